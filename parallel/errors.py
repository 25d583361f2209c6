"""Errors raised by `parallel`.

ParallelError
├── LayoutError          the spec asks for a layout that cannot be built (bad input)
└── EngineUnavailable    the engine or an optional dependency of it is not installed (bad input)
"""


class ParallelError(Exception):
    """Base of every error raised by this package; the message says how to fix it."""


class LayoutError(ParallelError):
    """The layout does not divide the model, the batch or the world."""


class EngineUnavailable(ParallelError):
    """The engine, or an option of it, needs a package that is not installed."""
