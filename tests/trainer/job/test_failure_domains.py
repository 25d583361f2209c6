"""Failure domains in a job and a site file, and SLURM's syntax for lists of nodes; tests/slurm asks scontrol."""

from pathlib import Path

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.text import print_plan
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job, load_run, save_job
from keepwarm.trainer.job.site.site_file import VARIABLE
from keepwarm.trainer.job.slurm.hostlist import MAX_NODES, expand
from keepwarm.trainer.job.spec import JobSpec

SLURM = Path(__file__).parents[3] / "configs" / "ci" / "slurm.yaml"
LISTS = {
    "a": ["a"],
    "a,b": ["a", "b"],
    "n[1-3,7]": ["n1", "n2", "n3", "n7"],
    "n[08-10]": ["n08", "n09", "n10"],
    "n[1,3],m2,n1": ["n1", "n3", "m2"],
    "r[1-2]n[0-1]": ["r1n0", "r1n1", "r2n0", "r2n1"],
}


def job(*overrides: str) -> JobSpec:
    return load_job(SLURM, [*overrides, "output=runs/test"])


@pytest.mark.parametrize("text", LISTS)
def test_hostlist_is_expanded_in_order(text: str) -> None:
    assert expand([text]) == LISTS[text]


@pytest.mark.parametrize("text", ["n[3-1]", "n[a]", "n[]", "n[1-]", f"n[0-{MAX_NODES}]", "n[0-999]m[0-999]"])
def test_hostlist_that_slurm_would_not_take_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected ranges|more than"):
        expand([text])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("switch", "expected nodes by domain, such as {rack1: 'node[0-15]', rack2: 'node[16-31]'}, or topology"),
        ("{a: 'n[0-3]', b: n2}", "n2 is in two failure domains, a and b"),
        ("{a: 'n[3-1]'}", "n[3-1]: expected ranges of numbers"),
        ("{a: 3}", "expected the nodes of domain a as text or a list, got 3"),
        ("{a: ['n 1']}", "expected names of nodes as sbatch has them"),
        ("{a b: n1}", "expected the nodes of domain a b"),
    ],
)
def test_failure_domains_that_are_wrong_are_refused_with_the_key(value: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(f"cluster.slurm.failure_domains={value}")
    assert f"cluster.slurm.failure_domains: {words}" in str(caught.value)


def test_failure_domains_of_a_job_replace_those_of_the_site_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("cluster:\n  slurm:\n    failure_domains: {east: 'n[0-1]', west: 'n[2-3]'}\n")
    monkeypatch.setenv(VARIABLE, str(site))
    taken = job()
    assert taken.cluster.slurm.domain_of_node == {"n0": "east", "n1": "east", "n2": "west", "n3": "west"}
    assert (taken.cluster.sources or {})["slurm.failure_domains"] == str(site)
    assert Plan(taken).site["cluster.slurm.failure_domains"]["source"] == str(site)
    assert job("cluster.slurm.failure_domains={a: n0}").cluster.slurm.domain_of_node == {"n0": "a"}
    assert job("cluster.slurm.failure_domains=topology").cluster.slurm.failure_domains == "topology"
    assert job("cluster.slurm.failure_domains=null").cluster.slurm.failure_domains is None
    save_job(taken, tmp_path / "run.json")
    monkeypatch.setenv(VARIABLE, "")
    assert load_run(tmp_path / "run.json").cluster.slurm == taken.cluster.slurm
    assert load_run(tmp_path / "run.json", resubmit=True).cluster.slurm.failure_domains is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["failure_domains={a: 'n[0-1]', b: n2, c: n3}"],
            ["group 0: n0 (a, slot 0), n2 (b, slot 1), n3 (c, slot 2)", "spares: n1 (a)", "leaves the memory whole"],
        ),
        (
            ["failure_domains={a: 'n[0-3]'}"],
            ["up to 1 of the 3 nodes may be lost", "loss of all of a (3 of them) costs the memory: 1 group"],
        ),
        (["failure_domains={a: n0}"], ["another node 1 (another node 1, slot 1)"]),
        (["failure_domains=topology"], ["failure domains: the cluster's switches, known when the job starts"]),
    ],
)  # fmt: skip
def test_plan_shows_the_placement_and_what_the_loss_of_a_domain_costs(
    overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(job(*(f"cluster.slurm.{text}" for text in overrides)))
    print_plan(plan)
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []
    assert (plan.data()["placement"] is None) == ("topology" in overrides[0])


@pytest.mark.parametrize("override", ["cluster.slurm.launcher=rank", "snapshot=off"])
def test_plan_without_memory_that_outlives_a_node_has_no_placement(override: str) -> None:
    assert Plan(job("cluster.slurm.failure_domains={a: n0}", override)).placement is None
