"""What the data commands have in common: how they end."""

import sys
from typing import NoReturn

import typer

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.errors import TrainerError


def run(app: typer.Typer) -> NoReturn:
    """Run a command; an error of ours is one sentence on stderr and its exit code, an interruption is 130."""
    try:
        app()
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.DONE)
