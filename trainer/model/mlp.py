"""The feed-forward half of a layer."""

import torch
import torch.nn.functional as F
from torch import nn

from keepwarm.trainer.model.spec import ModelSpec


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.up = nn.Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.ffn_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return hidden


class PlainMLP(nn.Module):
    """`down(gelu(up(x)))`, with exact GELU or its tanh approximation."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.ffn_size, spec.hidden_size, bias=spec.mlp_bias)
        self.approximate = "tanh" if spec.activation == "gelu_tanh" else "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(F.gelu(self.up(x), approximate=self.approximate))
        return hidden


def mlp(spec: ModelSpec) -> nn.Module:
    """Return the MLP that the spec selects."""
    return GatedMLP(spec) if spec.activation == "swiglu" else PlainMLP(spec)
