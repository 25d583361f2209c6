"""DeepSpeed engine: ZeRO stages 1 to 3, pipelines with ZeRO 1, and Megatron Core's layers on the tensor axis."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from keepwarm.parallel import step
from keepwarm.parallel.deepspeed.info import DeepSpeedOptions
from keepwarm.parallel.deepspeed.setup import Groups, configuration, initialized, prepared
from keepwarm.parallel.deepspeed.zero import Partition, PartitionByParameter, UnpartitionedParameter, groups_of
from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.mesh.layout import split_layers
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.model import is_tied_across
from keepwarm.parallel.optimizer.optimizer import counter_shard, make_optimizer, moments, set_step, weight_decay
from keepwarm.parallel.optimizer.optimizer import materialise as materialise_state
from keepwarm.parallel.parameter import ShardingSpec, Split, materialise
from keepwarm.parallel.recompute import apply_numerics, in_bf16
from keepwarm.parallel.shard import Shard

if TYPE_CHECKING:
    from keepwarm.parallel.deepspeed.pipeline import Pipeline


@dataclass(kw_only=True, slots=True)
class _Step:
    """Inputs of the update at the end of DeepSpeed's step, and its result."""

    lr: float
    before_update: Callable[[], None] | None
    result: StepResult | None = None


class DeepSpeedEngine:
    """An `Engine` for one rank; every rank of the layout creates one.

    DeepSpeed averages over micro-batches and over the data axis. The loss is multiplied by the divisor beforehand, so
    that the gradients are those of the loss that `Engine` defines. The engine itself clips gradients and decides
    whether to skip a step; to skip one, it hands DeepSpeed a non-finite gradient.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Build this rank's stage, fill in the initial weights and allocate the optimizer state.

        The caller initialises `torch.distributed`; a world of one rank does not need it.

        Raises:
            LayoutError: the layout does not fit the model or the world.
            EngineUnavailable: an optional dependency is not installed.
        """
        optimizer, model = config.optimizer, config.model
        self._options = config.parallel.options_as(DeepSpeedOptions)
        step.set_numerics(config)
        self.layout = config.layout
        self._config = config
        self._linear = nn.functional.linear
        self._mesh = Mesh(config.layout, config.device, config.timeout, alone=True)
        self._losses = Losses(model.loss_weights, config.device)
        self._losses.scale = config.layout.data
        module, placed = self._build()
        rates = {one.name: weight_decay(optimizer, model, one.name) for one in placed}
        self._torch = make_optimizer(optimizer, groups_of(placed, rates), config.device)
        self.counter = torch.zeros((), dtype=torch.int64)
        self._pipeline: Pipeline | None = None
        self._make(module, placed)
        kind = PartitionByParameter if self._options.zero_stage == 3 else Partition
        self._partition = kind(self._zero, placed)
        materialise_state(self._torch, optimizer, self._partition.buffers[0].device, self._partition.buffers)
        self._pending: _Step | None = None
        self._update = self._zero.step
        self._norm = math.nan
        if self._options.zero_stage < 3:
            # DeepSpeed all-reduces the norm of each parameter group in turn. Middle stages have no group for tied
            # embeddings, so all ranks would deadlock. `self._norm` carries the same verdict, already agreed on.
            self._zero.scaled_global_norm = lambda: torch.tensor(self._norm, device=config.device)
        self._zero.step = self._decide

    @property
    def mesh(self) -> Mesh:
        """The process groups, owned by the engine."""
        return self._mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`."""
        batch = step.begin(batch, self._config, self._mesh, self._losses)
        self._pending = _Step(lr=lr, before_update=before_update)
        if self._pipeline is not None:
            self._pipeline.train(batch)
        else:
            self._accumulate(batch)
        result, self._pending = self._pending.result, None
        if result is None:
            raise AssertionError("DeepSpeed did not update at the end of the step")
        return result

    def evaluate(self, batch: Batch) -> Evaluation:
        """See `Engine.evaluate`."""
        batch = step.begin(batch, self._config, self._mesh, self._losses)
        if self._pipeline is not None:
            self._pipeline.evaluate(batch)
        else:
            with torch.no_grad():
                for micro in range(len(batch.tokens)):
                    self._forward(batch.micro_batch(micro))
        return step.evaluated(self._mesh, self._losses)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`. Weights are ZeRO's fp32 master weights; each rank holds its partition."""
        buffers = self._partition.buffers
        shards = [counter_shard(self.counter, range(self.layout.world_size))]
        for fragment in self._partition.fragments:
            if not fragment.elements:
                continue
            flat = buffers[fragment.buffer]
            shards.append(fragment.shard("model", flat))
            for key, stored in moments(self._config.optimizer).items():
                shards.append(fragment.shard(f"optimizer.{key}", self._torch.state[flat][stored]))
        return {shard.name: shard for shard in shards}

    def restored(self) -> None:
        """See `Engine.restored`."""
        set_step(self._torch, self._config.optimizer, int(self.counter))
        self._partition.refresh()

    def close(self) -> None:
        """See `Engine.close`."""
        self._zero.step = self._update
        self._pipeline = None
        self._deepspeed.destroy()
        # ZeRO 3 replaces torch's `linear` with its own for the whole process.
        nn.functional.linear = self._linear
        self._mesh.close()

    def _build(self) -> tuple[nn.Module, list[UnpartitionedParameter]]:
        """Return this rank's stage with its initial weights, and where its parameters lie in the model."""
        model, numerics, device = self._config.model, self._config.numerics, self._config.device
        stage, layout = self._mesh.at.pipeline, self.layout
        split: dict[str, Split] = {}
        with torch.device("meta"):
            layers = split_layers(model.layers, self._config.parallel)[stage]
            module = model.build_stage(layers, embed=stage == 0, head=stage == layout.pipeline - 1)
            shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
            group = self._mesh.group("tensor")
            if layout.tensor > 1 and group is not None:
                from keepwarm.parallel.deepspeed.tensor import split as split_over

                split = split_over(module, model.tensor_plan(), group, device)
                module.tie()  # type: ignore[operator]
        apply_numerics(module, numerics)
        if numerics.precision == "bf16":
            module.forward = in_bf16(module.forward, device)
        module.forward = self._losses.collected(module.forward)
        materialise(module, device)
        boxes = ShardingSpec(layout=layout, at=self._mesh.at, split=split, shard_size=1)
        alone = ShardingSpec(layout=layout, at=self._mesh.at, split=split, shard_size=layout.data)
        placed = []
        for name, parameter in module.named_parameters():
            canonical = model.canonical(name)
            box = boxes.box(name, shapes[name])
            parameter.data.copy_(model.initial(canonical, shapes[name], box.offsets, box.shape))
            tied = is_tied_across(canonical, model, layout.pipeline)
            placed.append(
                UnpartitionedParameter(
                    name=canonical,
                    parameter=parameter,
                    global_shape=shapes[name],
                    box=box,
                    replicas=alone.replicas(name, (0, layout.pipeline - 1) if tied else (stage,)),
                    tied=tied,
                )
            )
        return module, placed

    def _make(self, module: nn.Module, placed: list[UnpartitionedParameter]) -> None:
        """Create DeepSpeed's engine over the stage."""
        config = configuration(self._options, [one.parameter for one in placed])
        with prepared(self._mesh, self._config.device):
            if self.layout.pipeline > 1:
                from keepwarm.parallel.deepspeed.pipeline import Pipeline, Stages

                tied = [one.parameter for one in placed if one.tied]
                stages = Stages(module, self._mesh, self._losses, tied)
                self._pipeline = Pipeline(stages, initialized(stages, self._torch, config, None))
                self._deepspeed = self._pipeline.engine
            else:
                self._deepspeed = initialized(module, self._torch, config, Groups(self._mesh))
        self._zero = self._deepspeed.optimizer

    def _forward(self, micro: Batch) -> torch.Tensor:
        """Return the objective of one micro-batch, without a pipeline."""
        return self._losses.add_table(self._deepspeed(micro.tokens, **micro.keywords()))

    def _accumulate(self, batch: Batch) -> None:
        """Run forward and backward of every micro-batch without a pipeline, then the update."""
        last = len(batch.tokens) - 1
        for micro in range(last + 1):
            self._deepspeed.set_gradient_accumulation_boundary(micro == last)
            self._deepspeed.backward(self._forward(batch.micro_batch(micro)), scale_wrt_gas=False)
        self._deepspeed.step()

    def _decide(self, closure: Callable[[], float] | None = None) -> None:
        """Finish the step and update unless it is skipped.

        Replaces the update that DeepSpeed's engines call after the last backward of a step.
        """
        pending = self._pending
        if pending is None:
            raise AssertionError("DeepSpeed updates outside of a step")
        gradients = self._partition.gradients()
        result = step.finish(self._config, self._mesh, self._losses, gradients, pending.before_update)
        if result.skipped:
            self._norm = math.nan
            self._partition.discard()
        else:
            self._norm = result.grad_norm
            for group in self._torch.param_groups:
                group["lr"] = pending.lr
            self.counter += 1
        self._update()
        pending.result = result
