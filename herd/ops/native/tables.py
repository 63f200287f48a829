"""The tables that native calls take, as `step.inl` and `native.cpp` lay them out."""

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from herd.ops.attend import Slots
from herd.ops.int4 import kind_of

_float_p, _int_p = ctypes.c_void_p, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """One matrix of blocks; all zeros stand for none."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("has_minimum", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )

    @classmethod
    def of(cls, blocks: Tensor) -> "Matrix":
        """blocks: [N/8, K/g, B], or [E, ...] for the first of E."""
        kind = kind_of(blocks)
        assert blocks.is_contiguous() and blocks.device.type == "cpu"
        N, K = kind.matrix_shape(blocks.shape)[-2:]
        return cls(blocks.data_ptr(), N, K, kind.group, kind.bits, kind.has_minimum, 0)


class Pages(ctypes.Structure):
    """Keys and values of one layer."""

    KINDS: ClassVar = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        ("kv_heads", ctypes.c_int64),
        ("page_tokens", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )

    @classmethod
    def of(cls, slots: Slots) -> "Pages":
        """Addresses of one layer's slots."""
        scales = [None if scale is None else scale.data_ptr() for scale in (slots.key_scales, slots.value_scales)]
        _, G, S, _ = slots.keys.shape
        return cls(slots.keys.data_ptr(), slots.values.data_ptr(), *scales, G, S, cls.KINDS[slots.keys.dtype], 0)


class Layer(ctypes.Structure):
    """The weights and pages of one layer."""

    _fields_ = (
        ("attention_norm", _float_p),
        ("ffn_norm", _float_p),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down", "experts_gate", "experts_up", "experts_down")),
        ("router", _float_p),
        ("pages", Pages),
        ("is_local", ctypes.c_int64),
    )


class File(ctypes.Structure):
    """A mapped file that the pages of global layers lie in."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("touched", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    """A model and its layers."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "heads", "kv_heads", "head_width", "experts", "experts_per_token", "num_layers")),
        ("activation_parts", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("qk_norm_eps", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        ("frequencies", ctypes.c_void_p),
        ("temperature_scale", ctypes.c_double),
        ("temperature_floor", ctypes.c_int64),
        ("layers", ctypes.POINTER(Layer)),
        ("norm", _float_p),
        ("embed", Matrix),
        ("head", Matrix),
        ("file", ctypes.POINTER(File)),
    )


class Reach(ctypes.Structure):
    """What the sequences of a step see in one kind of layer; all zeros for a kind that the model has not."""

    _fields_ = (("pages", _int_p), ("num_pages", _int_p), ("lengths", _int_p), ("page_tokens", ctypes.c_int64))


class Step(ctypes.Structure):
    """The tokens of one step."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("counts", _int_p),
        ("starts", _int_p),
        ("local", Reach),
        ("full", Reach),
        ("ids", _int_p),
        ("x", _float_p),
        ("num_rows", ctypes.c_int64),
        ("rows", _int_p),
        ("logits", _float_p),
    )


class Draw(ctypes.Structure):
    """`herd.ops.sample.Draw`."""

    _fields_ = (
        ("scale", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("point", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("least", ctypes.c_int64),
    )
