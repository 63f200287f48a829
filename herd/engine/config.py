"""The choices of an engine, with defaults that work on a laptop."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from herd.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much an engine may hold and do at once."""

    context_tokens: int | None = None  # longest sequence, prompt and reply together; None: the model's, or what kv_gib holds
    kv_gib: float = 2.0  # GiB for keys and values of all sequences, of each model where there are several
    kv_folder: Path | None = None  # where a file of no name holds those of global layers, so that contexts outgrow memory; None: nowhere
    kv_disk_gib: float = 20.0  # GiB that this file may take; kv_gib then bounds what of it is in memory, and the local layers' together
    max_sequences: int = 16  # sequences that are computed at once; more wait
    step_tokens: int = 512  # tokens of one step: every decoding sequence takes one, prefill gets the rest
    page_tokens: int = 16  # tokens per page; must divide the model's chunk
    pace: float = 0.7  # share of their speed that replies under way keep while prompts come in; 0: prompts take what they can
    prefix_cache: bool = True  # keep what was computed while there is room, for prompts that begin alike
    prefix_folder: Path | None = None  # where finished chunks of prompts are kept over restarts; None: nowhere
    prefix_gib: float = 20.0  # GiB that files in that folder may take, the least recently used give way
    draft_tokens: int = 8  # guesses at a reply's next tokens that one step may test; 0: none
    kv: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"  # of keys and values; auto: as computed, fp16 beside int4 weights
    activation_bits: Literal[0, 8, 16] = 0  # that 4-bit and 8-bit weights meet on a CPU; 0: 8 in wide models, 16 in narrow ones
    tool_format: Literal["auto", "pythonic", "json", "tags"] = "auto"  # how tools and calls are written in prompts; auto: as is usual
    threads: int = 0  # CPU threads of the native kernels, which all engines of a process share; 0: as many as it may use

    def __post_init__(self) -> None:
        for name in ("max_sequences", "step_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1", param=name)
        if self.kv not in ("auto", "fp32", "fp16", "bf16", "int8"):
            raise UsageError(f"kv is {self.kv!r}; it must be auto, fp32, fp16, bf16 or int8", param="kv")
        if self.activation_bits not in (0, 8, 16):
            raise UsageError(
                f"activation_bits is {self.activation_bits}; it must be 8, 16, or 0 for what suits the model", param="activation_bits"
            )
        if self.threads < 0:
            raise UsageError(f"threads is {self.threads}; it must be 0 (all) or more", param="threads")
        if self.draft_tokens < 0:
            raise UsageError(f"draft_tokens is {self.draft_tokens}; it must be 0 (none) or more", param="draft_tokens")
        if not 0 <= self.pace <= 1:
            raise UsageError(f"pace is {self.pace}; it must be between 0 and 1", param="pace")
        if self.context_tokens is not None and self.context_tokens < 2:
            raise UsageError(f"context_tokens is {self.context_tokens}; it must be at least 2", param="context_tokens")
        for name in ("kv_gib", "kv_disk_gib", "prefix_gib"):
            if not 0 < getattr(self, name) < 1e6:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0 and below a million", param=name)
        if self.prefix_folder is not None and not self.prefix_cache:
            raise UsageError(
                "prefix_folder is set and prefix_cache is off", "what is stored comes back through the cache", param="prefix_folder"
            )
        if self.step_tokens < self.max_sequences:
            raise UsageError(
                f"step_tokens is {self.step_tokens}, fewer than max_sequences {self.max_sequences}",
                "every decoding sequence takes one token of a step: raise step_tokens",
                param="step_tokens",
            )
