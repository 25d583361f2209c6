"""One run from joining the world to the closing table, on one rank."""

import contextlib
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from trainer import events
from trainer.build import build
from trainer.elastic import resized
from trainer.errors import OutputError, TrainingStopped
from trainer.goodput import Timeline, write_result
from trainer.in_process import Halted, Orders
from trainer.interrupt import Interrupt
from trainer.loop import Run, train
from trainer.restore import Start
from trainer.run_folder import RUN_FILE, RunFolder
from trainer.spec import JobSpec
from trainer.spec_file import load_job, load_run, save_job
from trainer.world import World, join


def run_session(path: Path, overrides: Sequence[str], *, resume: bool, orders: Orders | None = None) -> bool:
    """Train; False when a signal ended the run early with its state saved. Without `orders` nobody can halt it.

    Raises:
        TrainerError: with the exit code of its kind.
        Halted: peers have died; nothing of the run is left in this process, which may begin anew.
    """
    job = load_run(path, overrides) if path.name == RUN_FILE else load_job(path, overrides)
    if job.cluster.elastic == "shrink":
        job = resized(job, int(os.environ.get("WORLD_SIZE", job.layout.world_size)))
    logging.basicConfig(format=" %(levelname)s: %(message)s", level=logging.WARNING)
    world = join(job.layout.world_size, job.numerics)
    start = _start(job, world, resume)
    _open_folder(job, world)
    orders = orders or Orders(None)
    timeline = _timeline(job, world, start, orders.began)
    run = build(job, world, start=start)
    try:
        # Not earlier: a rank that waits for others in a library must end at the first signal.
        with Interrupt() as interrupt, _halts(job, world, orders):
            finished = _train(run, interrupt, timeline)
        _leave_agents(run)
        _account(run, timeline)
    except TrainingStopped:
        _leave_agents(run)
        _account(run, timeline)
        raise
    except Halted:
        _abandon(run, timeline)
        raise
    finally:
        run.watchdog.close()
        run.profile.close()
        run.metrics.close()
        run.loader.close()
    run.engine.close()
    world.leave()
    return finished


def _start(job: JobSpec, world: World, resume: bool) -> Start:
    """A rank that a launcher started again goes on by itself; a user who starts a run twice must say what is meant."""
    if world.restarts > 0:
        return "restart"
    if resume:
        return "resume"
    folder = Path(job.output)
    if RunFolder(folder).metrics_file.exists():
        raise OutputError(f"{folder} holds a run already: continue it with --resume, or start it anew with --force")
    return "anew"


def _leave_agents(run: Run) -> None:
    """The job is over, or its state is on disk: nobody needs the agents' memory any more."""
    if run.snapshots is not None:
        run.metrics.event(msgspec.convert(run.snapshots.timings(), events.Snapshots))
        run.snapshots.close(finished=True)


def _halts(job: JobSpec, world: World, orders: Orders) -> AbstractContextManager[None]:
    """While it lasts, this worker can be halted: with a GPU, where that has never been tried, only if asked for."""
    if world.device.type != "cpu" and job.cluster.in_process != "on":
        return contextlib.nullcontext()
    return orders.training(world.interrupt)


def _abandon(run: Run, timeline: Timeline) -> None:
    """Leave the agent and the peers, who may be dead, without waiting for any of them."""
    timeline.close(run.state.step, ended=False)
    if run.snapshots is not None:
        run.snapshots.abandon()
    run.engine.close()
    run.world.leave()


def _timeline(job: JobSpec, world: World, start: Start, began: float) -> Timeline:
    # From the start of the process on, if it is the first of this process: imports are part of what a start costs.
    return Timeline(Path(job.output), rank=world.rank, began=began, restart=start == "restart", anew=start == "anew")


def _account(run: Run, timeline: Timeline) -> None:
    """Say where the time went, now that the run ends with its state saved."""
    timeline.close(run.state.step, ended=True)
    if run.world.rank == 0:
        with contextlib.suppress(OSError):
            run.console.say(write_result(Path(run.job.output)).text())


def _open_folder(job: JobSpec, world: World) -> None:
    world.barrier()  # no rank may look for metrics.jsonl after another has begun to write it
    if world.rank != 0:
        return
    folder = Path(job.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not RunFolder(folder).exists:
            save_job(job, RunFolder(folder).run_file)
    except OSError as error:
        raise OutputError(f"output={folder}: cannot be written: {error.strerror}") from error


def _train(run: Run, interrupt: Interrupt, timeline: Timeline) -> bool:
    layout = run.job.parallel
    axes = (layout.data, layout.pipeline, layout.tensor)
    run.metrics.event(events.TrainingStarted(step=run.state.step, ranks=run.world.size, layout=axes))
    beginning = run.beginning
    run.metrics.event(events.Began(source=beginning.source, step=beginning.step, reason=beginning.reason))
    if beginning.source != "nothing":
        run.console.say(f" continues after iteration {beginning.step} from {beginning.source}: {beginning.reason}")
    if run.snapshots is not None and not run.snapshots.protected:
        run.console.say(" WARNING: one node alone has no parity: its loss is survived by the durable checkpoint only")
    with run.console:
        finished = train(run, interrupt, timeline)
    if finished:
        run.metrics.event(events.Finished(step=run.state.step, tokens_per_s=run.speed.tokens_per_s))
        if run.world.rank == 0:
            _summarise(run)
    return finished


def _summarise(run: Run) -> None:
    losses = RunFolder(Path(run.job.output)).evaluations()
    before, after = (losses[0], losses[-1]) if losses else ({}, {})
    run.console.summary(before, after, run.speed.tokens_per_s, run.job.output)
