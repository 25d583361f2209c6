"""The state of a run in any layout without its processes: what every rank holds, cut from whole tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.writer import write_part
from keepwarm.ft.worker.snapshotter import piece_of
from keepwarm.parallel.mesh.layout import Layout, split_layers, stages_of
from keepwarm.parallel.native.data import shard_size_of
from keepwarm.parallel.parameter import ShardingSpec, Split
from keepwarm.parallel.shard import Shard
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.parallel.style import SPLIT_DIM, copies_of
from keepwarm.trainer.checkpoint.own_part import host_bytes
from keepwarm.trainer.model.shapes import parameter_shapes, tensor_plan
from keepwarm.trainer.model.spec import ModelSpec

MOMENTS = ("exp_avg", "exp_avg_sq")

State = dict[str, torch.Tensor]
"""Whole tensors by global name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout; with `flat`, moments lie in equal ranges of the flattened box, as ZeRO's optimizers keep them."""

    spec: ParallelSpec
    flat: bool = False

    @property
    def layout(self) -> Layout:
        return Layout.of(self.spec)


def whole_state(model: ModelSpec, seed: int) -> State:
    """Weights, moments and counter with values of their own."""
    random = torch.Generator().manual_seed(seed)
    state = {"optimizer.step": torch.tensor(seed)}
    for name, shape in parameter_shapes(model).items():
        for prefix in ("model", *(f"optimizer.{moment}" for moment in MOMENTS)):
            state[f"{prefix}.{name}"] = torch.randn(shape, generator=random)
    return state


def shards_of(rank: int, model: ModelSpec, case: Case, state: Mapping[str, torch.Tensor] | None) -> dict[str, Shard]:
    """What one rank holds of `state`, in memory of its own; zeros without one."""
    layout, spec = case.layout, case.spec
    sharding = ShardingSpec(
        layout=layout, at=layout.coordinates(rank), split=_split(model, spec), shard_size=shard_size_of(spec)
    )
    found = {}
    for name, shape, stages in _parameters(rank, model, case):
        box = sharding.box(name, shape)
        where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.shape, strict=True))
        for prefix in ("model", *(f"optimizer.{moment}" for moment in MOMENTS)):
            whole = torch.zeros(shape) if state is None else state[f"{prefix}.{name}"]
            local, flat, replicas = whole[where].clone(), None, sharding.replicas(name, stages)
            if case.flat and prefix != "model":
                place = replicas.index(rank)
                flat = local.numel() * place // len(replicas), local.numel() * (place + 1) // len(replicas)
                local, replicas = local.reshape(-1)[flat[0] : flat[1]].clone(), (rank,)
            found[f"{prefix}.{name}"] = Shard(
                name=f"{prefix}.{name}",
                global_shape=shape,
                offsets=box.offsets,
                shape=box.shape,
                local=local,
                replicas=replicas,
                flat=flat,
            )
    step = torch.zeros((), dtype=torch.int64) if state is None else state["optimizer.step"].clone()
    found["optimizer.step"] = Shard(
        name="optimizer.step",
        global_shape=(),
        offsets=(),
        shape=(),
        local=step,
        replicas=tuple(range(layout.world_size)),
    )
    return found


def write_checkpoint(root: Path, model: ModelSpec, case: Case, state: State, meta: dict[str, object]) -> Path:
    """What the ranks of a run in this layout write, published."""
    root.mkdir(parents=True, exist_ok=True)
    tmp, final = publication.staging(root, 0, 1, "ranks"), publication.folder(root, 1)
    tmp.mkdir()
    for rank in range(case.layout.world_size):
        mine = [shard for shard in shards_of(rank, model, case, state).values() if shard.replicas[0] == rank]
        write_part(tmp, rank, [(piece_of(shard), host_bytes(shard.local)) for shard in mine])
    publication.write_manifest(
        tmp, publication.Identity(run="run", epoch=0, step=1, layout="any"), ranks=case.layout.world_size, meta=meta
    )
    publication.publish(tmp, final)
    return final


def _parameters(rank: int, model: ModelSpec, case: Case) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Canonical name and shape of what a rank's stages hold, and the pipeline coordinates that hold it."""
    spec, pipeline = case.spec, case.spec.pipeline
    at = case.layout.coordinates(rank).pipeline
    seen = set()
    for index in stages_of(at, spec):
        part = parameter_shapes(
            model, split_layers(model.layers, spec)[index], embed=index == 0, head=index == spec.stages - 1
        )
        for name, shape in part.items():
            tied = model.tied_embeddings and name in ("head.weight", "embedding.weight")
            canonical = "embedding.weight" if tied else name
            if canonical not in seen:
                seen.add(canonical)
                yield canonical, shape, (0, pipeline - 1) if tied else (at,)


def _split(model: ModelSpec, spec: ParallelSpec) -> dict[str, Split]:
    """Parameters that the tensor axis splits, by name, as `TensorParallel.apply` finds them."""
    if spec.tensor == 1:
        return {}
    plan, found = tensor_plan(model), {}
    for name, shape in parameter_shapes(model).items():
        parts = name.rpartition(".")[0].split(".")
        style = plan.get(".".join(["layers", "*", *parts[2:]] if parts[0] == "layers" else parts))
        dim = None if style is None else SPLIT_DIM.get(style)
        if dim is not None and dim < len(shape):
            found[name] = Split(dim, copies_of(style, model.key_value_heads, spec.tensor))
    return found
