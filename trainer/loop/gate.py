"""Gates: check whether a domain was forgotten more than its stage allows. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.trainer.job.sections import GateSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """A domain whose loss rose by more than its gate allows; losses in nats per token."""

    stage: str
    gate: GateSpec
    step: int
    before: float
    """At the start of the stage."""
    now: float

    def text(self) -> str:
        """Describe the violation in one sentence."""
        return (
            f"stages.{self.stage}.gate: domain {self.gate.domain} was forgotten by {self.now - self.before:.4f} nats "
            f"per token by iteration {self.step} ({self.before:.4f} at the start of the stage, {self.now:.4f} now), "
            f"more than max_forgetting = {self.gate.max_forgetting:g}"
        )


def forgetting(
    gate: GateSpec | None, *, stage: str, step: int, baseline: Mapping[str, float], losses: Mapping[str, float]
) -> Forgetting | None:
    """Check an evaluation against the losses at the start of the stage. None: the gate is passed or does not apply."""
    if gate is None:
        return None
    before, now = baseline.get(gate.domain), losses.get(gate.domain)
    if before is None or now is None or now - before <= gate.max_forgetting:
        return None
    return Forgetting(stage=stage, gate=gate, step=step, before=before, now=now)
