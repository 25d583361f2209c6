"""CPUs of each rank of a job that does not say: what nodes of these kinds give; tests/slurm asks a real cluster."""

from dataclasses import replace
from pathlib import Path

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.slurm.commands import Node
from keepwarm.launch.slurm.cpus import KEY, Cpus, Offer, parse_offer, share
from keepwarm.trainer.job.files import load_run, save_job
from tests.launch.slurm.test_submit import job, node

NODES = """\
NodeName=g1 Arch=x86_64 CoresPerSocket=24 CPUEfctv=94 CPUTot=96 CPULoad=0.1 Sockets=2 ThreadsPerCore=2
NodeName=g2 Arch=x86_64 CoresPerSocket=32 CPUTot=64 CPULoad=0.1 Sockets=2 ThreadsPerCore=1
"""
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 MaxCPUsPerNode=64 Nodes=g[1-2]
PartitionName=all AllowGroups=ALL MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 MaxCPUsPerNode=UNLIMITED Nodes=g[1-2]
"""


def test_offer_is_what_jobs_may_use_of_nodes_and_partitions() -> None:
    assert parse_offer(NODES, PARTITIONS) == Offer(
        nodes={"g1": Cpus(usable=94, threads_per_core=2), "g2": Cpus(usable=64)}, most={"gpu": 64}
    )


def gpu_nodes(count: int, cpus: int, *, start: int = 0) -> list[Node]:
    made = [node(f"g{start + number}", "gpu", gpus=8, cpus=cpus) for number in range(count)]
    return [replace(one, resources="gpu:a100:8") for one in made]


TWO_THREADS = dict.fromkeys(("g0", "g1"), Cpus(usable=92, threads_per_core=2))


@pytest.mark.parametrize(
    ("overrides", "nodes", "offer", "count", "why"),
    [
        (["gpus_per_node=8"], gpu_nodes(2, 96), {}, 12, "96 CPUs of a node of partition gpu, with 8 ranks on each"),
        # Whole cores of two threads.
        (["gpus_per_node=8"], gpu_nodes(2, 92), TWO_THREADS, 10, "92 CPUs"),
        # Those that the cluster keeps for itself do not count.
        (["gpus_per_node=8"], gpu_nodes(2, 96), dict.fromkeys(("g0", "g1"), Cpus(usable=88)), 11, "88 CPUs"),
        # As large a part of the CPUs as of the GPUs.
        (["gpus_per_node=4"], gpu_nodes(2, 96), {}, 6, "96 CPUs of a node of partition gpu for 4 of its 8 GPUs"),
        (["gres=gpu:a100:4"], gpu_nodes(2, 96), {}, 6, "for 4 of its 8 GPUs"),
        ([], gpu_nodes(2, 96), {}, 12, "96 CPUs"),
        # One small node among many is left out of the job.
        (["gpus_per_node=8"], [*gpu_nodes(19, 96), *gpu_nodes(1, 16, start=19)], {}, 12, "96 CPUs"),
        # Several are not, and a job that chooses nodes may get any.
        (["gpus_per_node=8"], [*gpu_nodes(8, 96), *gpu_nodes(4, 16, start=8)], {}, 2, "16 CPUs"),
        (["constraint=ib"], [*gpu_nodes(19, 96), *gpu_nodes(1, 16, start=19)], {}, 2, "16 CPUs"),
        (["extra=[-Cib]"], [*gpu_nodes(19, 96), *gpu_nodes(1, 16, start=19)], {}, 2, "16 CPUs"),
        # What counts CPUs in another way is the user's own.
        (["extra=['--hint=nomultithread']"], gpu_nodes(2, 96), {}, 1, "as cluster.slurm.extra sets --hint"),
        (["gpus_per_node=8"], gpu_nodes(2, 6), {}, 1, "numerics.threads_per_rank"),
        (["gpus_per_node=8"], [], {}, 1, "numerics.threads_per_rank"),
    ],
)  # fmt: skip
def test_share_of_cpus_follows_from_the_nodes(
    overrides: list[str], nodes: list[Node], offer: dict[str, Cpus], count: int, why: str
) -> None:
    eight = job("parallel.data=8", "cluster.ranks_per_node=8", *(f"cluster.slurm.{text}" for text in overrides))
    found = share(eight, nodes, Offer(nodes=offer, most={}))
    assert found[0] == count
    assert why in found[1]


def test_share_of_cpus_is_taken_again_when_a_run_is_submitted_again(tmp_path: Path) -> None:
    before = job()
    taken = {"slurm": before.cluster.slurm.model_copy(update={"cpus_per_rank": 12}), "sources": {KEY: "96 CPUs"}}
    save_job(before.model_copy(update={"cluster": before.cluster.model_copy(update=taken)}), tmp_path / "run.json")
    stored, again = load_run(tmp_path / "run.json"), load_run(tmp_path / "run.json", resubmit=True)
    assert stored.cluster.slurm.cpus_per_rank == 12
    assert Plan(stored).site == {"cluster.slurm.cpus_per_rank": {"value": 12, "source": "96 CPUs"}}
    assert again.cluster.slurm.cpus_per_rank is None


def test_share_of_cpus_is_bounded_by_the_partition() -> None:
    eight = job("parallel.data=8", "cluster.ranks_per_node=8")
    assert share(eight, gpu_nodes(2, 96), Offer(nodes={}, most={"gpu": 64})) == (
        8,
        "64 CPUs of a node of partition gpu, with 8 ranks on each",
    )
