"""Run one rank: `python -P -m keepwarm.trainer RUN.json`, started by keepwarm, torchrun, mpirun or srun."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from keepwarm.debug import wants_traceback
from keepwarm.exit_code import ExitCode
from keepwarm.side_writer import protect_streams
from keepwarm.text import problem_of


def main(arguments: list[str]) -> int:
    """Train the job; return the exit code: 0 done, 2 bad input, 3 stopped itself, 4 lost, 6 unsaved, 130 signal."""
    protect_streams(patient=True)
    if (wrong := problem_of(arguments)) is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    options = _parser().parse_args(arguments)
    # Heavy imports come after the arguments are validated: a typo must not cost three seconds.
    from keepwarm.ft.errors import FtError
    from keepwarm.parallel.errors import ParallelError
    from keepwarm.trainer.distributed.device_errors import broken
    from keepwarm.trainer.distributed.in_process_restart import ControlChannel, RestartRequested
    from keepwarm.trainer.errors import TrainerError
    from keepwarm.trainer.loop.interrupt import HandedOver
    from keepwarm.trainer.loop.session import run_session
    from keepwarm.trainer.monitor.last_words import BrokenGpu, leave

    control = ControlChannel.inherited()
    try:
        while True:
            try:
                finished = run_session(options.job, options.override, resume=options.resume, control=control)
                return ExitCode.DONE if finished else ExitCode.INTERRUPTED
            except RestartRequested as request:
                rank = os.environ.get("RANK", "0")
                print(f"rank {rank}: lost its peers ({request}); restarting in this process", file=sys.stderr)
            except BaseException as error:
                if (text := broken(error)) is not None:
                    leave(BrokenGpu(text))
                raise
            control.park()
    except (TrainerError, ParallelError, FtError) as error:
        if wants_traceback():
            traceback.print_exc()
        rank = f"rank {os.environ.get('RANK', '0')}: "
        print(f"error: {rank}{str(error).removeprefix(rank)}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, TrainerError) else ExitCode.BAD_INPUT
    except (KeyboardInterrupt, HandedOver):
        return ExitCode.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -P -m keepwarm.trainer",
        description="Run one rank of a job; start one process per rank of its layout, for example with "
        "`torchrun --nproc-per-node 8 -m keepwarm.trainer runs/demo/run.json`. `keepwarm train` does that for you.",
    )
    parser.add_argument("job", type=Path, help="run.json of a run folder, or a job file")
    parser.add_argument("override", nargs="*", help="a.b=c")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    return parser


if __name__ == "__main__":
    # Not just sys.exit: after an error, other ranks may still be in a collective that this one must not wait for.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)
