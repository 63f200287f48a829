"""Meta's format, held against Meta's own code: its argument class, its rule of widths and its resharding."""

import importlib
import io
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from herd.checkpoint import meta
from herd.checkpoint.convert import write
from herd.checkpoint.load import open_source
from herd.errors import CheckpointError
from herd.model.config import ModelConfig
from herd.model.presets import GUARD
from herd.model.presets import MAVERICK as REAL_MAVERICK
from herd.model.presets import SCOUT as REAL_SCOUT
from tests.checkpoint.made import DENSE, FAMILY, MAVERICK, SCOUT, assert_same, entries, indexed
from tests.standins import installed


def facts(config: ModelConfig) -> ModelConfig:
    """A config with the ids and context that params.json has no place for, as a reader assumes them."""
    found = meta.read_params(meta.write_params(config), {}, "params.json")
    soft = ("context_tokens", "bos_id", "stop_ids", "pad_id", "patch_id", "chat_format", "tied")
    return replace(config, **{name: getattr(found, name) for name in soft})


@pytest.mark.parametrize("num_shards", [1, 2, 8])
@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_there_and_back_is_the_same_bit_for_bit(config: ModelConfig, num_shards: int, tmp_path: Path) -> None:
    source = indexed(config)
    write(source, tmp_path / "meta", "meta", num_shards=num_shards)
    shards = [f"consolidated.{i:02d}.pth" for i in range(num_shards)]
    assert entries(tmp_path / "meta") == [*shards, "params.json", "tokenizer.json"]
    back = open_source(tmp_path / "meta")
    assert back.config == facts(config)
    assert_same(source, back)


def test_bfloat16_and_float32_can_be_mixed(tmp_path: Path) -> None:
    source = indexed(SCOUT, torch.bfloat16)
    tensors = {name: stored.to(torch.float32) if "norm" in name else stored for name, stored in source.tensors.items()}
    mixed = replace(source, tensors=tensors)
    write(mixed, tmp_path / "meta", "meta")
    assert_same(mixed, open_source(tmp_path / "meta"))


def test_pieces_may_be_small_and_cross_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.source.PIECE_BYTES", 1500)
    for num_shards in (2, 8):
        write(indexed(SCOUT), tmp_path / f"meta{num_shards}", "meta", num_shards=num_shards)
        assert_same(indexed(SCOUT), open_source(tmp_path / f"meta{num_shards}"))


def test_torch_loads_every_shard_mapped_or_not(tmp_path: Path) -> None:
    write(indexed(SCOUT), tmp_path / "meta", "meta", num_shards=2)
    shard = tmp_path / "meta" / "consolidated.01.pth"
    read, mapped = torch.load(shard, weights_only=True), torch.load(shard, weights_only=True, mmap=True)
    assert read.keys() == mapped.keys()
    assert all(torch.equal(read[name], mapped[name]) for name in read)


@pytest.fixture(scope="module")
def reshard() -> ModuleType:
    """llama_models/checkpoint.py, with what it asks of fairscale."""
    names = ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel", "fairscale.nn.model_parallel.initialize")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].__dict__.update(get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 1)
    sys.modules.pop("llama_models.checkpoint", None)
    with installed(modules):
        return importlib.import_module("llama_models.checkpoint")


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, DENSE], ids=["scout", "maverick", "dense"])
def test_metas_code_merges_our_eight_shards_into_our_one(config: ModelConfig, reshard: ModuleType, tmp_path: Path) -> None:
    write(indexed(config), tmp_path / "eight", "meta", num_shards=8)
    write(indexed(config), tmp_path / "one", "meta", num_shards=1)
    shards = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "eight").glob("*.pth"))]
    if config.num_experts:
        shards = [reshard.convert_moe_weights(shard, config.num_experts) for shard in shards]
    merged = reshard.reshard_mp(shards, size=1, rank=0)
    one = torch.load(tmp_path / "one" / "consolidated.00.pth", weights_only=True)
    assert merged.keys() == one.keys()
    for name, tensor in merged.items():
        flat = tensor.flatten(0, 1) if ".experts." in name else tensor
        assert torch.equal(flat, one[name]), name


def test_metas_own_arguments_take_our_params() -> None:
    args = pytest.importorskip("llama_models.llama4.args")
    for config in (SCOUT, MAVERICK, DENSE, REAL_SCOUT, REAL_MAVERICK, GUARD):
        params = meta.write_params(config)
        taken = args.ModelArgs(**params)
        assert params.keys() <= args.ModelArgs.model_fields.keys()
        assert (taken.dim, taken.n_layers, taken.head_dim, taken.use_qk_norm) == (
            *(config.width, config.num_layers, config.head_width, config.qk_norm),
        )


def test_the_released_params_are_read_and_written() -> None:
    """Source: params.json of the released models, as Meta's own `args.py` names the keys."""
    assert meta.read_params(meta.write_params(REAL_SCOUT), {}, "x") == REAL_SCOUT
    assert meta.read_params(meta.write_params(REAL_MAVERICK), {}, "x") == REAL_MAVERICK
    params = meta.write_params(REAL_SCOUT)
    assert (params["ffn_exp"], params["ffn_dim_multiplier"], params["multiple_of"]) == (4.0, 1.2, 2048)
    assert (params["moe_args"]["capacity_factor"], params["moe_args"]["auto_scale_F"]) == (1.0, True)
    assert meta.ffn_widths(params) == (16384, 8192)


@pytest.mark.parametrize("dense", [1, 7, 56, 128, 1000, 8192, 16384, 53248])
@pytest.mark.parametrize("hidden", [1, 24, 96, 1000, 8192, 20480])
def test_any_widths_can_be_written(dense: int, hidden: int) -> None:
    for width in (40, 64, 5120, 14336):
        params = meta.write_params(replace(SCOUT, width=width, dense_width=dense, hidden_width=hidden))
        assert meta.ffn_widths(params) == (dense, hidden)


def test_the_rule_of_widths_is_metas() -> None:
    """The two formulas as Meta's model.py and moe.py spell them."""
    for config in (SCOUT, REAL_SCOUT, GUARD):
        p = meta.write_params(config)
        hidden = int(2 * int(4 * p["dim"]) / 3)
        hidden = int(p["ffn_dim_multiplier"] * hidden)
        hidden = p["multiple_of"] * ((hidden + p["multiple_of"] - 1) // p["multiple_of"])
        assert hidden == config.dense_width
        if "moe_args" in p:
            hidden = int(2 * int(p["ffn_exp"] * p["dim"]) / 3)
            hidden = int(p["ffn_dim_multiplier"] * hidden)
            hidden = int(hidden / (p["moe_args"]["capacity_factor"] + 1))
            hidden += -hidden % p["multiple_of"]
            assert hidden == config.hidden_width


def test_what_params_cannot_say_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="herd"):
        write(indexed(replace(SCOUT, tied=True)), tmp_path / "meta", "meta", num_shards=1)
    assert "params.json has no place for some facts" in caplog.text
    assert "bos_id is 256 (there 200000)" in caplog.text
    back = open_source(tmp_path / "meta")
    assert torch.equal(back.tensors["head.weight"].read(), back.tensors["embed.weight"].read())


def test_what_params_cannot_compute_is_refused(tmp_path: Path) -> None:
    assert SCOUT.rope_scaling is not None
    scaling = replace(SCOUT.rope_scaling, original_tokens=64, low_freq_factor=2.0)
    message = r"rope_scaling.low_freq_factor is 2.0 \(there 1.0\); rope_scaling.original_tokens is 64 \(there 8192\)"
    with pytest.raises(CheckpointError, match=message):
        write(indexed(replace(SCOUT, rope_scaling=scaling)), tmp_path / "meta", "meta")
    assert entries(tmp_path) == []


def test_shards_do_not_cut_heads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"8 key/value heads do not divide into 16 shards"):
        write(indexed(SCOUT), tmp_path / "meta", "meta", num_shards=16)


# --- what files may hold


def one_shard(folder: Path, change: dict[str, Any]) -> Path:
    """A checkpoint of one shard with some entries changed; ... takes one away."""
    write(indexed(DENSE), folder / "meta", "meta", num_shards=1)
    path = folder / "meta" / "consolidated.00.pth"
    state = {**torch.load(path, weights_only=True), **change}
    torch.save({name: value for name, value in state.items() if value is not ...}, path)
    return folder / "meta"


def test_leftovers_of_training_are_dropped(tmp_path: Path) -> None:
    junk = {
        "layers.0.attention.wqkv._extra_state": io.BytesIO(b"scales"),
        "rope.freqs": torch.ones(4),
        "layers.1.feed_forward.running_gate_stats_3E": torch.ones(3, 4),
        "layers.1.feed_forward.expert_activation_DE": torch.ones(3, 4),
    }
    assert_same(indexed(DENSE), open_source(one_shard(tmp_path, junk)))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(witness),)

    folder = one_shard(tmp_path, {"norm.weight": Trap()})
    with pytest.raises(CheckpointError, match=r"holds more than tensors; nothing in it was run. .*mkdir"):
        open_source(folder)
    assert not witness.exists()


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    change = {"norm.weight": ..., "norm.wight": torch.ones(48), "output.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError) as caught:
        open_source(one_shard(tmp_path, change))
    message = caught.value.message
    assert "1 tensor is missing: norm.weight" in message
    assert "1 tensor is left over that no part of the model takes: norm.wight" in message
    assert "1 tensor is misshapen: output.weight is [3, 3], not [288, 48]" in message
    assert caught.value.hint == "did you mean 'norm.wight'?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": [1, 2]}, "norm.weight is a list, not a tensor"),
        ({"layers.0.attention.wo.weight": torch.zeros(128, 48).T}, "is stored transposed"),
    ],
)
def test_entries_that_are_no_plain_tensors_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(one_shard(tmp_path, change))


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    write(indexed(DENSE), tmp_path / "meta", "meta", num_shards=2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth \(.* bytes\) is cut short or is no .pth file"):
        open_source(tmp_path / "meta")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(indexed(DENSE), tmp_path / "meta", "meta", num_shards=4)
    (tmp_path / "meta" / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"without a gap: consolidated.00.pth, consolidated.01.pth, consolidated.03.pth"):
        open_source(tmp_path / "meta")


def test_params_that_are_quantized_or_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(indexed(DENSE), tmp_path / "meta", "meta", num_shards=1)
    path = tmp_path / "meta" / "params.json"
    params = json.loads(path.read_text())
    with caplog.at_level(logging.WARNING, logger="herd"):
        path.write_text(json.dumps({**params, "novel": 1}))
        open_source(tmp_path / "meta")
    assert "unknown keys are ignored: novel" in caplog.text
    path.write_text(json.dumps({**params, "quantization_args": {"group_size": 32}}))
    with pytest.raises(CheckpointError, match=r"quantization_args with group_size 32 is not supported\nhint: herd reads .* groups of 128"):
        open_source(tmp_path / "meta")
    path.write_text(json.dumps({"dim": 64}))
    with pytest.raises(CheckpointError, match=r"does not say 'n_heads'"):
        open_source(tmp_path / "meta")
