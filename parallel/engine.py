"""The interface that every engine implements, and what passes through it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from parallel.layout import Layout
from parallel.shard import Shard

IGNORED = -100
"""Target value of a position that carries no loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One data-parallel rank's share of a global batch, split into micro-batches; CPU tensors.

    Every rank of the same data coordinate holds the same batch, so each pipeline stage has what it needs.
    All three have the shape `[micro_batches, micro_size, sequence]`.
    """

    tokens: torch.Tensor
    """int64 token ids."""
    targets: torch.Tensor
    """int64 next-token ids, `IGNORED` where masked."""
    documents: torch.Tensor | None = None
    """int32 document index of each token; None: attention may cross documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did; equal on every rank."""

    loss: float
    """Cross-entropy in nats per unmasked target of the global batch."""
    tokens: int
    """Unmasked targets of the global batch."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    skipped: bool
    """True when loss or norm was not finite; nothing was changed then."""


class Engine(Protocol):
    """A model with its optimizer, spread over the ranks of a mesh. Every method is collective."""

    layout: Layout

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """Forward, backward and one optimizer update.

        The loss is the sum over the unmasked targets of the global batch divided by their number. `before_update`
        is called once, after the last backward and before any state changes; a running snapshot copy is joined
        there. The update is skipped by all ranks or by none.
        """
        ...

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed cross-entropy and number of unmasked targets over the global batch, equal on every rank."""
        ...

    def state(self) -> Mapping[str, Shard]:
        """Live shards by canonical name: `model.<parameter>`, `optimizer.<moment>.<parameter>` and counters.

        Complete from construction on: moments exist before the first step.
        """
        ...

    def restored(self) -> None:
        """Called after someone wrote into the shards of `state()`: refresh whatever is derived from them."""
        ...

    def close(self) -> None:
        """Free the process groups. The engine cannot be used afterwards."""
        ...


def local_rows(global_size: int, layout: Layout, rank: int) -> range:
    """Samples of a global batch that belong to `rank`: contiguous blocks in the order of the data axis."""
    share = global_size // layout.data
    start = layout.coordinates(rank).data * share
    return range(start, start + share)
