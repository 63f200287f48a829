"""The feed-forward half of a layer: a dense SwiGLU, or a shared expert plus the experts that the router picks.

    y = shared(x) + sum over chosen e of expert_e(sigmoid(z_e) * x),  z = router(x)

The score multiplies the expert's *input*; since SwiGLU is not linear, scaling the output instead gives fluent, degraded text. The score
is a sigmoid, is not renormalised, and the shared expert is not gated. Source: Meta's `moe.py`; we drop its `detach`, an inference
artefact that cuts the gradient of the router.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herd.model.config import ModelConfig
from herd.ops.pick import grouped_linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layer, and the shared expert."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> [T, D]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Experts(nn.Module):
    """E SwiGLUs in three tensors, each expert's matrix laid out as `nn.Linear` has it: [out, in]."""

    def __init__(self, num_experts: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_width, width))  # [E, F, D]
        self.up = nn.Parameter(torch.empty(num_experts, hidden_width, width))  # [E, F, D]
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden_width))  # [E, D, F]

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: [R, D] rows sorted by expert, counts: [E] rows of each -> [R, D]."""
        hidden = F.silu(grouped_linear(x, self.gate, counts)) * grouped_linear(x, self.up, counts)
        return grouped_linear(hidden, self.down, counts)


class MoE(nn.Module):
    """Shared expert plus sparse routed experts; no expert sees a row that it does not serve."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = config.num_experts, config.experts_per_token
        self.router = nn.Linear(config.width, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.width, config.hidden_width)
        self.shared = SwiGLU(config.width, config.hidden_width)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> scores [T, k] in (0, 1) and experts [T, k]. Ties go to the lowest expert."""
        logits = self.router(x)  # [T, E]
        if self.experts_per_token == 1:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.experts_per_token]
        return torch.sigmoid(logits.gather(-1, chosen).float()).type_as(x), chosen

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] -> [T, D]."""
        scores, chosen = self.route(x)
        k = self.experts_per_token
        order = chosen.flatten().argsort(stable=True)  # [R] rows by expert, R = T * k
        token = order // k
        rows = x[token] * scores.flatten()[order][:, None]  # [R, D]
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device).index_add(0, chosen.flatten(), torch.ones_like(order))
        y: Tensor = self.shared(x)
        return y.index_add(0, token, self.experts(rows, counts))
