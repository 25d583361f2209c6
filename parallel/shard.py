"""The unit of state: a global tensor name and the part of that tensor that a rank holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's live part of one global tensor.

    The part is the box of `shape` at `offsets` inside the tensor of `global_shape`. Engines whose optimizers
    partition flattened buffers hold only the elements `flat = (start, stop)` of that box in row-major order, and
    `local` is then one-dimensional.

    `local` is the engine's own memory. Restore by writing into it in place and then calling `Engine.restored()`;
    read it only between steps, or before `before_update` returns.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    local: torch.Tensor
    replicas: tuple[int, ...]
    """Global ranks that hold exactly these bytes, ascending; includes the holder itself."""
    flat: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        expected = self.shape if self.flat is None else (self.flat[1] - self.flat[0],)
        if tuple(self.local.shape) != expected:
            raise ValueError(f"{self.name}: local tensor is {tuple(self.local.shape)}, its shard says {expected}")
