"""SLURM's commands, asked with a deadline and read into values. Formats are those that no version has changed."""

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepwarm.launch.errors import ClusterError

COMMAND_TIMEOUT_S = 30.0
"""Seconds that one command may take."""
CONTROLLER_TIMEOUT_S = 60.0
"""Seconds that a controller which does not answer, as while it restarts, is asked again."""
_PAUSE = 1.0
_UNCONFIGURED = ("Could not establish a configuration source", "No such file or directory: slurm.conf")
_ELSEWHERE = "submit from a login node of the cluster, or run the job here with keepwarm train"
_SILENT = ("Unable to contact slurm controller", "Connection refused", "Zero Bytes were transmitted")


def ask(*command: str, stdin: str | None = None, patience: float = CONTROLLER_TIMEOUT_S) -> str:
    """The standard output of a SLURM command.

    Raises:
        ClusterError: with what the command said. A silent controller is asked again for `patience` seconds first.
    """
    end = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
                stdin=subprocess.DEVNULL if stdin is None else None,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ClusterError(
                f"SLURM is not on this machine (there is no command {command[0]}); {_ELSEWHERE}"
            ) from error
        except subprocess.TimeoutExpired as error:
            message = f"{command[0]} gave no answer within {COMMAND_TIMEOUT_S:g} s; is the controller up?"
            raise ClusterError(message) from error
        if done.returncode == 0:
            return done.stdout
        said = " ".join(line.removeprefix(f"{command[0]}: ") for line in done.stderr.strip().splitlines())
        if any(sign in said for sign in _UNCONFIGURED):
            raise ClusterError(f"SLURM is on this machine, but no cluster is configured; {_ELSEWHERE}")
        if not any(sign in said for sign in _SILENT):
            raise ClusterError(f"{command[0]}: {said.removeprefix('error: ') or f'exit code {done.returncode}'}")
        if time.monotonic() > end:
            raise ClusterError(f"the SLURM controller did not answer {command[0]} for {patience:g} s: {said}")
        time.sleep(_PAUSE)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as one partition offers it."""

    name: str
    partition: str
    default: bool
    """Whether it is the partition that jobs go to when they name none."""
    state: str
    gpus: int
    cpus: int

    @property
    def usable(self) -> bool:
        """Whether it can run a job now or when another has ended."""
        return (
            not any(word in self.state for word in ("down", "drain", "fail", "inval", "unknown"))
            and "*" not in self.state
        )


def nodes() -> list[Node]:
    """Every node of every partition."""
    return [
        _node(line) for line in ask("sinfo", "--noheader", "--Node", "--format=%N|%P|%T|%G|%c").splitlines() if line
    ]


def _node(line: str) -> Node:
    name, partition, state, resources, cpus = line.strip().split("|")
    return Node(
        name=name,
        partition=partition.removesuffix("*"),
        default=partition.endswith("*"),
        state=state,
        gpus=gpus_in(resources),
        cpus=int(cpus.rstrip("+")),
    )


def gpus_in(resources: str) -> int:
    """The number of GPUs in a list of generic resources, as `gpu:a100:4(S:0-1),shard:8`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the controller knows it; some minutes after its end it forgets."""

    id: str
    state: str
    reason: str
    nodes: str
    restarts: int
    run_time: str
    time_limit: str
    exit_code: int


GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")
"""States of a job that has not ended."""


def job(identity: str) -> Job | None:
    """The job, or None when the controller has forgotten it.

    Raises:
        ClusterError: the controller cannot be asked.
    """
    try:
        found = parse_job(ask("scontrol", "show", "job", "--oneliner", identity))
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    # A task of an array is known under two numbers, and shares one with the others until it starts.
    return replace(found, id=identity)


def parse_job(line: str) -> Job:
    """One line of `scontrol show job --oneliner`."""
    values = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))
    return Job(
        id=values["JobId"],
        state=values["JobState"],
        reason="" if values.get("Reason") in (None, "None") else values["Reason"],
        nodes="" if values.get("NodeList") in (None, "(null)") else values["NodeList"],
        restarts=int(values.get("Restarts", "0")),
        run_time=values.get("RunTime", ""),
        time_limit=values.get("TimeLimit", ""),
        exit_code=int(values.get("ExitCode", "0:0").partition(":")[0]),
    )


def host_names(node_list: str) -> list[str]:
    """The names in a node list, as `node[0-3]`."""
    return ask("scontrol", "show", "hostnames", node_list).split() if node_list else []


def partitions(offered: Sequence[Node]) -> list[str]:
    """Their names, each once."""
    return list(dict.fromkeys(node.partition for node in offered))
