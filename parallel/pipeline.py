"""Pipeline parallelism over the schedules of torch.distributed.pipelining.

Shapes are given to the stages up front, so that no stage runs a trial forward or sends pickled descriptions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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

from parallel.layout import check_micro_batches
from parallel.spec import ParallelSpec

MULTI: Mapping[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Shape(NamedTuple):
    """What fixes the buffers of a schedule."""

    micro_batches: int
    micro_size: int
    sequence: int
    training: bool


class Loss:
    """The loss function of the last stage: sums cross-entropy for the record, returns what backward starts from."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.ones((), device=device)
        """Unmasked targets of the global batch."""
        self.total = torch.zeros((), device=device, dtype=torch.float64)

    def __call__(self, output: torch.Tensor, _targets: torch.Tensor | None = None) -> torch.Tensor:
        """`output` is `[micro, 2]`: summed cross-entropy and z-loss of each sample."""
        self.total += output[:, 0].detach().sum()
        return output.sum() / self.count


class Pipeline:
    """The stages of one rank and its schedules, made anew when the micro-batches change in number or shape."""

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        spec: ParallelSpec,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        loss: Loss,
    ) -> None:
        """`parts` are this rank's stages by index; `dtype` is that of the hidden states sent between stages."""
        self._parts = parts
        self._spec = spec
        self._group = group
        self._device = device
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._loss = loss
        # One for training and one for evaluation: a schedule holds the buffers of all its micro-batches.
        self._schedules: dict[bool, tuple[Shape, PipelineScheduleSingle | PipelineScheduleMulti]] = {}

    def train(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """Forward and backward of all micro-batches; the loss object collects the result on the last stage.

        Raises:
            LayoutError: the schedule cannot run this number of micro-batches.
        """
        check_micro_batches(tokens.shape[0], self._spec)
        self._run(tokens, targets, documents, training=True)

    def evaluate(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Forward of all micro-batches: `[samples, 2]` as the head returns it on the last stage, else None."""
        with torch.no_grad():
            return self._run(tokens, targets, documents, training=False)

    def _run(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None, *, training: bool
    ) -> torch.Tensor | None:
        count, size, length = tokens.shape
        schedule = self._schedule(Shape(count, size, length, training))
        last = self._spec.stages - 1
        # Keyword arguments reach every local stage, so `targets` goes only to ranks of the last stage; its other
        # stages have no head and ignore it.
        kwargs: dict[str, Any] = {} if documents is None else {"documents": documents.flatten(0, 1)}
        if last in self._parts:
            kwargs["targets"] = targets.flatten(0, 1)
        args = (tokens.flatten(0, 1),) if 0 in self._parts else ()
        target = targets.flatten(0, 1) if training and last in self._parts else None
        result: torch.Tensor | None = schedule.step(*args, target=target, return_outputs=not training, **kwargs)
        return result

    def _schedule(self, shape: Shape) -> PipelineScheduleSingle | PipelineScheduleMulti:
        known = self._schedules.pop(shape.training, None)
        if known is None or known[0] != shape:
            stages = [self._stage(index, shape) for index in sorted(self._parts)]
            loss = self._loss if shape.training else None
            if self._spec.schedule == "1f1b":
                single = Schedule1F1B if shape.training else ScheduleGPipe
                known = shape, single(stages[0], shape.micro_batches, loss, scale_grads=False)
            else:
                multi = MULTI[self._spec.schedule] if shape.training else ScheduleLoopedBFS
                known = shape, multi(stages, shape.micro_batches, loss, scale_grads=False)  # type: ignore[arg-type]
        self._schedules[shape.training] = known
        return known[1]

    def _stage(self, index: int, shape: Shape) -> "_Stage":
        part, last = self._parts[index], self._spec.stages - 1
        shards = part.sequence_shards if isinstance(part.sequence_shards, int) else 1
        hidden = torch.empty(
            (shape.micro_size, shape.sequence // shards, self._hidden_size),
            dtype=self._dtype,
            device="meta",
            requires_grad=shape.training,
        )
        tokens = torch.empty((shape.micro_size, shape.sequence), dtype=torch.int64, device="meta")
        summed = torch.float64 if self._dtype == torch.float64 else torch.float32
        losses = torch.empty((shape.micro_size, 2), dtype=summed, device="meta", requires_grad=shape.training)
        return _Stage(
            part,
            index,
            self._spec.stages,
            self._device,
            input_args=tokens if index == 0 else hidden,
            output_args=losses if index == last else hidden,
            group=self._group,
        )


class _Stage(PipelineStage):
    """A stage that has no gradient to reduce after a forward without backward."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
