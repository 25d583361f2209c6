"""Exponential moving average of the weights, kept as named state that snapshots and checkpoints include.

After every step that was not skipped: mean <- decay * mean + (1 - decay) * weight, in the dtype of the weight.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint.checkpoint import WEIGHTS
from keepwarm.trainer.continual.average import MOVING
from keepwarm.trainer.loop.callback import Callback, Run, StepDone


class MovingAverage(Callback):
    """Owns one buffer for each parameter shard of this rank, initially a copy of it."""

    def __init__(self, decay: float, state: Mapping[str, Shard]) -> None:
        super().__init__()
        self.decay = decay
        self._weights = {name: shard for name, shard in state.items() if name.startswith(WEIGHTS)}
        self._means = {name: shard.local.detach().clone() for name, shard in self._weights.items()}

    def begin(self) -> None:
        """Start again from the current weights."""
        with torch.no_grad():
            for name, mean in self._means.items():
                mean.copy_(self._weights[name].local)

    def after_step(self, run: Run, done: StepDone) -> None:
        if not done.result.skipped:
            self.update()

    def update(self) -> None:
        """Update the average from the weights. Call after a step, while no earlier snapshot is being copied."""
        with torch.no_grad():
            for name, mean in self._means.items():
                mean.lerp_(self._weights[name].local.detach(), 1 - self.decay)

    def shards(self) -> dict[str, Shard]:
        """Return `average.model.<parameter>`, laid out like the parameter."""
        return {
            MOVING + name: replace(shard, name=MOVING + name, local=self._means[name])
            for name, shard in self._weights.items()
        }
