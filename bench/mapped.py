#!/usr/bin/env python3
"""How is a process kept small that reads through a mapped file? What each kind of advice to the system holds resident, and costs.

usage: mapped.py FOLDER [--mib 512] [--window-mib 4]

The file is written once and read in order, twice for each advice, which is given after every window. The system's cache is warm at first.
"""

import argparse
import mmap
import time
from pathlib import Path

import torch

from herd.engine.mapped import MappedFile

ADVICE = {"none": None, "MADV_DONTNEED": mmap.MADV_DONTNEED, "MADV_COLD": 20, "MADV_PAGEOUT": 21}  # numbers that Python has no names for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--window-mib", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, window = arguments.mib << 20, arguments.window_mib << 20
    file = MappedFile(arguments.folder, size)
    numbers = file.tensor((size // 8,), torch.int64)
    used = time.process_time()
    for part in numbers.split(window // 8):
        part.fill_(1)
        file.let_go()
    print(f"written for the first time: {(time.process_time() - used) / size * 1e9:.2f} s of CPU a GB\n")
    print("| advice | pass | s a GB | CPU s a GB | resident at most, MiB |\n|---|---|---|---|---|")
    for name, advice in ADVICE.items():
        for turn in (1, 2):
            file.let_go()
            before, most, start, used = resident(), 0, time.perf_counter(), time.process_time()
            for offset, part in zip(range(0, size, window), numbers.split(window // 8), strict=True):
                assert int(part.sum()) == len(part)
                most = max(most, resident() - before)
                if advice is not None:
                    file._map.madvise(advice, offset, window)
            seconds, cpu = (time.perf_counter() - start) / size * 1e9, (time.process_time() - used) / size * 1e9
            print(f"| {name} | {turn} | {seconds:.2f} | {cpu:.2f} | {most / 2**20:.0f} |")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


if __name__ == "__main__":
    main()
