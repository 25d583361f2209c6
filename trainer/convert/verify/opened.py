"""A model of any format, opened to compute logits."""

from dataclasses import dataclass
from typing import Protocol

import torch

from keepwarm.trainer.errors import CheckpointError

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's dtypes by the names of the safetensors format."""


class Opened(Protocol):
    """A model that computes, with its weights brought in as they are needed."""

    vocabulary: int
    context: int
    """Longest sequence."""
    dtypes: frozenset[str]
    """Of the weights, as the safetensors format names them."""

    def logits(self, tokens: torch.Tensor, rounding: "Rounding") -> torch.Tensor:
        """Return fp32 logits `[sequence, vocabulary]` of the tokens `[sequence]`, computed in fp32.

        Raises:
            CheckpointError: a tensor is missing, left over, damaged or does not fit; names it.
        """


@dataclass(frozen=True)
class Rounding:
    """Weights are rounded to this dtype before anything is computed; None: as they are."""

    dtype: str | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return fp32 values."""
        if self.dtype is not None:
            tensor = tensor.to(TORCH[self.dtype])
        return tensor.to(torch.float32)


def fitting(tensor: torch.Tensor, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """Return the tensor. Raise `CheckpointError` unless it has the shape."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{where} is {list(tensor.shape)}, the model that computes with it has {list(shape)}")
    return tensor
