"""Run SLURM's commands with a deadline and parse their output. Uses only formats common to all versions."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepwarm.launch.errors import ClusterError
from keepwarm.trainer.job.slurm.sbatch_options import RESERVED

COMMAND_TIMEOUT_S = 30.0
"""Timeout of one command."""
CONTROLLER_TIMEOUT_S = 60.0
"""Seconds for which commands are retried while the controller does not answer, for example during its restart."""
_PAUSE = 1.0
_UNCONFIGURED = ("Could not establish a configuration source", "No such file or directory: slurm.conf")
_ELSEWHERE = "submit from a login node of the cluster, or run the job here with keepwarm train"
_SILENT = ("Unable to contact slurm controller", "Connection refused", "Zero Bytes were transmitted")


def ask(*command: str, stdin: str | None = None, patience: float = CONTROLLER_TIMEOUT_S) -> str:
    """Run a SLURM command and return its standard output, retrying a silent controller for `patience` seconds.

    Raises:
        ClusterError: the command is missing, timed out or failed; includes its error output.
    """
    end = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
                stdin=subprocess.DEVNULL if stdin is None else None, env=_environment(),
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


def _environment() -> dict[str, str]:
    """Return the environment without the variables that override options of a script which the layout needs."""
    overriding = {f"SBATCH_{name.upper().replace('-', '_')}" for name in RESERVED if name != "time"}
    return {name: text for name, text in os.environ.items() if name not in overriding | {"SBATCH_ARRAY_INX"}}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as listed in one partition."""

    name: str
    partition: str
    default: bool
    """Whether the partition is the cluster's default."""
    state: str
    resources: str = ""
    """Generic resources, such as `gpu:a100:8(S:0-1)`."""
    gpus: int
    cpus: int

    @property
    def usable(self) -> bool:
        """Return whether the node can run a job now or after its current one."""
        return (
            not any(word in self.state for word in ("down", "drain", "fail", "inval", "unknown"))
            and "*" not in self.state
        )


def nodes() -> list[Node]:
    """Return every node of every partition."""
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
        resources=resources,
        gpus=gpus_in(resources),
        cpus=int(cpus.rstrip("+")),
    )


def gpu_types(resources: str) -> set[str]:
    """Return the types of GPUs in a list of generic resources; an empty text for those without one."""
    return set(re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:\d+", resources))


def has(resources: str, wanted: str) -> bool:
    """Return whether a node's generic resources include the wanted `NAME[[:TYPE]:COUNT]`."""
    name, *rest = wanted.split(":")
    count = rest.pop() if rest and rest[-1][0].isdigit() else "1"
    one_type = "".join(f":{kind}" for kind in rest) or "(?::[^:,()]+)?"
    found = re.findall(rf"(?:^|,){name}{one_type}:(\d+)(?=$|[,(])", resources)
    return sum(map(int, found)) >= int(count) if count.isdigit() else bool(found)


def gpus_in(resources: str) -> int:
    """Return the number of GPUs in a list of generic resources such as `gpu:a100:4(S:0-1),shard:8`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as reported by the controller, which forgets jobs some minutes after their end."""

    id: str
    state: str
    reason: str
    nodes: str
    restarts: int
    run_time: str
    time_limit: str
    exit_code: int
    """128 + n if signal n ended the job's script; 0 while the job runs for the first time."""


GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED")
"""States of a job that has not ended."""


def job(identity: str) -> Job | None:
    """Return the job, or None if the controller has forgotten it.

    Raises:
        ClusterError: the controller cannot be queried.
    """
    try:
        found = parse_job(ask("scontrol", "show", "job", "--oneliner", identity))
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    # An array task has two IDs, and shares one with the other tasks until it starts.
    return replace(found, id=identity)


def parse_job(line: str) -> Job:
    """Parse one line of `scontrol show job --oneliner`."""
    values = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))
    code, _, signal = values.get("ExitCode", "0:0").partition(":")
    return Job(
        id=values["JobId"],
        state=values["JobState"],
        reason="" if values.get("Reason") in (None, "None") else values["Reason"],
        nodes="" if values.get("NodeList") in (None, "(null)") else values["NodeList"],
        restarts=int(values.get("Restarts", "0")),
        run_time=values.get("RunTime", ""),
        time_limit=values.get("TimeLimit", ""),
        exit_code=128 + int(signal) if int(signal or 0) else int(code),
    )


def host_names(node_list: str) -> list[str]:
    """Return the host names in a node list such as `node[0-3]`."""
    return ask("scontrol", "show", "hostnames", node_list).split() if node_list else []


def partitions(offered: Sequence[Node]) -> list[str]:
    """Return the distinct partition names."""
    return list(dict.fromkeys(node.partition for node in offered))
