"""What continues a run besides the tensors and the data ledger: counters, curves, health."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.job.curve import Curve, load_curve
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.job.stages import StagePlan
from keepwarm.trainer.monitor.health import Health


@dataclass(kw_only=True)
class RunState:
    """Saved as JSON in every snapshot and checkpoint; changed by the loop alone."""

    step: int
    """Completed steps of the job, skipped ones included."""
    curves: list[Curve]
    """One for each stage, resolved when the run began."""
    health: Health
    baseline: dict[str, float] = field(default_factory=dict)
    """Validation loss by domain at the beginning of the current stage; forgetting is measured against it."""
    parent: dict[str, Any] | None = None
    """What the run was initialised from."""
    tokenizer: str | None = None
    """Hash of the tokenizer that made the data."""

    def save(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "step": self.step,
            "curves": [curve.save() for curve in self.curves],
            "health": self.health.save(),
            "baseline": self.baseline,
            "parent": self.parent,
            "tokenizer": self.tokenizer,
        }

    def adopt_curves(self, plans: Sequence[StagePlan]) -> list[str]:
        """Take the curves of the plan for every stage that is not over; returns a line for each that changes."""
        lines = []
        for plan in plans:
            if plan.index >= len(self.curves):
                self.curves.append(plan.curve)
            before = self.curves[plan.index]
            if before != plan.curve and self.step < plan.end_step:
                old, new = before.save(), plan.curve.save()
                lines += [
                    f"stages.{plan.name}.lr: {key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
                    for key in dict.fromkeys((*old, *new))
                    if old.get(key) != new.get(key)
                ]
                self.curves[plan.index] = plan.curve
        del self.curves[len(plans) :]
        return lines

    @classmethod
    def load(cls, saved: dict[str, Any], health: HealthSpec) -> "RunState":
        """The inverse of `save`.

        Raises:
            CheckpointError: a value is missing.
        """
        try:
            return cls(
                step=int(saved["step"]),
                curves=[load_curve(curve) for curve in saved["curves"]],
                health=Health.load(health, saved["health"]),
                baseline=dict(saved.get("baseline", {})),
                parent=saved.get("parent"),
                tokenizer=saved.get("tokenizer"),
            )
        except KeyError as error:
            raise CheckpointError(f"the saved run state lacks {error}") from error
