"""Numbers that a class writes into its tensors itself, kept while it is built without memory for weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_KEY = "_keepwarm_given"


class GivenNumbers(TorchFunctionMode):
    """Makes tensors of a single given number on the CPU, whatever the default device is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and args and isinstance(args[0], float) and options.get("device") is None:
            options["device"] = "cpu"
        return func(*args, **options)


def note_given(model: nn.Module) -> None:
    """Note the numbers that tensors of the model hold, and move these to the meta device, where all others are."""
    given: dict[int, float] = {}
    for owner in model.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                absent = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                owner._parameters[key] = absent
                given |= _number(absent, parameter)
        for key, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[key] = kept = buffer.to("meta")
                given |= _number(kept, buffer)
    model.__dict__[_KEY] = given


def _number(absent: torch.Tensor, tensor: torch.Tensor) -> dict[int, float]:
    return {id(absent): tensor.item()} if tensor.numel() == 1 else {}


def given_number(model: nn.Module, tensor: torch.Tensor) -> float | None:
    """Return the number that the class gave a tensor of the model, or None."""
    given: dict[int, float] = vars(model)[_KEY]
    return given.get(id(tensor))
