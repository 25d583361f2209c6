"""Callback that writes durable checkpoints from the ranks."""

import time
from collections.abc import Mapping

from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed.random_state import RandomState
from keepwarm.trainer.errors import StateNotSaved
from keepwarm.trainer.loop.callback import Callback, Run
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.watchdog import Watchdog

PAUSES_S = (1.0, 4.0)
"""Seconds before the last checkpoint of a start is tried again. A signal may have left little time."""


class DurableSaver(Callback):
    """Writes a durable checkpoint whenever one is due, and always after the last step of this start.

    One that fails between two steps costs a warning and an event: the state is still in memory, and the next one is
    tried when it is due. The last one is tried again a few times; then the start ends with `StateNotSaved`.
    """

    def __init__(
        self, checkpoints: Checkpoints, random: RandomState, extra: Mapping[str, Shard], watchdog: Watchdog
    ) -> None:
        """`extra`: the tensors to save in addition to the engine's state."""
        super().__init__()
        self._checkpoints = checkpoints
        self._random = random
        self._extra = extra
        self._watchdog = watchdog

    def on_start(self, run: Run) -> None:
        if run.stop_reason is not None:
            self.at_boundary(run)

    def at_boundary(self, run: Run) -> None:
        if not run.ends_here and not self._checkpoints.due(run.state.step):
            return
        self._watchdog.suspend()
        self._random.capture()
        if run.ends_here:
            self._save_last(run)
            return
        try:
            self._save(run)
        except StateNotSaved as error:
            self._report(run, error, "training continues, and the next checkpoint is tried when it is due")

    def _save_last(self, run: Run) -> None:
        for pause in PAUSES_S:
            try:
                self._save(run)
            except StateNotSaved as error:
                self._report(run, error, f"it is tried again in {pause:g} s")
                time.sleep(pause)
            else:
                return
        try:
            self._save(run)
        except StateNotSaved as error:
            raise StateNotSaved(
                f"{error}; the steps after the newest checkpoint are lost unless agents still hold them: make room, "
                "then continue with --resume"
            ) from error

    def _save(self, run: Run) -> None:
        self._checkpoints.save(
            run.state.step, {**run.engine.state(), **self._extra}, run.meta(), self._watchdog.suspend
        )

    def _report(self, run: Run, error: StateNotSaved, then: str) -> None:
        run.metrics.event(events.CheckpointFailed(step=run.state.step, reason=str(error)))
        run.console.warn(f"{error}; {then}")
