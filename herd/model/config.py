"""What a Llama 4 is: the facts of one model, read from its checkpoint, and the presets of the family.

A layer is **local** (attention inside a chunk, with RoPE) or **global** (full attention, no RoPE); `is_local` decides, and nothing else
in herd counts layers. Source of the numbers: the released config.json and params.json files, and Meta's `llama_models/llama4`.
"""

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from herd.errors import CheckpointError, nearest

MOST_TOKENS = 1 << 40  # positions that herd counts to
_ALLOWED: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,), int | None: (int, NoneType)}


def _check_types(config: Any) -> None:
    """Numbers where numbers belong: what a JSON file holds is not to be trusted. Raises `CheckpointError`."""
    for f in fields(config):
        value = getattr(config, f.name)
        allowed = _ALLOWED.get(f.type)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            wanted = getattr(f.type, "__name__", str(f.type))
            raise CheckpointError(f"model config has {f.name} = {value!r}; it must be of type {wanted}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling. Scout: 16 / 1 / 1 / 8192, where low == high makes it a hard switch without a blend."""

    factor: float = 16.0  # long wavelengths are stretched by this
    low_freq_factor: float = 1.0  # wavelengths over original_tokens / low are stretched whole
    high_freq_factor: float = 1.0  # wavelengths under original_tokens / high are left alone
    original_tokens: int = 8192  # context the frequencies were first made for

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The image encoder: a ViT over one square tile, pixel shuffle, a two-layer adapter."""

    width: int = 1408  # channels of the encoder
    num_layers: int = 34
    num_heads: int = 16
    hidden_width: int = 5632  # of the encoder's MLP
    tile_pixels: int = 336  # side of a tile
    patch_pixels: int = 14  # side of a patch
    shuffle: int = 2  # side of the square of patches that becomes one token
    adapter_width: int = 4096  # output of both adapter layers
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_tiles: int = 16  # tiles of one image, the global one not counted

    def __post_init__(self) -> None:
        _check_types(self)
        if self.width % (self.num_heads * 4):
            raise CheckpointError(
                f"vision width {self.width} with {self.num_heads} heads: 2D RoPE needs a head width that is a whole multiple of 4"
            )
        if self.tile_pixels % (self.patch_pixels * self.shuffle):
            raise CheckpointError(
                f"vision tiles of {self.tile_pixels} pixels do not divide into squares of {self.shuffle} patches of {self.patch_pixels}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_pixels // self.patch_pixels

    @property
    def tokens_per_tile(self) -> int:
        """Patch tokens that one tile becomes: 144 in the released models."""
        return (self.grid // self.shuffle) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The facts of one model of the family. Immutable; what a checkpoint says, not what a user chooses."""

    width: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_width: int  # K
    vocab_size: int  # V
    hidden_width: int  # F of a routed and of the shared expert
    dense_width: int  # F of a dense layer
    num_experts: int = 0  # E; 0 is a dense model
    experts_per_token: int = 1
    moe_step: int = 1  # every moe_step-th layer has experts: 1 all, 2 every second
    global_step: int | None = 4  # every global_step-th layer is global; None: every layer is local
    chunk_tokens: int | None = 8192  # attention span of a local layer; None: unlimited
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # weightless RMS norm of q and k on local layers
    temperature_tuning: bool = True  # scale q with the log of its position on global layers
    temperature_floor: int = 8192  # tokens per step of that scale
    temperature_scale: float = 0.1
    norm_eps: float = 1e-5
    context_tokens: int = 131072  # longest sequence that the makers vouch for
    tied: bool = False  # output head is the embedding
    bos_id: int | None = 200000
    stop_ids: tuple[int, ...] = (200001, 200007, 200008)  # end_of_text, eom, eot
    pad_id: int = 200018
    patch_id: int = 200092  # `<|patch|>`: where image features go. Not `<|image|>`, which is 200090
    chat_format: str = "llama4"  # how messages are rendered: "llama4" or "chatml"
    advised_temperature: float = 0.6  # what the makers advise for sampling. Source: Meta's generation scripts
    advised_top_p: float = 0.9
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_width",
            "vocab_size",
            "moe_step",
            "temperature_floor",
            "context_tokens",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(f"model config has {name} = {getattr(self, name)}; it must be at least 1")
        for name in ("global_step", "chunk_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise CheckpointError(f"model config has {name} = {getattr(self, name)}; it must be at least 1, or null")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise CheckpointError(f"model config has {name} = {getattr(self, name)}; it must be a positive number")
        if self.context_tokens > MOST_TOKENS:
            raise CheckpointError(f"model config has context_tokens = {self.context_tokens:,}; herd counts to {MOST_TOKENS:,}")
        if self.num_layers > 10_000:
            raise CheckpointError(f"model config has num_layers = {self.num_layers}; herd builds at most 10,000")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"{self.num_heads} query heads do not divide into {self.num_kv_heads} key/value heads")
        if self.head_width % 2:
            raise CheckpointError(f"head_width is {self.head_width}; RoPE turns pairs, so it must be even")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise CheckpointError(f"{self.experts_per_token} experts per token of {self.num_experts}")

    def is_local(self, layer: int) -> bool:
        """Whether layer `layer` has chunked attention with RoPE (else full attention without). Layers 3, 7, 11, ... are global."""
        return self.global_step is None or (layer + 1) % self.global_step != 0

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts (else a dense MLP)."""
        return self.num_experts > 0 and (layer + 1) % self.moe_step == 0

    @property
    def local_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if self.is_local(i))

    @property
    def global_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if not self.is_local(i))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Build a config dataclass from JSON values; an unknown key is an error that names the nearest known one."""
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise CheckpointError(f"unknown key {key!r} in {kind.__name__}", nearest(key, known))
    values = dict(values)
    if values.get("vision") is not None and kind is ModelConfig:
        values["vision"] = from_dict(VisionConfig, values["vision"])
    if values.get("rope_scaling") is not None and kind is ModelConfig:
        values["rope_scaling"] = from_dict(RopeScaling, values["rope_scaling"])
    if "stop_ids" in values:
        values["stop_ids"] = tuple(values["stop_ids"])
    return kind(**values)
