"""Callback that writes durable checkpoints from the ranks."""

from collections.abc import Mapping

from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import Checkpoints
from keepwarm.trainer.distributed.random_state import RandomState
from keepwarm.trainer.loop.callback import Callback, Run
from keepwarm.trainer.monitor.watchdog import Watchdog


class DurableSaver(Callback):
    """Writes a durable checkpoint whenever one is due, and always after the last step of this start."""

    def __init__(
        self, checkpoints: Checkpoints, random: RandomState, extra: Mapping[str, Shard], watchdog: Watchdog
    ) -> None:
        """`extra`: the tensors to save in addition to the engine's state."""
        super().__init__()
        self._checkpoints = checkpoints
        self._random = random
        self._extra = extra
        self._watchdog = watchdog

    def at_boundary(self, run: Run) -> None:
        if run.ends_here or self._checkpoints.due(run.state.step):
            self._watchdog.suspend()
            self._random.capture()
            self._checkpoints.save(run.state.step, {**run.engine.state(), **self._extra}, run.meta())
