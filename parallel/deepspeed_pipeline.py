"""One pipeline stage under DeepSpeed's `PipelineModule`. Importing this module imports DeepSpeed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from parallel.deepspeed_setup import initialized
from parallel.deepspeed_zero import Placed
from parallel.mesh import Mesh
from parallel.pipeline import Loss

Micro = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Tokens, targets and documents of one micro-batch."""


class Feed:
    """The micro-batches of a step, in the order in which every stage runs their forwards.

    Ranks of one data coordinate hold the same batch, so documents and targets need not travel with the hidden states.
    """

    def __init__(self) -> None:
        self._waiting: Iterator[Micro] = iter(())

    def load(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """All three `[micro_batches, micro_size, sequence]`."""
        several = [None] * len(tokens) if documents is None else list(documents)
        self._waiting = iter(list(zip(tokens, targets, several, strict=True)))

    def next(self) -> Micro:
        return next(self._waiting)


class Fed(nn.Module):
    """A part that takes what it needs besides hidden states from the feed."""

    def __init__(self, part: nn.Module, feed: Feed) -> None:
        super().__init__()
        self.part = part
        self.feed = feed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, targets, documents = self.feed.next()
        output: torch.Tensor = self.part(x, documents=documents, targets=targets)
        return output


class Elsewhere(nn.Module):
    """Stands for a stage of another rank, which `PipelineModule` counts but does not run here."""


class Stages(PipelineModule):  # type: ignore[misc]
    """This rank's part as one layer of as many as there are stages, on the mesh of the layout."""

    def __init__(
        self,
        part: nn.Module,
        feed: Feed,
        mesh: Mesh,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        tied: Sequence[nn.Parameter],
    ) -> None:
        """`tied` are the parameters that the other end of the pipeline has too."""
        stage, layout = mesh.at.pipeline, mesh.layout
        layers = [Fed(part, feed) if index == stage else Elsewhere() for index in range(layout.pipeline)]
        topology = ProcessTopology(axes=["data", "pipe", "model"], dims=list(layout.shape))
        super().__init__(layers, topology=topology, loss_fn=loss, partition_method="uniform")
        self._tied = [(parameter, mesh.ends) for parameter in tied]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup | None]]:
        """What the pipeline engine sums before it reduces gradients over the data axis, and over which ranks."""
        return self._tied


class Pipeline:
    """DeepSpeed's pipeline engine for one rank: 1F1B over the stages, one on each rank."""

    def __init__(
        self,
        part: nn.Module,
        placed: Sequence[Placed],
        mesh: Mesh,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
    ) -> None:
        self._mesh = mesh
        self._loss = loss
        self._feed = Feed()
        self._shape: torch.Size | None = None
        tied = [one.parameter for one in placed if one.tied]
        stages = Stages(part, self._feed, mesh, self._divided, tied)
        self.engine = initialized(stages, optimizer, config, None)

    def train(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """Forward and backward of all micro-batches, and the update."""
        self.engine.set_train_batch_size(len(tokens) * self._mesh.layout.data)
        self.engine.train_batch(self._load(tokens, targets, documents))

    def evaluate(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """Forward of all micro-batches; the loss object of the last stage collects the result."""
        self.engine.eval_batch(
            self._load(tokens, targets, documents), reduce_output=None, bcast_loss=False, num_micro_batches=len(tokens)
        )

    def _load(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the first stage takes as inputs and the last one as labels."""
        if tokens.shape[1:] != self._shape:
            self._shape = tokens.shape[1:]
            self.engine.reset_activation_shape()
        self._feed.load(tokens, targets, documents)
        return zip(tokens, targets, strict=True)

    def _divided(self, output: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, multiplied by what DeepSpeed is going to divide it by."""
        divisor: int = self.engine.gradient_accumulation_steps() * self._mesh.layout.data
        return self._loss(output) * divisor
