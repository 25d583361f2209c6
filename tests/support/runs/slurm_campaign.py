"""Drawn faults on the SLURM cluster: one seed gives one run with one or two moments, each of one or two faults.

    python -m tests.support.runs.slurm_campaign --seeds 0-39 --results FILE

runs the seeds that FILE does not yet name as passed, and appends a line of JSON for each: what was done at which step,
how many steps were lost, how long after the end of the run the queue was empty, and what was wrong, if anything.
"""

import argparse
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from keepwarm.trainer.monitor import events
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses, show

JOB = str(Path(__file__).parents[3] / "configs" / "ci" / "slurm.yaml")
LAST = 100
DURABLE_EVERY = 10
OPTIONS = (
    f"stages.0.tokens={LAST * 384}", "log.tensorboard=false", "evaluation.samples=2", "cluster.max_restarts=6",
    f"snapshot.durable={{every: {DURABLE_EVERY}}}", "cluster.slurm.save_before_limit=20",
)  # fmt: skip
NODES = ("node0", "node1", "node2", "node3")
FREE_WITHIN_S = 60.0
"""How long nodes may stay allocated after the end of the run."""
LOST = {"memory": 3, "disk": 3 * DURABLE_EVERY}
"""Steps that may be lost by what a start continues from: snapshots are taken after every step, and written to disk
every `DURABLE_EVERY` steps while training goes on.
"""


@dataclass
class Campaign:
    """One run on the cluster, whose folder lies on the small disk of the nodes."""

    cluster: SlurmCluster
    folder: Path
    """Run folder as the nodes see it."""
    seed: int
    told: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    disk_was_full: bool = False
    job: str = ""

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.run = self.cluster.seen(self.folder)

    def play(self, expected: list[str]) -> float:
        """Run to the end through all faults; return the seconds from then until the queue was empty."""
        self._submit("submit", JOB, *OPTIONS, f"output={self.folder}")
        for step in sorted(self.draw.sample(range(3, LAST - 20), self.draw.choice((1, 1, 2)))):
            self.await_step(step)
            self._strike(self.draw.sample(FAULTS, self.draw.choice((1, 2))))
        self.await_step(LAST)
        self._await(lambda: bool(self.of("finished")), "the end of the run", 300)
        begin = time.monotonic()
        self._await(lambda: not self.active(), "an empty queue", FREE_WITHIN_S)
        emptied = time.monotonic() - begin
        kept = losses(self.run / "metrics.jsonl")
        # What a full disk did not take is missing; the rest is what it is without faults.
        assert (set(kept) <= set(expected) and kept[-1] == expected[-1]) if self.disk_was_full else kept == expected
        self.cluster.await_idle()
        return emptied

    def of(self, event: str) -> list[dict[str, object]]:
        return [json.loads(msgspec.json.encode(each)) for each in events.read(self.run).of(events.KINDS[event])]

    def step(self) -> int:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def words(self) -> str:
        return show(sorted((self.run / "logs").iterdir())) if (self.run / "logs").is_dir() else ""

    def active(self) -> bool:
        states = "--states=RUNNING,COMPLETING,PENDING,CONFIGURING,SUSPENDED"
        listed = self.cluster.login("squeue", "--noheader", states, "--name=slurm")
        return listed.returncode != 0 or listed.stdout != ""

    def await_step(self, step: int) -> None:
        """Until the run has recorded a step; one that a fault has ended is submitted again."""

        def reached() -> bool:
            if self.of("finished") or self.step() >= step:
                return True
            if not self.active():
                self._submit("submit", str(self.folder), "--resume")
            return False

        self._await(reached, f"step {step}", 600)

    def node(self) -> str:
        return self.draw.choice(NODES)

    def _strike(self, faults: list["Fault"]) -> None:
        reached, before = self.step(), events.size(self.run)
        for fault in faults:
            self.told.append(f"step {self.step()}: {fault(self)}")
            print(f"seed {self.seed}: {self.told[-1]}", file=sys.stderr, flush=True)
        if self.cluster.stopped():
            # They come back after SLURM has given them up.
            down = ["sinfo", "--noheader", f"--nodes={','.join(self.cluster.stopped())}", "--format=%T"]
            self._await(lambda: "down" in self.cluster.login(*down).stdout, "SLURM to notice", 300)
        self._put_right()
        self.await_step(min(LAST, max(reached, self.step()) + 2))
        for event in events.read(self.run, start=before).events:
            if isinstance(event, events.BatchStarted):
                reached = event.step
            elif isinstance(event, events.Began):
                self.lost.append(f"{reached - event.step} from {event.source}")
                assert reached - event.step <= LOST.get(event.source, DURABLE_EVERY), self.lost
                break

    def _put_right(self) -> None:
        for name in self.cluster.stopped():
            self.cluster.boot(name)
        self._await(lambda: self.cluster.login("scontrol", "ping").returncode == 0, "the controller", 120)
        self.cluster.login("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")
        self.cluster.login("scancel", "--name=wrap")
        self.cluster.login("scontrol", "update", f"JobId={self.job}", "TimeLimit=10")
        self.cluster.login("rm", "-f", str(self.folder.parent / "filler"))

    def _submit(self, *command: str) -> None:
        said = self.cluster.keepwarm(*command)
        if said.returncode == 0:
            self.job = said.stdout.strip()
        assert said.returncode == 0 or "is still" in said.stderr or self.active(), said.stderr

    def _await(self, condition: Callable[[], bool], what: str, deadline: float) -> None:
        await_that(condition, f"{what} after {self.told}", deadline)


Fault = Callable[[Campaign], str]


def crash(campaign: Campaign) -> str:
    node = campaign.node()
    campaign.cluster.crash(node)
    return f"{node} crashed"


def requeue(campaign: Campaign) -> str:
    how = campaign.draw.choice(((), ("--now",)))
    campaign.cluster.keepwarm("requeue", str(campaign.folder), *how)
    return " ".join(("keepwarm requeue", *how))


def scontrol_requeue(campaign: Campaign) -> str:
    campaign.cluster.login("scontrol", "requeue", campaign.job)
    return "scontrol requeue"


def cancel(campaign: Campaign) -> str:
    how = campaign.draw.choice(((), ("--now",)))
    campaign.cluster.keepwarm("cancel", str(campaign.folder), *how)
    return " ".join(("keepwarm cancel", *how))


def scancel(campaign: Campaign) -> str:
    campaign.cluster.login("scancel", campaign.job)
    return "scancel"


def preempt(campaign: Campaign) -> str:
    """A job of the partition above takes a node of this one, which SLURM requeues."""
    campaign.cluster.login("sbatch", "--partition=high", "--nodes=1", "--exclusive", "--wrap=true")
    return "preempted"


def time_limit(campaign: Campaign) -> str:
    """The limit comes within a minute, and the notice before it."""
    starts = len(campaign.of("batch_started"))
    shown = campaign.cluster.login("squeue", "--noheader", f"--jobs={campaign.job}", "--format=%M").stdout.strip()
    limit = int(shown.split(":")[0]) + 1 if ":" in shown else 1
    campaign.cluster.login("scontrol", "update", f"JobId={campaign.job}", f"TimeLimit={limit}")
    over = lambda: len(campaign.of("batch_started")) > starts or bool(campaign.of("finished"))  # noqa: E731
    campaign._await(lambda: over() or not campaign.active() or bool(campaign.cluster.stopped()), "the limit", 300)
    return f"time limit of {limit} min"


def notice(campaign: Campaign) -> str:
    """What SLURM does before a time limit."""
    campaign.cluster.login("scancel", "--signal=USR1", campaign.job)
    return "signalled as before a time limit"


def drain(campaign: Campaign) -> str:
    node = campaign.node()
    campaign.cluster.login("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    campaign.cluster.keepwarm("requeue", str(campaign.folder))
    return f"{node} drained and requeued"


def full_disk(campaign: Campaign) -> str:
    """It stays full until the faults of this moment are put right."""
    campaign.disk_was_full = True
    campaign.cluster.login("sh", "-c", f"cat /dev/zero > {campaign.folder.parent}/filler")
    return "disk full"


def controller(campaign: Campaign) -> str:
    cluster = campaign.cluster
    cluster.login("pkill", "-x", "slurmctld")
    await_that(lambda: cluster.login("pgrep", "-x", "slurmctld").returncode == 1, "the controller to end")
    cluster.start("slurmctld", "-D", output=cluster.root / "log" / f"controller{time.time()}")
    return "the controller restarted"


FAULTS: tuple[Fault, ...] = (
    crash, crash, requeue, scontrol_requeue, cancel, scancel, preempt, time_limit, notice, drain, full_disk, controller,
)  # fmt: skip


@functools.cache
def without_faults(cluster_root: Path, run: Callable[..., object]) -> list[str]:
    """Return the losses of the same job under `keepwarm train`, on the login node alone."""
    folder = cluster_root / "shared" / "without-faults"
    run("train", JOB, *OPTIONS, f"output={folder}", timeout=600)
    return losses(folder / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-39", metavar="FIRST-LAST")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", default="99:99", metavar="HH:MM", help="begin no seed after this time of the day")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    done = {record["seed"] for record in _records(given.results) if record["wrong"] is None}
    left = [seed for seed in range(int(first), int(last or first) + 1) if seed not in done]
    while left and time.strftime("%H:%M") < given.until:
        _some(left, given.results, given.until)


def _some(left: list[int], results: Path, until: str) -> None:
    """Run seeds, and remove them from the list, until one fails: the cluster may be as the failure left it."""
    root, wrong = Path(tempfile.mkdtemp(prefix="campaign-")), None
    cluster = SlurmCluster(root)
    try:
        cluster.up()
        while left and wrong is None and time.strftime("%H:%M") < until:
            record = _one(cluster, left.pop(0))
            wrong = record["wrong"]
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    finally:
        cluster.down()
        if wrong is None:
            shutil.rmtree(root)


def _records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _one(cluster: SlurmCluster, seed: int) -> dict[str, object]:
    begin, wrong, emptied = time.monotonic(), None, None
    campaign = Campaign(cluster, cluster.root / "small" / f"run{seed}", seed)
    try:
        emptied = round(campaign.play(without_faults(cluster.root, cluster.keepwarm)), 1)
    except Exception:
        wrong = traceback.format_exc(limit=-4) + campaign.words()
        shutil.copytree(campaign.run, cluster.root / f"kept{seed}", ignore=shutil.ignore_patterns("*.safetensors"))
    cluster.login("rm", "-rf", str(campaign.folder))
    seconds = round(time.monotonic() - begin)
    return {
        "seed": seed, "commit": _commit(), "faults": campaign.told, "lost": campaign.lost, "empty_after_s": emptied,
        "seconds": seconds, "kept": str(cluster.root) if wrong else None, "wrong": wrong,
    }  # fmt: skip


def _commit() -> str:
    shown = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
