"""Parse and format durations such as 10ms, 30s, 3.1h, 54d."""

import math
import re

from keepwarm.launch.errors import SimulationError

UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 365.25 * 86400}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-z]*)\s*")


def seconds(text: str, name: str = "a length of time") -> float:
    """Parse a duration to seconds; a bare number is in seconds. `name` is the option to name in an error.

    Raises:
        SimulationError: the number is missing or the unit is unknown.
    """
    match = _DURATION.fullmatch(text)
    if match is None or (match[2] or "s") not in UNITS:
        raise SimulationError(f"{name} = {text!r}: write a number and a unit, such as 10ms, 30s, 5m, 3.1h, 54d or 5y")
    return float(match[1]) * UNITS[match[2] or "s"]


def duration(value: float) -> str:
    """Format seconds in the largest unit that keeps three digits readable."""
    if not math.isfinite(value):
        return "never"
    for unit in ("y", "d", "h", "m", "s"):
        if value >= 2 * UNITS[unit] or (unit == "s" and value >= 1):
            return f"{value / UNITS[unit]:.3g} {unit}"
    return f"{value * 1e3:.3g} ms"
