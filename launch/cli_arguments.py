"""What several commands take."""

from pathlib import Path
from typing import Annotated

import typer

WITH_OVERRIDES = {"ignore_unknown_options": True}
PASSED_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

Job = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, or the name of a shipped job such as ci/tiny.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of the job file, as parallel.tensor=2."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also KEEPWARM_DEBUG=1).")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
