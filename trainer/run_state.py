"""What continues a run besides the tensors and the data ledger: counters, curves, health."""

from dataclasses import dataclass
from typing import Any

from trainer.errors import CheckpointError
from trainer.health import Health
from trainer.schedule import LrCurve
from trainer.spec import HealthSpec


@dataclass(kw_only=True)
class RunState:
    """Saved as JSON in every snapshot and checkpoint; changed by the loop alone."""

    step: int
    """Completed steps of the job, skipped ones included."""
    curves: list[LrCurve]
    """One for each stage, resolved when the run began."""
    health: Health

    def save(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "step": self.step,
            "curves": [curve.save() for curve in self.curves],
            "health": self.health.save(),
        }

    @classmethod
    def load(cls, saved: dict[str, Any], health: HealthSpec) -> "RunState":
        """The inverse of `save`.

        Raises:
            CheckpointError: a value is missing.
        """
        try:
            return cls(
                step=int(saved["step"]),
                curves=[LrCurve.load(curve) for curve in saved["curves"]],
                health=Health.load(health, saved["health"]),
            )
        except KeyError as error:
            raise CheckpointError(f"the saved run state lacks {error}") from error
