"""Tensors of a class's layers that are saved with its weights and not trained."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers.attention import Sequences, masks_of

_TOKENS = 4


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to a module's weights, by name."""
    for name, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield (f"{name}.{key}" if name else key), buffer


def check_buffers(model: Any) -> None:
    """Raise SpecError unless all buffers of a settled model can be kept as constants or made again.

    The model is on the meta device, where a trial forward shows which buffers it writes to.
    """
    name, base = type(model).__name__, model.model
    inside = {id(buffer) for _, buffer in saved_buffers(base.layers)}
    for key, buffer in saved_buffers(base):
        if id(buffer) not in inside:
            raise SpecError(f"{name} has a buffer outside its layers, {key}, which would be lost")
        if not buffer.is_floating_point():
            raise SpecError(f"{name} has a buffer {key} of type {buffer.dtype}, which cannot be kept with its weights")
    for key, buffer in base.layers.named_buffers():
        if id(buffer) not in inside:
            raise SpecError(f"{name} has a buffer layers.{key} that is not saved with its weights")
    if inside:
        _check_constant(base, name)


def _check_constant(base: Any, name: str) -> None:
    before = {key: (id(buffer), buffer._version) for key, buffer in base.layers.named_buffers()}
    hidden = torch.empty(1, _TOKENS, base.config.hidden_size, device="meta")
    # Without a mask, transformers would look for documents in the positions, which have no values.
    seen = torch.ones(1, _TOKENS, dtype=torch.bool, device="meta")
    try:
        with masks_of(Sequences(_TOKENS, hidden.device, None)):
            base(inputs_embeds=hidden, position_ids=seen.cumsum(1), attention_mask=seen, use_cache=False)
    except Exception as error:
        raise SpecError(f"{name} has buffers, and a trial shows nothing of them: {error}") from error
    for key, buffer in base.layers.named_buffers():
        if before.get(key) != (id(buffer), buffer._version):
            raise SpecError(f"{name} changes its buffer layers.{key} in training, which keepwarm does not keep equal")


def compute_like_inputs(layers: nn.Module) -> None:
    """Let buffers take part in the dtype of what their modules are handed, as if the class itself had it.

    They stay as precise as the weights; a wider one would make hidden states wider.
    """
    for owner in layers.modules():
        if owner._buffers:
            owner.forward = _cast(owner, owner.forward)


def _cast(owner: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        dtype = next(iter((*args, *kwargs.values()))).dtype
        kept = owner._buffers
        # In `__dict__`, as `nn.Module` would take it for an attribute of its own.
        owner.__dict__["_buffers"] = {key: None if one is None else one.to(dtype) for key, one in kept.items()}
        try:
            return inner(*args, **kwargs)
        finally:
            owner.__dict__["_buffers"] = kept

    return forward
