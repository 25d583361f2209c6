"""Callbacks: what happens around the steps of a run, one class for each concern.

`keepwarm.trainer.loop.build` puts them together in a fixed order, since results depend on it: every hook is called on
the callbacks in the order of the list, `close` in the reverse order. Every hook is called on every rank, at the same
step, so a hook may be collective as long as all ranks take the same way through it; `run.world.rank` tells a rank which
one it is.

An exception in a hook ends the run: `TrainingStopped` with exit code 3, another like any fault, after which launchers
start the ranks again. A callback that writes to where training does not depend on catches its own errors.

Callbacks of other packages are listed in the entry-point group `keepwarm.callbacks` and named in a job:

    callbacks:
      slack: {channel: "#runs"}

They are built as `slack(options)` with an instance of their `Options`. Reading a job imports their module, also on
machines without torch: import what is heavy inside the hooks.
"""

from __future__ import annotations

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
    from keepwarm.trainer.job.spec import JobSpec
    from keepwarm.trainer.job.stages import StagePlan
    from keepwarm.trainer.loop.run_state import RunState
    from keepwarm.trainer.monitor.console import RunConsole
    from keepwarm.trainer.monitor.goodput import Timeline
    from keepwarm.trainer.monitor.metrics import Metrics

Ending = Literal["finished", "stopped", "halted", "failed"]
"""How a run leaves a process. finished: the last stage is over; stopped: by a signal or by itself; halted: peers
have died, and this process starts again; failed: by an exception."""


@dataclass(kw_only=True)
class Run:
    """A run as its loop and its callbacks see it; put together by `keepwarm.trainer.loop.build`."""

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
    """A signal has asked for the end; equal on every rank."""
    stop_reason: str | None = None
    """Why training stops itself after this step, with its state saved; equal on every rank."""

    @property
    def last_step(self) -> int:
        return self.plans[-1].end_step

    @property
    def ends_here(self) -> bool:
        """No other step follows the one that was completed last. Known from `at_boundary` on."""
        return self.interrupted or self.stop_reason is not None or self.state.step == self.last_step

    @property
    def at_stage_boundary(self) -> bool:
        """A stage ends here, or the first one begins."""
        return self.state.step == 0 or any(plan.end_step == self.state.step for plan in self.plans)

    def stage_at(self, step: int) -> StagePlan:
        """The stage that step `step`, counted from 0, belongs to."""
        return next(plan for plan in self.plans if step < plan.end_step)

    def request_stop(self, reason: str) -> None:
        """Let training stop itself (exit code 3) after this step, with its state saved. On all ranks alike."""
        self.stop_reason = self.stop_reason or reason

    def meta(self) -> dict[str, Any]:
        """What continues the run besides the tensors, as plain values."""
        average = self.job.moving_average
        decay = None if average is None else average.decay
        return {"run": self.state.save(), "ledger": self.loader.state(), "moving_average": decay}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """The step that has just been completed; equal on every rank, but for `seconds`."""

    plan: StagePlan
    result: StepResult
    lr: float
    samples: int
    """Of the global batch."""
    seconds: float
    """From drawing the batch to the end of the update, on this rank."""

    @property
    def positions(self) -> int:
        """Tokens of the global batch, masked targets included."""
        return self.samples * self.plan.sequence_length


class Callback(Component):
    """Base of all callbacks; every hook does nothing."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @property
    def blocked_s(self) -> float:
        """Seconds that training has waited for this callback in this process, which the account of time sets apart."""
        return 0.0

    def on_start(self, run: Run) -> None:
        """Before the first step of this start, with the state restored; also where no step is left to do."""

    def before_step(self, run: Run) -> None:
        """Before the batch of step number `run.state.step`, from 0, is drawn. The state may be read, not changed."""

    def before_update(self, run: Run) -> None:
        """Before weights or optimizer state change: after the last backward of a step, and before they are reset."""

    def after_step(self, run: Run, done: StepDone) -> None:
        """After a step, skipped ones included; `run.state.step` counts it.

        No snapshot is being copied: tensors may be changed here, and are then in the snapshot and checkpoint of this
        step as they are after the change.
        """

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        """After an evaluation: mean cross-entropy by domain, in nats per unmasked target, equal on every rank."""

    def at_boundary(self, run: Run) -> None:
        """Between two steps, last of all, after the evaluation if one was due, before a checkpoint is written.

        A snapshot may be copied meanwhile: the state is only read. Where `run.ends_here`, no other step follows.
        """

    def close(self, run: Run, ending: Ending) -> None:
        """Free resources, once, when the run leaves this process. Collective work is allowed only when the ending is
        `finished` or `stopped`: after the others peers may be dead. After those an exception is only logged."""


class Callbacks(tuple[Callback, ...]):
    """The callbacks of a run, in their order; each hook calls that of all of them."""

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

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        for callback in self:
            callback.on_evaluation(run, losses)

    def at_boundary(self, run: Run) -> None:
        for callback in self:
            callback.at_boundary(run)

    def close(self, run: Run, ending: Ending) -> None:
        """Close all, the last one first. One that fails keeps no other from being closed; the first error is raised
        after `finished` and `stopped`, and logged after `halted` and `failed`, which have an error of their own."""
        failures: list[Exception] = []
        for callback in reversed(self):
            try:
                callback.close(run, ending)
            except Exception as error:
                failures.append(error)
        if failures and ending in ("finished", "stopped"):
            raise failures[0]
        for failure in failures:
            logging.warning("closing a callback failed: %s", failure)


def registered_callbacks(chosen: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """Build the callbacks that a job names, in the order of the job.

    Raises SpecError: one of them is no `Callback`.
    """
    return [_build(name, options) for name, options in chosen.items()]


def _build(name: str, options: Mapping[str, Any]) -> Callback:
    component = CALLBACKS.get(name)
    if not issubclass(component, Callback):
        raise SpecError(
            f"callbacks.{name}: {component.__qualname__} is no subclass of keepwarm.trainer.loop.callback.Callback"
        )
    return component(parse_options(component, options))
