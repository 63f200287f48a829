"""The one table of tensor names: herd, Hugging Face, Meta, GGUF; and how each lies in each.

herd has every matrix as `nn.Linear` has it, [out, in]: experts.gate and .up are [E, F, D], experts.down [E, D, F], the router [E, D].
The others differ in four ways, and the table says which:

    turned   the last two dims are swapped against herd's: x @ W, [in, out]
    part     several herd tensors are one, end to end along the *out* dim: gate then up; q, then k, then v
    flat     Meta folds the expert dim into the rows: [E * in, out]
    split    Meta cuts a tensor over its shard files along this dim of herd's; None: every shard has the whole

Hugging Face keeps Meta's order of rotary pairs in q and k (unlike for Llama 2 and 3), and so do herd and GGUF: nothing is permuted.
Source: transformers' modeling_llama4.py and convert_llama4_weights_to_hf.py; llama_models' checkpoint.py; llama.cpp's llama4.cpp.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from herd.errors import CheckpointError, nearest
from herd.model.config import ModelConfig
from herd.model.llama4 import build


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one herd tensor lies in another format."""

    name: str  # with {i} for the layer
    part: int | None = None  # which part of a tensor that several share
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One herd tensor in all formats."""

    herd: str
    hf: Slot
    meta: Slot
    split: int | None = None  # dim of herd's tensor that Meta cuts over shards
    gguf: str | None = None  # None: the eyes, which a GGUF model file does not hold


def _text() -> Iterator[Row]:
    hf, meta, gguf = "language_model.model.layers.{i}.", "layers.{i}.", "blk.{i}."
    yield Row("embed.weight", Slot("language_model.model.embed_tokens.weight"), Slot("tok_embeddings.weight"), 0, "token_embd.weight")
    yield Row("norm.weight", Slot("language_model.model.norm.weight"), Slot("norm.weight"), None, "output_norm.weight")
    yield Row("head.weight", Slot("language_model.lm_head.weight"), Slot("output.weight"), 0, "output.weight")

    def layer(herd: str, theirs: Slot, metas: Slot, split: int | None, ggufs: str) -> Row:
        theirs = Slot(hf + theirs.name, theirs.part, theirs.turned)
        metas = Slot(meta + metas.name, metas.part, metas.turned)
        return Row("layers.{i}." + herd, theirs, metas, split, f"{gguf}{ggufs}.weight")

    yield layer("attention_norm.weight", Slot("input_layernorm.weight"), Slot("attention.wqkv.layer_norm_weight"), None, "attn_norm")
    for part, x in enumerate("qkv"):
        yield layer(f"attention.{x}.weight", Slot(f"self_attn.{x}_proj.weight"), Slot("attention.wqkv.weight", part), 0, f"attn_{x}")
    yield layer("attention.o.weight", Slot("self_attn.o_proj.weight"), Slot("attention.wo.weight"), 1, "attn_output")

    # ffn_norm: Meta names it by the kind of layer, see `_meta_name`
    yield layer("ffn_norm.weight", Slot("post_attention_layernorm.weight"), Slot("feed_forward.{ffn}"), None, "ffn_norm")
    for part, x in enumerate(("gate", "up")):
        yield layer(f"ffn.{x}.weight", Slot(f"feed_forward.{x}_proj.weight"), Slot("feed_forward.mlp.fc1_weight", part), 0, f"ffn_{x}")
    yield layer("ffn.down.weight", Slot("feed_forward.down_proj.weight"), Slot("feed_forward.mlp.fc2_weight"), 1, "ffn_down")

    ff, moe = "feed_forward.", "feed_forward.experts.moe_w_"
    yield layer("ffn.router.weight", Slot(ff + "router.weight"), Slot(ff + "router_DE", turned=True), None, "ffn_gate_inp")
    for part, (x, name) in enumerate((("gate", "in_eD_F"), ("up", "swiglu_eD_F"))):
        fused = Slot(ff + "experts.gate_up_proj", part, turned=True)
        yield layer(f"ffn.experts.{x}", fused, Slot(moe + name, turned=True), 1, f"ffn_{x}_exps")
    turned_down = Slot(ff + "experts.down_proj", turned=True)
    yield layer("ffn.experts.down", turned_down, Slot(moe + "out_eF_D", turned=True), 2, "ffn_down_exps")
    for x, name, split in (("gate", "w_in_shared_FD", 0), ("up", "w_swiglu_FD", 0), ("down", "w_out_shared_DF", 1)):
        theirs = Slot(f"{ff}shared_expert.{x}_proj.weight")
        yield layer(f"ffn.shared.{x}.weight", theirs, Slot(f"{ff}{name}.weight"), split, f"ffn_{x}_shexp")


def _eyes() -> Iterator[Row]:
    hf, meta = "vision_model.", "vision_embeddings.vision_encoder."

    def both(herd: str, theirs: str, metas: str, split: int | None = None, bias_split: int | None = None) -> Iterator[Row]:
        for x, s in (("weight", split), ("bias", bias_split)):
            yield Row(f"vision.{herd}.{x}", Slot(f"{hf}{theirs}.{x}"), Slot(f"{meta}{metas}.{x}"), s)

    yield Row("vision.patch.weight", Slot(hf + "patch_embedding.linear.weight"), Slot(meta + "conv1._linear.weight"), 0)
    yield Row("vision.cls", Slot(hf + "class_embedding"), Slot(meta + "class_embedding"))
    yield Row("vision.positions", Slot(hf + "positional_embedding_vlm"), Slot(meta + "positional_embedding_vlm"))
    yield from both("norm_in", "layernorm_pre", "ln_pre")
    yield from both("norm_out", "layernorm_post", "ln_post")
    herd, theirs, metas = "layers.{i}.", "model.layers.{i}.", "transformer.resblocks.{i}."
    yield from both(herd + "attention_norm", theirs + "input_layernorm", metas + "ln_1")
    for x in "qkv":
        yield from both(f"{herd}attention.{x}", f"{theirs}self_attn.{x}_proj", f"{metas}attn.w{x}", 0, 0)
    yield from both(herd + "attention.o", theirs + "self_attn.o_proj", metas + "attn.wo", 1)
    yield from both(herd + "mlp_norm", theirs + "post_attention_layernorm", metas + "ln_2")
    yield from both(herd + "mlp.up", theirs + "mlp.fc1", metas + "mlp.c_fc", 0, 0)
    yield from both(herd + "mlp.down", theirs + "mlp.fc2", metas + "mlp.c_proj", 1)
    for x, fc, c, split in (("up", "fc1", "c_fc", 0), ("down", "fc2", "c_proj", 1)):
        adapter = Slot(f"vision_embeddings.vision_adapter.mlp.{c}.weight")
        yield Row(f"vision.adapter.{x}.weight", Slot(f"{hf}vision_adapter.mlp.{fc}.weight"), adapter, split)
    yield Row("projector.weight", Slot("multi_modal_projector.linear_1.weight"), Slot("vision_projection.weight"), 0)


TABLE = {row.herd: row for row in (*_text(), *_eyes())}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file: the herd tensors it is made of, in order, and its shape there (whole, not one shard's)."""

    name: str
    herd: tuple[str, ...]
    shape: tuple[int, ...]
    turned: bool
    split: int | None


def herd_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model, in the order of the model."""
    return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}


def row_of(name: str) -> tuple[Row, int]:
    """The table's row for a herd name, and the layer in it (0 where there is none)."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return TABLE[re.sub(r"\blayers\.\d+\.", "layers.{i}.", name)], int(found[1]) if found else 0


def file_tensors(config: ModelConfig, column: str) -> dict[str, FileTensor]:
    """The tensors that a file of `config` holds in the format `column` ("hf", "meta" or "gguf"), by their names there."""
    shapes = herd_shapes(config)
    found: dict[str, FileTensor] = {}
    for herd, shape in shapes.items():
        row, layer = row_of(herd)
        if column == "gguf":
            if row.gguf is None:
                continue
            slot = Slot(row.gguf)
        else:
            slot = row.hf if column == "hf" else row.meta
        ffn = "norm.weight" if config.is_moe(layer) else "mlp.layer_norm_weight"  # Meta's two names of the ffn norm
        name = slot.name.format(i=layer, ffn=ffn)
        if slot.part:  # the parts come in order; the later ones join the first
            before = found[name]
            herd_names = (*before.herd, herd)
            shape = _fused(shapes[h] for h in herd_names)
            found[name] = FileTensor(name, herd_names, _turn(shape) if slot.turned else shape, slot.turned, row.split)
        else:
            found[name] = FileTensor(name, (herd,), _turn(shape) if slot.turned else shape, slot.turned, row.split)
    return found


def _fused(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    first, *rest = shapes
    return (*first[:-2], first[-2] + sum(shape[-2] for shape in rest), first[-1])


def _turn(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def check_tensors(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise `CheckpointError` unless a file holds exactly the wanted tensors in the wanted shapes; it names the first few of each fault."""
    missing = [name for name in wanted if name not in found]
    left = [name for name in found if name not in wanted]
    bent = [name for name in wanted if name in found and found[name] != wanted[name]]
    faults, hint = [], "the config does not fit the weights, or the download is not whole"
    if missing:
        faults.append(f"{_count(missing)} missing: {_few(missing)}")
        hint = nearest(missing[0], left) or hint
    if left:
        faults.append(f"{_count(left)} left over that no part of the model takes: {_few(left)}")
    if bent:
        faults.append(f"{_count(bent)} misshapen: " + _few([f"{n} is {list(found[n])}, not {list(wanted[n])}" for n in bent]))
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}", hint)


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names):,} tensors are"


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
