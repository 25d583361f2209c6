"""Normalisation layers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from keepwarm.parallel.optimizer import apex
from keepwarm.trainer.model.collective import local, sum_over
from keepwarm.trainer.model.spec import ModelSpec


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim (Zhang and Sennrich, 2019).

    If tensor parallelism splits that dim (OLMo 2 normalises the whole query projection), the engine sets
    `reduce_group`: `x` and `weight` are then this rank's part, and the mean runs over all `features`, of which the
    group has `copies`. The gradients with respect to both are complete on every rank but for those of its copies.
    """

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.features = features
        self.eps = eps
        self.copies = 1
        self.reduce_group: dist.ProcessGroup | None = None
        self.kernel = F.rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A DTensor input (torch's SequenceParallel style) needs the DTensor weight; a plain one, the local weight.
        weight = self.weight if isinstance(x, DTensor) else local(self.weight)
        if self.reduce_group is None:
            return self.kernel(x, (self.features,), weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        mean = sum_over(wide.square().sum(-1, keepdim=True), self.reduce_group) / (self.features * self.copies)
        return (wide * torch.rsqrt(mean + self.eps) * weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm with a replaceable kernel."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__(features, eps=eps)
        self.kernel = F.layer_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.normalized_shape, self.weight, self.bias, self.eps)


def use_apex(model: nn.Module) -> None:
    """Make a model on a GPU compute its norms with Apex's fused kernels.

    Raises:
        EngineUnavailable: Apex is not installed.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = apex.rms_norm()  # type: ignore[assignment]
        elif isinstance(module, LayerNorm):
            module.kernel = apex.layer_norm()  # type: ignore[assignment]


def norm(spec: ModelSpec, features: int) -> nn.Module:
    """Return the norm that the spec selects, over `features` values."""
    if spec.norm == "rms":
        return RMSNorm(features, spec.norm_eps)
    return LayerNorm(features, spec.norm_eps)
