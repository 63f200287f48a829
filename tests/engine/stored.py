"""What the tests of the store put into it, and, as a program, writers that are there to be killed.

The program reads lines: "FIRST LIMIT FOLDER" starts a writer and prints its process id, "wait PID" prints when that one is gone.
"""

import os
import sys
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

FINGERPRINT = "0123456789abcdef" * 2


def key_of(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def parts_of(key: bytes, num_values: int | None = 30) -> dict[str, Tensor]:
    """Parts that follow from the key, so that whoever knows it knows what they must be. num_values: of floats; None: a few 100,000."""
    factor = int.from_bytes(key[:3], "little") * 2 + 1
    if num_values is None:
        num_values = 200_000 + key[0] * 4000
    codes = torch.arange(1, num_values + 1, dtype=torch.int32) * factor  # cheap: a writer is to write, not to compute
    return {
        "3.keys": codes.view(torch.float32),
        "3.values": (codes * 3).view(torch.bfloat16)[:num_values],
        "7.keys": (codes * 5).view(torch.int8)[: num_values // 2],
    }


def _write_on(folder: Path, first: int, limit_bytes: int) -> None:
    from herd.engine.disk import DiskStore

    store = DiskStore(folder, FINGERPRINT, limit_bytes)
    _say(str(os.getpid()))
    for number in range(first, first + 10_000):  # it is killed long before; should its killer die, it ends by itself
        store.put(key_of(number), parts_of(key_of(number), None), key_of(number - 1) if number % 4 else None)
        store.flush()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _main() -> None:
    torch.set_num_threads(1)
    _say("ready")
    for line in sys.stdin:
        word, value, *folder = line.strip().split(" ", 2)
        if word == "wait":
            os.waitpid(int(value), 0)
            _say("gone")
        elif os.fork() == 0:
            _write_on(Path(folder[0]), int(word), int(value))


if __name__ == "__main__":
    _main()
