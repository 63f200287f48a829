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


# Blocks, each with a first line of prefixes ("." is none): herd | Hugging Face | Meta | dim that Meta cuts | GGUF. `[1]` is part 1, `^T` is
# turned, "-" is none. Meta names the ffn norm by the kind of layer: `file_tensors` puts the name in for {ffn}.
_ROWS = """
.            | .                                        | .                     | . | .
embed.weight | language_model.model.embed_tokens.weight | tok_embeddings.weight | 0 | token_embd.weight
norm.weight  | language_model.model.norm.weight         | norm.weight           | - | output_norm.weight
head.weight  | language_model.lm_head.weight            | output.weight         | 0 | output.weight

layers.{i}.            | language_model.model.layers.{i}.            | layers.{i}.                              | . | blk.{i}.
attention_norm.weight  | input_layernorm.weight                      | attention.wqkv.layer_norm_weight         | - | attn_norm.weight
attention.q.weight     | self_attn.q_proj.weight                     | attention.wqkv.weight[0]                 | 0 | attn_q.weight
attention.k.weight     | self_attn.k_proj.weight                     | attention.wqkv.weight[1]                 | 0 | attn_k.weight
attention.v.weight     | self_attn.v_proj.weight                     | attention.wqkv.weight[2]                 | 0 | attn_v.weight
attention.o.weight     | self_attn.o_proj.weight                     | attention.wo.weight                      | 1 | attn_output.weight
ffn_norm.weight        | post_attention_layernorm.weight             | feed_forward.{ffn}                       | - | ffn_norm.weight
ffn.gate.weight        | feed_forward.gate_proj.weight               | feed_forward.mlp.fc1_weight[0]           | 0 | ffn_gate.weight
ffn.up.weight          | feed_forward.up_proj.weight                 | feed_forward.mlp.fc1_weight[1]           | 0 | ffn_up.weight
ffn.down.weight        | feed_forward.down_proj.weight               | feed_forward.mlp.fc2_weight              | 1 | ffn_down.weight
ffn.router.weight      | feed_forward.router.weight                  | feed_forward.router_DE^T                 | - | ffn_gate_inp.weight
ffn.experts.gate       | feed_forward.experts.gate_up_proj[0]^T      | feed_forward.experts.moe_w_in_eD_F^T     | 1 | ffn_gate_exps.weight
ffn.experts.up         | feed_forward.experts.gate_up_proj[1]^T      | feed_forward.experts.moe_w_swiglu_eD_F^T | 1 | ffn_up_exps.weight
ffn.experts.down       | feed_forward.experts.down_proj^T            | feed_forward.experts.moe_w_out_eF_D^T    | 2 | ffn_down_exps.weight
ffn.shared.gate.weight | feed_forward.shared_expert.gate_proj.weight | feed_forward.w_in_shared_FD.weight       | 0 | ffn_gate_shexp.weight
ffn.shared.up.weight   | feed_forward.shared_expert.up_proj.weight   | feed_forward.w_swiglu_FD.weight          | 0 | ffn_up_shexp.weight
ffn.shared.down.weight | feed_forward.shared_expert.down_proj.weight | feed_forward.w_out_shared_DF.weight      | 1 | ffn_down_shexp.weight

.                          | .                                          | .                                                         | . | .
vision.patch.weight        | vision_model.patch_embedding.linear.weight | vision_embeddings.vision_encoder.conv1._linear.weight     | 0 | -
vision.cls                 | vision_model.class_embedding               | vision_embeddings.vision_encoder.class_embedding          | - | -
vision.positions           | vision_model.positional_embedding_vlm      | vision_embeddings.vision_encoder.positional_embedding_vlm | - | -
vision.norm_in.weight      | vision_model.layernorm_pre.weight          | vision_embeddings.vision_encoder.ln_pre.weight            | - | -
vision.norm_in.bias        | vision_model.layernorm_pre.bias            | vision_embeddings.vision_encoder.ln_pre.bias              | - | -
vision.norm_out.weight     | vision_model.layernorm_post.weight         | vision_embeddings.vision_encoder.ln_post.weight           | - | -
vision.norm_out.bias       | vision_model.layernorm_post.bias           | vision_embeddings.vision_encoder.ln_post.bias             | - | -
vision.adapter.up.weight   | vision_model.vision_adapter.mlp.fc1.weight | vision_embeddings.vision_adapter.mlp.c_fc.weight          | 0 | -
vision.adapter.down.weight | vision_model.vision_adapter.mlp.fc2.weight | vision_embeddings.vision_adapter.mlp.c_proj.weight        | 1 | -
projector.weight           | multi_modal_projector.linear_1.weight      | vision_projection.weight                                  | 0 | -

vision.layers.{i}.    | vision_model.model.layers.{i}.  | vision_embeddings.vision_encoder.transformer.resblocks.{i}. | . | .
attention_norm.weight | input_layernorm.weight          | ln_1.weight                                                 | - | -
attention_norm.bias   | input_layernorm.bias            | ln_1.bias                                                   | - | -
attention.q.weight    | self_attn.q_proj.weight         | attn.wq.weight                                              | 0 | -
attention.q.bias      | self_attn.q_proj.bias           | attn.wq.bias                                                | 0 | -
attention.k.weight    | self_attn.k_proj.weight         | attn.wk.weight                                              | 0 | -
attention.k.bias      | self_attn.k_proj.bias           | attn.wk.bias                                                | 0 | -
attention.v.weight    | self_attn.v_proj.weight         | attn.wv.weight                                              | 0 | -
attention.v.bias      | self_attn.v_proj.bias           | attn.wv.bias                                                | 0 | -
attention.o.weight    | self_attn.o_proj.weight         | attn.wo.weight                                              | 1 | -
attention.o.bias      | self_attn.o_proj.bias           | attn.wo.bias                                                | - | -
mlp_norm.weight       | post_attention_layernorm.weight | ln_2.weight                                                 | - | -
mlp_norm.bias         | post_attention_layernorm.bias   | ln_2.bias                                                   | - | -
mlp.up.weight         | mlp.fc1.weight                  | mlp.c_fc.weight                                             | 0 | -
mlp.up.bias           | mlp.fc1.bias                    | mlp.c_fc.bias                                               | 0 | -
mlp.down.weight       | mlp.fc2.weight                  | mlp.c_proj.weight                                           | 1 | -
mlp.down.bias         | mlp.fc2.bias                    | mlp.c_proj.bias                                             | - | -
"""


def _slot(cell: str, prefix: str) -> Slot:
    found = re.fullmatch(r"(\S+?)(?:\[(\d)\])?(\^T)?", cell)
    assert found, cell
    return Slot(prefix + found[1], int(found[2]) if found[2] else None, found[3] is not None)


def _rows() -> Iterator[Row]:
    for block in _ROWS.strip().split("\n\n"):
        head, *lines = ([cell.strip() for cell in line.split(" | ")] for line in block.splitlines())
        herd, hf, meta, _, gguf = ("" if prefix == "." else prefix for prefix in head)
        for ours, theirs, metas, split, ggufs in lines:
            cut = None if split == "-" else int(split)
            yield Row(herd + ours, _slot(theirs, hf), _slot(metas, meta), cut, None if ggufs == "-" else gguf + ggufs)


TABLE = {row.herd: row for row in _rows()}


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
        hint = nearest(missing[0], left[:1000]) or hint
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
