"""Error handling shared by the data commands."""

import sys
from typing import NoReturn

import typer

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.errors import TrainerError


def run(app: typer.Typer) -> NoReturn:
    """Run a command; print errors of ours as one line on stderr and exit with their code, or 130 if interrupted."""
    try:
        app()
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.DONE)
