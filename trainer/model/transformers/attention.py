"""Attention and masks that transformers' layers call in place of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.attention import Context, Logits, attend, context

IMPLEMENTATION = "keepwarm"
"""Name under which transformers knows both functions."""
_UNSUPPORTED = ("head_mask", "position_bias", "alibi")
"""Arguments of attention functions that change the result and that ours does not have."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of one forward, from which masks are made."""

    length: int
    device: torch.device
    documents: torch.Tensor | None
    made: dict[int | None, Context] = field(default_factory=dict)
    """Contexts by window."""


_SEQUENCES: ContextVar[Sequences] = ContextVar("sequences")


@contextmanager
def masks_of(sequences: Sequences) -> Iterator[None]:
    """Make the masks that a model asks for those of `sequences`."""
    token = _SEQUENCES.set(sequences)
    try:
        yield
    finally:
        _SEQUENCES.reset(token)


def register() -> None:
    """Make both functions known to transformers; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*, local_size: int | None = None, **asked: Any) -> Context:
    """Return what attention needs to know, in the place where transformers has a tensor.

    `facts_of` has checked that the mask is causal within a window of `local_size` tokens.
    """
    sequences = _SEQUENCES.get()
    if local_size not in sequences.made:
        if "mask_function" in asked and isinstance(sequences, Probe):
            sequences.asked(asked["mask_function"], local_size)
        sequences.made[local_size] = context(None, sequences.length, sequences.device, sequences.documents, local_size)
    return sequences.made[local_size]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Context,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention `[micro, sequence, heads, head_dim]` for `[micro, heads, sequence, head_dim]`."""
    _refuse(module, others)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    logits = Logits(others.get("scaling"), others.get("softcap"), others.get("s_aux"))
    return attend(query, key, value, attention_mask, logits), None


def _refuse(module: nn.Module, others: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} passes {name} to attention, which keepwarm has not")


class Probe(Sequences):
    """Sequences that note the masks that a model asks for, to check that ours are the same."""

    def asked(self, mask_function: Any, window: int | None) -> None:
        """Raise SpecError unless a mask is causal within `window`; the sentence lacks the name of the class."""
        distances = {0, 1, 2, -1, *(() if window is None else (window - 1, window, window + 1))}
        starts = {0, 1, 5, *(() if window is None else (window, window + 1, 2 * window))}
        for start in sorted(starts):
            for distance in sorted(distances):
                if start - distance < 0:
                    continue
                seen = mask_function(0, 0, torch.tensor(start), torch.tensor(start - distance))
                if bool(seen) != (0 <= distance < (start + 1 if window is None else window)):
                    raise SpecError("has masks that are not causal, whole or within a window")
