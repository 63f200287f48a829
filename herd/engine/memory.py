"""Memory that is free already, handed back to the system: the allocators keep it, in case."""

import ctypes
import gc
from contextlib import suppress

import torch


def hand_back() -> None:
    """Give the system what the C allocator and a GPU's hold and nobody uses."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def sweep() -> None:
    """The same after Python has looked for what only refers to itself: for when much was just dropped."""
    gc.collect()
    hand_back()
