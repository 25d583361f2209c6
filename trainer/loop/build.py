"""Composition root: the only module that combines parts of `trainer`, `parallel` and `ft` into a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from keepwarm.parallel.engine import Engine, EngineConfig
from keepwarm.parallel.engine_support import registered_engine, require
from keepwarm.parallel.model import ModelParts
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints, layout_hash
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.loader import BatchLoader, RankShare
from keepwarm.trainer.data.preprocess.prepare import PreparedData, prepare_sources
from keepwarm.trainer.distributed.random_state import RandomState
from keepwarm.trainer.distributed.world import COLLECTIVE_TIMEOUT, World
from keepwarm.trainer.job.estimate import decided_parallel, model_flops_per_token
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan, global_size_at, plan_stages
from keepwarm.trainer.loop.callback import Callback, Callbacks, Run, registered_callbacks
from keepwarm.trainer.loop.continuation import adopt_changes, check_continues
from keepwarm.trainer.loop.durable_saver import DurableSaver
from keepwarm.trainer.loop.evaluation import Evaluation, Evaluator
from keepwarm.trainer.loop.health_check import HealthCheck
from keepwarm.trainer.loop.init_from import adopt
from keepwarm.trainer.loop.moving_average import MovingAverage
from keepwarm.trainer.loop.observers import Heartbeat, Opening, Profiling, StepReport
from keepwarm.trainer.loop.restore import Beginning, Start, begin
from keepwarm.trainer.loop.run_state import RunState
from keepwarm.trainer.loop.snapshots import MemoryTier, Snapshots
from keepwarm.trainer.loop.straggler_watch import StragglerWatch
from keepwarm.trainer.model.make import make_model
from keepwarm.trainer.monitor.console import RunConsole
from keepwarm.trainer.monitor.goodput import Timeline
from keepwarm.trainer.monitor.health import Health
from keepwarm.trainer.monitor.metrics import Metrics
from keepwarm.trainer.monitor.profile import ProfileWindow
from keepwarm.trainer.monitor.speed import Speed
from keepwarm.trainer.monitor.watchdog import Watchdog


def build(job: JobSpec, world: World, *, start: Start, timeline: Timeline) -> Run:
    """Build a job's run, at step 0 or at the newest available state. Collective.

    Raises:
        DataError: data or tokenizer cannot be used.
        CheckpointError: there is nothing to resume from, or it does not fit.
        FtError: the agents cannot be started, with the arithmetic where memory is too small.
    """
    torch.manual_seed(job.seed + world.rank)
    data = prepare_sources(job.data, job.model.vocabulary_size, Path(job.output) / "data")
    model = make_model(job.model, job.seed, norms=job.numerics.norms)
    return assemble(job, world, model, data, start=start, timeline=timeline)


def assemble(
    job: JobSpec, world: World, model: ModelParts, data: PreparedData, *, start: Start, timeline: Timeline
) -> Run:
    """Build a run from any model and any sources; `build` passes those that the job names.

    The order matters: a restore writes into the shards of every stateful part; curves and segments follow from that.
    """
    registered = registered_callbacks(job.callbacks)
    folder = Path(job.output)
    parts = _stateful_parts(job, world, model, data)
    root = RunFolder(folder).checkpoints
    checkpoints = Checkpoints(root, job.checkpoint, world, run=job.name, layout=layout_hash(job))
    if start != "restart":
        checkpoints.sweep()
    memory = MemoryTier() if job.snapshot == "off" else Snapshots(job, world, parts.shards(), parts.random)
    beginning = begin(start, parts.shards(), checkpoints, memory, world)
    state = _first_state(job, parts, beginning, data)
    if beginning.meta is None and job.init_from is not None:
        _begin_with_parent(job, world, model, parts, state, data.tokenizer)
    _begin_averages(parts, beginning)
    plans = plan_stages(job, state.position(parts.loader.ledger))
    changes = adopt_changes(state, parts.loader.ledger, data, plans, job.stages)
    checkpoints.begin_epoch(memory.epoch)
    _open_segments(job, plans, parts.loader)
    watchdog = Watchdog(job.health, folder, rank=world.rank, size=world.size, restart=world.restarts)
    flops = model_flops_per_token(job.model, job.data.sequence_length)
    speed = Speed.of(flops, ranks=world.size, device=world.device)
    resume_step = None if start == "fresh" else state.step
    return Run(
        job=job,
        world=world,
        plans=plans,
        state=state,
        engine=parts.engine,
        loader=parts.loader,
        metrics=Metrics(folder, job.log, job.name, rank=world.rank, resume_step=resume_step),
        console=RunConsole(rank=world.rank, steps=plans[-1].end_step, done=state.step, log_every=job.log.every),
        timeline=timeline,
        # The order of callbacks is part of what a run computes; the comments give the reasons.
        callbacks=Callbacks(
            [
                Opening(beginning, changes),
                *_profiling(job, world),
                # Updates the average while no snapshot is being copied, so that this step's snapshot includes it.
                *parts.averages,
                # Writes a step's metrics before a snapshot of that step can be restored; otherwise they could be lost.
                StepReport(speed),
                # A snapshot includes the health state of its step. None is taken after a step that stops training.
                HealthCheck(),
                StragglerWatch(),
                # A checkpoint includes the losses that later gates compare against.
                Evaluation(Evaluator(parts.engine, data.validation, job, world), watchdog),
                *registered,
                # Copies in the background: anything that changes the state must come earlier.
                memory,
                DurableSaver(checkpoints, parts.random, parts.beside_engine(), watchdog),
                Heartbeat(watchdog),  # closes first: closing the others may take longer than a step
            ]
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The parts whose state snapshots and checkpoints save."""

    engine: Engine
    loader: BatchLoader
    random: RandomState
    averages: tuple[MovingAverage, ...]
    """One item or none."""

    def beside_engine(self) -> dict[str, Shard]:
        """Return the tensors outside the engine."""
        shards = self.random.shards()
        for average in self.averages:
            shards |= average.shards()
        return shards

    def shards(self) -> Mapping[str, Shard]:
        """Return all tensors."""
        return {**self.engine.state(), **self.beside_engine()}


def _stateful_parts(job: JobSpec, world: World, model: ModelParts, data: PreparedData) -> _Parts:
    engine = make_engine(job, world, model)
    average = job.moving_average
    return _Parts(
        engine=engine,
        loader=_loader(job, world, data),
        random=RandomState(world.rank, world.device),
        averages=() if average is None else (MovingAverage(average.decay, engine.state()),),
    )


def _first_state(job: JobSpec, parts: _Parts, beginning: Beginning, data: PreparedData) -> RunState:
    """Continue from the state restored into the shards, or start at step 0."""
    model = job.model.model_dump(mode="json")
    if beginning.meta is None:
        return RunState(step=0, curves=[], health=Health(spec=job.health), seed=job.seed, model=model)
    parts.engine.restored()
    parts.random.restored()
    parts.loader.restore(beginning.meta["ledger"])
    state = RunState.load(beginning.meta["run"], job.health, parts.loader.ledger)
    check_continues(job, state, parts.loader.ledger, data.tokenizer)
    state.model = model
    return state


def _begin_with_parent(
    job: JobSpec, world: World, model: ModelParts, parts: _Parts, state: RunState, tokenizer: str | None
) -> None:
    parent = adopt(job, model, parts.engine.state(), tokenizer, world)
    parts.engine.restored()
    if parent.ledger is not None:
        parts.loader.restore(parent.ledger)
    state.parent = parent.record


def _begin_averages(parts: _Parts, beginning: Beginning) -> None:
    """Start from the current weights, unless an average was restored."""
    if beginning.meta is None or beginning.meta.get("moving_average") is None:
        for average in parts.averages:
            average.begin()


def _profiling(job: JobSpec, world: World) -> list[Callback]:
    if job.profile is None:
        return []
    return [Profiling(ProfileWindow(job.profile, Path(job.output) / "profile", world.rank, world.device))]


def make_engine(job: JobSpec, world: World, model: ModelParts) -> Engine:
    """Build the engine that the job names. Imports only its modules, since each pulls in a library that loads for
    seconds.

    Raises:
        EngineUnavailable: what it needs is not installed, or of a version that cannot run the job or was not tested.
        LayoutError: the layout does not fit the model or the world.
    """
    require(job)
    config = EngineConfig(
        model=model,
        parallel=decided_parallel(job),
        optimizer=job.optimizer,
        numerics=job.numerics,
        layout=job.layout,
        device=world.device,
        timeout=COLLECTIVE_TIMEOUT,
    )
    made: Engine = registered_engine(job.parallel.engine).engine_class()(config)
    return made


def _loader(job: JobSpec, world: World, data: PreparedData) -> BatchLoader:
    def size_at(consumed: int) -> int:
        return global_size_at(job.batch, consumed)

    return BatchLoader(
        data.sources,
        Ledger(seed=job.seed),
        RankShare(layout=job.layout, rank=world.rank, micro_batch_size=job.batch.micro_batch_size),
        global_size_at=size_at,
        prefetch=job.data.prefetch,
    )


def _open_segments(job: JobSpec, plans: tuple[StagePlan, ...], loader: BatchLoader) -> None:
    """Open the segments of all unfinished stages; the prefetcher reads across their boundaries."""
    for plan, stage in zip(plans, job.stages, strict=True):
        ends = [*(plan.start_sample + first for first, _ in plan.mixtures[1:]), plan.end_sample]
        for (first, mixture), end in zip(plan.mixtures, ends, strict=True):
            if end > loader.consumed:
                start = max(plan.start_sample + first, loader.consumed)
                loader.open_segment(
                    mixture,
                    start=start,
                    replay=stage.replays,
                    stage=stage.name,
                    skip=stage.skip,
                    sequence_length=plan.sequence_length,
                )
