"""Run a simulation from options to tables, plots or JSON."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from keepwarm.launch.simulation.options import Options, questions, sizes
from keepwarm.launch.simulation.recommend import recommend
from keepwarm.launch.simulation.report import Asked, as_data, print_report
from keepwarm.launch.simulation.study import ask, schemes_for

GOODPUT, SURVIVAL = 0.9, 0.999
"""Default of each target if only the other one is given."""
PROGRESS_DELAY_S = 2.0
"""Seconds of computation after which progress is shown."""


def run(options: Options) -> None:
    """Simulate what the options request and print the answers. Raises SimulationError on bad input."""
    goodput, survival = options.target_goodput, options.target_survival
    wanted = goodput is not None or survival is not None
    trials, advice = options.trials, None
    asked: list[Asked] = []
    with _progress(trials * 4 * len(sizes(options)) + (trials + 20) * wanted) as step:
        for question in questions(options):
            asked.append((question, ask(question, schemes_for(question), step)))
        if wanted:
            advice = recommend(asked[-1][0], goodput or GOODPUT, survival or SURVIVAL, step)
    if options.plot is not None:
        from keepwarm.launch.simulation.plot import plot

        for path in plot(asked, options.plot):
            print(f"wrote {path}", file=sys.stderr)
    if options.as_json:
        print(json.dumps(as_data(asked, advice), allow_nan=False))
    else:
        print_report(asked, advice)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that counts steps; show progress on stderr after PROGRESS_DELAY_S."""
    began = shown = monotonic()
    done = 0

    def step() -> None:
        nonlocal done, shown
        done += 1
        now = monotonic()
        if now - began > PROGRESS_DELAY_S and now - shown > (0.2 if live else 5 * PROGRESS_DELAY_S):
            shown = now
            line = f"simulating: {min(done / total, 1):.0%} after {now - began:.0f} s"
            print(f"\r{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    live = sys.stderr.isatty()
    try:
        yield step
    finally:
        if live and shown > began:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
