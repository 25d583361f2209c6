"""Look for stragglers during training."""

import os
import socket

import msgspec

from keepwarm.ft.discovery.config import NODE
from keepwarm.trainer.distributed import device_check
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.loop.callback import Callback, Run, StepDone
from keepwarm.trainer.monitor import events, flight_recorder
from keepwarm.trainer.monitor.stragglers import Straggler, Trace, stragglers


def poll(world: World, *, stage: int, factor: float) -> list[Straggler]:
    """Collect the flight recorders and the speeds of the GPUs of all ranks.

    Every rank calls this at the same step. Rank 0 gets the result, the others an empty list.
    """
    host = os.environ.get(NODE) or socket.gethostname()
    flights = tuple(flight_recorder.read()[-flight_recorder.RECORDED :])
    trace = Trace(world.rank, stage, host, flights, device_check.seconds(world.device))
    traces = world.gather(msgspec.msgpack.encode(trace))
    return stragglers([msgspec.msgpack.decode(trace, type=Trace) for trace in traces], factor)


class StragglerWatch(Callback):
    """Polls the flight recorders every `health.straggler_every` steps and reports the ranks that slow the job down."""

    def after_step(self, run: Run, done: StepDone) -> None:
        health, world = run.job.health, run.world
        if health.straggler_every is None or run.state.step % health.straggler_every or world.size == 1:
            return
        stage = run.job.layout.coordinates(world.rank).pipeline
        for straggler in poll(world, stage=stage, factor=health.straggler_factor):
            run.metrics.event(events.Straggler(step=run.state.step, **msgspec.structs.asdict(straggler)))
            run.console.straggler(straggler)
