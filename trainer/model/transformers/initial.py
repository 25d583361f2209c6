"""Initial weights as transformers' classes draw them: recorded on the meta device, replayed for any box."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import initialization

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.initial import normal
from keepwarm.trainer.model.transformers.buffers import saved_buffers
from keepwarm.trainer.model.transformers.given import given_number

Box = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a parameter is drawn."""

    mean: float = 0.0
    std: float = 0.0
    bounds: tuple[float, float] | None = None
    """Of a truncated normal distribution."""
    zero_row: int | None = None
    """A row that is zero: that of the padding token."""

    def draw(self, seed: int, name: str, global_shape: Box, offsets: Box, shape: Box) -> torch.Tensor:
        """Return the values of a box, fp32 on the CPU: a function of (seed, name, index) only."""
        if self.std == 0.0:
            return torch.full(shape, self.mean)
        lines = (1,) * (2 - len(shape))
        drawn = normal(seed, name, (*lines, *global_shape), (*(0 for _ in lines), *offsets), (*lines, *shape))
        values = drawn.view(shape)
        if self.bounds is not None:
            values = _within(values, *((bound - self.mean) / self.std for bound in self.bounds))
        values = values.mul_(self.std)
        if self.mean:
            values += self.mean
        if self.zero_row is not None and offsets[0] <= self.zero_row < offsets[0] + shape[0]:
            values[self.zero_row - offsets[0]] = 0
        return values


def recorded(model: Any) -> dict[str, Rule]:
    """Return the rule of every parameter and saved buffer of a model on the meta device, by its name there.

    Raises:
        SpecError: its class draws a parameter in a way that cannot be replayed.
    """
    tensors = (*model.named_parameters(), *saved_buffers(model))
    parameters = {id(tensor): name for name, tensor in tensors}
    given = {name: given_number(model, tensor) for name, tensor in tensors}
    rules = {name: Rule(mean=number) for name, number in given.items() if number is not None}
    with torch.no_grad(), _recorder(parameters, rules):
        for module in model.modules():
            model._init_weights(module)
    missing = sorted(set(parameters.values()) - set(rules))
    if missing:
        raise SpecError(f"{type(model).__name__} does not initialise {missing[0]}")
    return rules


def _within(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Turn normal numbers into truncated ones, by their rank in the distribution."""
    first, last = (torch.special.ndtr(torch.tensor(bound, dtype=torch.float64)) for bound in (low, high))
    rank = torch.special.ndtr(values.double())
    drawn: torch.Tensor = torch.special.ndtri(first + rank * (last - first))
    return drawn.clamp(low, high).float()


@contextmanager
def _recorder(parameters: Mapping[int, str], rules: dict[str, Rule]) -> Iterator[None]:
    """Replace transformers' functions that fill tensors by ones that note what they are called for."""

    def note(tensor: torch.Tensor, rule: Rule, what: str) -> torch.Tensor:
        name = parameters.get(id(tensor))
        if name is not None:
            rules[name] = rule
        elif tensor._base is not None and id(tensor._base) in parameters:
            _note_row(tensor, rule, parameters[id(tensor._base)], rules)
        elif isinstance(tensor, nn.Parameter):
            raise SpecError(f"a parameter outside the model is filled by {what}")
        return tensor

    def normal_(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator: object = None) -> torch.Tensor:
        return note(tensor, Rule(mean=mean, std=std), "normal_")

    def trunc_normal_(
        tensor: torch.Tensor,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: object = None,
    ) -> torch.Tensor:
        return note(tensor, Rule(mean=mean, std=std, bounds=(a, b)), "trunc_normal_")

    def constant_(tensor: torch.Tensor, val: float) -> torch.Tensor:
        return note(tensor, Rule(mean=float(val)), "constant_")

    def zeros_(tensor: torch.Tensor) -> torch.Tensor:
        return note(tensor, Rule(), "zeros_")

    def ones_(tensor: torch.Tensor) -> torch.Tensor:
        return note(tensor, Rule(mean=1.0), "ones_")

    known: dict[str, Callable[..., torch.Tensor]] = {
        function.__name__: function for function in (normal_, trunc_normal_, constant_, zeros_, ones_)
    }
    before = {name: getattr(initialization, name) for name in initialization.TORCH_INIT_FUNCTIONS}
    before["copy_"] = initialization.copy_
    try:
        for name in before:
            setattr(initialization, name, known.get(name) or _refusing(name, parameters))
        yield
    finally:
        for name, function in before.items():
            setattr(initialization, name, function)


def _note_row(view: torch.Tensor, rule: Rule, name: str, rules: dict[str, Rule]) -> None:
    """Note that a row of a matrix, the padding token's, is zero."""
    base = view._base
    assert base is not None
    if rule != Rule() or base.ndim != 2 or view.shape != base.shape[1:] or name not in rules:
        raise SpecError(f"{name} is filled part by part, which cannot be replayed")
    rules[name] = replace(rules[name], zero_row=view.storage_offset() // base.shape[1])


def _refusing(what: str, parameters: Mapping[int, str]) -> Callable[..., torch.Tensor]:
    def refuse(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if id(tensor) in parameters:
            raise SpecError(f"{parameters[id(tensor)]} is initialised by {what}, which cannot be replayed")
        return tensor

    return refuse
