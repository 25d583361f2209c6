"""Megatron engine: Megatron Core's layers, pipeline schedules, data parallelism and optimizers."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from keepwarm.parallel import step
from keepwarm.parallel.engine import Batch, EngineConfig, Evaluation, StepResult
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.loss import Losses
from keepwarm.parallel.megatron.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    P2PCommunicator,
    finalize_model_grads,
    get_forward_backward_func,
    initialize_rng_tracker,
)
from keepwarm.parallel.megatron.groups import Groups
from keepwarm.parallel.megatron.info import MegatronInfo
from keepwarm.parallel.megatron.loss import NAMES, losses_of
from keepwarm.parallel.megatron.model import build_stages, transformer_config
from keepwarm.parallel.megatron.names import pieces_of
from keepwarm.parallel.megatron.optimizer import MegatronUpdater, is_distributed
from keepwarm.parallel.mesh.layout import split_layers, stages_of
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.parameter import ShardingSpec
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.targets import IGNORED


class MegatronEngine:
    """An `Engine` for one rank; every rank of the layout creates one.

    Process groups are passed to Megatron Core explicitly; its `parallel_state` is never initialised. One thing remains
    global: its random-state tracker, which is set to the no-op tracker because there is no dropout.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Build this rank's stages, allocate the optimizer state and fill in the initial weights.

        Jobs for which `MegatronInfo.refuses` yields a reason must have been rejected before.

        Raises:
            LayoutError: the layout does not fit the world.
            EngineUnavailable: an optional dependency is not installed, or the model has a loss that this engine lacks.
        """
        model, parallel = config.model, config.parallel
        if unknown := set(model.loss_weights) - set(NAMES):
            raise EngineUnavailable(f"parallel.engine = megatron: no loss {sorted(unknown)}; it has {list(NAMES)}")
        step.set_numerics(config)
        self.layout = config.layout
        self._config = config
        self._groups = Groups(config.layout, config.device, config.timeout)
        self._losses = Losses(model.loss_weights, config.device)
        mesh = self._groups.mesh
        with self._groups.inside():
            initialize_rng_tracker(inference_rng_tracker=True)
            self._transformer = transformer_config(config)
            stages = stages_of(mesh.at.pipeline, parallel)
            gpts = build_stages(config, self._transformer, self._groups.collection, stages)
            self._chunks = self._wrap(gpts)
            split = split_layers(model.layers, parallel)
            sharding = ShardingSpec(layout=config.layout, at=mesh.at, split={}, shard_size=1)
            pieces = [
                one
                for gpt, stage in zip(gpts, stages, strict=True)
                for one in pieces_of(gpt, split[stage], model, sharding)
            ]
            self._updater = MegatronUpdater(config, self._chunks, pieces, mesh)
        self._state = {shard.name: shard for shard in self._updater.shards(range(config.layout.world_size))}
        self._initialise()

    @property
    def mesh(self) -> Mesh:
        """The process groups, owned by the engine."""
        return self._groups.mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`.

        Raises:
            LayoutError: the pipeline schedule cannot run this number of micro-batches.
        """
        MegatronInfo.check_micro_batches(len(batch.tokens), self._config.parallel)
        batch = step.begin(batch, self._config, self.mesh, self._losses)
        with self._groups.inside():
            self._updater.clear()
            self._run(batch, training=True)
            self._updater.prepare()
        result = step.finish(self._config, self.mesh, self._losses, self._updater.gradients(), before_update)
        if not result.skipped:
            with self._groups.inside():
                self._updater.step(lr)
        return result

    def evaluate(self, batch: Batch) -> Evaluation:
        """See `Engine.evaluate`."""
        batch = step.begin(batch, self._config, self.mesh, self._losses)
        with self._groups.inside(), torch.no_grad():
            self._run(self._filled_up(batch), training=False)
        return step.evaluated(self.mesh, self._losses)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`. A name has no shard on a rank that updates none of its elements."""
        return dict(self._state)

    def restored(self) -> None:
        """See `Engine.restored`."""
        with self._groups.inside():
            self._updater.restored()

    def close(self) -> None:
        """See `Engine.close`."""
        self._chunks.clear()
        self._groups.close()

    def _wrap(self, gpts: list[Any]) -> list[Any]:
        """Wrap every stage in data parallelism and connect it to the pipeline schedules."""
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=is_distributed(self._config.parallel),
            average_in_collective=False,
        )
        chunks = [
            DistributedDataParallel(
                self._transformer, options, gpt, disable_bucketing=index > 0, pg_collection=self._groups.collection
            )
            for index, gpt in enumerate(gpts)
        ]
        self._transformer.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
        self._transformer.finalize_model_grads_func = _finalise
        return chunks

    def _initialise(self) -> None:
        for name, shard in self._state.items():
            if name.startswith("model."):
                values = self._config.model.initial(
                    name.removeprefix("model."), shard.global_shape, shard.offsets, shard.shape
                )
                values = values if shard.flat is None else values.view(-1)[slice(*shard.flat)]
                shard.local.copy_(values)
        self.restored()

    def _run(self, batch: Batch, *, training: bool) -> None:
        """Run forward, and backward in training, of all micro-batches; the last stage collects the losses."""
        micro_batches, micro_batch_size, sequence = batch.tokens.shape
        virtual = self._transformer.virtual_pipeline_model_parallel_size
        inputs = [_micro_batches(batch) for _ in self._chunks]
        collection = self._groups.collection
        get_forward_backward_func(pp_size=self.layout.pipeline, vp_size=virtual)(
            forward_step_func=self._forward,
            data_iterator=inputs if virtual else inputs[0],
            model=self._chunks if virtual else self._chunks[0],
            num_microbatches=micro_batches,
            seq_length=sequence,
            micro_batch_size=micro_batch_size,
            forward_only=not training,
            p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=self._transformer),
            pg_collection=collection,
        )

    def _forward(self, inputs: Iterator["_Inputs"], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        micro, positions, mask = next(inputs)
        return chunk(micro.tokens, positions, mask), functools.partial(self._loss, micro)

    def _loss(self, micro: Batch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return the objective of one micro-batch, computed from this rank's part of the logits."""
        objective = self._losses.add(losses_of(logits, micro, self._groups.collection.tp))
        return objective, torch.zeros((), dtype=torch.int, device=self._config.device), {}

    def _filled_up(self, batch: Batch) -> Batch:
        """Pad the batch with micro-batches without targets to a count that an interleaved schedule can run."""
        missing = -len(batch.tokens) % self.layout.pipeline
        if not missing or self._transformer.virtual_pipeline_model_parallel_size is None:
            return batch
        filled = batch.map(lambda tensor: torch.cat((tensor, tensor[-1:].expand(missing, *tensor.shape[1:]))))
        filled.targets[-missing:] = IGNORED
        return filled


def _finalise(chunks: list[Any], tokens: torch.Tensor | None, **options: Any) -> None:
    """Reduce gradients over the data axis, then over tensor ranks and tied stages where needed, without dividing."""
    finalize_model_grads(chunks, None, **options)


_Inputs = tuple[Batch, torch.Tensor, torch.Tensor | None]
"""One micro-batch, the positions of its tokens, and its attention mask."""


def _micro_batches(batch: Batch) -> Iterator[_Inputs]:
    """Yield the inputs of each micro-batch in order."""
    index = torch.arange(batch.tokens.shape[-1], device=batch.tokens.device)
    for number in range(len(batch.tokens)):
        micro = batch.micro_batch(number)
        positions, mask = index.expand_as(micro.tokens), None
        if micro.documents is not None:
            positions = _positions_in(micro.documents, index)
            same = micro.documents[:, None, :, None] == micro.documents[:, None, None, :]
            mask = same & (index[:, None] >= index)
        yield micro, positions, mask


def _positions_in(documents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the position of each token inside its document, for learned positions.

    Rotary embeddings do not need it, as they depend on distances only.
    """
    starts = torch.zeros_like(documents, dtype=torch.int64)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[1:], 0)
    return index - starts.cummax(dim=1).values
