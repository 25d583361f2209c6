"""Megatron Core's optimizers with the interface an engine needs: state by name, and updates from reduced gradients.

With `data_mode` fsdp this is the distributed optimizer (ZeRO stage 1, Rajbhandari et al., 2020): each data-parallel
rank updates a range of the flattened weights, in which each tensor has a range of its own; all ranks then gather the
result. With ddp every rank updates everything.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepwarm.parallel.engine import EngineConfig
from keepwarm.parallel.megatron.core import (
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    OptimizerConfig,
)
from keepwarm.parallel.megatron.names import Piece
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.optimizer.clip import Gradient
from keepwarm.parallel.optimizer.optimizer import (
    counter_shard,
    make_optimizer,
    materialise,
    moments,
    set_step,
    weight_decay,
)
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import OptimizerSpec, ParallelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class MainParameter:
    """The part of one parameter that this rank updates, in fp32: all of it, or a range of its elements."""

    parameter: nn.Parameter
    """The parameter that the model computes with."""
    pieces: Sequence[Piece]
    local: nn.Parameter
    """The tensor that the optimizer updates; one-dimensional if it is a range."""
    span: tuple[int, int] | None
    """Range of the parameter's elements that `local` holds; None: all of them."""
    replicas: tuple[int, ...]
    """Ranks that update the same elements."""

    def parts(self) -> Iterator[tuple[Piece, int, int]]:
        """Yield the canonical tensors in this part, each with its first and one-past-last index in `local`."""
        start, stop = self.span or (0, self.parameter.numel())
        for piece in self.pieces:
            first, last = max(piece.start, start), min(piece.stop, stop)
            if first < last:
                yield piece, first - start, last - start

    def shards(self, prefix: str, tensor: torch.Tensor) -> Iterator[Shard]:
        """Yield the shards of the state that `tensor`, shaped like `local`, holds."""
        for piece, first, last in self.parts():
            within, flat = tensor.detach().view(-1)[first:last], None
            if self.span is None:
                within = within.view(piece.box.shape)
            else:
                flat = (self.span[0] + first - piece.start, self.span[0] + last - piece.start)
            yield Shard(
                name=f"{prefix}.{piece.name}",
                global_shape=piece.global_shape,
                offsets=piece.box.offsets,
                shape=piece.box.shape,
                local=within,
                replicas=self.replicas,
                flat=flat,
            )

    def write_back(self) -> None:
        """Copy `local` into the parameter unless they share memory."""
        if self.local.dtype != self.parameter.dtype:
            start, stop = self.span or (0, self.parameter.numel())
            self.parameter.detach().view(-1)[start:stop].copy_(self.local.detach().view(-1))


class MegatronUpdater:
    """One of Megatron Core's optimizers over all stages of a rank; its moments exist from construction on."""

    def __init__(
        self,
        config: EngineConfig,
        chunks: Sequence[Any],
        parameters: Sequence[tuple[nn.Parameter, list[Piece]]],
        mesh: Mesh,
    ) -> None:
        """`chunks` are the stages, wrapped in Megatron Core's data parallelism; `parameters` are their parameters."""
        self._spec, self._chunks, self._distributed = config.optimizer, chunks, is_distributed(config.parallel)
        self.counter = torch.zeros((), dtype=torch.int64)
        """Number of updates done; part of the state."""
        inner = make_optimizer(self._spec, _groups(self._spec, config.model, parameters), config.device)
        with torch.no_grad():  # the views it creates of parameters are then leaves, which optimizers require
            self._optimizer = _wrap(inner, config, chunks, mesh)
        materialise(inner, self._spec, config.device)
        self._inner = inner
        self.mains = [main for one in parameters if (main := self._main(*one, mesh)) is not None]

    def gradients(self) -> list[Gradient]:
        """Return the gradients of the elements that this rank updates; valid after `prepare`."""
        return [Gradient(main.local.grad, main.replicas) for main in self.mains if main.local.grad is not None]

    def prepare(self) -> None:
        """Assign the gradients reduced over the data axis to the elements that this rank updates."""
        self._optimizer.prepare_grads()

    def step(self, lr: float) -> None:
        """Apply one update, after which every rank has the new weights."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._optimizer.step_with_ready_grads()
        self.counter += 1

    def clear(self) -> None:
        """Zero the gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def restored(self) -> None:
        """Refresh the weights on all ranks and all step counters from the restored state."""
        set_step(self._inner, self._spec, int(self.counter))
        for main in self.mains:
            main.write_back()
        if self._distributed:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def shards(self, ranks: Iterable[int]) -> Iterator[Shard]:
        """Yield weights, moments and counter; `ranks` are all ranks of the world, which share the counter."""
        for main in self.mains:
            yield from main.shards("model", main.local)
            for key, stored in moments(self._spec).items():
                yield from main.shards(f"optimizer.{key}", self._inner.state[main.local][stored])
        yield counter_shard(self.counter, ranks)

    def _main(self, parameter: nn.Parameter, pieces: list[Piece], mesh: Mesh) -> MainParameter | None:
        """Return the part of the parameter that this rank updates, or None if there is none."""
        replicas = pieces[0].replicas
        if not self._distributed:
            local = getattr(parameter, "main_param", parameter)
            return MainParameter(parameter=parameter, pieces=pieces, local=local, span=None, replicas=replicas)
        place = self._optimizer.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        buffer, dtypes, bucket = self._optimizer.model_param_gbuf_map[parameter]
        span = self._optimizer.gbuf_ranges[buffer][dtypes][bucket]["param_map"][parameter]["param"]
        here = [rank for rank in replicas if mesh.layout.coordinates(rank).data == mesh.at.data]
        local = self._inner.param_groups[place[0]]["params"][place[1]]
        return MainParameter(
            parameter=parameter, pieces=pieces, local=local, span=(span.start, span.end), replicas=tuple(here)
        )


def _groups(
    spec: OptimizerSpec, model: ModelParts, parameters: Sequence[tuple[nn.Parameter, list[Piece]]]
) -> list[dict[str, Any]]:
    """Group the parameters by weight decay."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, pieces in parameters:
        groups.setdefault(weight_decay(spec, model, pieces[0].name), []).append(parameter)
    return [{"params": params, "weight_decay": rate} for rate, params in sorted(groups.items())]


def is_distributed(spec: ParallelSpec) -> bool:
    """Return whether the optimizer state is sharded over the data axis."""
    return spec.data_mode == "fsdp"


def _wrap(inner: torch.optim.Optimizer, engine: EngineConfig, chunks: Sequence[Any], mesh: Mesh) -> Any:
    distributed = is_distributed(engine.parallel)
    bf16 = engine.numerics.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam" if engine.optimizer.name == "adamw" else "sgd",
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
        clip_grad=0.0,
    )
    if not distributed:
        return (
            Float16OptimizerWithFloat16Params(inner, config, None, None) if bf16 else FP32Optimizer(inner, config, None)
        )
    return DistributedOptimizer(
        inner,
        config,
        None,
        None,
        model_chunks=chunks,
        per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},
        data_parallel_group=mesh.group("data"),
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
