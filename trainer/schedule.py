"""Learning-rate curves: pure functions of the step inside a stage, with every boundary resolved and saved.

Formulas: linear warm-up and cosine as in Ibrahim et al. (2024); WSD as in Hu et al. (2024); infinite (warm-up,
cooldown, constant, exponential anneal) as in Singh et al. (2025). A piecewise curve holds what `trainer.refine` found.
Torch-free.
"""

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from keepwarm.section import Section

Kind = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite", "piecewise"]
Points = tuple[tuple[float, float], ...]
Shape = Literal["cosine", "linear", "inverse_sqrt"]

INVERSE_SQRT_ALPHA = 10.0
"""Steepness of the inverse-square-root cooldown (Singh et al., 2025)."""


class LrSpec(Section):
    """The learning-rate clause of a stage. Fractions are of the stage's steps."""

    schedule: Kind = "cosine"
    max: PositiveFloat = Field(description="peak, reached after the warm-up")
    min: NonNegativeFloat = Field(0.0, description="end of linear, cosine, wsd and of infinite's anneal")
    warmup: float = Field(0.01, ge=0, lt=1, description="fraction of linear warm-up from zero")
    constant: PositiveFloat | None = Field(None, description="infinite: the rate of the constant phase")
    cooldown: Shape = Field("cosine", description="infinite: shape of the way from max to constant")
    cooldown_end: float = Field(0.6, ge=0, le=1, description="infinite: where the constant phase begins")
    anneal: float = Field(0.0, ge=0, le=1, description="infinite, wsd: fraction of the final anneal")
    points: Points = Field(
        (), description="piecewise: (fraction of the stage, fraction of max), joined by straight lines; no warm-up"
    )

    @model_validator(mode="after")
    def _is_a_curve(self) -> "LrSpec":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        if self.schedule == "infinite":
            if self.constant is None or not self.min <= self.constant <= self.max:
                raise ValueError("schedule infinite needs constant, between min and max")
            if not self.warmup <= self.cooldown_end <= 1 - self.anneal:
                raise ValueError("schedule infinite needs warmup <= cooldown_end <= 1 - anneal")
            if self.anneal and not self.min:
                raise ValueError("an exponential anneal needs min above 0")
        elif self.constant is not None:
            raise ValueError(f"constant belongs to schedule infinite, not to {self.schedule}")
        if self.schedule == "piecewise":
            self._check_points()
        elif self.points:
            raise ValueError(f"points belong to schedule piecewise, not to {self.schedule}")
        if self.schedule == "wsd" and self.warmup + self.anneal > 1:
            raise ValueError("schedule wsd needs warmup + anneal <= 1")
        return self

    def _check_points(self) -> None:
        at = [point[0] for point in self.points]
        if len(at) < 2 or at != sorted(set(at)) or (at[0], at[-1]) != (0, 1):
            raise ValueError("schedule piecewise needs points from fraction 0 to fraction 1, each later than the last")
        if not all(0 <= height <= 1 for _, height in self.points):
            raise ValueError("points are fractions of max, from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LrCurve:
    """A clause resolved for a stage of `end` steps; its fields are saved with the training state."""

    kind: Kind
    peak: float
    floor: float
    constant: float
    cooldown: Shape
    warmup_end: int
    cooldown_end: int
    constant_end: int
    end: int
    points: Points = ()

    @classmethod
    def of(cls, spec: LrSpec, steps: int) -> "LrCurve":
        """Boundaries in steps; a warm-up fraction above zero is at least one step."""
        return cls(
            kind=spec.schedule,
            peak=spec.max,
            floor=spec.min,
            constant=spec.max if spec.constant is None else spec.constant,
            cooldown=spec.cooldown,
            warmup_end=max(1, int(spec.warmup * steps)) if spec.warmup and not spec.points else 0,
            cooldown_end=int(spec.cooldown_end * steps),
            constant_end=int((1 - spec.anneal) * steps),
            end=steps,
            points=spec.points,
        )

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "LrCurve":
        """The inverse of `save`."""
        values = {field.name: saved[field.name] for field in fields(cls) if field.name != "points"}
        points = tuple((float(at), float(height)) for at, height in saved.get("points", ()))
        return cls(**values, points=points)

    def save(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"points": [list(point) for point in self.points]}

    @property
    def constant_phase(self) -> range:
        """Counts of completed steps of the stage after which the rate is the constant one; empty where there is none.

        From any of them an anneal continues the curve without a jump.
        """
        match self.kind:
            case "constant":
                return range(self.warmup_end, self.end + 1)
            case "wsd" if self.warmup_end < self.constant_end:
                return range(self.warmup_end, self.constant_end + 1)
            case "infinite" if self.cooldown_end < self.constant_end:
                return range(self.cooldown_end, self.constant_end + 1)
            case _:
                return range(0)

    @property
    def corners(self) -> tuple[int, ...]:
        """Steps of the stage at which one phase of the curve may pass into the next."""
        inner = {at for at in (self.warmup_end, self.cooldown_end, self.constant_end) if 0 < at < self.end}
        return tuple(sorted({0, *(at + offset for at in inner for offset in (-1, 0)), self.end - 1}))

    def at(self, step: int) -> float:
        """Learning rate of the stage's step `step`, counted from 0; after `end` it stays where it is."""
        step = min(step, self.end)
        if step < self.warmup_end:
            return self.peak * (step + 1) / self.warmup_end
        match self.kind:
            case "constant":
                return self.peak
            case "linear":
                return _between(self.peak, self.floor, self._progress(step, self.warmup_end, self.end))
            case "cosine":
                return _cosine(self.peak, self.floor, self._progress(step, self.warmup_end, self.end))
            case "inverse_sqrt":
                return max(self.floor, self.peak * math.sqrt(max(1, self.warmup_end) / max(1, step)))
            case "wsd":
                return _between(self.peak, self.floor, self._progress(step, self.constant_end, self.end))
            case "infinite":
                return self._infinite(step)
            case "piecewise":
                return self._piecewise(step / max(1, self.end))

    def _piecewise(self, at: float) -> float:
        for (start, low), (stop, high) in pairwise(self.points):
            if at <= stop:
                return self.peak * _between(low, high, (at - start) / (stop - start))
        return self.peak * self.points[-1][1]

    def _infinite(self, step: int) -> float:
        if step < self.cooldown_end:
            progress = self._progress(step, self.warmup_end, self.cooldown_end)
            match self.cooldown:
                case "cosine":
                    return _cosine(self.peak, self.constant, progress)
                case "linear":
                    return _between(self.peak, self.constant, progress)
                case "inverse_sqrt":
                    last = 1 / math.sqrt(1 + INVERSE_SQRT_ALPHA) - 1
                    now = 1 / math.sqrt(1 + INVERSE_SQRT_ALPHA * progress) - 1
                    return _between(self.peak, self.constant, now / last)
        if step < self.constant_end or self.constant_end >= self.end:
            return self.constant
        progress = self._progress(step, self.constant_end, self.end)
        return self.constant * math.pow(self.floor / self.constant, progress)

    @staticmethod
    def _progress(step: int, start: int, end: int) -> float:
        return min(1.0, max(0, step - start) / max(1, end - start))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
