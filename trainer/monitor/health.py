"""Decide when a run warns and when it stops itself. Pure: a function of the step results."""

from dataclasses import dataclass
from typing import Literal

from keepwarm.trainer.job.sections import HealthSpec

MEAN_MOMENTUM = 0.9
WARM_STEPS = 10

Verdict = Literal["good", "empty", "skipped", "spike", "stop"]


@dataclass(kw_only=True, slots=True)
class Health:
    """Running judgement over the steps of a run."""

    spec: HealthSpec
    skipped_total: int = 0
    skipped_in_a_row: int = 0
    empty_total: int = 0
    """Steps without a target, which are skipped as well but say nothing about the model."""
    mean_loss: float | None = None
    seen: int = 0

    def judge(self, loss: float, skipped: bool, *, tokens: int) -> Verdict:
        """Judge the result of one step over `tokens` targets; `stop` after too many consecutive skipped steps."""
        if not tokens:
            self.empty_total += 1
            return "empty"
        if skipped:
            self.skipped_total += 1
            self.skipped_in_a_row += 1
            return "stop" if self.skipped_in_a_row >= self.spec.max_skipped else "skipped"
        self.skipped_in_a_row = 0
        self.seen += 1
        before = self.mean_loss
        self.mean_loss = loss if before is None else MEAN_MOMENTUM * before + (1 - MEAN_MOMENTUM) * loss
        spiked = before is not None and self.seen > WARM_STEPS and loss > self.spec.spike_factor * before
        return "spike" if spiked else "good"

    def save(self) -> dict[str, float | int | None]:
        """Return plain values, saved with the training state."""
        return {
            "skipped_total": self.skipped_total,
            "skipped_in_a_row": self.skipped_in_a_row,
            "empty_total": self.empty_total,
            "mean_loss": self.mean_loss,
            "seen": self.seen,
        }

    @classmethod
    def load(cls, spec: HealthSpec, saved: dict[str, float | int | None]) -> "Health":
        """Restore what `save` returned."""
        mean = saved["mean_loss"]
        return cls(
            spec=spec,
            skipped_total=int(saved["skipped_total"] or 0),
            skipped_in_a_row=int(saved["skipped_in_a_row"] or 0),
            empty_total=int(saved.get("empty_total") or 0),
            mean_loss=None if mean is None else float(mean),
            seen=int(saved["seen"] or 0),
        )
