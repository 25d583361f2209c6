"""Base class of every section of a job spec. Torch-free."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of a job spec: frozen, strict about types, no unknown keys.

    Registered components (engines, curves, metric sinks, ...) declare their own options as a subclass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
