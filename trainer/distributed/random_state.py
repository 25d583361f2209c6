"""The random generators of a rank as named state, like any other tensor that a snapshot holds.

keepwarm draws nothing in a step; the generators are kept for code of users that does.
"""

import torch

from keepwarm.parallel.shard import Shard


class RandomState:
    """Owns one buffer per generator of this rank. `capture` before saving, `restored` after writing into the shards."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._buffers = {name: torch.empty_like(state) for name, state in self._now().items()}
        self.capture()

    def _now(self) -> dict[str, torch.Tensor]:
        states = {"torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def capture(self) -> None:
        """Copy the generators' states into the buffers."""
        for name, state in self._now().items():
            self._buffers[name].copy_(state)

    def shards(self) -> dict[str, Shard]:
        """`random.<generator>.<rank>` for this rank; no other rank holds the same."""
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
        """Set the generators to what the buffers hold."""
        torch.set_rng_state(self._buffers["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._buffers["cuda"], self._device)
