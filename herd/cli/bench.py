"""How fast a model is on this machine: prompt tokens, one reply, several replies at once, and the share of the memory's speed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.measure import measure
from herd.engine.opening import open_engine
from herd.engine.trace import TraceFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Medians of several rounds over random tokens; nothing is sampled or shown."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "cria"  # a path to a checkpoint or a name
    prefill: int = 512  # tokens of the prompt
    decode: int = 64  # tokens of a reply
    batch: int = 8  # replies at once
    rounds: int = 5
    json: bool = False  # one line of JSON with the field names that llama.cpp's bench scripts use
    trace: Path | None = None  # file for what every step did, to be opened in ui.perfetto.dev
    # every token is computed, and all prompts before any reply
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(prefix_cache=False, draft_tokens=0, pace=0))


def run(options: Options) -> int:
    trace = TraceFile(options.trace) if options.trace else None
    engine: Engine = open_engine(options.model, config=options.engine, trace=trace)
    if engine.runner.whole is not None:
        torch.set_num_threads(1)  # as in the engine's own thread: what is left to torch is small, and a second pool fights for the cores
    try:
        speed = measure(engine, prefill=options.prefill, decode=options.decode, batch=options.batch, rounds=options.rounds)
    finally:
        engine.close()
    if options.json:
        fields = {
            "model": Path(options.model).name,
            "threads": engine.threads,
            "prefill_tok_s": round(speed.prefill_tok_s, 2),
            "decode_tok_s": round(speed.decode_tok_s, 2),
            f"decode_x{options.batch}_tok_s": round(speed.batch_tok_s, 2),
            "first_token_ms": round(speed.first_token_ms, 1),
            "decode_gb_s": round(speed.decode_gb_s, 2),
            "read_gb_s": round(speed.read_gb_s, 2),
        }
        print(json.dumps(fields))
        return 0
    share = speed.decode_gb_s / speed.read_gb_s
    print(f"prefill of {options.prefill:<5}  {speed.prefill_tok_s:9.1f} tokens/s   first token after {speed.first_token_ms:.0f} ms")
    print(f"decode            {speed.decode_tok_s:9.1f} tokens/s   {speed.decode_gb_s:.1f} of {speed.read_gb_s:.1f} GB/s read, {share:.0%}")
    print(f"{options.batch} at once         {speed.batch_tok_s:9.1f} tokens/s in all")
    return 0
