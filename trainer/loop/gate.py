"""Gates: whether a domain has forgotten more than a stage allows. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.trainer.job.sections import GateSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """A domain's loss before and after, in nats per token, of which the difference is more than a gate allows."""

    stage: str
    gate: GateSpec
    step: int
    before: float
    """At the beginning of the stage."""
    now: float

    def text(self) -> str:
        """What happened, in one sentence."""
        return (
            f"stages.{self.stage}.gate: domain {self.gate.domain} has forgotten {self.now - self.before:.4f} nats per "
            f"token by iteration {self.step} ({self.before:.4f} at the beginning of the stage, {self.now:.4f} now), "
            f"more than max_forgetting = {self.gate.max_forgetting:g}"
        )


def forgetting(
    gate: GateSpec | None, *, stage: str, step: int, baseline: Mapping[str, float], losses: Mapping[str, float]
) -> Forgetting | None:
    """Judge an evaluation against the losses at the beginning of the stage; None: the gate is passed or not judged."""
    if gate is None:
        return None
    before, now = baseline.get(gate.domain), losses.get(gate.domain)
    if before is None or now is None or now - before <= gate.max_forgetting:
        return None
    return Forgetting(stage=stage, gate=gate, step=step, before=before, now=now)
