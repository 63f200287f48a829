"""A process that holds a model in herd's engine and times what it is asked for: one JSON line in, one out. `versus.py` starts it."""

import json
import random
import sys
import time

import torch

from herd.chat import Sampling
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.local import open_engine
from herd.engine.measure import active_bytes
from herd.ops.native import kernels
from herd.text.prompt import Prompt


def run(engine: Engine, numbers: random.Random, vocabulary: int, lengths: list[int], replies: int) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and from there for `replies` - 1 more each; random ids take the place of draws."""
    sampling = Sampling(temperature=0, max_tokens=replies, ignore_eos=True)
    sequences = []
    for length in lengths:
        prompt = Prompt(tokens=[numbers.randrange(vocabulary) for _ in range(length)], loss_mask=[False] * length)
        sequences.append(engine.sequence(prompt, sampling, _unheard))
        engine.scheduler.add(sequences[-1])
    start, first = time.perf_counter(), 0.0
    while not engine.scheduler.is_idle:
        engine.step()
        if not first and all(len(s.tokens) > s.num_prompt for s in sequences):
            first = time.perf_counter() - start
        for sequence in engine.scheduler.running:
            if len(sequence.tokens) > sequence.num_prompt:
                sequence.tokens[-1] = numbers.randrange(vocabulary)
    return first, time.perf_counter() - start - first


def _unheard(event: object) -> None:
    del event


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
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
            answer = {"seconds": run(engine, numbers, ask["vocabulary"], [ask["tokens"]], 1)[0]}
        else:
            lengths = [ask["prompt"]] * ask["sequences"]
            answer = {"seconds": run(engine, numbers, ask["vocabulary"], lengths, ask["tokens"] + 1)[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
