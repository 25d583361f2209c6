"""One run on one rank, from joining the world to the closing table."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from keepwarm import side_writer
from keepwarm.files import within
from keepwarm.trainer.distributed import device_check, nccl
from keepwarm.trainer.distributed.affinity import bind_near
from keepwarm.trainer.distributed.device import Request, pci_address
from keepwarm.trainer.distributed.in_process_restart import ControlChannel, RestartRequested
from keepwarm.trainer.distributed.world import World, join
from keepwarm.trainer.errors import OutputError, TrainingStopped
from keepwarm.trainer.job.files import accept, is_run_file, load_job, load_run, save_job
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.shrink import resized
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.build import build
from keepwarm.trainer.loop.callback import Ending, Run
from keepwarm.trainer.loop.interrupt import HandedOver, Interrupt
from keepwarm.trainer.loop.loop import train
from keepwarm.trainer.loop.restore import Start
from keepwarm.trainer.monitor import flight_recorder, last_words
from keepwarm.trainer.monitor.goodput import Timeline, process_start, write_result

FOLDER_PATIENCE_S = 2.0
"""How long a restart waits for the run folder, in seconds."""


def run_session(path: Path, overrides: Sequence[str], *, resume: bool, control: ControlChannel | None = None) -> bool:
    """Train; return False when a signal ended the run early with its state saved. Without `control` it is never parked.

    Raises:
        TrainerError: with the exit code of its kind.
        RestartRequested: peers have died; nothing of the run is left in this process, which may start again.
        HandedOver: the last step is committed in memory, and the ranks of this start end.
    """
    job = load_run(path, overrides) if is_run_file(path) else load_job(path, overrides)
    if job.cluster.elastic == "shrink":
        job = resized(job, int(os.environ.get("WORLD_SIZE", job.layout.world_size)))
    logging.basicConfig(format=" %(levelname)s: %(message)s", level=logging.WARNING)
    side_writer.forget()
    request = Request.of(job.cluster)
    if job.layout.world_size > 1:
        gpu = request.device != "cpu" and torch.cuda.is_available()
        flight_recorder.enable(gpu=gpu)  # before any process group
        if gpu:
            nccl.configure(in_process=job.cluster.in_process == "on")
    world = join(job.layout.world_size, job.numerics, request)
    if world.device.type == "cuda" and job.cluster.numa == "auto":
        bind_near(pci_address(world.device), job.numerics.threads_per_rank)
    if world.device.type != "cpu":
        last_words.leave(last_words.OnGpu())
        device_check.check(world)
    start = _start(job, world, resume)
    world.barrier()  # no rank may look for metrics.jsonl once another has started writing it
    if world.rank == 0:
        _on_folder(start, partial(_open_folder, job))
    control = control or ControlChannel(None)
    timeline = _timeline(job, world, start, control.resumed_at)
    run = build(job, world, start=start, timeline=timeline)
    world.barrier()  # a rank that refuses the spec never arrives
    if world.rank == 0:
        _on_folder(start, partial(accept, path))
    try:
        # Not earlier: a rank that waits for others in a library must end at the first signal.
        with Interrupt().watching() as interrupt, _parking(job, world, control), run.console:
            finished = train(run, interrupt)
    except BaseException as error:
        for failure in _leave(run, _ending(error)):
            logging.warning("leaving the run failed: %s", failure)
        raise
    if failures := _leave(run, "finished" if finished else "stopped"):
        raise failures[0]
    return finished


def _start(job: JobSpec, world: World, resume: bool) -> Start:
    """Return how this rank starts: a launcher's restart continues; a user must ask to resume or overwrite."""
    if world.restarts > 0:
        return "restart"
    if resume:
        return "resume"
    folder = Path(job.output)
    if RunFolder(folder).metrics_file.exists():
        raise OutputError(f"{folder} already contains a run: continue it with --resume, or start over with --force")
    return "fresh"


def _ending(error: BaseException) -> Ending:
    """Return how a run ends that an exception ends."""
    if isinstance(error, TrainingStopped):
        return "stopped"
    return "halted" if isinstance(error, RestartRequested | HandedOver) else "failed"


def _leave(run: Run, ending: Ending) -> list[Exception]:
    """Free what the run holds in this process, whatever fails of it, and return the failures.

    If the state is saved, first record where the time went: what follows may fail.
    """
    if ending != "failed":
        run.timeline.close(run.state.step, ended=ending != "halted")
    saved = ending in ("finished", "stopped") and run.world.rank == 0
    account = write_result(Path(run.job.output)).text() if saved else None
    steps: list[Callable[[], object]] = [partial(run.callbacks.close, run, ending), run.loader.close]
    if account is not None:
        steps.append(partial(run.console.print, account))
    if ending != "failed":
        steps += [run.engine.close, run.world.leave]
    failures: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            failures.append(error)
    return failures


def _parking(job: JobSpec, world: World, control: ControlChannel) -> AbstractContextManager[None]:
    """Allow this worker to be parked inside the `with` block; with a GPU, where it is untested, only if asked for."""
    if world.device.type != "cpu" and job.cluster.in_process != "on":
        return contextlib.nullcontext()
    return control.training(world.interrupt)


def _timeline(job: JobSpec, world: World, start: Start, resumed_at: float | None) -> Timeline:
    # The first start of a process begins with the process: imports are part of its cost.
    began = process_start() if resumed_at is None else resumed_at
    return Timeline(Path(job.output), rank=world.rank, began=began, restart=start == "restart", fresh=start == "fresh")


def _on_folder(start: Start, work: Callable[[], None]) -> None:
    """Do what a start needs of the run folder. A restart goes on without it: an earlier one has done the same."""
    if start != "restart":
        work()
        return
    with contextlib.suppress(OutputError):
        within(work, FOLDER_PATIENCE_S)


def _open_folder(job: JobSpec) -> None:
    folder = Path(job.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not RunFolder(folder).exists:
            save_job(job, RunFolder(folder).run_file)
    except OSError as error:
        raise OutputError(f"output={folder}: cannot write: {error.strerror}") from error
