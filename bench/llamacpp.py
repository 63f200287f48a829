"""A process that holds a model in llama.cpp and times what it is asked for, as `ours.py` does. Needs llama-cpp-python, nothing of herd.

usage: llamacpp.py GGUF THREADS        `versus.py` starts it with the python of --rival; by hand, for one number:

    echo '{"do": "decode", "sequences": 8, "prompt": 16, "tokens": 32, "seed": 0, "vocabulary": 2048}' | python bench/llamacpp.py x.gguf 2

The lines in and out are those of `ours.py`, "limits" aside. To build llama-cpp-python for this machine, in an environment of its own:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary :all: llama-cpp-python
"""

import argparse
import json
import random
import sys
import time

import llama_cpp as L


class Context:
    """Some sequences over a model."""

    def __init__(self, model, sequences: int, tokens: int, threads: int) -> None:
        choices = L.llama_context_default_params()
        choices.n_ctx, choices.n_batch, choices.n_ubatch, choices.n_seq_max = sequences * tokens, 2048, 512, sequences
        choices.n_threads = choices.n_threads_batch = threads
        self.context = L.llama_init_from_model(model, choices)
        self.batch = L.llama_batch_init(2048, 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_due) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i], self.batch.logits[i] = token, position, 1, is_due
            self.batch.seq_id[i][0] = sequence
        assert L.llama_decode(self.context, self.batch) == 0
        L.llama_synchronize(self.context)

    def clear(self) -> None:
        L.llama_memory_clear(L.llama_get_memory(self.context), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", help="a file that llama.cpp loads")
    parser.add_argument("threads", type=int)
    path, threads = vars(parser.parse_args()).values()
    quiet = L.llama_log_callback(lambda *_: None)  # kept alive: llama.cpp holds only the pointer
    L.llama_log_set(quiet, None)
    L.llama_backend_init()
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    print(json.dumps({"version": L.__version__, "system": L.llama_print_system_info().decode()}), flush=True)
    contexts: dict[tuple[int, int], Context] = {}
    for line in sys.stdin:
        ask = json.loads(line)
        numbers = random.Random(ask["seed"])
        sequences = ask.get("sequences", 1)
        room = ask["tokens"] + ask.get("prompt", 0) + 64
        if (sequences, room) not in contexts:
            contexts[sequences, room] = Context(model, sequences, room, threads)
        context = contexts[sequences, room]
        context.clear()

        def draw(numbers=numbers, ask=ask) -> int:
            return numbers.randrange(ask["vocabulary"])

        if ask["do"] == "prefill":
            rows = [(draw(), i, 0, i == ask["tokens"] - 1) for i in range(ask["tokens"])]
            start = time.perf_counter()
            context.run(rows)
        else:
            for s in range(sequences):
                context.run([(draw(), i, s, i == ask["prompt"] - 1) for i in range(ask["prompt"])])
            start = time.perf_counter()
            for i in range(ask["tokens"]):
                context.run([(draw(), ask["prompt"] + i, s, True) for s in range(sequences)])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
