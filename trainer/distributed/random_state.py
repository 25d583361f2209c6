"""Random generators of a rank as named state, like any other tensor of a snapshot.

keepwarm draws no random numbers in a step; the generators are kept for user code that does.
"""

import torch

from keepwarm.parallel.shard import Shard


class RandomState:
    """Holds a buffer per generator of this rank. Call `capture` before saving, `restored` after writing the shards."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._buffers = {name: torch.empty_like(state) for name, state in self._now().items()}
        self.capture()

    def _now(self) -> dict[str, torch.Tensor]:
        states = {"torch": torch.get_rng_state()}
        if self._device.type != "cpu":
            states[self._device.type] = torch.get_device_module(self._device).get_rng_state(self._device)
        return states

    def capture(self) -> None:
        """Copy the generators' states into the buffers."""
        for name, state in self._now().items():
            self._buffers[name].copy_(state)

    def shards(self) -> dict[str, Shard]:
        """Return the shards `random.<generator>.<rank>`, which no other rank holds."""
        return {
            f"random.{name}.{self._rank}": Shard(
                name=f"random.{name}.{self._rank}",
                global_shape=tuple(buffer.shape),
                offsets=(0,),
                shape=tuple(buffer.shape),
                local=buffer,
                replicas=(self._rank,),
            )
            for name, buffer in self._buffers.items()
        }

    def restored(self) -> None:
        """Set the generators from the buffers."""
        torch.set_rng_state(self._buffers["torch"])
        if self._device.type != "cpu":
            state = self._buffers[self._device.type]
            torch.get_device_module(self._device).set_rng_state(state, self._device)
