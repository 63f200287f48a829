"""Blocks that stay blocks when a checkpoint is loaded: where, and in which dtype the rest computes."""

from pathlib import Path

import pytest
import torch

from herd.checkpoint.convert import write
from herd.checkpoint.load import fill, load_model
from herd.checkpoint.quantize import quantized
from herd.model.swap import BlocksEmbedding, BlocksExperts, BlocksLinear
from herd.ops import pick
from tests.checkpoint.made import LLAMACPP, random_source
from tests.model.small import packed_logits, random_prompt


def test_a_bfloat16_model_computes_in_bfloat16_around_its_blocks() -> None:
    """As a GPU wants it: embeddings come out of their blocks in the dtype of the rest."""
    source = quantized(random_source(LLAMACPP))
    held, plain = fill(source, torch.bfloat16, holds_blocks=True), fill(source, torch.bfloat16)
    assert isinstance(held.embed, BlocksEmbedding) and held.embed(torch.arange(9)).dtype == torch.bfloat16
    assert torch.equal(held.embed(torch.arange(9)), plain.embed(torch.arange(9)))
    prompts = [random_prompt(LLAMACPP, 40)]
    found, want = packed_logits(held, prompts), packed_logits(plain, prompts)
    assert (found - want).std() < 0.05 * want.std()


@pytest.mark.parametrize("asked", [None, torch.float32], ids=str)
@pytest.mark.parametrize("can", [True, False])
def test_where_something_computes_with_blocks_they_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, can: bool, asked: torch.dtype | None
) -> None:
    """On a device that is no CPU (here "meta"), unless a dtype is asked for; the rest is bfloat16 then."""
    monkeypatch.setattr(pick, "holds_blocks", lambda device, dtype: can)
    write(quantized(random_source(LLAMACPP)), tmp_path / "model", "herd")
    model, _ = load_model(tmp_path / "model", device="meta", dtype=asked)
    holders = [module for module in model.modules() if isinstance(module, BlocksLinear | BlocksExperts)]
    assert bool(holders) is (can and asked is None)
    tensors = model.state_dict().values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} == {asked or torch.bfloat16, *([torch.uint8] if holders else [])}
