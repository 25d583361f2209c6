"""The state that continues a run, besides tensors and the data ledger: counters, curves, health."""

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
    """Saved as JSON in every snapshot and checkpoint; only the loop changes it."""

    step: int
    """Completed steps of the job, including skipped ones."""
    curves: list[Curve]
    """One curve per stage, resolved when the run began."""
    health: Health
    baseline: dict[str, float] = field(default_factory=dict)
    """Validation loss by domain at the start of the current stage, the baseline for forgetting."""
    parent: dict[str, Any] | None = None
    """Origin of the initial weights."""
    tokenizer: str | None = None
    """Hash of the tokenizer that produced the data."""

    def save(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "step": self.step,
            "curves": [curve.save() for curve in self.curves],
            "health": self.health.save(),
            "baseline": self.baseline,
            "parent": self.parent,
            "tokenizer": self.tokenizer,
        }

    def adopt_curves(self, plans: Sequence[StagePlan]) -> list[str]:
        """Take over the planned curves of every unfinished stage; return one line per change."""
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
        """Restore what `save` returned.

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
            raise CheckpointError(f"the saved run state has no {error}") from error
