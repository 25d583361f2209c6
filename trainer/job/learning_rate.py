"""The learning-rate curves shipped with keepwarm, each with its options in a job.

Formulas: linear warm-up and cosine as in Ibrahim et al. (2024); WSD as in Hu et al. (2024); infinite (warm-up,
cooldown, constant, exponential anneal) as in Singh et al. (2025). Piecewise curves come from
`keepwarm.trainer.continual.refine`. Torch-free.
"""

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from keepwarm.trainer.job.curve import AnnealableCurve, Curve, LrSpec

Points = tuple[tuple[float, float], ...]
Cooldown = Literal["cosine", "linear", "inverse_sqrt"]

INVERSE_SQRT_ALPHA = 10.0
"""Steepness of the inverse-square-root cooldown (Singh et al., 2025)."""


class WarmedSpec(LrSpec):
    """Options of curves that start with a warm-up."""

    warmup: float = Field(0.01, ge=0, lt=1, description="fraction of steps spent on linear warm-up from zero")

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps; a nonzero fraction gives at least one."""
        return max(1, int(self.warmup * steps)) if self.warmup else 0


class FallingSpec(WarmedSpec):
    """Options of curves that decay to `min`."""

    min: NonNegativeFloat = Field(0.0, description="rate at the end of the curve (infinite: of its anneal)")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


@dataclass(frozen=True, kw_only=True)
class WarmedCurve(Curve):
    """Linear warm-up to the peak, followed by the shape's own curve."""

    peak: float
    warmup_end: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        return (self.warmup_end,)

    def at(self, step: int) -> float:
        step = min(step, self.end)
        if step < self.warmup_end:
            return self.peak * (step + 1) / self.warmup_end
        return self.warmed_at(step)

    @abstractmethod
    def warmed_at(self, step: int) -> float:
        """Return the rate of a step between `warmup_end` and `end`."""


class ConstantSpec(WarmedSpec):
    """Warm-up, then `max`."""

    schedule: Literal["constant"] = "constant"

    def curve(self, steps: int) -> "Constant":
        return Constant(kind=self.schedule, peak=self.max, warmup_end=self.warmup_steps(steps), end=steps)


@dataclass(frozen=True, kw_only=True)
class Constant(WarmedCurve, AnnealableCurve):
    """Constant at the peak."""

    Options = ConstantSpec

    @property
    def constant_phase(self) -> range:
        return range(self.warmup_end, self.end + 1)

    def anneal(self) -> dict[str, Any]:
        return {"schedule": "wsd", "max": self.peak, "min": 0.0, "warmup": 0.0, "anneal": 1.0}

    def warmed_at(self, step: int) -> float:
        return self.peak


class LinearSpec(FallingSpec):
    """Warm-up, then a straight line to `min`."""

    schedule: Literal["linear"] = "linear"

    def curve(self, steps: int) -> "Linear":
        warm = self.warmup_steps(steps)
        return Linear(kind=self.schedule, peak=self.max, floor=self.min, warmup_end=warm, end=steps)


@dataclass(frozen=True, kw_only=True)
class Linear(WarmedCurve):
    """Straight line from the peak to the floor."""

    Options = LinearSpec
    floor: float

    def warmed_at(self, step: int) -> float:
        return _between(self.peak, self.floor, _progress(step, self.warmup_end, self.end))


class CosineSpec(FallingSpec):
    """Warm-up, then half a cosine to `min`."""

    schedule: Literal["cosine"] = "cosine"

    def curve(self, steps: int) -> "Cosine":
        warm = self.warmup_steps(steps)
        return Cosine(kind=self.schedule, peak=self.max, floor=self.min, warmup_end=warm, end=steps)


@dataclass(frozen=True, kw_only=True)
class Cosine(WarmedCurve):
    """Half a cosine from the peak to the floor."""

    Options = CosineSpec
    floor: float

    def warmed_at(self, step: int) -> float:
        return _cosine(self.peak, self.floor, _progress(step, self.warmup_end, self.end))


class InverseSqrtSpec(FallingSpec):
    """Warm-up, then the inverse square root of the step, never below `min`."""

    schedule: Literal["inverse_sqrt"] = "inverse_sqrt"

    def curve(self, steps: int) -> "InverseSqrt":
        warm = self.warmup_steps(steps)
        return InverseSqrt(kind=self.schedule, peak=self.max, floor=self.min, warmup_end=warm, end=steps)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(WarmedCurve):
    """Peak times sqrt(warm-up / step)."""

    Options = InverseSqrtSpec
    floor: float

    def warmed_at(self, step: int) -> float:
        return max(self.floor, self.peak * math.sqrt(max(1, self.warmup_end) / max(1, step)))


class WsdSpec(FallingSpec):
    """Warm-up, stable at `max`, then a straight line to `min`."""

    schedule: Literal["wsd"] = "wsd"
    anneal: float = Field(0.0, ge=0, le=1, description="fraction of steps spent on the final anneal")

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.warmup + self.anneal > 1:
            raise ValueError("schedule wsd needs warmup + anneal <= 1")
        return self

    def curve(self, steps: int) -> "Wsd":
        return Wsd(
            kind=self.schedule,
            peak=self.max,
            floor=self.min,
            warmup_end=self.warmup_steps(steps),
            constant_end=int((1 - self.anneal) * steps),
            end=steps,
        )


@dataclass(frozen=True, kw_only=True)
class Wsd(WarmedCurve, AnnealableCurve):
    """Constant at the peak, then a straight line to the floor from `constant_end` on."""

    Options = WsdSpec
    floor: float
    constant_end: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        return self.warmup_end, self.constant_end

    @property
    def constant_phase(self) -> range:
        return range(self.warmup_end, self.constant_end + 1) if self.warmup_end < self.constant_end else range(0)

    def anneal(self) -> dict[str, Any]:
        return {"schedule": "wsd", "max": self.peak, "min": self.floor, "warmup": 0.0, "anneal": 1.0}

    def warmed_at(self, step: int) -> float:
        return _between(self.peak, self.floor, _progress(step, self.constant_end, self.end))


class InfiniteSpec(FallingSpec):
    """Warm-up, cooldown from `max` to `constant`, a constant phase, an exponential anneal to `min`."""

    schedule: Literal["infinite"] = "infinite"
    constant: PositiveFloat = Field(description="rate of the constant phase")
    cooldown: Cooldown = Field("cosine", description="shape of the decay from max to constant")
    cooldown_end: float = Field(0.6, ge=0, le=1, description="fraction of steps at which the constant phase begins")
    anneal: float = Field(0.0, ge=0, le=1, description="fraction of steps spent on the final anneal")

    @model_validator(mode="after")
    def _has_its_phases(self) -> Self:
        if not self.min <= self.constant <= self.max:
            raise ValueError("schedule infinite needs constant, between min and max")
        if not self.warmup <= self.cooldown_end <= 1 - self.anneal:
            raise ValueError("schedule infinite needs warmup <= cooldown_end <= 1 - anneal")
        if self.anneal and not self.min:
            raise ValueError("an exponential anneal needs min above 0")
        return self

    def curve(self, steps: int) -> "Infinite":
        return Infinite(
            kind=self.schedule,
            peak=self.max,
            floor=self.min,
            constant=self.constant,
            cooldown=self.cooldown,
            warmup_end=self.warmup_steps(steps),
            cooldown_end=int(self.cooldown_end * steps),
            constant_end=int((1 - self.anneal) * steps),
            end=steps,
        )


@dataclass(frozen=True, kw_only=True)
class Infinite(WarmedCurve, AnnealableCurve):
    """Cooldown to a constant rate, held until an anneal of any length."""

    Options = InfiniteSpec
    floor: float
    constant: float
    cooldown: Cooldown
    cooldown_end: int
    constant_end: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        return self.warmup_end, self.cooldown_end, self.constant_end

    @property
    def constant_phase(self) -> range:
        return range(self.cooldown_end, self.constant_end + 1) if self.cooldown_end < self.constant_end else range(0)

    def anneal(self) -> dict[str, Any]:
        rates = {"max": self.constant, "constant": self.constant, "min": self.floor or self.constant / 10}
        return {"schedule": "infinite", **rates, "warmup": 0.0, "cooldown_end": 0.0, "anneal": 1.0}

    def warmed_at(self, step: int) -> float:
        if step < self.cooldown_end:
            return self._cooling(_progress(step, self.warmup_end, self.cooldown_end))
        if step < self.constant_end or self.constant_end >= self.end:
            return self.constant
        return self.constant * math.pow(self.floor / self.constant, _progress(step, self.constant_end, self.end))

    def _cooling(self, progress: float) -> float:
        match self.cooldown:
            case "cosine":
                return _cosine(self.peak, self.constant, progress)
            case "linear":
                return _between(self.peak, self.constant, progress)
            case "inverse_sqrt":
                last = 1 / math.sqrt(1 + INVERSE_SQRT_ALPHA) - 1
                now = 1 / math.sqrt(1 + INVERSE_SQRT_ALPHA * progress) - 1
                return _between(self.peak, self.constant, now / last)


class PiecewiseSpec(LrSpec):
    """Linear interpolation between points, without a warm-up."""

    schedule: Literal["piecewise"] = "piecewise"
    points: Points = Field(description="(fraction of the stage, fraction of max), interpolated linearly")

    @model_validator(mode="after")
    def _covers_the_stage(self) -> Self:
        at = [point[0] for point in self.points]
        if len(at) < 2 or at != sorted(set(at)) or (at[0], at[-1]) != (0, 1):
            raise ValueError("schedule piecewise needs points from fraction 0 to fraction 1, each later than the last")
        if not all(0 <= height <= 1 for _, height in self.points):
            raise ValueError("points are fractions of max, from 0 to 1")
        return self

    def curve(self, steps: int) -> "Piecewise":
        return Piecewise(kind=self.schedule, peak=self.max, points=self.points, end=steps)


@dataclass(frozen=True, kw_only=True)
class Piecewise(Curve):
    """Linear interpolation between points."""

    Options = PiecewiseSpec
    peak: float
    points: Points

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(int(at * self.end) for at, _ in self.points)

    def at(self, step: int) -> float:
        at = min(step, self.end) / max(1, self.end)
        for (start, low), (stop, high) in pairwise(self.points):
            if at <= stop:
                return self.peak * _between(low, high, (at - start) / (stop - start))
        return self.peak * self.points[-1][1]

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Self:
        points = tuple((float(at), float(height)) for at, height in saved["points"])
        return cls(kind=saved["kind"], peak=saved["peak"], points=points, end=saved["end"])

    def save(self) -> dict[str, Any]:
        return asdict(self) | {"points": [list(point) for point in self.points]}


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0, step - start) / max(1, end - start))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
