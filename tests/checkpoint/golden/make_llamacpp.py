"""Make llamacpp.json: what llama.cpp computes from our GGUF of a small random Llama 4.

pip install llama-cpp-python==0.3.36
python -m tests.checkpoint.golden.make_llamacpp
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from herd.checkpoint.convert import write
from tests.checkpoint.made import LLAMACPP, random_source
from tests.model.small import random_prompt

PATH = Path(__file__).with_name("llamacpp.json")
NUM_PROMPT, NUM_NEW, NUM_TOP = 40, 12, 5


def run(model: Path, prompt: list[int]) -> list[dict[str, list[float]]]:
    """The greedy continuation: for every step the ids of the highest logits, best first, and those logits."""
    import llama_cpp  # heavy to install: only who makes or checks the golden needs it

    f32 = 0  # ggml type of the key/value cache, which is float16 by default
    llama = llama_cpp.Llama(str(model), n_ctx=128, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, logits_all=True, verbose=False)
    steps = []
    llama.eval(prompt)
    for _ in range(NUM_NEW):
        logits = llama.scores[llama.n_tokens - 1]
        top = logits.argsort()[::-1][:NUM_TOP]
        steps.append({"ids": top.tolist(), "logits": [round(float(x), 4) for x in logits[top]]})
        llama.eval([int(top[0])])
    llama.close()
    return steps


def main() -> None:
    prompt = random_prompt(LLAMACPP, NUM_PROMPT).tokens.tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        write(random_source(LLAMACPP), path, "gguf")
        steps = run(path, prompt)
    PATH.write_text(json.dumps({"llama_cpp_python": version("llama-cpp-python"), "prompt": prompt, "steps": steps}) + "\n")


if __name__ == "__main__":
    main()
