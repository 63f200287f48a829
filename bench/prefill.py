#!/usr/bin/env python3
"""How fast is a prompt taken in, against llama.cpp on the same weights?  usage: prefill.py MODEL GGUF [--rival PYTHON] [--save]"""

from versus import Case, compare, parse

if __name__ == "__main__":
    arguments = parse(__doc__ or "")
    cases = [Case(f"{count} tokens", {"do": "prefill", "tokens": count}, count) for count in (128, 512)]
    compare("Taking in a prompt", arguments, cases, "peak")
