"""Rotary position embedding (Su et al., 2021) in the half-split form of GPT-NeoX and Llama."""

import torch


def rotation(positions: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `[..., 1, size / 2]` for integer `positions` `[...]`, in fp32, or fp64 for fp64 models.

    `size` is the number of rotating features per head. The dim of size 1 broadcasts over the heads.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device=positions.device).to(wide) / size
    angles = positions.to(wide)[..., None, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the first `2 * cosine.shape[-1]` features of every head of `x` `[micro, sequence, heads, head_dim]`."""
    half = cosine.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((turned[0].to(x.dtype), turned[1].to(x.dtype), rest), dim=-1)


def positions_in(documents: torch.Tensor) -> torch.Tensor:
    """Return each token's position inside its document, int64 `[micro, sequence]`; `documents` is int32 of that shape.

    A document is a run of equal indices within one sample.
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values
