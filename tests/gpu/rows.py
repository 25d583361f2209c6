"""What all parts use: a row of the table, the small job, and runs of it."""

import json
from pathlib import Path

import torch

from keepwarm.trainer.job.files import shipped_configs
from keepwarm.trainer.loop.session import run_session
from tests.support.runs.run_contents import steps_of

TINY = shipped_configs() / "ci" / "tiny.yaml"
MIB, GIB = 1 << 20, 1 << 30
STEPS = 6


def row(what: str, value: object, *, passed: bool | None = None) -> None:
    """Print a row. `passed` is None where there is nothing to fail."""
    print(json.dumps({"what": what, "value": str(value), "passed": passed}), flush=True)


def small(output: Path, device: torch.device) -> list[str]:
    """Return the overrides of a few steps of the tiny job whose bits are the same every time."""
    return [
        f"cluster.device={device.type}", f"output={output}", "log.tensorboard=false", "numerics.deterministic=true",
        f"stages.0.tokens={STEPS * 8 * 64}", "evaluation.samples=4",
    ]  # fmt: skip


def losses(output: Path, device: torch.device, *overrides: str) -> torch.Tensor:
    """Run the tiny job in this process."""
    run_session(TINY, [*small(output, device), *overrides], resume=False)
    return losses_of(output)


def losses_of(output: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in steps_of(output) if "loss" in line], dtype=torch.float64)


def compare(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    difference = float((one - other).abs().max())
    row(f"largest difference of losses, {what}", f"{difference:.1e}", passed=difference < 1e-2)
