#!/usr/bin/env python3
"""How fast do several replies come at once, against llama.cpp on the same weights?  usage: batch.py MODEL GGUF [--rival PYTHON] [--save]"""

from versus import Case, compare, parse

if __name__ == "__main__":
    arguments = parse(__doc__ or "")
    cases = [
        Case(f"{count} sequences", {"do": "decode", "prompt": 16, "sequences": count, "tokens": 32}, 32 * count) for count in (2, 4, 8, 16)
    ]
    compare("Decoding several sequences at once", arguments, cases, "read")
