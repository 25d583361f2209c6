"""Callbacks: the work around the steps of a run, one class per concern.

`keepwarm.trainer.loop.build` arranges them in a fixed order, because results depend on it: hooks are called in the
order of the list, `close` in reverse. Every rank calls every hook at the same step, so a hook may be collective as long
as all ranks take the same path through it; `run.world.rank` is this rank's number.

An exception in a hook ends the run: `TrainingStopped` with exit code 3; any other counts as a fault, after which the
launcher restarts the ranks. A callback that writes somewhere training does not depend on catches its own errors.

Other packages list their callbacks in the entry-point group `keepwarm.callbacks`, and a job enables them by name:

    callbacks:
      slack: {channel: "#runs"}

This one is built as `slack(options)` with an instance of its `Options`. Reading a job imports the callback's module,
even on machines without torch: do heavy imports inside the hooks.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from keepwarm.options import Component, parse_options
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.extensions import CALLBACKS

if TYPE_CHECKING:
    from keepwarm.parallel.engine import Engine, StepResult
    from keepwarm.trainer.data.loader import BatchLoader
    from keepwarm.trainer.distributed.world import World
    from keepwarm.trainer.job.position import Position
    from keepwarm.trainer.job.spec import JobSpec
    from keepwarm.trainer.job.stages import StagePlan
    from keepwarm.trainer.loop.run_state import RunState
    from keepwarm.trainer.monitor.console import RunConsole
    from keepwarm.trainer.monitor.goodput import Timeline
    from keepwarm.trainer.monitor.metrics import Metrics

Ending = Literal["finished", "stopped", "halted", "failed"]
"""How a run ends in this process. finished: the last stage is done; stopped: by a signal or by itself; halted: the next
start goes on from memory, as peers died or this start was handed over; failed: by an exception."""


@dataclass(kw_only=True)
class Run:
    """A run as seen by its loop and callbacks; built by `keepwarm.trainer.loop.build`."""

    job: JobSpec
    world: World
    plans: Sequence[StagePlan]
    state: RunState
    engine: Engine
    loader: BatchLoader
    metrics: Metrics
    console: RunConsole
    timeline: Timeline
    callbacks: Callbacks
    interrupted: bool = False
    """Whether a signal requested a stop; equal on every rank."""
    stop_reason: str | None = None
    """Why training stops itself after this step, with its state saved; equal on every rank."""

    @property
    def last_step(self) -> int:
        return self.plans[-1].end_step

    @property
    def ends_here(self) -> bool:
        """Whether the last completed step is the last of this start. Valid from `at_boundary` on."""
        return self.interrupted or self.stop_reason is not None or self.state.step == self.last_step

    @property
    def at_stage_boundary(self) -> bool:
        """Whether a stage ends here, or the first one begins."""
        return self.state.step == 0 or any(plan.end_step == self.state.step for plan in self.plans)

    def stage_at(self, step: int) -> StagePlan:
        """Return the stage that contains step `step`, counted from 0."""
        return next(plan for plan in self.plans if step < plan.end_step)

    @property
    def position(self) -> Position:
        """How far the run has come."""
        return self.state.position(self.loader.ledger)

    def request_stop(self, reason: str) -> None:
        """Stop training (exit code 3) after this step, with its state saved. All ranks must call this."""
        self.stop_reason = self.stop_reason or reason

    def meta(self) -> dict[str, Any]:
        """Return the state besides the tensors that is needed to continue, as plain values."""
        average = self.job.moving_average
        decay = None if average is None else average.decay
        return {"run": self.state.save(), "ledger": self.loader.state(), "moving_average": decay}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """The step just completed; equal on every rank, except for `seconds`."""

    plan: StagePlan
    result: StepResult
    lr: float
    samples: int
    """Loss and norms of the global batch."""
    seconds: float
    """Time from drawing the batch to the end of the update, on this rank."""

    @property
    def positions(self) -> int:
        """Number of tokens in the global batch, including masked targets."""
        return self.samples * self.plan.sequence_length


class Callback(Component):
    """Base class of callbacks; its hooks do nothing."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @property
    def blocked_s(self) -> float:
        """Seconds that training waited for this callback in this process; goodput accounting lists them separately."""
        return 0.0

    def on_start(self, run: Run) -> None:
        """Run before the first step of this start, with the state restored; also if no steps are left."""

    def before_step(self, run: Run) -> None:
        """Run before the batch of step `run.state.step` (from 0) is drawn. May read the state, must not change it."""

    def before_update(self, run: Run) -> None:
        """Run before weights or optimizer state change: after the last backward pass of a step, and before a reset."""

    def after_step(self, run: Run, done: StepDone) -> None:
        """Run after every step, including skipped ones; `run.state.step` already counts it.

        No snapshot is being copied: this hook may change tensors, and the snapshot and checkpoint of this step include
        the change.
        """

    def votes(self, run: Run) -> Sequence[int]:
        """Return numbers of this rank of which all ranks are to learn the largest, always as many of them.

        They travel with a collective that every step has between `after_step` and `at_boundary`.
        """
        return ()

    def agreed(self, run: Run, largest: Sequence[int]) -> None:
        """Take the largest of all ranks' `votes`, place by place."""

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        """Run after an evaluation. `losses`: mean cross-entropy by domain, in nats per unmasked target, equal on every
        rank.
        """

    def at_boundary(self, run: Run) -> None:
        """Run last between two steps: after the evaluation, if one was due, and before a checkpoint is written.

        A snapshot may be being copied: read the state only. If `run.ends_here`, no step follows.
        """

    def exposed(self, run: Run) -> bool:
        """Return whether this rank finds that the state in memory has lost its redundancy. Not collective; never waits.

        Asked between two steps. If any rank says so, `protect` is called on all, unless the run ends here.
        """
        return False

    def protect(self, run: Run) -> None:
        """Restore the redundancy of the state in memory. Collective."""

    def hand_over(self, run: Run) -> bool:
        """Make the last completed step safe in memory, for another start of the ranks; return whether it is.

        Called between two steps when a supervisor asks for it. Collective; all ranks must return the same.
        """
        return False

    def close(self, run: Run, ending: Ending) -> None:
        """Free resources; called once, when the run ends in this process.

        Collective work is allowed only if the ending is `finished` or `stopped`; otherwise peers may be dead. An
        exception is raised only if the run ends without one, and logged otherwise.
        """


class Callbacks(tuple[Callback, ...]):
    """The ordered callbacks of a run; each hook calls that hook of every callback."""

    @property
    def blocked_s(self) -> float:
        return sum(callback.blocked_s for callback in self)

    def on_start(self, run: Run) -> None:
        for callback in self:
            callback.on_start(run)

    def before_step(self, run: Run) -> None:
        for callback in self:
            callback.before_step(run)

    def before_update(self, run: Run) -> None:
        for callback in self:
            callback.before_update(run)

    def after_step(self, run: Run, done: StepDone) -> None:
        for callback in self:
            callback.after_step(run, done)

    def agree(self, run: Run, value: int) -> int:
        """Return the largest of all ranks' values, and tell every callback what its votes came to. Collective."""
        votes = [callback.votes(run) for callback in self]
        largest, *others = run.world.largest_each([value, *itertools.chain.from_iterable(votes)])
        for callback, mine in zip(self, votes, strict=True):
            if mine:
                callback.agreed(run, [others.pop(0) for _ in mine])
        return largest

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        for callback in self:
            callback.on_evaluation(run, losses)

    def at_boundary(self, run: Run) -> None:
        for callback in self:
            callback.at_boundary(run)

    def exposed(self, run: Run) -> bool:
        return any(callback.exposed(run) for callback in self)

    def protect(self, run: Run) -> None:
        for callback in self:
            callback.protect(run)

    def hand_over(self, run: Run) -> bool:
        return any(callback.hand_over(run) for callback in self)

    def close(self, run: Run, ending: Ending) -> None:
        """Close all callbacks, last one first, even if some fail; raise the first error, and log the others."""
        failures: list[Exception] = []
        for callback in reversed(self):
            try:
                callback.close(run, ending)
            except Exception as error:
                failures.append(error)
        for failure in failures[1:]:
            logging.warning("closing a callback failed: %s", failure)
        if failures:
            raise failures[0]


def registered_callbacks(chosen: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """Build the callbacks that a job names, in the job's order.

    Raises SpecError if one is not a `Callback`.
    """
    return [_build(name, options) for name, options in chosen.items()]


def _build(name: str, options: Mapping[str, Any]) -> Callback:
    component = CALLBACKS.get(name)
    if not issubclass(component, Callback):
        raise SpecError(
            f"callbacks.{name}: {component.__qualname__} is not a subclass of keepwarm.trainer.loop.callback.Callback"
        )
    return component(parse_options(component, options))
