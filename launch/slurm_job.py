"""What runs on the first node of a SLURM allocation: `python -P -m launch.slurm_job RUN`.

Checks the nodes, starts the ranks on as many healthy ones as the layout has, and decides what follows when they end:
nothing, the same again on the nodes that are left, or a requeue of the job.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from launch import events, slurm
from launch.errors import ClusterError
from launch.node_check import MARK, look, problems
from launch.run_folder import STARTED_FILE
from launch.slurm_script import in_container, node_step, rank_step
from trainer.errors import SpecError
from trainer.spec import JobSpec
from trainer.spec_file import RUN_FILE, load_run
from trainer.stages import plan_stages

RECORD = "slurm.json"
"""In the run folder: what `keepwarm submit` did."""
INTERRUPTED = 130
CHECK_DEADLINE = 120.0
"""Seconds that a node has to say how it is."""
REQUEUE_GRACE = 60.0
"""Seconds that SLURM has to end this process once it has put the job back into the queue."""

Verdict = Literal["done", "again", "requeue", "give up"]
_POLITE = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def verdict(code: int, *, ending: bool, failures: int, limit: int) -> tuple[Verdict, str]:
    """What follows when the ranks ended with `code`, and why. Pure.

    Args:
        code: of srun; 128 + n when a signal ended it.
        ending: SLURM ends the job by itself, by scancel, preemption or requeue: what comes next is its decision.
        failures: starts in a row, this one included, that failed without a step in between.
        limit: of `failures`.
    """
    if code == 0:
        return "done", "finished"
    if ending:
        return "give up", "SLURM ends the job"
    if code == INTERRUPTED or code in [128 + number for number in _POLITE]:
        return "requeue", "the state is saved, the time limit is near or somebody asked for it"
    if code in (2, 3):
        return "give up", "bad input" if code == 2 else "training stopped itself"
    if failures > limit:
        return "give up", f"{failures} starts in a row failed without a step (cluster.max_restarts = {limit})"
    return "again", f"ranks ended with exit code {code}"


@dataclass
class Allocation:
    """The nodes of this job, and what this process was told about its end."""

    folder: Path
    job: JobSpec
    nodes: list[str]
    ending: bool = False
    bad: dict[str, str] = field(default_factory=dict)
    """Why a node is left out."""

    def say(self, text: str) -> None:
        print(f"keepwarm: {text}", flush=True)

    def note(self, event: str, **values: Any) -> None:
        events.append(self.folder, event, slurm_job=os.environ["SLURM_JOB_ID"], **values)

    def note_end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def healthy(self) -> list[str]:
        """The nodes that can take part, in SLURM's order; those that cannot are named in the log."""
        wanted = look(self.folder)
        seen = self._ask(self.nodes)
        silent = [name for name in self.nodes if name not in seen]
        if silent:
            # A node that is dead makes srun give up the whole step: the others are asked one by one.
            for name in silent:
                seen |= self._ask([name])
        found = []
        for name in self.nodes:
            why = problems(seen[name], wanted) if name in seen else ["does not answer"]
            if why and name not in self.bad:
                self.say(f"node {name} is left out: it {'; '.join(why)}")
                self.note("node left out", host=name, why="; ".join(why))
                self.bad[name] = "; ".join(why)
            elif not why:
                self.bad.pop(name, None)
                found.append(name)
        return found

    def _ask(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        command = [
            "srun", f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1", "--no-kill",
            f"--nodelist={','.join(names)}", "--overlap", "--kill-on-bad-exit=0",
            *in_container(self.job.cluster.slurm, self.folder, sys.executable),
            *("-P", "-m", "launch.node_check", str(self.folder)),
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            try:
                output, _ = process.communicate(timeout=CHECK_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        lines = [line.partition(MARK)[2] for line in output.splitlines() if MARK in line]
        return {record["node"]: record for record in map(json.loads, lines)}

    def run(self, command: Sequence[str], restarts: int) -> int:
        """Run the step to its end; its exit code, 128 + n for a signal."""
        environment = os.environ | {
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "OMP_NUM_THREADS": str(self.job.numerics.threads_per_rank),
            "PYTHONUNBUFFERED": "1",
        }
        # Its own session: the signal that ends the batch shell must not make srun kill ranks that are about to save.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        code = process.wait()
        return code if code >= 0 else 128 - code


def steps_done(folder: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    try:
        lines = (folder / STARTED_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError):
            continue
    return 0


def run_job(folder: Path) -> int:
    """The whole life of one start of the job; its exit code."""
    job = load_run(folder / RUN_FILE)
    here = Allocation(folder, job, slurm.host_names(os.environ["SLURM_JOB_NODELIST"]))
    signal.signal(signal.SIGTERM, here.note_end)
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    here.note("slurm start", nodes=here.nodes, requeues=requeues)
    resume = json.loads((folder / RECORD).read_text(encoding="utf-8"))["resume"]
    failures = attempts = 0
    while True:
        nodes = here.healthy()
        if len(nodes) < job.layout.nodes:
            return _requeue(here, f"{len(nodes)} of {len(here.nodes)} nodes are fit, the layout has {job.layout.nodes}")
        begun = steps_done(folder)
        restarts = max(requeues + attempts, 1 if begun else 0)
        code = here.run(_step(here, nodes, resume=resume, begun=begun > 0, restarts=restarts), restarts)
        if code and steps_done(folder) >= plan_stages(job)[-1].end_step and _finished(folder):
            code = 0  # of a node that was lost on the way
        attempts += 1
        failures = 1 if steps_done(folder) > begun else failures + 1
        what, why = verdict(code, ending=here.ending, failures=failures, limit=job.cluster.max_restarts)
        here.note("slurm end", code=code, verdict=what, why=why)
        here.say(f"the ranks ended with exit code {code}: {what}: {why}")
        if what == "requeue":
            return _requeue(here, why)
        if what != "again":
            return code


def _step(here: Allocation, nodes: list[str], *, resume: bool, begun: bool, restarts: int) -> list[str]:
    """The srun command of the next start."""
    job, folder = here.job, here.folder
    if job.cluster.slurm.launcher == "rank":
        here.say(f"{job.name}: starting {job.layout.world_size} ranks on {', '.join(nodes[: job.layout.nodes])}")
        return rank_step(job, folder, nodes[: job.layout.nodes], resume=resume and not restarts)
    here.say(f"{job.name}: starting supervisors on {', '.join(nodes)} for {job.layout.nodes} slots")
    saved = (folder / "checkpoints" / "latest").exists()
    if begun and not saved:
        # Nothing was saved before everything was lost: the run begins anew, and so does its record.
        (folder / STARTED_FILE).unlink()
    return node_step(job, folder, nodes, resume=saved)


def _finished(folder: Path) -> bool:
    """Whether rank 0 has said so since the last start."""
    names = [line["event"] for line in events.read(folder) if line["event"] in ("began", "finished")]
    return names[-1:] == ["finished"]


def _requeue(here: Allocation, why: str) -> int:
    """Put the job back into the queue, without the nodes that are not fit; it goes on from where it is saved."""
    identity = os.environ["SLURM_JOB_ID"]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        if here.bad:
            excluded = ",".join([*here.job.cluster.slurm.exclude, *here.bad])
            slurm.ask("scontrol", "update", f"JobId={identity}", f"ExcNodeList={excluded}")
        here.note("requeue", why=why, left_out=sorted(here.bad))
        here.say(f"requeued: {why}")
        slurm.ask("scontrol", "requeue", identity)
    except ClusterError as error:
        here.say(f"not requeued: {error}; keepwarm submit {here.folder} --resume goes on from the saved state")
        return INTERRUPTED
    # SLURM ends this process now; until it says so the job must not end by itself.
    signal.sigtimedwait([signal.SIGTERM], REQUEUE_GRACE)
    return INTERRUPTED


def main() -> None:
    """Entry point."""
    try:
        sys.exit(run_job(Path(sys.argv[1])))
    except (ClusterError, SpecError) as error:
        print(f"keepwarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
