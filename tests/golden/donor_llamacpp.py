#!/usr/bin/env python3
"""Make donor_llamacpp.json: greedy replies of llama.cpp on the donor's GGUF, with its two largest logits at each step.

usage: donor_llamacpp.py SmolLM2-135M-Instruct.Q4_1.gguf     (needs: pip install llama-cpp-python; made with 0.3.36 on an AVX2 CPU)
Each prompt is a chat of one user message in the donor's template; 64 tokens are taken greedily, past any stop token.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

NUM_TOKENS = 64
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three uses of a hammer.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' to Spanish.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Summarize the story of Cinderella in two sentences.",
    "What is the largest planet in the solar system?",
    "Name four programming languages.",
    "How do I boil an egg?",
    "What are the primary colors?",
    "Write a short email asking for a day off.",
    "Why is the sky blue?",
    "What does HTTP stand for?",
    "Tell me a joke about cats.",
    "What is the difference between a list and a tuple in Python?",
    "Describe a sunset in one sentence.",
]

model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, logits_all=False, verbose=False)
replies = []
for prompt in PROMPTS:
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.tokenize(text.encode(), add_bos=False, special=True)
    model.reset()
    model.eval(tokens)
    reply, ids, values = [], [], []
    for _ in range(NUM_TOKENS):
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
        top = np.argsort(-logits, kind="stable")[:2]
        ids.append(top.tolist())
        values.append([round(float(logits[i]), 4) for i in top])
        reply.append(int(top[0]))
        model.eval([reply[-1]])
    replies.append({"prompt": prompt, "tokens": tokens, "reply": reply, "top_ids": ids, "top_logits": values})
    print(prompt, "->", model.detokenize(reply).decode(errors="replace")[:80], file=sys.stderr)
out = Path(__file__).with_suffix(".json")
out.write_text(json.dumps({"llama_cpp": llama_cpp.__version__, "replies": replies}, separators=(",", ":")))
