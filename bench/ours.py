"""A process that holds a model in herd's engine and times what it is asked for, one JSON line in, one out.

usage: ours.py MODEL THREADS        `versus.py` starts it beside `llamacpp.py`; by hand, for one number:

    echo '{"do": "prefill", "tokens": 512, "seed": 0, "vocabulary": 2048}' | python bench/ours.py cria 2

Its first line says what was loaded. It is asked, and answers with {"seconds": ...} unless said otherwise:

    {"do": "prefill", "tokens": n, ...}                                   a prompt of n random ids, to its first token
    {"do": "decode", "sequences": b, "prompt": p, "tokens": n, ...}       n tokens for each of b sequences, after prompts of p
    {"do": "limits", "seed": 0}                                           {"read_gb_s", "peak_gop_s"}: what the machine can do now

"seed" draws the ids, all of them below "vocabulary".
"""

import argparse
import json
import random
import sys

import torch

from herd.engine.config import EngineConfig
from herd.engine.measure import active_bytes, run_random
from herd.engine.opening import open_engine
from herd.ops.native import kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint that herd loads")
    parser.add_argument("threads", type=int)
    model, threads = vars(parser.parse_args()).values()
    torch.set_num_threads(1)
    engine = open_engine(model, config=EngineConfig(threads=threads, prefix_cache=False, draft_tokens=0, pace=0), device="cpu")
    native = kernels()
    assert native is not None, "the native kernels are not built"
    much = torch.ones(1 << 27)
    facts = {"active_bytes": active_bytes(engine), "path": native.path, "activation_bits": engine.activation_bits}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        numbers = random.Random(ask["seed"])
        if ask["do"] == "limits":
            answer = {"read_gb_s": native.read_gb_s(much), "peak_gop_s": native.peak_gop_s()}
        elif ask["do"] == "prefill":
            answer = {"seconds": run_random(engine, numbers, [ask["tokens"]], 1, ask["vocabulary"])[0]}
        else:
            lengths = [ask["prompt"]] * ask["sequences"]
            answer = {"seconds": run_random(engine, numbers, lengths, ask["tokens"] + 1, ask["vocabulary"])[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
