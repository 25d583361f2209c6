"""The interface that every engine implements, and what passes through it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from keepwarm.parallel.loss import MAIN
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What every engine is built from."""

    model: ModelParts
    parallel: ParallelSpec
    optimizer: OptimizerSpec
    numerics: NumericsSpec
    layout: Layout
    device: torch.device
    """Where parameters live; for CUDA the current device."""
    timeout: timedelta
    """Of every collective in the groups that the engine makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One data-parallel rank's share of a global batch, split into micro-batches; CPU tensors.

    Every rank of the same data coordinate holds the same batch, so each pipeline stage has what it needs.
    Tokens, targets and documents have the shape `[micro_batches, micro_batch_size, sequence]`.
    """

    tokens: torch.Tensor
    """int64 token ids."""
    targets: torch.Tensor
    """int64 next-token ids, `keepwarm.parallel.targets.IGNORED` where masked."""
    documents: torch.Tensor | None = None
    """int32 document index of each token; None: attention may cross documents."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Named inputs of each sample besides these, such as logits of a teacher: `[micro_batches, micro_batch_size, ...]`.
    Every stage is given all of it, as keyword arguments of these names."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with every tensor changed alike."""
        return Batch(
            tokens=change(self.tokens),
            targets=change(self.targets),
            documents=None if self.documents is None else change(self.documents),
            extra={name: change(tensor) for name, tensor in self.extra.items()},
        )

    def micro_batch(self, index: int) -> "Batch":
        """One micro-batch, of tensors without the first dim."""
        return self.map(lambda tensor: tensor[index])

    def keywords(self) -> dict[str, Any]:
        """What the forward of a stage takes besides its first argument."""
        documents = {} if self.documents is None else {"documents": self.documents}
        return {"targets": self.targets, **documents, **self.extra}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did; equal on every rank."""

    losses: Mapping[str, float] = field(hash=False)
    """Every loss that is optimised by its name, not weighted, per unmasked target of the global batch."""
    tokens: int
    """Unmasked targets of the global batch."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    skipped: bool
    """True when a loss or the norm was not finite; nothing was changed then."""

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per unmasked target of the global batch."""
        return self.losses[MAIN]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What the losses of a global batch are; equal on every rank."""

    sums: Mapping[str, float]
    """Every loss that is optimised by its name, not weighted, summed over the global batch."""
    tokens: int
    """Unmasked targets of the global batch."""

    @property
    def loss_sum(self) -> float:
        """Cross-entropy in nats, summed over the unmasked targets."""
        return self.sums[MAIN]


class Engine(Protocol):
    """A model with its optimizer, sharding over the ranks of a mesh. Every method is collective."""

    layout: Layout

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """Forward, backward and one optimizer update.

        What is optimised is the weighted sum of the losses over the unmasked targets of the global batch, divided by
        their number. `before_update` is called once, after the last backward and before any state changes; a running
        snapshot copy is joined there. The update is skipped by all ranks or by none.
        """
        ...

    def evaluate(self, batch: Batch) -> Evaluation:
        """The losses of a global batch, without any update."""
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


def local_rows(global_batch_size: int, layout: Layout, rank: int) -> range:
    """Samples of a global batch that belong to `rank`: contiguous blocks in the order of the data axis."""
    share = global_batch_size // layout.data
    start = layout.coordinates(rank).data * share
    return range(start, start + share)
