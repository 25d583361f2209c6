"""One pipeline stage under DeepSpeed's `PipelineModule`. Importing this module imports DeepSpeed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from keepwarm.parallel.engine import Batch
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.mesh.mesh import Mesh


class MicroBatchQueue:
    """The micro-batches of a step, in the order in which every stage runs their forward passes.

    Ranks with the same data coordinate hold the same batch, so none of it is sent along with the hidden states.
    """

    def __init__(self) -> None:
        self._waiting: Iterator[Batch] = iter(())

    def load(self, batch: Batch) -> None:
        """Queue all micro-batches of `batch`."""
        self._waiting = iter([batch.micro_batch(index) for index in range(len(batch.tokens))])

    def next(self) -> Batch:
        return next(self._waiting)


class StageWithInputs(nn.Module):
    """A stage that takes its inputs other than hidden states from the queue."""

    def __init__(self, stage: nn.Module, queue: MicroBatchQueue) -> None:
        super().__init__()
        self.stage = stage
        self.queue = queue

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.stage(x, **self.queue.next().keywords())
        return output


class RemoteStagePlaceholder(nn.Module):
    """Placeholder for a stage of another rank, which `PipelineModule` counts but does not run here."""


class Stages(PipelineModule):  # type: ignore[misc]
    """This rank's stage as one layer of a `PipelineModule` that has one layer per stage, on the mesh of the layout."""

    def __init__(self, module: nn.Module, mesh: Mesh, losses: Losses, tied: Sequence[nn.Parameter]) -> None:
        """`tied` are the parameters that the other end of the pipeline also holds."""
        stage, layout = mesh.at.pipeline, mesh.layout
        queue = MicroBatchQueue()
        layers = [
            StageWithInputs(module, queue) if index == stage else RemoteStagePlaceholder()
            for index in range(layout.pipeline)
        ]
        topology = ProcessTopology(axes=["data", "pipe", "model"], dims=list(layout.shape))
        super().__init__(layers, topology=topology, loss_fn=self._objective, partition_method="uniform")
        self.queue = queue
        self.layout = layout
        self.micro_batches = 1
        """Micro-batches in the current step; DeepSpeed divides the loss by this number."""
        self._losses = losses
        self._tied = [(parameter, mesh.ends) for parameter in tied]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup | None]]:
        """Return the parameters whose gradients are summed before the data-axis reduction, each with its group."""
        return self._tied

    def _objective(self, table: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        return self._losses.add_table(table, self.micro_batches)


class Pipeline:
    """DeepSpeed's pipeline engine for one rank: a 1F1B schedule with one stage per rank."""

    def __init__(self, stages: Stages, engine: Any) -> None:
        """`engine` is DeepSpeed's engine over `stages`."""
        self.engine = engine
        self._stages = stages
        self._shape: torch.Size | None = None

    def train(self, batch: Batch) -> None:
        """Run forward and backward of all micro-batches, then the update."""
        self._stages.micro_batches = len(batch.tokens)
        self.engine.set_train_batch_size(len(batch.tokens) * self._stages.layout.data)
        self.engine.train_batch(self._load(batch))

    def evaluate(self, batch: Batch) -> None:
        """Run the forward pass of all micro-batches; the losses on the last stage collect the result."""
        self.engine.eval_batch(
            self._load(batch), reduce_output=None, bcast_loss=False, num_micro_batches=len(batch.tokens)
        )

    def _load(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return what the first stage takes as inputs and the last one as labels."""
        if batch.tokens.shape[1:] != self._shape:
            self._shape = batch.tokens.shape[1:]
            self.engine.reset_activation_shape()
        self._stages.queue.load(batch)
        return zip(batch.tokens, batch.targets, strict=True)
