#!/usr/bin/env python3
"""How fast does one reply come, against llama.cpp on the same weights?  usage: decode.py MODEL GGUF [--rival PYTHON] [--save]"""

from versus import Case, compare, parse

if __name__ == "__main__":
    arguments = parse(__doc__ or "")
    cases = [Case(f"after {prompt} tokens", {"do": "decode", "prompt": prompt, "sequences": 1, "tokens": 64}, 64) for prompt in (16, 512)]
    compare("Decoding one sequence", arguments, cases, "read")
