"""Arguments and options shared by several commands."""

from pathlib import Path
from typing import Annotated, Literal

import typer

WITH_OVERRIDES = {"ignore_unknown_options": True}
PASSED_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

Job = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, or the name of a shipped job such as ci/tiny.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the job file, such as parallel.tensor=2."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Force = Annotated[bool, typer.Option("--force", help="Empty the output folder and restart the run from scratch.")]


def start_mode(*, resume: bool, force: bool) -> Literal["new", "resume", "force"]:
    """Return the start mode of a run. Raises typer.BadParameter if both options are given."""
    if resume and force:
        raise typer.BadParameter("--resume continues a run and --force starts it again: give one of them")
    return "resume" if resume else "force" if force else "new"
