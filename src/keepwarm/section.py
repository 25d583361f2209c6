"""Base class of every section of a job spec. Torch-free."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""A positive number of things, in the 32 bits that libraries give it."""
Ranks = Annotated[int, Field(gt=0, le=2**20)]
"""A number of ranks, nodes or layers: things that are listed one by one."""
FewOrNone = Annotated[int, Field(ge=0, le=2**20)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A time to wait; longer ones overflow the clocks of the operating system."""
_LARGEST = 2**63 - 1


class Section(BaseModel):
    """One mapping of a job spec: frozen, strict about types, no unknown keys.

    Registered components (engines, curves, metric sinks, ...) declare their own options as a subclass.
    """

    # Sections that a job does not use, as those of other curves, cost nothing at start.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_in_64_bits(cls, value: Any) -> Any:
        """Refuse whole numbers that neither torch nor NumPy holds."""
        if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"expected a number of at most {_LARGEST} (64 bits), got {value}")
        return value

    @classmethod
    def variant(cls, values: Any) -> "type[Section]":
        """Return the section whose keys `values` may have: this one, unless a name among the values chooses another."""
        return cls

    @classmethod
    def is_meant(cls, values: Any) -> bool:
        """Return whether `values` may be meant for this section, where several could stand in its place."""
        return True

    @classmethod
    def unknown_key(cls, key: str, values: Any) -> str | None:
        """Return why `key` is unknown among `values`, where this section knows more than that; a phrase for errors."""
        return None
