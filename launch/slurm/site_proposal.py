"""Propose a site file from what SLURM says about its cluster."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from keepwarm.launch.slurm import commands

_KINDS = "--format=%P|%a|%l|%D|%c|%m|%G"
_UNSET = ("(null)", "none", "n/a", "unlimited", "all", "")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Equal nodes of a partition."""

    partition: str
    default: bool
    """Whether the partition is the cluster's default."""
    time_limit: str
    nodes: int
    cpus: int
    memory_mib: int
    resources: str
    """Generic resources, as sinfo prints them."""

    @property
    def gpus(self) -> str | None:
        """Return the GPUs of a node as `cluster.slurm.gres` has them; None without any."""
        found = re.findall(r"(?:^|,)(gpu(?::[^:,()]+)?:\d+)", self.resources)
        return ",".join(found) or None

    def __str__(self) -> str:
        words = f"{self.nodes} {'node' if self.nodes == 1 else 'nodes'} of {self.cpus} CPUs"
        return f"{words}, {self.memory_mib / 1024:.0f} GiB, {self.gpus or 'no GPUs'}"


def ask_cluster() -> tuple[list[Kind], dict[str, dict[str, str]], dict[str, str]]:
    """Return the kinds of nodes, the settings of each partition and those of the cluster.

    Raises:
        ClusterError: there is no cluster here, or it does not answer.
    """
    listed = commands.ask("sinfo", "--noheader", "--exact", _KINDS)
    listed_partitions = commands.ask("scontrol", "show", "partition", "--oneliner").splitlines()
    partitions = [commands.settings(line) for line in listed_partitions]
    return (
        kinds_in(listed),
        {each["PartitionName"]: each for each in partitions if "PartitionName" in each},
        dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", commands.ask("scontrol", "show", "config"), re.MULTILINE)),
    )


def kinds_in(listed: str) -> list[Kind]:
    """Parse the output of sinfo; partitions that are not up are left out."""
    found: dict[Kind, int] = {}
    for line in listed.splitlines():
        name, available, limit, nodes, cpus, memory, resources = line.strip().split("|")
        if available == "up":
            kind = Kind(
                partition=name.removesuffix("*"),
                default=name.endswith("*"),
                time_limit=limit,
                nodes=0,
                cpus=int(cpus.rstrip("+")),
                memory_mib=int(memory.rstrip("+")),
                resources="" if resources == "(null)" else resources,
            )
            found[kind] = found.get(kind, 0) + int(nodes)  # one line for each state
    return [Kind(**{**vars(kind), "nodes": nodes}) for kind, nodes in found.items()]


def proposal(
    kinds: Sequence[Kind],
    partitions: Mapping[str, Mapping[str, str]],
    config: Mapping[str, str],
    environment: Mapping[str, str],
) -> str:
    """Return a site file with comments. What only its users know is commented out. Pure."""
    chosen = best_partition(kinds)
    lines = [
        f"# Site file of keepwarm for the cluster {config.get('ClusterName', '')}: defaults of every job's `cluster`.",
        "# Proposed by `keepwarm site init` from sinfo and scontrol; uncomment and change what fits.",
        "# It belongs in ~/.config/keepwarm/site.yaml, or for all users in /etc/keepwarm/site.yaml.",
        "# A job file and its KEY=VALUE stand above it: `keepwarm plan JOB` shows what a job takes from it.",
        "cluster:",
        "  slurm:",
        *(f"    {line}" for line in _partition_lines(kinds, chosen)),
    ]
    if chosen is not None:
        own = [kind for kind in kinds if kind.partition == chosen]
        lines += [f"    {line}" for line in _account_lines(partitions.get(chosen, {}), config)]
        lines += [f"    {line}" for line in _resource_lines(own, partitions.get(chosen, {}), config)]
    lines += [f"    {line}" for line in _environment_lines(environment)]
    lines.append(f"    {_domain_line(config)}")
    return "\n".join(lines) + "\n"


def best_partition(kinds: Sequence[Kind]) -> str | None:
    """Return the partition with the most GPUs; without GPUs the default one, else the largest."""

    def rank(name: str) -> tuple[int, bool, int]:
        own = [kind for kind in kinds if kind.partition == name]
        gpus = sum(kind.nodes * commands.gpus_in(kind.resources) for kind in own)
        return gpus, own[0].default, sum(kind.nodes for kind in own)

    return max(dict.fromkeys(kind.partition for kind in kinds), key=rank, default=None)


def _partition_lines(kinds: Sequence[Kind], chosen: str | None) -> Iterator[str]:
    yield "# Partitions, * the default:"
    for kind in kinds:
        yield f"#   {kind.partition}{'*' if kind.default else ''}: {kind}; time limit {kind.time_limit}"
    if chosen is not None:
        yield f"partition: {json.dumps(chosen)}"


def _account_lines(partition: Mapping[str, str], config: Mapping[str, str]) -> Iterator[str]:
    enforced = config.get("AccountingStorageEnforce", "none")
    why = f"required: the cluster enforces {enforced}" if enforced not in ("none", "") else "not enforced here"
    for key, allowed in (("account", "AllowAccounts"), ("qos", "AllowQos")):
        given = _known(partition.get(allowed, ""))
        yield f"# {key}: NAME  # {f'one of {given}' if given else why if key == 'account' else 'any'}"


def _resource_lines(own: Sequence[Kind], partition: Mapping[str, str], config: Mapping[str, str]) -> Iterator[str]:
    default_time = _known(partition.get("DefaultTime", "")) or "none"
    yield f"# time: 24:00:00  # of one start; at most {own[0].time_limit}; the partition's default: {default_time}"
    gpus = {kind.gpus for kind in own}
    if len(gpus) > 1:
        named = "; ".join(f"{kind.gpus or 'none'} on {kind.nodes}" for kind in own)
        yield f"# The nodes of this partition differ in their GPUs ({named}): a job must name its type here."
    for each in sorted(one for one in gpus if one is not None):
        yield f"# gres: {json.dumps(each)}  # all GPUs of a node, for jobs with as many cluster.ranks_per_node"
    limits = {"node": _known(config.get("DefMemPerNode", "")), "CPU": _known(config.get("DefMemPerCPU", ""))}
    default = next((f"{limit} MiB for each {what}" for what, limit in limits.items() if limit), "all of it")
    yield f"# mem: 0  # all memory of a node; the cluster's default: {default}"
    if config.get("JobRequeue", "1") == "0":
        yield "# SLURM requeues no jobs here: continue long runs with `keepwarm submit --chain`."
    wait = config.get("KillWait", "30 sec")
    yield f"# save_before_limit: 120  # seconds; at the limit itself SLURM leaves {wait} (KillWait)"


def _environment_lines(environment: Mapping[str, str]) -> Iterator[str]:
    loaded = [name for name in environment.get("LOADEDMODULES", "").split(":") if name]
    yield f"# modules: {json.dumps(loaded or ['cuda/12'])}" + ("  # those that are loaded now" if loaded else "")
    for key, variable in (("conda", "CONDA_PREFIX"), ("venv", "VIRTUAL_ENV")):
        if environment.get(variable):
            yield f"# {key}: {json.dumps(environment[variable])}  # default: the Python that submits"
    yield "# export: [WANDB_API_KEY, HF_HOME]  # all that jobs get of the shell that submits them"
    yield "# interface: ib0  # network interface of the collectives"
    yield "# scratch: /scratch/$USER  # temporary files on each node"
    yield "# mail: {user: NAME@HOST, type: [END, FAIL]}"
    yield "# container: {runtime: pyxis, image: /images/keepwarm.sqsh}"
    yield "# setup: [ulimit -l unlimited]  # shell lines before the start"


def _domain_line(config: Mapping[str, str]) -> str:
    """Return what fails at once: the switches, if SLURM knows them."""
    plugin = _known(config.get("TopologyPlugin", ""))
    if plugin.rpartition("/")[2] in ("", "none", "default", "flat"):
        return "# failure_domains: {rack1: 'node[0-15]', rack2: 'node[16-31]'}  # nodes by what fails at once"
    return f"# failure_domains: topology  # what fails at once: the switches, as SLURM knows them ({plugin})"


def _known(value: str) -> str:
    return "" if value.strip().lower() in _UNSET else value.strip()
