"""Pipeline parallelism with the schedules of torch.distributed.pipelining.

Stages are given their shapes up front, so none runs a trial forward or sends pickled metadata.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from keepwarm.parallel.engine import Batch, EngineConfig
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.mesh.layout import check_micro_batches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Dtype of the hidden states that are sent between stages."""

MULTI: Mapping[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Shape(NamedTuple):
    """Properties that determine the buffers of a schedule."""

    micro_batches: int
    micro_batch_size: int
    sequence: int
    training: bool


class Pipeline:
    """The stages of one rank and their schedules, rebuilt when the number or shape of micro-batches changes."""

    def __init__(
        self, stages: Mapping[int, nn.Module], config: EngineConfig, group: dist.ProcessGroup, losses: Losses
    ) -> None:
        """`stages` are this rank's modules by index, whose forwards are wrapped by `losses.collected`."""
        self._stages = stages
        self._spec = config.parallel
        self._group = group
        self._device = config.device
        self._hidden_size = config.model.hidden_size
        self._dtype = DTYPES[config.numerics.precision]
        self._losses = losses
        # One for training and one for evaluation: a schedule keeps the buffers of all its micro-batches.
        self._schedules: dict[bool, tuple[Shape, PipelineScheduleSingle | PipelineScheduleMulti]] = {}

    def train(self, batch: Batch) -> None:
        """Run forward and backward of all micro-batches.

        Raises:
            LayoutError: the schedule cannot run this number of micro-batches.
        """
        check_micro_batches(len(batch.tokens), self._spec)
        self._run(batch, training=True)

    def evaluate(self, batch: Batch) -> None:
        """Run the forward pass of all micro-batches."""
        with torch.no_grad():
            table = self._run(batch, training=False)
            if table is not None:
                self._losses.add_table(table)

    def _run(self, batch: Batch, *, training: bool) -> torch.Tensor | None:
        """Run the schedule. In training, add up the losses; in an evaluation, return the last stage's table of them."""
        count, size, length = batch.tokens.shape
        schedule = self._schedule(Shape(count, size, length, training))
        samples = batch.map(lambda tensor: tensor.flatten(0, 1))
        args = (samples.tokens,) if 0 in self._stages else ()
        target = samples.targets if training and self._spec.stages - 1 in self._stages else None
        result: torch.Tensor | None = schedule.step(
            *args, target=target, return_outputs=not training, **samples.keywords()
        )
        return result

    def _objective(self, table: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        return self._losses.add_table(table)

    def _schedule(self, shape: Shape) -> PipelineScheduleSingle | PipelineScheduleMulti:
        known = self._schedules.pop(shape.training, None)
        if known is None or known[0] != shape:
            stages = [self._stage(index, shape) for index in sorted(self._stages)]
            loss = self._objective if shape.training else None
            if self._spec.schedule == "1f1b":
                single = Schedule1F1B if shape.training else ScheduleGPipe
                known = shape, single(stages[0], shape.micro_batches, loss, scale_grads=False)
            else:
                multi = MULTI[self._spec.schedule] if shape.training else ScheduleLoopedBFS
                known = shape, multi(stages, shape.micro_batches, loss, scale_grads=False)  # type: ignore[arg-type]
        self._schedules[shape.training] = known
        return known[1]

    def _stage(self, index: int, shape: Shape) -> "_Stage":
        module, last = self._stages[index], self._spec.stages - 1
        shards = module.sequence_shards if isinstance(module.sequence_shards, int) else 1
        hidden = torch.empty(
            (shape.micro_batch_size, shape.sequence // shards, self._hidden_size),
            dtype=self._dtype,
            device="meta",
            requires_grad=shape.training,
        )
        tokens = torch.empty((shape.micro_batch_size, shape.sequence), dtype=torch.int64, device="meta")
        summed = torch.float64 if self._dtype == torch.float64 else torch.float32
        losses = torch.empty(
            (shape.micro_batch_size, self._losses.columns), dtype=summed, device="meta", requires_grad=shape.training
        )
        return _Stage(
            module,
            index,
            self._spec.stages,
            self._device,
            input_args=tokens if index == 0 else hidden,
            output_args=losses if index == last else hidden,
            group=self._group,
        )


class _Stage(PipelineStage):
    """A stage that skips gradient reduction after a forward without backward."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
