"""Checks of a job that need more than one of its sections. Each names the keys and says what would fit."""

import contextlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

from keepwarm.ft.errors import PlacementError
from keepwarm.ft.groups import groups_of
from keepwarm.ft.spec import SnapshotSpec
from keepwarm.parallel.engine_support import engine_info, refusals
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.layout import Layout, split_layers
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.parallel.style import misfits
from keepwarm.text import counted
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.data.weights import UNITS, quantise
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.sections import BatchSpec, CheckpointSpec, ClusterSpec, StageSpec
from keepwarm.trainer.job.url import is_url
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.spec import ModelSpec

_LONGEST_RAMP = 1_000_000
"""Steps of a batch ramp, which a plan counts one by one."""
_MOST_RANKS = 2**20


class Job(Protocol):
    """What the checks read of a job; `keepwarm.trainer.job.spec.JobSpec` has it."""

    @property
    def output(self) -> str: ...
    @property
    def init_from(self) -> str | None: ...
    @property
    def model(self) -> AnyModelSpec: ...
    @property
    def data(self) -> DataSpec: ...
    @property
    def batch(self) -> BatchSpec: ...
    @property
    def stages(self) -> tuple[StageSpec, ...]: ...
    @property
    def optimizer(self) -> OptimizerSpec: ...
    @property
    def parallel(self) -> ParallelSpec: ...
    @property
    def numerics(self) -> NumericsSpec: ...
    @property
    def checkpoint(self) -> CheckpointSpec: ...
    @property
    def cluster(self) -> ClusterSpec: ...
    @property
    def snapshot(self) -> SnapshotSpec | Literal["off"]: ...
    @property
    def layout(self) -> Layout: ...


def check_job(job: Job) -> None:
    """Raise ValueError with a line for everything that does not fit, the keys named."""
    problems = [
        *_layout(job),
        *_tensor(job),
        *_batch(job),
        *_data(job),
        *_snapshot(job),
        *_elastic(job),
        *refusals(job),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _layout(job: Job) -> Iterator[str]:
    ranks = job.parallel.data * job.parallel.pipeline * job.parallel.tensor
    if ranks > _MOST_RANKS:
        yield f"parallel.data x pipeline x tensor = {ranks}: at most {_MOST_RANKS:,} ranks"
        return
    try:
        Layout.of(job.parallel, job.cluster.ranks_per_node)
    except LayoutError as error:
        yield str(error)
    try:
        split_layers(job.model.layers, job.parallel)
    except LayoutError as error:
        yield str(error)


def _tensor(job: Job) -> Iterator[str]:
    tensor, model = job.parallel.tensor, job.model
    yield from misfits(model.heads, model.key_value_heads, model.vocabulary_size, tensor)
    if model.ffn_size % tensor:
        yield f"model.ffn_size = {model.ffn_size} does not divide by parallel.tensor = {tensor}"
    if not isinstance(model, ModelSpec) and tensor > 1 and model.description.no_tensor is not None:
        yield f"parallel.tensor = {tensor}: {model.description.no_tensor}; set 1"
    for key, length in _lengths(job):
        if job.parallel.sequence and length % tensor:
            yield f"parallel.sequence: {key} = {length} does not divide by parallel.tensor = {tensor}"


def _elastic(job: Job) -> Iterator[str]:
    cluster = job.cluster
    durable = job.snapshot != "off" and job.snapshot.durable is not None
    if cluster.elastic == "shrink" and not durable and job.checkpoint.every is None:
        yield (
            "cluster.elastic = shrink: another layout begins from a checkpoint on disk; set snapshot.durable.every or "
            "checkpoint.every"
        )
    least, replicas = cluster.min_data_parallel, job.parallel.data
    if cluster.elastic == "shrink" and least > replicas:
        yield f"cluster.min_data_parallel = {least}: of {counted(replicas, 'replica')} (parallel.data)"


def _lengths(job: Job) -> Iterator[tuple[str, int]]:
    """Every sequence length by its key."""
    yield "data.sequence_length", job.data.sequence_length
    for stage in job.stages:
        if stage.sequence_length is not None:
            yield f"stages.{stage.name}.sequence_length", stage.sequence_length


def _batch(job: Job) -> Iterator[str]:
    unit = job.parallel.data * job.batch.micro_batch_size
    named = f"parallel.data x batch.micro_batch_size = {job.parallel.data} x {job.batch.micro_batch_size} = {unit}"
    if job.batch.global_batch_size % unit:
        yield f"batch.global_batch_size = {job.batch.global_batch_size} does not divide by {named}"
        return
    ramp = job.batch.ramp
    if ramp and ramp.samples > _LONGEST_RAMP * ramp.start:
        yield f"batch.ramp.samples = {ramp.samples}: a ramp takes at most {_LONGEST_RAMP:,} steps of batch.ramp.start"
        return
    if ramp and (ramp.start % unit or ramp.increment % unit):
        yield f"batch.ramp.start and batch.ramp.increment must divide by {named}"
    if ramp and (
        job.batch.global_batch_size < ramp.start or (job.batch.global_batch_size - ramp.start) % ramp.increment
    ):
        yield "batch.ramp: increments from batch.ramp.start must reach batch.global_batch_size exactly"
        return
    sizes = (
        range(ramp.start, job.batch.global_batch_size + 1, ramp.increment) if ramp else [job.batch.global_batch_size]
    )
    for size in sizes:
        try:
            engine_info(job.parallel).check_micro_batches(size // unit, job.parallel)
        except LayoutError as error:
            yield str(error)
            return


def _data(job: Job) -> Iterator[str]:
    for key, length in _lengths(job):
        if length > job.model.max_sequence_length:
            yield f"{key} = {length} is longer than model.max_sequence_length = {job.model.max_sequence_length}"
    names = [stage.name for stage in job.stages]
    if len(set(names)) != len(names):
        yield f"stages: names must differ, got {names}"
    for stage in job.stages:
        yield from _mixtures(stage, job)
        yield from _shares(stage)
        yield from _domains(stage, job)
    yield from _replays(job)
    yield from _parent(job)


def _parent(job: Job) -> Iterator[str]:
    # Starting over with --force empties the output folder.
    if job.init_from is None or is_url(job.init_from):
        return
    parent, output = Path(job.init_from), Path(job.output)
    if output in (parent, *parent.parents):
        yield f"init_from = {parent} lies in output = {output}: a run cannot be its own parent"
    elif parent in output.parents:
        yield f"output = {output} lies in init_from = {parent}, which is only read; choose another"


def _shares(stage: StageSpec) -> Iterator[str]:
    """Yield what the ledger would refuse once the ranks run: shares too small to be drawn."""
    where, units = f"stages.{stage.name}", [round(clause.fraction * UNITS) for clause in stage.replays]
    if 0 in units:
        yield f"{where}.replay: fraction is below the smallest share, 1/{UNITS:,}; raise it or leave the clause out"
    rest = UNITS - sum(units)
    if rest < 1:
        return  # reported by _replays
    ramp, between = stage.mixture_ramp, []
    if ramp is not None:
        ends = (0.5 / ramp.stairs, 1 - 0.5 / ramp.stairs)
        between = [(f"{where}.mixture_ramp", _between(stage.mixture, ramp.to, at)) for at in ends]
    steps = [(f"{where}.mixture_steps.{index}", step.mixture) for index, step in enumerate(stage.mixture_steps)]
    for place, mixture in ((where, stage.mixture), *steps, *between):
        try:
            quantise(mixture, rest)
        except SpecError as error:
            yield f"{place}: {error}"


def _between(first: Mapping[str, float], last: Mapping[str, float], progress: float) -> dict[str, float]:
    before, after = sum(map(Fraction, first.values())), sum(map(Fraction, last.values()))
    mixed = {
        name: Fraction(1 - progress) * Fraction(first.get(name, 0)) / before
        + Fraction(progress) * Fraction(last.get(name, 0)) / after
        for name in (*first, *last)
    }
    return {name: float(share) for name, share in mixed.items()}


def _mixtures(stage: StageSpec, job: Job) -> Iterator[str]:
    unknown = sorted({name for mixture in stage.mixtures for name in mixture} - set(job.data.sources))
    if unknown:
        yield f"stages.{stage.name}.mixture names {unknown}, not in data.sources {sorted(job.data.sources)}"
    at = [step.at for step in stage.mixture_steps]
    if at != sorted(set(at)):
        yield f"stages.{stage.name}.mixture_steps: `at` must grow from step to step, got {at}"
    ramp = stage.mixture_ramp
    if ramp and stage.mixture_steps:
        yield f"stages.{stage.name}: give mixture_steps or mixture_ramp, not both"
    if ramp and ramp.start >= ramp.end:
        yield f"stages.{stage.name}.mixture_ramp: start {ramp.start} is not before end {ramp.end}"


def _domains(stage: StageSpec, job: Job) -> Iterator[str]:
    known = sorted(job.data.validation)
    named = {f"evaluate names {name!r}": name for name in stage.evaluate or ()}
    if stage.gate:
        named |= {f"gate.domain = {stage.gate.domain!r}": stage.gate.domain}
    for what, name in named.items():
        if name not in known:
            yield f"stages.{stage.name}.{what}, a domain without data in data.validation {known}"
    if stage.gate and stage.evaluate is not None and stage.gate.domain not in stage.evaluate:
        yield f"stages.{stage.name}.gate.domain = {stage.gate.domain!r} is not among those in evaluate"


def _replays(job: Job) -> Iterator[str]:
    """What can be told without the ledger of a parent; the rest is refused when the job is put together."""
    later = [stage.name for stage in job.stages]
    drawn: set[str] = set()
    for index, stage in enumerate(job.stages):
        where = f"stages.{stage.name}.replay"
        total = sum(clause.fraction for clause in stage.replays)
        if total >= 1:
            yield f"{where}: the fractions add up to {total:g}, which leaves nothing for the mixture; keep below 1"
        for clause in stage.replays:
            if clause.proxy_source is not None:
                yield from _proxy(clause.proxy_source, where, job)
            elif index == 0 and job.init_from is None:
                yield f"{where}: nothing was seen before the first stage; leave it out, or begin with init_from"
            else:
                yield from _origins(clause.origins, where, job, later[index:], set(later[:index]), drawn)
        drawn |= {name for mixture in stage.mixtures for name in mixture}


def _proxy(name: str, where: str, job: Job) -> Iterator[str]:
    if name not in job.data.sources:
        yield f"{where}: proxy_source names {name!r}, not in data.sources {sorted(job.data.sources)}"
    if job.init_from is None:
        yield f"{where}: proxy_source is for a parent without a ledger, and there is no init_from; use `from`"


def _origins(
    names: tuple[str, ...], where: str, job: Job, later: list[str], earlier: set[str], drawn: set[str]
) -> Iterator[str]:
    for name in names:
        if name in earlier and name in job.data.sources:
            yield f"{where}: from: {name!r} is both a stage and a source; rename one of them"
        elif name == later[0] and name not in job.data.sources:
            yield f"{where}: from: a stage cannot replay itself; name earlier ones"
        elif job.init_from is not None or name in earlier:
            continue
        elif name in later and name not in job.data.sources:
            yield f"{where}: from: stage {name!r} comes later and has seen nothing yet"
        elif name not in job.data.sources:
            yield f"{where}: from: {name!r} is neither an earlier stage nor in data.sources {sorted(job.data.sources)}"
        elif name not in drawn:
            yield f"{where}: from: nothing of source {name!r} was seen before this stage"


def _snapshot(job: Job) -> Iterator[str]:
    if job.snapshot == "off":
        return
    with contextlib.suppress(LayoutError):  # reported by _layout
        nodes = job.layout.nodes
        if isinstance(job.snapshot.domains, tuple) and len(job.snapshot.domains) != nodes:
            yield f"snapshot.domains names {counted(len(job.snapshot.domains), 'node')}, the layout has {nodes}"
            return
        try:
            groups_of(nodes, job.snapshot)
        except PlacementError as error:
            yield f"snapshot.code: {error}"
