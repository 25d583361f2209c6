"""The composition root: the one place where parts of `trainer`, `parallel` and `ft` are put together."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.engine import Engine
from parallel.engine_support import ENGINES, require
from parallel.model import ModelParts
from parallel.shard import Shard
from trainer.checkpoint import Checkpoints, layout_hash
from trainer.console import RunConsole
from trainer.data.ledger import Ledger
from trainer.data.loader import BatchLoader, RankShare
from trainer.data.prepare import PreparedData, prepare_sources
from trainer.estimate import model_flops_per_token
from trainer.evaluation import Evaluator
from trainer.health import Health
from trainer.loop import Run
from trainer.metrics import Metrics
from trainer.model.decoder import Decoder
from trainer.moving_average import MovingAverage
from trainer.parent import adopt
from trainer.profile import ProfileWindow
from trainer.random_state import RandomState
from trainer.restore import Start, begin
from trainer.run_state import RunState
from trainer.snapshots import Snapshots
from trainer.spec import JobSpec
from trainer.speed import Speed
from trainer.stages import StagePlan, global_size_at, plan_stages
from trainer.watchdog import Watchdog
from trainer.world import TIMEOUT, World


class DurableSaver:
    """Writes a durable checkpoint when one is due, and always after the last step."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        random: RandomState,
        average: MovingAverage | None,
        watchdog: Watchdog,
    ) -> None:
        self._checkpoints = checkpoints
        self._watchdog = watchdog
        self._engine = engine
        self._random = random
        self._beside = random.shards() | (average.shards() if average else {})

    def after_step(self, state: RunState, meta: dict[str, Any], *, last: bool) -> None:
        if last or self._checkpoints.due(state.step):
            self._watchdog.relax()
            self._random.capture()
            self._checkpoints.save(state.step, {**self._engine.state(), **self._beside}, meta)


def build(job: JobSpec, world: World, *, start: Start) -> Run:
    """Everything a run consists of, where it begins: anew, or at the newest state that can be had.

    Raises:
        DataError: data or tokenizer cannot be used.
        CheckpointError: there is nothing to resume from, or it does not fit.
        FtError: the agents cannot be started, with the arithmetic where memory is too small.
    """
    folder = Path(job.output)
    torch.manual_seed(job.seed + world.rank)
    data = prepare_sources(job.data, job.model.vocabulary_size, folder / "data")
    plans = plan_stages(job)
    model = Decoder(job.model, job.seed, norms=job.numerics.norms)
    engine = make_engine(job, world, model)
    loader = _loader(job, world, data)
    random = RandomState(world.rank, world.device)
    average = MovingAverage(job.moving_average.decay, engine.state()) if job.moving_average else None
    shards = {**engine.state(), **random.shards(), **(average.shards() if average else {})}
    checkpoints = Checkpoints(folder / "checkpoints", job.checkpoint, world, run=job.name, layout=layout_hash(job))
    if start != "restart":
        checkpoints.sweep()
    snapshots = _snapshots(job, world, shards, random)
    beginning = begin(start, shards, checkpoints, snapshots, world)
    state = RunState(step=0, curves=[plan.curve for plan in plans], health=Health(spec=job.health))
    if beginning.meta is not None:
        engine.restored()
        random.restored()
        loader.restore(beginning.meta["ledger"])
        state = RunState.load(beginning.meta["run"], job.health)
    elif job.init_from is not None:
        _begin_with_parent(job, world, model, engine, loader, state, data.tokenizer)
    if average is not None and (beginning.meta is None or beginning.meta.get("moving_average") is None):
        average.begin()
    state.tokenizer = data.tokenizer
    changes = state.adopt_curves(plans)
    if snapshots is not None:
        checkpoints.epoch = snapshots.epoch
    _open_segments(job, plans, loader)
    watchdog = Watchdog(job.health, folder, rank=world.rank, size=world.size, restart=world.restarts)
    run = Run(
        job=job,
        world=world,
        plans=plans,
        state=state,
        engine=engine,
        loader=loader,
        evaluator=Evaluator(engine, data.validation, job, world),
        savers=[DurableSaver(checkpoints, engine, random, average, watchdog)],
        snapshots=snapshots,
        average=average,
        beginning=beginning,
        metrics=Metrics(
            folder, job.log, job.name, rank=world.rank, resume_step=None if start == "anew" else state.step
        ),
        console=RunConsole(rank=world.rank, steps=plans[-1].end_step, done=state.step, log_every=job.log.every),
        profile=ProfileWindow(job.profile, folder / "profile", world.rank),
        speed=Speed.of(model_flops_per_token(job.model, job.data.sequence_length), gpus=world.size),
        watchdog=watchdog,
    )
    _tell(run, changes)
    return run


def make_engine(job: JobSpec, world: World, model: ModelParts) -> Engine:
    """The engine that the job names. Only its own modules are imported: each brings a library of many seconds.

    Raises:
        EngineUnavailable: what it needs is not installed, or of a version that was not tested.
        LayoutError: the layout does not fit the model or the world.
    """
    require(job.parallel.engine)
    info = ENGINES[job.parallel.engine]
    made: Engine = getattr(importlib.import_module(info.module), info.name)(
        model, job.parallel, job.optimizer, job.numerics, job.layout, device=world.device, timeout=TIMEOUT
    )
    return made


def _begin_with_parent(
    job: JobSpec,
    world: World,
    model: ModelParts,
    engine: Engine,
    loader: BatchLoader,
    state: RunState,
    tokenizer: str | None,
) -> None:
    parent = adopt(job, model, engine.state(), tokenizer, world)
    engine.restored()
    if parent.ledger is not None:
        loader.restore(parent.ledger)
    state.parent = parent.record


def _tell(run: Run, changes: Sequence[str]) -> None:
    """Say what a reader of the log must know about where this run comes from."""
    if (parent := run.state.parent) is not None and run.state.step == 0:
        run.metrics.event("parent", **parent)
        what = "weights and optimizer state" if parent["optimizer_state"] else "weights alone"
        run.console.say(f" begins with the {what} of {parent['run']} at iteration {parent['step']}: {parent['path']}")
    for line in changes:
        run.metrics.event("lr_changed", step=run.state.step, change=line)
        run.console.say(f" changed on continuation: {line}")
    for replay in run.loader.ledger.replays:
        if not replay.known:
            run.console.say(f" stage {replay.stage} replays a {replay.pools[0].stage}: not known to have been seen")


def _snapshots(job: JobSpec, world: World, shards: Mapping[str, Shard], random: RandomState) -> Snapshots | None:
    if job.snapshot == "off":
        return None
    return Snapshots(
        job.snapshot,
        Path(job.output),
        world,
        job.layout,
        shards,
        layout_hash=layout_hash(job),
        capture=random.capture,
    )


def _loader(job: JobSpec, world: World, data: PreparedData) -> BatchLoader:
    def size_at(consumed: int) -> int:
        return global_size_at(job.batch, consumed)

    return BatchLoader(
        data.sources,
        Ledger(seed=job.seed),
        RankShare(layout=job.layout, rank=world.rank, micro_batch_size=job.batch.micro_size),
        global_size_at=size_at,
        prefetch=job.data.prefetch,
    )


def _open_segments(job: JobSpec, plans: tuple[StagePlan, ...], loader: BatchLoader) -> None:
    """The segments of every stage that is not over; the prefetcher reads across their boundaries."""
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
