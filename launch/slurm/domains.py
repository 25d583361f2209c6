"""Failure domains of the nodes of an allocation, as the job names them or as the cluster's switches."""

import re
from collections.abc import Iterable

import msgspec

from keepwarm.launch.plan.placement import SHOWN, Placement, is_placed
from keepwarm.launch.slurm import commands
from keepwarm.trainer.job.cluster import SlurmSpec
from keepwarm.trainer.job.slurm.hostlist import expand
from keepwarm.trainer.job.spec import JobSpec

PLACE = "--place="
"""Argument of a node's task with the slots and failure domains of all nodes."""


def domain_of_node(slurm: SlurmSpec) -> dict[str, str]:
    """Return the failure domain of each node that has one.

    Raises ClusterError: the switches are not known.
    """
    if slurm.failure_domains == "topology":
        return switches(commands.ask("scontrol", "show", "topology"))
    return slurm.domain_of_node


def remarks(job: JobSpec, nodes: Iterable[str]) -> list[str]:
    """Return what a user is to know of the domains of the nodes that a job may get. Raises as `domain_of_node`."""
    if not is_placed(job):
        return []
    known, key = domain_of_node(job.cluster.slurm), "cluster.slurm.failure_domains"
    if not known:
        return [f"{key} = topology: SLURM knows no switches here, so that any node may take any slot"]
    without = sorted(set(nodes) - known.keys())
    if not without:
        return []
    more = "" if len(without) <= SHOWN else f" and {len(without) - SHOWN} more"
    return [f"{key}: no domain has {', '.join(without[:SHOWN])}{more}: such a node counts as one of its own"]


def switches(shown: str) -> dict[str, str]:
    """Return the lowest switch, or the block, of each node in the output of `scontrol show topology`. Pure."""
    found: dict[str, str] = {}
    for line in shown.splitlines():
        # A node may be below several switches of a level, as with two rails: the first one counts.
        if match := re.match(r"\s*(?:SwitchName=(\S+) Level=0\b|BlockName=(\S+)).* Nodes=(\S+)", line):
            for node in expand([match[3]]):
                found.setdefault(node, match[1] or match[2])
    return found


def place_argument(placement: Placement) -> str:
    """Return the argument by which each node of a step learns its slot and its failure domain. Pure."""
    places = {node: (placement.slots.get(node), domain) for node, domain in placement.domains.items()}
    return PLACE + msgspec.json.encode(places).decode()


def own_place(argument: str, node: str) -> list[str]:
    """Return the supervisor's arguments for a node of `place_argument`: its slot or that it is a spare, its domain."""
    places = msgspec.json.decode(argument.removeprefix(PLACE), type=dict[str, tuple[int | None, str]])
    slot, domain = places.get(node, (None, ""))
    return ["--spare" if slot is None else f"--slot={slot}", f"--domain={domain}"]
