"""Whether an error of ours shows its traceback, in every process of a command."""

import os

VARIABLE = "KEEPWARM_DEBUG"
"""Environment variable, so that the programs that a command starts or becomes follow it."""


def wants_traceback() -> bool:
    """Return whether the user asked for tracebacks, by the variable or by `--debug`."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
