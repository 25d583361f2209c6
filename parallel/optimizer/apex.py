"""Optional kernels from NVIDIA Apex, and the error raised if Apex is missing."""

from collections.abc import Callable
from typing import Any

import torch

from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.kernels import ADAM, NORMS

Shape = tuple[int, ...]


def fused_adam() -> Any:
    """Return Apex's FusedAdam class.

    Raises:
        EngineUnavailable: Apex is not installed.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise EngineUnavailable(ADAM.problem) from error
    return FusedAdam


def rms_norm() -> Callable[[torch.Tensor, Shape, torch.Tensor, float], torch.Tensor]:
    """Return Apex's RMS norm, with the arguments of `torch.nn.functional.rms_norm`; raise as `fused_adam`."""
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError as error:
        raise EngineUnavailable(NORMS.problem) from error
    return lambda x, shape, weight, eps: fused_rms_norm_affine(x, weight, shape, eps)


def layer_norm() -> Callable[[torch.Tensor, Shape, torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """Return Apex's layer norm, with the arguments of `torch.nn.functional.layer_norm`; raise as `fused_adam`."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError as error:
        raise EngineUnavailable(NORMS.problem) from error
    return lambda x, shape, weight, bias, eps: fused_layer_norm_affine(x, weight, bias, shape, eps)
