"""Megatron Core as an engine: its layers, pipeline schedules, data parallelism and optimizers behind our interface."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel import clip
from parallel.engine import IGNORED, Batch, StepResult
from parallel.errors import LayoutError
from parallel.layout import Layout, check_micro_batches, split_layers, stages_of
from parallel.megatron_groups import Groups
from parallel.megatron_import import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    P2PCommunicator,
    finalize_model_grads,
    get_forward_backward_func,
    initialize_rng_tracker,
)
from parallel.megatron_loss import cross_entropy
from parallel.megatron_model import build_stages, transformer_config
from parallel.megatron_names import pieces_of
from parallel.megatron_optimizer import MegatronUpdater
from parallel.mesh import Mesh
from parallel.model import ModelParts
from parallel.parameter import Spread
from parallel.shard import Shard
from parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec


class MegatronEngine:
    """An `Engine` for one rank; every rank of the layout makes one.

    Process groups are handed to Megatron Core explicitly, its `parallel_state` is never initialised. One thing stays
    global: its tracker of random states, which is set to the one that does nothing, as there is no dropout.
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
        """Build this rank's stages, make the optimizer's state and write in the initial weights.

        What `parallel.engine_support.refusals` names must have been refused before. Arguments as of `TorchEngine`.

        Raises:
            LayoutError: the layout does not fit the world.
            EngineUnavailable: an option is not installed.
        """
        if numerics.deterministic:
            torch.use_deterministic_algorithms(True)
        self.layout = layout
        self._model, self._parallel, self._optimizer, self._device = model, parallel, optimizer, device
        self._groups = Groups(layout, device, timeout)
        mesh = self._groups.mesh
        self._count = torch.ones((), device=device)
        self._total = torch.zeros((), device=device, dtype=torch.float64)
        with self._groups.inside():
            initialize_rng_tracker(inference_rng_tracker=True)
            self._config = transformer_config(model, parallel, numerics, device)
            stages = stages_of(mesh.at.pipeline, parallel)
            parts = build_stages(model, parallel, numerics, self._config, self._groups.collection, stages)
            self._chunks = self._wrap(parts)
            split = split_layers(model.layers, parallel)
            spread = Spread(layout=layout, at=mesh.at, split={}, shard_size=1)
            self._updater = MegatronUpdater(
                optimizer,
                numerics,
                model,
                self._chunks,
                [
                    one
                    for part, stage in zip(parts, stages, strict=True)
                    for one in pieces_of(part, split[stage], model, spread)
                ],
                mesh,
                distributed=self._distributed,
                device=device,
            )
        self._state = {shard.name: shard for shard in self._updater.shards(range(layout.world_size))}
        self._initialise()

    @property
    def mesh(self) -> Mesh:
        """The process groups; the engine's own."""
        return self._groups.mesh

    def step(self, batch: Batch, lr: float, before_update: Callable[[], None] | None = None) -> StepResult:
        """See `Engine.step`.

        Raises:
            LayoutError: the pipeline schedule cannot run this number of micro-batches.
        """
        check_micro_batches(batch.tokens.shape[0], self._parallel)
        with self._groups.inside():
            self._updater.clear()
            self._run(batch, training=True)
            self._updater.prepare()
        held = self._updater.held
        squared = clip.squared_norm(held, self.mesh.rank, self._device)
        total, squared_sum = self._agree(self._total, squared)
        number = int(self._count)
        loss = total / number if number else math.nan
        norm = math.sqrt(squared_sum) if squared_sum >= 0 else math.nan
        if before_update is not None:
            before_update()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            if self._optimizer.clip_norm is not None:
                clip.clip(held, norm, self._optimizer.clip_norm)
            with self._groups.inside():
                self._updater.step(lr)
        return StepResult(loss=loss, tokens=number, grad_norm=norm, skipped=skipped)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        with self._groups.inside(), torch.no_grad():
            self._run(self._filled_up(batch), training=False)
        (total,) = self._agree(self._total)
        return total, int(self._count)

    def state(self) -> Mapping[str, Shard]:
        """See `Engine.state`. Of a name that this rank updates no element of it has no shard."""
        return dict(self._state)

    def restored(self) -> None:
        """See `Engine.restored`."""
        with self._groups.inside():
            self._updater.restored()

    def close(self) -> None:
        """See `Engine.close`."""
        self._chunks.clear()
        self._groups.close()

    @property
    def _distributed(self) -> bool:
        return self._parallel.data_mode == "fsdp"

    def _wrap(self, parts: list[Any]) -> list[Any]:
        """Data parallelism around every stage, and its part in the schedules."""
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=self._distributed,
            average_in_collective=False,
        )
        chunks = [
            DistributedDataParallel(
                self._config, options, part, disable_bucketing=index > 0, pg_collection=self._groups.collection
            )
            for index, part in enumerate(parts)
        ]
        self._config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
        self._config.finalize_model_grads_func = _finalise
        return chunks

    def _initialise(self) -> None:
        for name, shard in self._state.items():
            if name.startswith("model."):
                values = self._model.initial(
                    name.removeprefix("model."), shard.global_shape, shard.offsets, shard.shape
                )
                values = values if shard.flat is None else values.view(-1)[slice(*shard.flat)]
                shard.local.copy_(values)
        self.restored()

    def _run(self, batch: Batch, *, training: bool) -> None:
        """Forward, and in training backward, of all micro-batches; the loss is collected on the last stage."""
        micro_batches, micro_size, sequence = batch.tokens.shape
        if self._config.sequence_parallel and sequence % self.layout.tensor:
            raise LayoutError(
                f"parallel.sequence: a sequence of {sequence} tokens does not divide by "
                f"parallel.tensor = {self.layout.tensor}"
            )
        self._total.zero_()
        self._count = (batch.targets != IGNORED).sum().to(self._device)
        if self.layout.data > 1:
            dist.all_reduce(self._count, group=self.mesh.group("data"))
        virtual = self._config.virtual_pipeline_model_parallel_size
        inputs = [_micro_batches(batch, self._device) for _ in self._chunks]
        collection = self._groups.collection
        get_forward_backward_func(pp_size=self.layout.pipeline, vp_size=virtual)(
            forward_step_func=self._forward,
            data_iterator=inputs if virtual else inputs[0],
            model=self._chunks if virtual else self._chunks[0],
            num_microbatches=micro_batches,
            seq_length=sequence,
            micro_batch_size=micro_size,
            forward_only=not training,
            p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=self._config),
            pg_collection=collection,
        )

    def _forward(self, inputs: Iterator[tuple[Any, ...]], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, targets, positions, mask = next(inputs)
        return chunk(tokens, positions, mask), functools.partial(self._loss, targets)

    def _loss(self, targets: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """What backward starts from, from this rank's part of the logits."""
        losses, partition = cross_entropy(logits, targets, self._groups.collection.tp)
        kept = targets != IGNORED
        total = losses.where(kept, 0).sum()
        self._total += total.detach()
        penalty = self._model.spec.z_loss * partition.where(kept, 0).square().sum() if self._model.spec.z_loss else 0.0
        return (total + penalty) / self._count, torch.zeros((), dtype=torch.int, device=self._device), {}

    def _filled_up(self, batch: Batch) -> Batch:
        """With micro-batches without targets up to what the interleaved schedule can run."""
        missing = -batch.tokens.shape[0] % self.layout.pipeline
        if not missing or self._config.virtual_pipeline_model_parallel_size is None:
            return batch
        last = {name: getattr(batch, name)[-1:].expand(missing, -1, -1) for name in ("tokens", "targets")}
        documents = batch.documents
        return Batch(
            tokens=torch.cat((batch.tokens, last["tokens"])),
            targets=torch.cat((batch.targets, torch.full_like(last["targets"], IGNORED))),
            documents=None if documents is None else torch.cat((documents, documents[-1:].expand(missing, -1, -1))),
        )

    def _agree(self, total: torch.Tensor, *others: torch.Tensor) -> list[float]:
        """One sum over the world: of `total` where the head is, and of all `others`."""
        at = self.mesh.at
        counts = at.tensor == 0 and at.pipeline == self.layout.pipeline - 1
        numbers = torch.stack([total if counts else torch.zeros_like(total), *others])
        dist.all_reduce(numbers, group=self.mesh.world)
        result: list[float] = numbers.tolist()
        return result


def _finalise(chunks: list[Any], tokens: torch.Tensor | None, **options: Any) -> None:
    """Reduce gradients over the data axis, and what is left of them over tensor ranks and tied stages; no division."""
    finalize_model_grads(chunks, None, **options)


def _micro_batches(batch: Batch, device: torch.device) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Tokens, targets, positions and mask of one micro-batch after the other."""
    sequence = batch.tokens.shape[-1]
    index = torch.arange(sequence, device=device)
    for micro in range(batch.tokens.shape[0]):
        tokens, targets = batch.tokens[micro].to(device), batch.targets[micro].to(device)
        positions, mask = index.expand_as(tokens), None
        if batch.documents is not None:
            documents = batch.documents[micro].to(device)
            positions = _positions_in(documents, index)
            same = documents[:, None, :, None] == documents[:, None, None, :]
            mask = same & (index[:, None] >= index)
        yield tokens, targets, positions, mask


def _positions_in(documents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Position of each token inside its document; rotary embeddings need none, as they see distances alone."""
    starts = torch.zeros_like(documents, dtype=torch.int64)
    starts[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[1:], 0)
    return index - starts.cummax(dim=1).values
