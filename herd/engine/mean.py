"""A prompt as one vector: the mean of the model's last states over all its tokens, scaled to length 1.

The states are those that the head would read, after the last norm; in them a model that was made to go on with a text has gathered what
the text is about, though it was never trained to tell texts apart by them.

They are taken up piece by piece, as the prompt is computed among other sequences. One that gave its pages up is computed again from its
beginning, and what was taken up before counts once.
"""

import torch
from torch import Tensor

from herd.chat import Embedding


class Mean:
    """The mean in the making."""

    def __init__(self) -> None:
        self.num_tokens = 0  # taken up: the first ones
        self._sum: Tensor | None = None  # [D] float64, so that it does not show where the pieces were cut

    def add(self, states: Tensor, start: int) -> None:
        """Take up the states [n, D] of the tokens from position `start` on, those that were not yet."""
        assert start <= self.num_tokens, "pieces come in order"
        new = states[self.num_tokens - start :]
        if len(new):
            total = new.sum(0, dtype=torch.float64)
            self._sum = total if self._sum is None else self._sum + total
            self.num_tokens += len(new)

    @property
    def embedding(self) -> Embedding:
        """What it is, after the last piece. The length of the sum does not matter, so nothing is divided by the number of tokens."""
        assert self._sum is not None
        vector = torch.nn.functional.normalize(self._sum, dim=0).float()
        return Embedding(vector=tuple(vector.tolist()), num_tokens=self.num_tokens)
