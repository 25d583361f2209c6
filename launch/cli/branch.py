"""`keepwarm branch`: start a new run from another run's checkpoint, which is only read."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from keepwarm.launch.local.train import run_here
from keepwarm.trainer.continual.branch import branched
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.stages import plan_stages


def branch_here(folder: Path, step: int, tokens: int, overrides: Sequence[str]) -> None:
    """Run the branch to completion.

    Raises the errors of `keepwarm.trainer.continual.branch.branched` and `keepwarm.launch.local.train.train_here`.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    job = branched(folder, step, tokens, overrides)
    if RunFolder(Path(job.output)).exists:
        raise OutputError(
            f"{job.output}: the run folder exists; keepwarm train {shlex.quote(job.output)} --resume continues it, "
            "output=PATH branches to another"
        )
    plan = plan_stages(job)[0]
    console.print(
        f"keepwarm: {job.name}: branches from {job.init_from}: {job.stages[0].tokens:,} tokens, "
        f"learning rate {plan.curve.at(0):g} to {plan.curve.at(plan.steps):g}"
    )
    run_here(job, "new", console)
