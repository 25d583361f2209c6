"""A batch system as another package would add it: each job is a background process of this machine.

tests/launch/test_batch_system.py installs this file as a distribution of its own; nothing of keepwarm names it. Jobs
are known by their process ID; the folder LOCAL_QUEUE_SPOOL holds the exit codes of those that have ended.
"""

import os
import shlex
import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from keepwarm.launch.batch_system import BatchJob, BatchSystem, Request
from keepwarm.section import Section
from keepwarm.trainer.distributed.launcher_environment import PORTS, Ranks
from keepwarm.trainer.job.files import load_run


class LocalQueueOptions(Section):
    """Options of the job under `cluster.local_queue`."""

    setup: tuple[str, ...] = ()
    """Shell lines before the start."""


class LocalQueue(BatchSystem):
    """Runs each job at once; cannot requeue, chain or submit arrays."""

    name = "local_queue"
    title = "the local queue"
    Options = LocalQueueOptions

    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        return ["the local queue has room"]

    def render(self, request: Request) -> str:
        options = request.job.cluster.batch_options(self.name)
        setup = options.setup if isinstance(options, LocalQueueOptions) else ()
        resume = ["--resume"] if request.mode == "resume" else []
        command = [sys.executable, "-P", "-m", __name__, str(request.spec), *resume]
        return "\n".join(["#!/bin/bash", *setup, f"exec {shlex.join(command)}", ""])

    def submit(self, request: Request) -> str:
        with (request.folder / "logs" / f"{self.name}-0.log").open("ab") as log:
            job = subprocess.Popen(
                ["bash", str(request.folder / self.script)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return str(job.pid)

    def state(self, job_id: str) -> BatchJob | None:
        code = spool() / job_id
        if code.exists():
            ended = int(code.read_text())
            return BatchJob(id=job_id, phase="ended", state="failed" if ended else "completed", exit_code=ended)
        if Path(f"/proc/{job_id}").exists():
            return BatchJob(id=job_id, phase="running", state="running", nodes="here")
        return None

    def cancel(self, job: BatchJob, *, now: bool) -> None:
        os.kill(int(job.id), signal.SIGTERM if now else signal.SIGUSR1)


def spool() -> Path:
    return Path(os.environ["LOCAL_QUEUE_SPOOL"])


def rank_from(environment: Mapping[str, str]) -> Ranks | None:
    """The rank of a process that `main` started."""
    if "LOCAL_QUEUE_RANK" not in environment:
        return None
    rank = int(environment["LOCAL_QUEUE_RANK"])
    return Ranks(
        launcher="the local queue",
        rank=rank,
        size=int(environment["LOCAL_QUEUE_SIZE"]),
        local_rank=rank,
        address="127.0.0.1",
        port=PORTS[zlib.crc32(environment["LOCAL_QUEUE_JOB"].encode()) % len(PORTS)],
    )


def main() -> None:
    """Run the ranks of a job, pass signals on to them and record how they ended."""
    spec, arguments = Path(sys.argv[1]), sys.argv[2:]
    folder, job = spec.parent, load_run(spec)
    size, job_id = job.layout.world_size, str(os.getpid())
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    for rank in range(size):
        own = {"LOCAL_QUEUE_RANK": str(rank), "LOCAL_QUEUE_SIZE": str(size), "LOCAL_QUEUE_JOB": job_id}
        with (folder / "logs" / f"rank_{rank:05d}.log").open("ab") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "keepwarm.trainer", str(spec), *arguments],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | own | {"OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip
    print(f"local queue: job {job_id} started {size} ranks, setup said {os.environ.get('SAID')}", flush=True)
    code = max(rank.wait() for rank in ranks)
    beside = spool() / f".{job_id}"
    beside.write_text(str(code))
    beside.replace(spool() / job_id)


if __name__ == "__main__":
    main()
