"""Parts of a forward pass that the programs of foreign checkpoints have in common, written out in plain torch."""

import torch
from torch.nn import functional as F

from keepwarm.trainer.model.rotary import plain_frequencies, scaled_frequencies
from keepwarm.trainer.model.spec import ModelSpec


def angles_of(spec: ModelSpec, length: int) -> torch.Tensor:
    """Return the rotary angles `[length, 1, features / 2]`, as both programs get them from their options."""
    frequencies = plain_frequencies(spec.rotating, spec.rope_theta, torch.float32)
    if spec.rope_scaling is not None:
        frequencies = scaled_frequencies(spec, frequencies, length)
    return torch.arange(length, dtype=torch.float32)[:, None, None] * frequencies


def turned_halves(x: torch.Tensor, angles: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Rotate features half a head apart; those beyond the angles stay."""
    first, second, rest = torch.split(x, [angles.shape[-1]] * 2 + [x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return causal attention `[length, features]` of heads `[length, heads, size]`; groups of queries share a key."""
    share = query.shape[1] // key.shape[1]
    q, k, v = query, key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def normalised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, kind: str, eps: float
) -> torch.Tensor:
    """Apply RMSNorm or LayerNorm over the last dim."""
    if kind == "rms":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return F.layer_norm(x, weight.shape, weight, bias, eps)
