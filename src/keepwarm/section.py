"""Base class of every section of a job spec. Torch-free."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of a job spec: frozen, strict about types, no unknown keys.

    Registered components (engines, curves, metric sinks, ...) declare their own options as a subclass.
    """

    # Sections that a job does not use, as those of other curves, cost nothing at start.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    @classmethod
    def variant(cls, values: Any) -> "type[Section]":
        """Return the section whose keys `values` may have: this one, unless a name among the values chooses another."""
        return cls

    @classmethod
    def unknown_key(cls, key: str, values: Any) -> str | None:
        """Return why `key` is unknown among `values`, where this section knows more than that; a phrase for errors."""
        return None
