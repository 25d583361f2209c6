"""The default engine: PyTorch's own DTensor, pipelining and FSDP2, on CPU with gloo and on CUDA with NCCL."""

import math
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from keepwarm.tested import splits_custom_backward
from parallel import clip, data
from parallel.engine import IGNORED, Batch, StepResult
from parallel.errors import EngineUnavailable, LayoutError
from parallel.layout import Layout, stages_of
from parallel.mesh import Mesh
from parallel.model import ModelParts
from parallel.optimizer import Updater
from parallel.pipeline import Loss, Pipeline
from parallel.shard import Shard
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from parallel.stage import Stage, is_tied_across

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class TorchEngine:
    """An `Engine` for one rank; every rank of the layout makes one.

    The loss is summed over the unmasked targets of the global batch and divided by their number, which is known
    before forward; gradients are summed over micro-batches and the data axis and reduced once per step.
    """

    def __init__(
        self,
        model: ModelParts,
        parallel: ParallelSpec,
        optimizer: OptimizerSpec,
        numerics: NumericsSpec,
        layout: Layout,
        *,
        device: torch.device,
        timeout: timedelta,
    ) -> None:
        """Build this rank's stages, write in the initial weights and make the optimizer's state.

        `torch.distributed` is initialised by the caller, or not at all for a world of one rank. Threads are set by
        the caller too, before the first operation.

        Args:
            device: where parameters live; for CUDA the current device.
            timeout: of every collective in the groups that the engine makes.

        Raises:
            LayoutError: the layout does not fit the model or the world.
            EngineUnavailable: an option is not installed, or cannot be combined with another.
        """
        _check(model, parallel, numerics)
        if numerics.deterministic:
            torch.use_deterministic_algorithms(True)
        self.layout = layout
        self._model = model
        self._parallel = parallel
        self._optimizer = optimizer
        self._device = device
        shard_size, wrapped = data.shard_size_of(parallel), data.is_wrapped(parallel, numerics)
        self._mesh = Mesh(layout, device, timeout, shard_size=shard_size, alone=wrapped)
        stages = [
            Stage.build(index, model, parallel, numerics, self._mesh, device)
            for index in stages_of(self._mesh.at.pipeline, parallel)
        ]
        for stage in stages:
            stage.initialise(model)
        self._parts = {stage.index: stage.part for stage in stages}
        self._parameters = [held for stage in stages for held in stage.held]
        self._updater = Updater(optimizer, model, self._parameters, device)
        self._loss = Loss(device)
        self._pipeline = self._make_pipeline(DTYPES[numerics.precision])

    @property
    def mesh(self) -> Mesh:
        """The process groups; the engine's own."""
        return self._mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`.

        Raises:
            LayoutError: the pipeline schedule cannot run this number of micro-batches.
        """
        tokens, targets, documents = self._on_device(batch)
        count = self._global_count(targets)
        self._loss.count = count
        self._loss.total.zero_()
        if self._pipeline is not None:
            self._pipeline.train(tokens, targets, documents)
        else:
            self._accumulate(tokens, targets, documents)
        self._finish_gradients()
        total, squared, number = self._agree(
            self._loss.total, clip.squared_norm(self._parameters, self._mesh.rank, self._device), count
        )
        loss = total / number if number else math.nan
        norm = math.sqrt(squared) if squared >= 0 else math.nan
        if before_update is not None:
            before_update()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            if self._optimizer.clip_norm is not None:
                clip.clip(self._parameters, norm, self._optimizer.clip_norm)
            self._updater.step(lr)
        self._drop_gradients()
        return StepResult(loss=loss, tokens=int(number), grad_norm=norm, skipped=skipped)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        tokens, targets, documents = self._on_device(batch)
        count = self._global_count(targets)
        self._loss.total.zero_()
        if self._pipeline is not None:
            output = self._pipeline.evaluate(tokens, targets, documents)
            if output is not None:
                self._loss(output)
        else:
            with torch.no_grad():
                for micro in range(tokens.shape[0]):
                    self._loss(self._forward(tokens, targets, documents, micro))
        for part in self._parts.values():
            data.reshard(part)
        total, number = self._agree(self._loss.total, count)
        return total, int(number)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`; moments are named as torch's optimizers name them, `optimizer.step` counts updates."""
        shards = [held.shard("model", held.local.data) for held in self._parameters]
        shards += self._updater.shards(range(self.layout.world_size))
        return {shard.name: shard for shard in shards}

    def restored(self) -> None:
        """See `Engine.restored`."""
        self._updater.restored()
        for part in self._parts.values():
            data.reshard(part)

    def close(self) -> None:
        """See `Engine.close`."""
        self._pipeline = None
        self._mesh.close()

    def _make_pipeline(self, dtype: torch.dtype) -> Pipeline | None:
        group = self._mesh.group("pipeline")
        if self.layout.pipeline == 1 or group is None:
            return None
        hidden = self._model.hidden_size
        return Pipeline(
            self._parts, self._parallel, group, self._device, hidden_size=hidden, dtype=dtype, loss=self._loss
        )

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self._parallel.sequence and batch.tokens.shape[-1] % self.layout.tensor:
            raise LayoutError(
                f"parallel.sequence: a sequence of {batch.tokens.shape[-1]} tokens does not divide by "
                f"parallel.tensor = {self.layout.tensor}"
            )
        documents = None if batch.documents is None else batch.documents.to(self._device, non_blocking=True)
        return (
            batch.tokens.to(self._device, non_blocking=True),
            batch.targets.to(self._device, non_blocking=True),
            documents,
        )

    def _global_count(self, targets: torch.Tensor) -> torch.Tensor:
        count = (targets != IGNORED).sum()
        if self.layout.data > 1:
            dist.all_reduce(count, group=self._mesh.group("data"))
        return count

    def _forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None, micro: int
    ) -> torch.Tensor:
        (part,) = self._parts.values()
        within = None if documents is None else documents[micro]
        output: torch.Tensor = part(tokens[micro], documents=within, targets=targets[micro])
        return output

    def _accumulate(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """Forward and backward of every micro-batch without a pipeline."""
        (part,) = self._parts.values()
        last = tokens.shape[0] - 1
        for micro in range(last + 1):
            data.prepare_backward(part, last=micro == last)
            self._loss(self._forward(tokens, targets, documents, micro)).backward()  # type: ignore[no-untyped-call]

    def _finish_gradients(self) -> None:
        clip.finish(self._parameters)
        ends = self._mesh.ends
        for held in self._parameters:
            tied = is_tied_across(held.name, self._model, self.layout.pipeline)
            if tied and held.local.grad is not None and ends is not None:
                clip.sum_ends(held.local.grad, ends)

    def _drop_gradients(self) -> None:
        for held in self._parameters:
            held.parameter.grad = None
            held.local.grad = None

    def _agree(self, total: torch.Tensor, *others: torch.Tensor) -> list[float]:
        """One sum over the world: of `total` where the head is, and of all `others` but the last, known everywhere."""
        at = self._mesh.at
        counts = at.tensor == 0 and at.pipeline == self.layout.pipeline - 1
        *summed, known = others
        numbers = torch.stack([total if counts else torch.zeros_like(total), *summed, known.double()])
        if self._mesh.world is not None:
            dist.all_reduce(numbers[:-1], group=self._mesh.world)
        result: list[float] = numbers.tolist()
        return result


def _check(model: ModelParts, parallel: ParallelSpec, numerics: NumericsSpec) -> None:
    for what, size in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads),
        ("vocabulary_size", model.vocabulary_size),
    ):
        if size % parallel.tensor:
            raise LayoutError(f"model.{what} = {size} does not divide by parallel.tensor = {parallel.tensor}")
    if parallel.schedule == "zero_bubble" and parallel.pipeline > 1 and not splits_custom_backward(torch.__version__):
        raise EngineUnavailable(
            f"parallel.schedule = zero_bubble needs torch 2.13, {torch.__version__} is installed; set another schedule"
        )
    if numerics.compile and parallel.schedule == "zero_bubble" and parallel.pipeline > 1:
        raise EngineUnavailable(
            "parallel.schedule = zero_bubble splits backward, which compiled layers do not allow; "
            "set numerics.compile = false or another schedule"
        )
