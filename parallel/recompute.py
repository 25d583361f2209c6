"""Activation recomputation, layer compilation and bf16: each replaces a forward and keeps all parameter names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keepwarm.parallel.parameter import layers_of
from keepwarm.parallel.spec import NumericsSpec


def apply_numerics(part: nn.Module, numerics: NumericsSpec) -> None:
    """Compile the layers of a stage and recompute them in backward, fully or attention only, as the spec says.

    Selective recomputation follows Korthikanti et al. (2022): attention takes much memory and little time.
    """
    for layer in layers_of(part):
        if numerics.recompute == "selective":
            attention: nn.Module = layer.attention  # type: ignore[assignment]
            attention.forward = recomputed(attention.forward)
        if numerics.compile:
            layer.forward = torch.compile(layer.forward)
        if numerics.recompute == "full":
            layer.forward = recomputed(layer.forward)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` to drop its activations and recompute them in backward; there is no RNG state to restore."""

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def in_bf16(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Wrap `forward` to multiply matrices in bf16; weights and gradients stay fp32."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*args, **kwargs)

    return lower
