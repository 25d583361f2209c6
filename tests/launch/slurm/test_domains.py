"""Failure domains of nodes, and how each node of a step learns its slot."""

from pathlib import Path

from keepwarm.launch.plan.placement import place_job
from keepwarm.launch.slurm.domains import domain_of_node, own_place, place_argument, switches
from keepwarm.trainer.job.files import load_job

SLURM = Path(__file__).parents[3] / "configs" / "ci" / "slurm.yaml"
TREE = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[0-1]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[2,3]
SwitchName=rail Level=0 LinkSpeed=1 Nodes=n[0-3]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=n[0-3] Switches=leaf[1-2]
"""
BLOCKS = "BlockName=b1 BlockIndex=0 Nodes=n[0-1] BlockSize=2\nBlockName=b2 BlockIndex=1 Nodes=n[2-3] BlockSize=2\n"


def test_switches_are_the_lowest_ones_or_blocks() -> None:
    assert switches(TREE) == {"n0": "leaf1", "n1": "leaf1", "n2": "leaf2", "n3": "leaf2"}
    assert switches(BLOCKS) == {"n0": "b1", "n1": "b1", "n2": "b2", "n3": "b2"}
    assert switches("No topology information available\n") == {}


def test_place_of_each_node_of_a_job_is_its_slot_or_that_of_a_spare(tmp_path: Path) -> None:
    racks = "cluster.slurm.failure_domains={a: 'n[0-1]', b: n2, c: n3}"
    job = load_job(SLURM, [racks, f"output={tmp_path}"])
    placement = place_job(job, ["n0", "n1", "n2", "n3"], domain_of_node(job.cluster.slurm))
    argument = place_argument(placement)
    assert [own_place(argument, node) for node in ("n0", "n1", "n2", "n3", "another")] == [
        ["--slot=0", "--domain=a"],
        ["--spare", "--domain=a"],
        ["--slot=1", "--domain=b"],
        ["--slot=2", "--domain=c"],
        ["--spare", "--domain="],
    ]
