"""Activations that backward computes again, compiled layers, bf16: all replace a forward and keep every name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keepwarm.parallel.parameter import layers_of
from keepwarm.parallel.spec import NumericsSpec


def apply_numerics(part: nn.Module, numerics: NumericsSpec) -> None:
    """Compile the layers of a stage and let backward recompute them, whole or their attention, as the spec says.

    Selective recompute is that of Korthikanti et al. (2022): attention costs much memory and little time.
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
    """`forward`, whose activations are dropped and computed again in backward; there is no randomness to replay."""

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def in_bf16(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`forward` with matrices multiplied in bf16, from weights that stay fp32 and with gradients in fp32."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*args, **kwargs)

    return lower
