"""herd: run, serve, train, distil, quantize and evaluate Llama 4 with one readable codebase.

import herd
model = herd.load("cria")
for piece in model.chat([{"role": "user", "content": "What is the capital of France?"}]):
    print(piece, end="")
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["HerdError", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `HerdError`, imported when first asked for: `import herd` stays free of torch."""
    if name == "load":
        from herd.engine.local import load

        return load
    if name == "HerdError":
        from herd.errors import HerdError

        return HerdError
    raise AttributeError(f"module 'herd' has no attribute {name!r}")
