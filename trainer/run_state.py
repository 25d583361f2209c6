"""What continues a run besides the tensors: counters, ledger, curves, health, random states."""

import ast
import base64
import random
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.ledger import Ledger
from trainer.health import Health
from trainer.schedule import LrCurve
from trainer.spec import HealthSpec


@dataclass(kw_only=True)
class RunState:
    """Saved as JSON in every snapshot and checkpoint; changed by the loop alone."""

    step: int
    """Completed steps of the job, skipped ones included."""
    consumed: int
    """Samples handed out."""
    curves: list[LrCurve]
    """One for each stage, resolved when the run began."""
    ledger: Ledger
    health: Health

    def save(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "step": self.step,
            "consumed": self.consumed,
            "curves": [curve.save() for curve in self.curves],
            "ledger": self.ledger.save(),
            "health": self.health.save(),
        }

    @classmethod
    def load(cls, saved: dict[str, Any], health: HealthSpec) -> "RunState":
        """The inverse of `save`."""
        return cls(
            step=saved["step"],
            consumed=saved["consumed"],
            curves=[LrCurve.load(curve) for curve in saved["curves"]],
            ledger=Ledger.load(saved["ledger"]),
            health=Health.load(health, saved["health"]),
        )


def random_states() -> dict[str, str]:
    """States of this rank's random generators. keepwarm draws from none of them in a step; user code may."""
    states = {"torch": _text(torch.get_rng_state()), "python": repr(random.getstate())}
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: dict[str, str]) -> None:
    """The inverse of `random_states`."""
    import ast

    torch.set_rng_state(_bytes(states["torch"]))
    random.setstate(ast.literal_eval(states["python"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
