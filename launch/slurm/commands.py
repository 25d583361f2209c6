"""Run SLURM's commands with a deadline and parse their output. Uses only formats common to all versions."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
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
_FORGOTTEN = ("Invalid job id", "not found")
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
        # scontrol reports some errors, such as a forgotten task of an array, on its standard output.
        output = done.stderr.strip() or done.stdout.strip()
        said = " ".join(line.removeprefix(f"{command[0]}: ") for line in output.splitlines())
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
    gpus: int
    cpus: int
    default_time: str = ""
    """Time limit of a job of this partition that names none."""
    resources: str = ""
    """Generic resources, such as `gpu:a100:8(S:0-1)`."""

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
        _node(line)
        for line in ask("sinfo", "--noheader", "--Node", "--format=%N|%P|%T|%G|%c|%L|%l").splitlines()
        if line
    ]


def _node(line: str) -> Node:
    name, partition, state, resources, cpus, default_time, most_time = line.strip().split("|")
    return Node(
        name=name,
        partition=partition.removesuffix("*"),
        default=partition.endswith("*"),
        state=state,
        gpus=gpus_in(resources),
        cpus=int(cpus.rstrip("+")),
        default_time=most_time if default_time.lower() in ("n/a", "none") else default_time,
        resources=resources,
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
    requeueable: bool
    """Whether SLURM may run the job again."""
    exit_code: int
    """128 + n if signal n ended the job's script; 0 while the job runs for the first time."""


def own_id(environment: Mapping[str, str]) -> str:
    """Return the ID of the job that this process belongs to. That of an array's task is always ARRAY_TASK: the last
    task to start has the number of the array, by which SLURM means all of its tasks.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return environment["SLURM_JOB_ID"] if array is None or task is None else f"{array}_{task}"


def seconds_of(time_limit: str) -> int | None:
    """Return the seconds of a time as SLURM's commands read and print it; None for no limit.

    Raises ValueError for anything else.
    """
    if time_limit.upper() in ("UNLIMITED", "INFINITE", "PARTITION_LIMIT", "NOT_SET", "N/A", "NONE", ""):
        return None
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = (0, *parts)[-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


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
        if any(sign in str(error) for sign in _FORGOTTEN):
            return None
        raise
    # An array task has two IDs, and shares one with the other tasks until it starts.
    return replace(found, id=identity)


def accounted(identity: str) -> Job | None:
    """Return a job that the controller has forgotten, as accounting has it; None without accounting or such a job.

    Accounting that does not answer is not waited for: it would cost as long again for each run of a list.
    """
    fields = "State,ExitCode,NodeList,Elapsed,Timelimit"
    query = ("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={identity}", f"--format={fields}")
    try:
        listed = ask(*query, patience=0.0)
    except ClusterError:
        return None
    return parse_accounted(identity, listed)


def parse_accounted(identity: str, listed: str) -> Job | None:
    """Return the newest job in the output of sacct."""
    lines = [line.split("|") for line in listed.splitlines() if line.count("|") == 4]
    if not lines:
        return None
    state, code, nodes, run_time, time_limit = lines[-1]
    return Job(
        id=identity,
        state=state.partition(" ")[0],  # CANCELLED by 1000
        reason="",
        nodes="" if nodes == "None assigned" else nodes,
        restarts=0,
        run_time=run_time,
        time_limit=time_limit,
        requeueable=False,
        exit_code=_exit_code(code),
    )


def _exit_code(text: str) -> int:
    code, _, signal = text.partition(":")
    return 128 + int(signal) if int(signal or 0) else int(code)


def settings(line: str) -> dict[str, str]:
    """Parse one line of `scontrol show ... --oneliner`."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line))


def parse_job(line: str) -> Job:
    """Parse one line of `scontrol show job --oneliner`."""
    values = settings(line)
    return Job(
        id=values["JobId"],
        state=values["JobState"],
        reason="" if values.get("Reason") in (None, "None") else values["Reason"],
        nodes="" if values.get("NodeList") in (None, "(null)") else values["NodeList"],
        restarts=int(values.get("Restarts", "0")),
        run_time=values.get("RunTime", ""),
        time_limit=values.get("TimeLimit", ""),
        requeueable=values.get("Requeue", "1") != "0",
        exit_code=_exit_code(values.get("ExitCode", "0:0")),
    )


def steps(identity: str) -> list[str]:
    """Return the names of a running job's steps."""
    return ask("squeue", "--noheader", "--steps", f"--jobs={identity}", "--format=%j").split()


def host_names(node_list: str) -> list[str]:
    """Return the host names in a node list such as `node[0-3]`."""
    return ask("scontrol", "show", "hostnames", node_list).split() if node_list else []


def partitions(offered: Sequence[Node]) -> list[str]:
    """Return the distinct partition names."""
    return list(dict.fromkeys(node.partition for node in offered))
