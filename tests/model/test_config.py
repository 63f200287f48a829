"""Facts of a model: which layers are what, and what is refused."""

from dataclasses import asdict, replace

import pytest

from herd.errors import CheckpointError
from herd.model.config import ModelConfig, RopeScaling, VisionConfig, from_dict
from herd.model.presets import CRIA, GUARD, MAVERICK, SCOUT, TINY


def test_every_fourth_layer_is_global() -> None:
    for config in (SCOUT, MAVERICK):
        assert config.global_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47)
        assert sorted(config.local_layers + config.global_layers) == list(range(48))
        assert all(config.is_local(layer) == (layer in config.local_layers) for layer in range(48))


def test_without_a_global_step_every_layer_is_local() -> None:
    for config in (GUARD, CRIA):
        assert config.global_layers == ()
        assert config.local_layers == tuple(range(config.num_layers))


def test_which_layers_have_experts() -> None:
    assert all(SCOUT.is_moe(layer) for layer in range(48))
    assert [layer for layer in range(48) if MAVERICK.is_moe(layer)] == list(range(1, 48, 2))
    assert not any(GUARD.is_moe(layer) for layer in range(48))


def test_tokens_per_tile() -> None:
    assert (VisionConfig().grid, VisionConfig().tokens_per_tile) == (24, 144)
    assert TINY.vision is not None
    assert TINY.vision.tokens_per_tile == 4


@pytest.mark.parametrize("config", [SCOUT, MAVERICK, GUARD, TINY, CRIA], ids=["scout", "maverick", "guard", "tiny", "cria"])
def test_from_dict_reads_back_what_asdict_writes(config: ModelConfig) -> None:
    values = asdict(config)
    values["stop_ids"] = list(values["stop_ids"])  # as JSON has it
    assert from_dict(ModelConfig, values) == config


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("num_head",), "num_heads"),
        (("vision", "tile_pixel"), "tile_pixels"),
        (("rope_scaling", "low_frequency_factor"), "low_freq_factor"),
    ],
)
def test_unknown_key_names_the_nearest(path: tuple[str, ...], nearest: str) -> None:
    values = asdict(SCOUT)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 1
    with pytest.raises(CheckpointError) as raised:
        from_dict(ModelConfig, values)
    assert repr(path[-1]) in raised.value.message
    assert repr(nearest) in raised.value.hint


def test_unknown_key_like_no_other_has_no_hint() -> None:
    with pytest.raises(CheckpointError, match="'zzzzzz'") as raised:
        from_dict(RopeScaling, {"zzzzzz": 1})
    assert raised.value.hint == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0}, "width = 0"),
        ({"chunk_tokens": 0}, "chunk_tokens = 0"),
        ({"global_step": 0}, "global_step = 0"),
        ({"temperature_floor": 0}, "temperature_floor = 0"),
        ({"norm_eps": -1.0}, "norm_eps = -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"context_tokens": 10**15}, "context_tokens = 1,000"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"moe_step": 0}, "moe_step = 0"),
        ({"num_kv_heads": 3}, "4 query heads do not divide into 3"),
        ({"head_width": 15}, "head_width is 15"),
        ({"experts_per_token": 0}, "0 experts per token of 4"),
        ({"experts_per_token": 5}, "5 experts per token of 4"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        replace(TINY, **change)


def test_a_dense_model_may_say_anything_of_experts() -> None:
    assert replace(TINY, num_experts=0, experts_per_token=1).num_experts == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [({"width": 90}, "width 90 with 16 heads"), ({"tile_pixels": 350}, "tiles of 350 pixels"), ({"shuffle": 5}, "squares of 5")],
    ids=str,
)
def test_impossible_eyes_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        VisionConfig(**change)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TINY.width = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"), [("width", "64"), ("width", 64.0), ("tied", 1), ("num_layers", True), ("chunk_tokens", "16"), ("norm_eps", None)]
)
def test_a_value_of_the_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{field} = "):
        replace(TINY, **{field: value})  # type: ignore[arg-type]
