#!/usr/bin/env python3
"""Make donor_llamacpp.json: greedy replies of llama.cpp on the donor, with its two largest logits at each step.

usage: donor_llamacpp.py SmolLM2-135M-Instruct.Q4_1.gguf     (needs: pip install llama-cpp-python; made with 0.3.36 on an AVX2 CPU)
Each prompt is a chat of one user message in the donor's template; 64 tokens are taken greedily, past any stop token. Two runs:
"rounded" is the file as it is, where llama.cpp rounds activations to 8 bits and keys and values to 16; "exact" is the same weights,
dequantized by the gguf package into a float32 file, with float32 keys and values, so that nothing is rounded.
"""

import json
import sys
import tempfile
from pathlib import Path

import gguf
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


def dequantized(source: str, target: str) -> None:
    """Write the same model with float32 tensors."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type", "general.quantization_version"):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def replies(path: str, **options: object) -> list[dict[str, object]]:
    """Greedy replies to all prompts."""
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=2, verbose=False, **options)
    out = []
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
        out.append({"prompt": prompt, "tokens": tokens, "reply": reply, "top_ids": ids, "top_logits": values})
    return out


donor = sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    exact = f"{folder}/exact.gguf"
    dequantized(donor, exact)
    golden = {
        "llama_cpp": llama_cpp.__version__,
        "exact": replies(exact, type_k=0, type_v=0, flash_attn=False),
        "rounded": replies(donor),
    }
Path(__file__).with_suffix(".json").write_text(json.dumps(golden, separators=(",", ":")))
