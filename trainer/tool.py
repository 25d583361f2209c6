"""Error handling shared by the commands of this package, each of which is a program of its own."""

import sys
import traceback
from typing import NoReturn

import typer

from keepwarm.debug import wants_traceback
from keepwarm.exit_code import ExitCode
from keepwarm.ft.errors import FtError
from keepwarm.side_writer import end_without_stdout, protect_streams
from keepwarm.text import problem_of, problem_of_path
from keepwarm.trainer.errors import TrainerError


def run(app: typer.Typer) -> NoReturn:
    """Run a command; print errors of ours as one line on stderr and exit with their code, or 130 if interrupted.

    With `--debug` or KEEPWARM_DEBUG=1 the traceback comes before that line. Progress and warnings on stderr never end a
    command; what it prints on stdout is its result.
    """
    protect_streams(2)
    end_without_stdout()
    if (wrong := problem_of(sys.argv[1:])) is not None:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    try:
        app()
    except (TrainerError, FtError) as error:
        if wants_traceback():
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, TrainerError) else ExitCode.BAD_INPUT)
    except OSError as error:
        if wants_traceback() or (said := problem_of_path(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        sys.stdout.flush()
    sys.exit(ExitCode.DONE)
