"""Nodes of a SLURM allocation: select the healthy ones for a start, and attribute failures to nodes."""

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from keepwarm.exit_code import ExitCode
from keepwarm.launch.node.slot_table import ATTRIBUTION_WINDOW_S
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.run import network_check
from keepwarm.launch.run.node_check import MARK, look, problems
from keepwarm.launch.slurm.script import in_container
from keepwarm.trainer.distributed.launcher_environment import own_address
from keepwarm.trainer.job.shrink import layouts
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.monitor import events

NODE_CHECK_TIMEOUT_S = 120.0
"""Timeout of the health check of the nodes."""


@dataclass
class Allocation:
    """Nodes of this job, their failures, and whether SLURM is ending the job."""

    folder: Path
    job: JobSpec
    nodes: list[str]
    ending: bool = False
    bad: dict[str, str] = field(default_factory=dict)
    """Reason for each excluded node."""
    blamed: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Unix times of failed starts, by the node whose rank failed first."""

    def say(self, text: str) -> None:
        print(f"keepwarm: {text}", flush=True)

    @property
    def slurm_job(self) -> str:
        return os.environ["SLURM_JOB_ID"]

    def note(self, event: events.Event) -> None:
        events.append(self.folder, event)

    def note_end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def healthy(self) -> list[str]:
        """Return the usable nodes in SLURM's order; log the excluded ones.

        Nodes whose ranks failed repeatedly are used only while there are not enough others.
        """
        unfit, failing = self._unfit(), self._failing()
        for name, why in failing.items():
            if name not in unfit and len(self.nodes) - len(unfit) > self.job.layout.nodes:
                unfit[name] = why
        for name, why in unfit.items():
            if name not in self.bad:
                self.say(f"node {name} is left out: it {why}")
                self.note(events.NodeExcluded(host=name, why=why, slurm_job=self.slurm_job))
        self.bad = unfit
        return [name for name in self.nodes if name not in unfit]

    def blame(self, name: str) -> None:
        """Record that a rank on this node ended a start."""
        self.blamed[name].append(time.time())

    def _failing(self) -> dict[str, str]:
        """Return nodes whose ranks failed repeatedly, as counted here or by supervisors, with the reason."""
        limit, now = self.job.cluster.max_node_failures, time.time()
        counts = {name: sum(now - at < ATTRIBUTION_WINDOW_S for at in times) for name, times in self.blamed.items()}
        return {name: f"ended {count} starts" for name, count in counts.items() if count >= limit} | left_out(
            events.read(self.folder).events
        )

    def _unfit(self) -> dict[str, str]:
        """Return unusable nodes with the reason. Check all nodes in one step, then those without an answer singly."""
        first = self.nodes[0]
        gpus = self.job.cluster.slurm.gpus > 0
        memory = max(Plan(one).node_memory(gpus=gpus) for one in layouts(self.job).values())
        wanted = look(self.folder)
        host = own_address(self.nodes[1]) if self.nodes[1:] else None
        with network_check.echo(host or "127.0.0.1") as echo:
            seen = self._ask(self.nodes, echo)
            for name in [name for name in self.nodes if name not in seen]:
                # A dead node makes srun abort the whole step.
                seen |= self._ask([name], echo)
        found = {name: "; ".join(why) for name, one in seen.items() if (why := problems(one, wanted, memory))}
        apart = network_check.apart({name: one["network_wrong"] for name, one in seen.items()}, first)
        silent = {name: "does not answer" for name in self.nodes if name not in seen}
        return apart | found | silent

    def _ask(self, names: Sequence[str], echo: str) -> dict[str, dict[str, Any]]:
        command = [
            "srun", f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1", "--no-kill",
            f"--nodelist={','.join(names)}", "--overlap", "--kill-on-bad-exit=0",
            *in_container(self.job.cluster.slurm, self.folder, sys.executable),
            *("-P", "-m", "keepwarm.launch.run.node_check", str(self.folder), echo),
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            try:
                output, _ = process.communicate(timeout=NODE_CHECK_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
        return {record["node"]: record for record in map(json.loads, lines)}

    def run(self, command: Sequence[str], restarts: int) -> tuple[int, str | None]:
        """Run the step to completion; return its exit code, 128 + n for signal n, and the node that failed first."""
        environment = os.environ | {
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "OMP_NUM_THREADS": str(self.job.numerics.threads_per_rank),
            "PYTHONUNBUFFERED": "1",
        }
        # In its own session: the signal that ends the batch shell must not make srun kill ranks before they save.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True,
            text=True, errors="replace",
        )  # fmt: skip
        assert process.stderr is not None
        guilty = None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            guilty = guilty or culprit(line)
        code = process.wait()
        return code if code >= 0 else 128 - code, guilty


def culprit(line: str) -> str | None:
    """Return the node of the failed task that an srun message names; None for a requested exit. Pure."""
    asked = rf"Terminated|User defined signal|Exited with exit code {ExitCode.INTERRUPTED:d}\b"
    found = re.match(rf"srun: error: ([^\s:]+): tasks? [\d,\-\[\]]+: (?!{asked})", line)
    return None if found is None else found.group(1)


def left_out(log: Sequence[events.Event]) -> dict[str, str]:
    """Return nodes that supervisors have excluded since the last submission, with the reason. Pure."""
    found: dict[str, str] = {}
    for event in log:
        if isinstance(event, events.BatchStarted) and not event.requeues:
            found.clear()
        elif isinstance(event, events.NodeExcluded) and event.slurm_job is None:
            found[event.host] = event.why
    return found
