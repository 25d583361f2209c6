"""Durable checkpoints that the ranks write, as a callback."""

from collections.abc import Mapping

from parallel.shard import Shard
from trainer.callback import Callback, Run
from trainer.checkpoint import Checkpoints
from trainer.random_state import RandomState
from trainer.watchdog import Watchdog


class DurableSaver(Callback):
    """Writes a durable checkpoint when one is due, and always after the last step of this start."""

    def __init__(
        self, checkpoints: Checkpoints, random: RandomState, beside: Mapping[str, Shard], watchdog: Watchdog
    ) -> None:
        """`beside`: what is saved besides the engine's state."""
        super().__init__()
        self._checkpoints = checkpoints
        self._random = random
        self._beside = beside
        self._watchdog = watchdog

    def at_boundary(self, run: Run) -> None:
        if run.ends_here or self._checkpoints.due(run.state.step):
            self._watchdog.suspend()
            self._random.capture()
            self._checkpoints.save(run.state.step, {**run.engine.state(), **self._beside}, run.meta())
