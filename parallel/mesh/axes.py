"""The axes of the mesh, outermost first, and a rank's coordinates on them. Pure and torch-free."""

from typing import Literal, NamedTuple

Axis = Literal["data", "pipeline", "tensor"]
AXES: tuple[Axis, ...] = ("data", "pipeline", "tensor")


class Coordinates(NamedTuple):
    """Position of one rank in the mesh, counted from 0 on each axis."""

    data: int
    pipeline: int
    tensor: int
