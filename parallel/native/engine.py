"""Default engine: PyTorch's own DTensor, pipelining and FSDP2, with gloo on CPUs and NCCL on CUDA."""

from collections.abc import Callable, Mapping

import torch

from keepwarm.parallel import step
from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.mesh.layout import stages_of
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.model import ModelParts, is_tied_across
from keepwarm.parallel.native import data
from keepwarm.parallel.native.pipeline import Pipeline
from keepwarm.parallel.native.stage import PREFIX, Stage
from keepwarm.parallel.optimizer import clip
from keepwarm.parallel.optimizer.optimizer import Updater
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.parallel.style import copies_of, misfits


class TorchEngine:
    """An `Engine` for one rank; every rank of the layout creates one.

    Gradients are summed over micro-batches and the data axis, and reduced once per step, or once per micro-batch with
    `parallel.accumulate = sharded`.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Build this rank's stages, fill in the initial weights and allocate the optimizer state.

        The caller initialises `torch.distributed` (a world of one rank does not need it) and sets the number of threads
        before the first operation.

        Raises:
            LayoutError: the layout does not fit the model or the world.
            EngineUnavailable: an optional dependency is not installed.
        """
        model, parallel, numerics = config.model, config.parallel, config.numerics
        _check(model, parallel)
        step.set_numerics(config)
        self.layout = config.layout
        self._config = config
        shard_size, wrapped = data.shard_size_of(parallel), data.is_wrapped(parallel, numerics)
        copies = copies_of("key_value", model.kv_heads, parallel.tensor)
        self._mesh = Mesh(
            config.layout, config.device, config.timeout, shard_size=shard_size, alone=wrapped, copies=copies
        )
        stages = [Stage.build(index, config, self._mesh) for index in stages_of(self._mesh.at.pipeline, parallel)]
        self._losses = Losses(model.loss_weights, config.device)
        for stage in stages:
            stage.initialise(model)
            stage.module.forward = self._losses.collected(stage.module.forward)
        self._modules = {stage.index: stage.module for stage in stages}
        self._parameters = [parameter for stage in stages for parameter in stage.parameters]
        self._buffers = [buffer for stage in stages for buffer in stage.buffers]
        plane = self._mesh.plane() if config.optimizer.name == "muon" else None
        self._updater = Updater(config, self._parameters, plane)
        self._pipeline = self._make_pipeline()

    @property
    def mesh(self) -> Mesh:
        """The process groups, owned by the engine."""
        return self._mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`.

        Raises:
            LayoutError: the pipeline schedule cannot run this number of micro-batches.
        """
        batch = step.begin(batch, self._config, self._mesh, self._losses)
        if self._pipeline is not None:
            self._pipeline.train(batch)
        else:
            self._accumulate(batch)
        self._finish_gradients()
        gradients = clip.gradients_of(self._parameters)
        result = step.finish(self._config, self._mesh, self._losses, gradients, before_update)
        if not result.skipped:
            self._updater.step(lr)
        self._drop_gradients()
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
        for module in self._modules.values():
            data.reshard(module)
        return step.evaluated(self._mesh, self._losses)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`. Moments have the names that torch's optimizers use; `optimizer.step` counts updates."""
        shards = [sharded.shard(PREFIX, sharded.local.data) for sharded in self._parameters] + self._buffers
        shards += self._updater.shards(range(self.layout.world_size))
        return {shard.name: shard for shard in shards}

    def restored(self) -> None:
        """See `Engine.restored`."""
        self._updater.restored()
        for module in self._modules.values():
            data.reshard(module)

    def close(self) -> None:
        """See `Engine.close`."""
        self._pipeline = None
        self._mesh.close()

    def _make_pipeline(self) -> Pipeline | None:
        group = self._mesh.group("pipeline")
        if self.layout.pipeline == 1 or group is None:
            return None
        return Pipeline(self._modules, self._config, group, self._losses)

    def _forward(self, micro: Batch) -> torch.Tensor:
        """Return the objective of one micro-batch, without a pipeline."""
        (module,) = self._modules.values()
        return self._losses.add_table(module(micro.tokens, **micro.keywords()))

    def _accumulate(self, batch: Batch) -> None:
        """Run forward and backward of every micro-batch without a pipeline."""
        (module,) = self._modules.values()
        last = len(batch.tokens) - 1
        for micro in range(last + 1):
            data.prepare_backward(module, self._config.parallel, last=micro == last)
            self._forward(batch.micro_batch(micro)).backward()  # type: ignore[no-untyped-call]

    def _finish_gradients(self) -> None:
        clip.finish(self._parameters, coalesce=self._config.device.type != "cpu")
        ends, copies = self._mesh.ends, self._mesh.copies
        for sharded in self._parameters:
            if sharded.copied and sharded.local.grad is not None and copies is not None:
                clip.sum_copies(sharded.local.grad, copies)
            tied = is_tied_across(sharded.name, self._config.model, self.layout.pipeline)
            if tied and sharded.local.grad is not None and ends is not None:
                clip.sum_copies(sharded.local.grad, ends)

    def _drop_gradients(self) -> None:
        for sharded in self._parameters:
            sharded.parameter.grad = None
            sharded.local.grad = None


def _check(model: ModelParts, parallel: ParallelSpec) -> None:
    for problem in misfits(model.heads, model.kv_heads, model.vocabulary_size, parallel.tensor):
        raise LayoutError(problem)
