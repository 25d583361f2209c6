"""Quantised weights of sources. Pure; reading a job needs them, so nothing heavy is imported."""

from collections.abc import Mapping
from fractions import Fraction

from keepwarm.trainer.errors import SpecError

UNITS = 65_536
"""Weights are multiples of 1/UNITS."""


def quantise(mixture: Mapping[str, float], units_in_all: int = UNITS) -> dict[str, int]:
    """Return weights in units of 1/65,536 that add up to `units_in_all`, by largest remainder; keys sorted.

    Raises:
        SpecError: no weights, one that is not a positive number, or one below 1/65,536 of the total.
    """
    if not mixture:
        raise SpecError("mixture: names no source")
    for name, weight in mixture.items():
        if not 0 < weight < float("inf"):
            raise SpecError(f"mixture.{name} = {weight} is not a positive weight")
    names = sorted(mixture)
    total = sum(Fraction(mixture[name]) for name in names)
    exact = {name: Fraction(mixture[name]) / total * units_in_all for name in names}
    for name in names:
        if exact[name] < 1:
            raise SpecError(
                f"mixture.{name} is {float(exact[name] / UNITS):.2e} of the total, below the smallest share "
                f"of 1/{UNITS:,} = {1 / UNITS:.2e}; raise it or remove the source"
            )
    units = {name: int(exact[name]) for name in names}
    missing = units_in_all - sum(units.values())
    for name in sorted(names, key=lambda name: units[name] - exact[name])[:missing]:
        units[name] += 1
    return units
