"""The state that continues a run, besides tensors and the data ledger: counters, curves, health."""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.job.curve import Curve, load_curve
from keepwarm.trainer.job.position import Position, StageRecord, position_at, saved_spec, stage_records
from keepwarm.trainer.job.sections import HealthSpec, StageSpec
from keepwarm.trainer.job.stages import StagePlan
from keepwarm.trainer.monitor.health import Health


@dataclass(kw_only=True)
class RunState:
    """Saved as JSON in every snapshot and checkpoint; only the loop changes it."""

    step: int
    """Completed steps of the job, including skipped ones."""
    curves: list[Curve]
    """One curve per stage, in steps of the stage's plan; those of stages that were left stay as they were trained."""
    health: Health
    stages: list[StageRecord] = field(default_factory=list)
    """Stages that have begun."""
    baseline: dict[str, float] = field(default_factory=dict)
    """Validation loss by domain at the start of the current stage, the baseline for forgetting."""
    parent: dict[str, Any] | None = None
    """Origin of the initial weights."""
    tokenizer: str | None = None
    """Hash of the tokenizer that produced the data."""
    seed: int | None = None
    """The job's seed when the run began; a ledger may have its parent's. None: saved by an earlier version."""
    validation: dict[str, str] = field(default_factory=dict)
    """Identity of each domain's data, which `baseline` and earlier evaluations refer to."""

    model: dict[str, Any] = field(default_factory=dict)
    """The job's model section; empty: saved by an earlier version."""

    def position(self, ledger: Ledger) -> Position:
        """Return how far the run has come."""
        return position_at(self.step, self.stages, ledger)

    def begin_stage(self, plan: StagePlan, spec: StageSpec) -> None:
        """Record that the stage of `plan` begins with the next step."""
        self.stages.append(
            StageRecord(name=plan.name, start_step=self.step, curve_step=plan.curve_step, spec=saved_spec(spec))
        )

    def save(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "step": self.step,
            "curves": [curve.save() for curve in self.curves],
            "health": self.health.save(),
            "baseline": self.baseline,
            "parent": self.parent,
            "tokenizer": self.tokenizer,
            "stages": msgspec.to_builtins(self.stages),
            "seed": self.seed,
            "validation": self.validation,
            "model": self.model,
        }

    @classmethod
    def load(cls, saved: dict[str, Any], health: HealthSpec, ledger: Ledger) -> "RunState":
        """Restore what `save` returned; `ledger` is the one that was saved with it.

        Raises:
            CheckpointError: a value is missing, or does not agree with the ledger.
        """
        try:
            return cls(
                step=int(saved["step"]),
                curves=[load_curve(curve) for curve in saved["curves"]],
                health=Health.load(health, saved["health"]),
                baseline=dict(saved.get("baseline", {})),
                parent=saved.get("parent"),
                tokenizer=saved.get("tokenizer"),
                stages=stage_records(saved, ledger),
                seed=saved.get("seed"),
                validation=dict(saved.get("validation", {})),
                model=dict(saved.get("model", {})),
            )
        except KeyError as error:
            raise CheckpointError(f"the saved run state has no {error}") from error
