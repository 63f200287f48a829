"""Fixtures that several folders of tests share."""

import pytest
import torch

from herd.engine.local import Model, load
from herd.model.presets import TINY

torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it brings, a hundred times more on a busy machine


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The tiny model with its engine running: random weights, byte tokenizer, text and images."""
    model = load("tiny")
    assert model.config == TINY
    return model
