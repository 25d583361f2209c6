"""`keepwarm watch`: refresh the table of runs until all of their jobs have ended."""

import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from keepwarm.launch.batch.runs import runs_in, table


def watch(root: Path, every: float) -> bool:
    """Redraw the table of runs in place `every` seconds until no job is active; return whether none has failed.

    Raises as `runs_in`.
    """
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            rows = runs_in(root)
            live.update(Text("\n".join(table(rows))), refresh=True)
            if not any(row.job is not None and row.job.active for row in rows):
                return not any(row.failed for row in rows)
            time.sleep(every)
