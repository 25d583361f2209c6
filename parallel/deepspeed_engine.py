"""The engine over DeepSpeed: ZeRO 1 to 3, its pipeline with ZeRO 1, Megatron Core's layers on the tensor axis."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from parallel import data
from parallel.deepspeed_setup import Groups, configuration, initialized, prepared
from parallel.deepspeed_zero import Partition, PartitionByParameter, Placed, groups_of
from parallel.engine import IGNORED, Batch, StepResult
from parallel.layout import Layout, split_layers
from parallel.mesh import Mesh
from parallel.model import ModelParts
from parallel.optimizer import counter_shard, make_optimizer, materialise, moments, set_step, weight_decay
from parallel.parameter import Spread
from parallel.pipeline import Loss
from parallel.recompute import apply_numerics, in_bf16
from parallel.shard import Shard
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from parallel.stage import is_tied_across

if TYPE_CHECKING:
    from parallel.deepspeed_pipeline import Pipeline


@dataclass(kw_only=True, slots=True)
class _Step:
    """What the update at the end of DeepSpeed's step needs from outside, and what it found."""

    lr: float
    count: torch.Tensor
    before_update: Callable[[], None] | None
    result: StepResult | None = None


class DeepSpeedEngine:
    """An `Engine` for one rank; every rank of the layout makes one.

    DeepSpeed averages over micro-batches and over the data axis. The loss is multiplied beforehand by what it will be
    divided by, so that gradients are those of the loss that `Engine` defines. Clipping and the decision to skip a step
    are the engine's own; to skip, DeepSpeed is shown a gradient that is not finite.
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
        """Build this rank's stage, write in the initial weights and make the optimizer's state.

        `torch.distributed` is initialised by the caller, or not at all for a world of one rank.

        Raises:
            LayoutError: the layout does not fit the model or the world.
            EngineUnavailable: an option is not installed.
        """
        if numerics.deterministic:
            torch.use_deterministic_algorithms(True)
        self.layout = layout
        self._model = model
        self._parallel = parallel
        self._optimizer = optimizer
        self._device = device
        self._linear = nn.functional.linear
        self._mesh = Mesh(layout, device, timeout, alone=True)
        part, placed = self._build(numerics)
        rates = {one.name: weight_decay(optimizer, model, one.name) for one in placed}
        self._torch = make_optimizer(optimizer, groups_of(placed, rates), device)
        self.counter = torch.zeros((), dtype=torch.int64)
        self._loss = Loss(device)
        self._pipeline: Pipeline | None = None
        self._make(part, placed)
        kind = PartitionByParameter if parallel.zero_stage == 3 else Partition
        self._partition = kind(self._zero, placed)
        materialise(self._torch, optimizer, self._partition.buffers[0].device, self._partition.buffers)
        self._pending: _Step | None = None
        self._update = self._zero.step
        self._norm = math.nan
        if parallel.zero_stage < 3:
            # DeepSpeed agrees on the norm of one parameter group after the other; stages between the first and the last
            # have none for tied embeddings, and all would wait for ever. What is agreed here says the same.
            self._zero.scaled_global_norm = lambda: torch.tensor(self._norm, device=self._device)
        self._zero.step = self._decide

    @property
    def mesh(self) -> Mesh:
        """The process groups; the engine's own."""
        return self._mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`."""
        tokens, targets, documents = self._on_device(batch)
        count = self._global_count(targets)
        self._loss.count = count
        self._loss.total.zero_()
        self._pending = _Step(lr=lr, count=count, before_update=before_update)
        if self._pipeline is not None:
            self._pipeline.train(tokens, targets, documents)
        else:
            self._accumulate(tokens, targets, documents)
        result, self._pending = self._pending.result, None
        if result is None:
            raise AssertionError("DeepSpeed did not update at the end of the step")
        return result

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        tokens, targets, documents = self._on_device(batch)
        count = self._global_count(targets)
        self._loss.count = count
        self._loss.total.zero_()
        if self._pipeline is not None:
            self._pipeline.evaluate(tokens, targets, documents)
        else:
            with torch.no_grad():
                for micro in range(tokens.shape[0]):
                    self._loss(self._forward(tokens, targets, documents, micro))
        (total,) = self._agree(self._loss.total)
        return total, int(count)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`; weights are ZeRO's fp32 master weights, of which each rank holds its partition."""
        buffers = self._partition.buffers
        shards = [counter_shard(self.counter, range(self.layout.world_size))]
        for fragment in self._partition.fragments:
            if not fragment.elements:
                continue
            flat = buffers[fragment.buffer]
            shards.append(fragment.shard("model", flat))
            for key, stored in moments(self._optimizer).items():
                shards.append(fragment.shard(f"optimizer.{key}", self._torch.state[flat][stored]))
        return {shard.name: shard for shard in shards}

    def restored(self) -> None:
        """See `Engine.restored`."""
        set_step(self._torch, int(self.counter))
        self._partition.refresh()

    def close(self) -> None:
        """See `Engine.close`."""
        self._zero.step = self._update
        self._pipeline = None
        self._deepspeed.destroy()
        # ZeRO 3 puts one of its own in the place of torch's, for the whole process.
        nn.functional.linear = self._linear
        self._mesh.close()

    def _build(self, numerics: NumericsSpec) -> tuple[nn.Module, list[Placed]]:
        """This rank's part with its initial weights, and where its parameters lie in the model."""
        stage, layout = self._mesh.at.pipeline, self.layout
        split: dict[str, int] = {}
        with torch.device("meta"):
            layers = split_layers(self._model.layers, self._parallel)[stage]
            part = self._model.part(layers, embed=stage == 0, head=stage == layout.pipeline - 1)
            shapes = {name: tuple(parameter.shape) for name, parameter in part.named_parameters()}
            group = self._mesh.group("tensor")
            if layout.tensor > 1 and group is not None:
                from parallel.deepspeed_tensor import split as split_over

                split = split_over(part, self._model.tensor_plan(), group)
                part.tie()  # type: ignore[operator]
        apply_numerics(part, numerics)
        if numerics.precision == "bf16":
            part.forward = in_bf16(part.forward, self._device)
        data.materialise(part, self._device)
        boxes = Spread(layout=layout, at=self._mesh.at, split=split, shard_size=1)
        alone = Spread(layout=layout, at=self._mesh.at, split=split, shard_size=layout.data)
        placed = []
        for name, parameter in part.named_parameters():
            canonical = self._model.canonical(name)
            box = boxes.box(name, shapes[name])
            parameter.data.copy_(self._model.initial(canonical, shapes[name], box.offsets, box.shape))
            tied = is_tied_across(canonical, self._model, layout.pipeline)
            placed.append(
                Placed(
                    name=canonical,
                    parameter=parameter,
                    global_shape=shapes[name],
                    box=box,
                    replicas=alone.replicas(name, (0, layout.pipeline - 1) if tied else (stage,)),
                    tied=tied,
                )
            )
        return part, placed

    def _make(self, part: nn.Module, placed: list[Placed]) -> None:
        """Hand the part to DeepSpeed."""
        config = configuration(self._parallel, [one.parameter for one in placed])
        with prepared(self._mesh, self._device):
            if self.layout.pipeline > 1:
                from parallel.deepspeed_pipeline import Pipeline

                self._pipeline = Pipeline(part, placed, self._mesh, self._loss, self._torch, config)
                self._deepspeed = self._pipeline.engine
            else:
                self._deepspeed = initialized(part, self._torch, config, Groups(self._mesh))
        self._zero = self._deepspeed.optimizer

    def _forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None, micro: int
    ) -> torch.Tensor:
        within = None if documents is None else documents[micro]
        output: torch.Tensor = self._deepspeed(tokens[micro], documents=within, targets=targets[micro])
        return output

    def _accumulate(self, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None) -> None:
        """Forward and backward of every micro-batch without a pipeline, and the update."""
        last = tokens.shape[0] - 1
        for micro in range(last + 1):
            self._deepspeed.set_gradient_accumulation_boundary(micro == last)
            loss = self._loss(self._forward(tokens, targets, documents, micro))
            self._deepspeed.backward(loss * self.layout.data, scale_wrt_gas=False)
        self._deepspeed.step()

    def _decide(self, closure: Callable[[], float] | None = None) -> None:
        """Stands before DeepSpeed's update, which its engines call after the last backward of a step."""
        step = self._pending
        if step is None:
            raise AssertionError("DeepSpeed updates outside of a step")
        total, squared = self._agree(self._loss.total, self._squared_norm())
        number = int(step.count)
        loss = total / number if number else math.nan
        norm = math.sqrt(squared) if squared >= 0 else math.nan
        if step.before_update is not None:
            step.before_update()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        self._norm = math.nan if skipped else norm
        if skipped:
            self._partition.discard()
        else:
            self._clip(norm)
            for group in self._torch.param_groups:
                group["lr"] = step.lr
            self.counter += 1
        self._update()
        step.result = StepResult(loss=loss, tokens=number, grad_norm=norm, skipped=skipped)

    def _squared_norm(self) -> torch.Tensor:
        """This rank's part of the squared 2-norm of the gradient: what several ranks hold counts on the first."""
        mine = [
            gradient
            for fragment, gradient in self._partition.gradients()
            if fragment.placed.replicas[0] == self._mesh.rank and gradient.numel()
        ]
        if not mine:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack(torch._foreach_norm(mine)).double().square().sum().to(self._device)

    def _clip(self, norm: float) -> None:
        limit = self._optimizer.clip_norm
        factor = 1.0 if limit is None else limit / (norm + 1e-6)
        gradients = [gradient for _, gradient in self._partition.gradients()]
        if factor < 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
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

    def _agree(self, total: torch.Tensor, *others: torch.Tensor) -> list[float]:
        """One sum over the world: of `total` where the head is, and of all `others`."""
        at = self._mesh.at
        counts = at.tensor == 0 and at.pipeline == self.layout.pipeline - 1
        numbers = torch.stack([total if counts else torch.zeros_like(total), *others])
        dist.all_reduce(numbers, group=self._mesh.world)
        result: list[float] = numbers.tolist()
        return result
