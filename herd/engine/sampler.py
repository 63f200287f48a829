"""From logits to tokens. Each sequence has its own sampler and its own random numbers, so its draws depend on nobody else's."""

import secrets
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from herd.chat import Sampling
from herd.engine.grammar import Grammar
from herd.ops.pick import sample
from herd.ops.sample import Draw


class Sampler:
    """Draws one sequence's tokens. The steps, in order: penalties, logit_bias, grammar, temperature, top_k, top_p, min_p, one draw."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), grammar: Grammar | None = None) -> None:
        """sampling: with a temperature and a top_p.  prompt: the tokens that repetition_penalty counts too."""
        self.sampling, self.grammar = sampling, grammar
        self.told: deque[tuple[float, list[tuple[int, float]]]] = deque()  # of each token drawn, if asked for: its log-probability, the top
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self.generator = torch.Generator().manual_seed(seed)
        s = sampling
        has_penalty = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1 or s.logit_bias
        self._penalties = Penalties(sampling, prompt) if has_penalty else None

    @property
    def is_finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.is_finished

    def __call__(self, logits: Tensor) -> int:
        """logits: [V] float32 -> a token. Temperature 0 takes the likeliest, the lowest id on a tie. Raises `HerdError` on NaNs."""
        s = self.sampling
        assert s.temperature is not None and s.top_p is not None
        own = logits
        if self._penalties or self.grammar:
            logits = logits.clone()
        if self._penalties:
            self._penalties.apply(logits)
        if self.grammar:
            self.grammar.mask(logits)
        point = float(torch.rand((), generator=self.generator, dtype=torch.float64)) if s.temperature else 0.0
        token = sample(logits, Draw(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, point=point))
        if self._penalties:
            self._penalties.count(token)
        if self.grammar:
            self.grammar.read(token)
        if s.logprobs is not None:
            self._tell(own, token, s.logprobs)
        return token

    def _tell(self, logits: Tensor, token: int, num_top: int) -> None:
        total = logits.logsumexp(0)
        values, ids = logits.topk(min(num_top, len(logits)))
        top = list(zip(ids.tolist(), (values - total).tolist(), strict=True))
        self.told.append((float(logits[token] - total), top))

    def draw(self, logits: Tensor, drafts: Sequence[int] = ()) -> list[int]:
        """Draw after each draft for as long as the one before was right: [1 + drafts, V] -> one token more than were right.

        One random number for each token that comes out, so the tokens are those that would be drawn without drafts.
        """
        drawn: list[int] = []
        for row, draft in zip(logits, (*drafts, None), strict=True):
            drawn.append(self(row))
            if drawn[-1] != draft or self.is_finished:
                break
        return drawn


class Penalties:
    """What is added to and taken from logits for what has been written. Source: OpenAI's API reference; transformers' logits processors."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._places: dict[int, int] = {}  # of the reply's tokens, in the next two
        self._tokens = torch.zeros(64, dtype=torch.int64)
        self._counts = torch.zeros(64, dtype=torch.float32)
        self._prompt = torch.tensor(sorted(set(prompt)) if sampling.repetition_penalty != 1 else [], dtype=torch.int64)

    def count(self, token: int) -> None:
        """Take note of a token of the reply."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def apply(self, logits: Tensor) -> None:
        """Change logits [V] in place."""
        s, device = self._sampling, logits.device
        tokens, counts = (t[: len(self._places)].to(device) for t in (self._tokens, self._counts))
        if s.repetition_penalty != 1:
            both = torch.unique(torch.cat([self._prompt.to(device), tokens]))
            found = logits[both]
            logits[both] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
        if len(self._biased):
            logits[self._biased.to(device)] += self._bias.to(device)
