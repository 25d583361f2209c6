"""The interface that every engine implements, and the types of its arguments and results."""

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
    """Arguments that every engine is built from."""

    model: ModelParts
    parallel: ParallelSpec
    optimizer: OptimizerSpec
    numerics: NumericsSpec
    layout: Layout
    device: torch.device
    """Device of the parameters; with CUDA it is the current device."""
    timeout: timedelta
    """Timeout of every collective in the groups that the engine creates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One data-parallel rank's share of a global batch, split into micro-batches; CPU tensors.

    All ranks with the same data coordinate hold the same batch, so every pipeline stage has what it needs.
    Tokens, targets and documents have the shape `[micro_batches, micro_batch_size, sequence]`.
    """

    tokens: torch.Tensor
    """int64 token ids."""
    targets: torch.Tensor
    """int64 next-token ids, `keepwarm.parallel.targets.IGNORED` where masked."""
    documents: torch.Tensor | None = None
    """int32 document index of each token; None: attention may cross document boundaries."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Additional named inputs of each sample, such as teacher logits: `[micro_batches, micro_batch_size, ...]`.
    Every stage receives all of them as keyword arguments."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with `change` applied to every tensor."""
        return Batch(
            tokens=change(self.tokens),
            targets=change(self.targets),
            documents=None if self.documents is None else change(self.documents),
            extra={name: change(tensor) for name, tensor in self.extra.items()},
        )

    def micro_batch(self, index: int) -> "Batch":
        """Return one micro-batch, whose tensors lack the first dim."""
        return self.map(lambda tensor: tensor[index])

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of a stage's forward; its first argument is passed separately."""
        documents = {} if self.documents is None else {"documents": self.documents}
        return {"targets": self.targets, **documents, **self.extra}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Result of one step, equal on every rank."""

    losses: Mapping[str, float] = field(hash=False)
    """Each optimised loss by name, unweighted, per unmasked target of the global batch."""
    tokens: int
    """Number of unmasked targets in the global batch."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    skipped: bool
    """Whether the step was skipped, since a loss or the norm was not finite or there was no target; no state has
    changed then."""

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per unmasked target of the global batch."""
        return self.losses[MAIN]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Losses of a global batch, equal on every rank."""

    sums: Mapping[str, float]
    """Each optimised loss by name, unweighted, summed over the global batch."""
    tokens: int
    """Number of unmasked targets in the global batch."""

    @property
    def loss_sum(self) -> float:
        """Cross-entropy in nats, summed over the unmasked targets."""
        return self.sums[MAIN]


class Engine(Protocol):
    """A model and its optimizer, sharded over the ranks of a mesh. Every method is collective."""

    layout: Layout

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """Run forward, backward and one optimizer update.

        The objective is the weighted sum of the losses over the unmasked targets of the global batch, divided by their
        number. `before_update` is called once, after the last backward and before any state changes, so that a running
        snapshot copy can be joined there. Either all ranks skip the update or none does.
        """
        ...

    def evaluate(self, batch: Batch) -> Evaluation:
        """Return the losses of a global batch without updating anything."""
        ...

    def state(self) -> Mapping[str, Shard]:
        """Return live shards by canonical name: `model.<parameter>`, `optimizer.<moment>.<parameter>` and counters.

        The state is complete from construction on: moments exist before the first step.
        """
        ...

    def restored(self) -> None:
        """Refresh everything derived from the shards of `state()`; call it after writing into them."""
        ...

    def close(self) -> None:
        """Free the process groups. The engine cannot be used afterwards."""
        ...


def local_rows(global_batch_size: int, layout: Layout, rank: int) -> range:
    """Return the samples of a global batch that belong to `rank`: contiguous blocks in data-axis order."""
    share = global_batch_size // layout.data
    start = layout.coordinates(rank).data * share
    return range(start, start + share)
