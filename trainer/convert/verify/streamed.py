"""Run a model whose weights are in memory only while the layer that needs them computes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Load = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Return the fp32 values of a parameter by the name and shape that the model has for it."""


@contextlib.contextmanager
def streamed(model: nn.Module, load: Load) -> Iterator[None]:
    """Let a model on the meta device compute, with parameters and buffers that `load` brings layer by layer.

    A member of a list of modules, such as a layer, is brought and dropped whole; so is each other module that has
    parameters of its own. A tied parameter is loaded by each of its names.
    """
    with contextlib.ExitStack() as stack:
        for prefix, unit in _units("", model):
            for handle in _hooked(unit, prefix, load):
                stack.callback(handle.remove)
        yield


def _units(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if module._parameters or any(one is not None and one.is_meta for one in module._buffers.values()):
        yield name, module
        return
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
    for key, child in module.named_children():
        inside = f"{name}.{key}" if name else key
        if is_list and next(child.parameters(), None) is not None:
            yield inside, child
        else:
            yield from _units(inside, child)


def _hooked(unit: nn.Module, prefix: str, load: Load) -> list[Any]:
    owned = [
        (owner, key, f"{prefix}.{inside}.{key}" if inside else f"{prefix}.{key}", parameter)
        for inside, owner in unit.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    ]
    buffers = [
        (owner, key, f"{prefix}.{inside}.{key}" if inside else f"{prefix}.{key}", buffer)
        for inside, owner in unit.named_modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None and buffer.is_meta
    ]

    def fill(*_: object) -> None:
        for owner, key, name, absent in owned:
            owner._parameters[key] = nn.Parameter(load(name, tuple(absent.shape)), requires_grad=False)
        for owner, key, name, absent in buffers:
            owner._buffers[key] = load(name, tuple(absent.shape))

    def drop(*_: object) -> None:
        for owner, key, _name, absent in owned:
            owner._parameters[key] = absent
        for owner, key, _name, absent in buffers:
            owner._buffers[key] = absent

    return [unit.register_forward_pre_hook(fill), unit.register_forward_hook(drop)]
