"""Models with known weights, for tests."""

from collections.abc import Mapping

import torch
from torch import nn

from keepwarm.trainer.model.decoder import Decoder, StageModule
from keepwarm.trainer.model.spec import ModelSpec


def load_parameters(part: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy `values` into the parameters of `part`; the names must be the same on both sides."""
    names = {name for name, _ in part.named_parameters()}
    assert names == set(values), names ^ set(values)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(values[name])


def initialise(part: nn.Module, decoder: Decoder) -> None:
    """Write the initial values of `decoder` into `part`."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(decoder.initial(name, shape, (0,) * len(shape), shape))


def losses_of(model: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The losses of each sample `[micro, 2]`: main and z-loss."""
    losses = model(*inputs)
    return torch.stack([losses["main"], losses["z_loss"]], dim=1)


def whole_model(spec: ModelSpec, seed: int = 1, dtype: torch.dtype = torch.float32) -> StageModule:
    """The whole model on one rank with its initial weights."""
    decoder = Decoder(spec, seed)
    part = decoder.build_stage(range(spec.layers), embed=True, head=True).to(dtype)
    initialise(part, decoder)
    return part
