"""What `keepwarm site init` proposes from the output of sinfo and scontrol; tests/slurm asks a real cluster."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.launch.slurm.site_proposal import best_partition, kinds_in, proposal
from keepwarm.trainer.job.site.site_file import VARIABLE, read_site

SINFO = """\
cpu*|up|2-00:00:00|30|64|257000|(null)
cpu*|up|2-00:00:00|2|64|257000|(null)
gpu|up|1-00:00:00|4|128|1031000|gpu:a100:8(S:0-7)
gpu|up|1-00:00:00|2|96|2063000|gpu:h100:4(S:0-3),shard:8
old|down|infinite|9|8|16000|gpu:k80:16
"""
CONFIG = {
    "ClusterName": "alps",
    "AccountingStorageEnforce": "associations,limits",
    "DefMemPerCPU": "4000",
    "JobRequeue": "0",
    "KillWait": "30 sec",
}
PARTITIONS = {"gpu": {"AllowAccounts": "lab,other", "AllowQos": "ALL", "DefaultTime": "01:00:00"}}


def test_kinds_are_counted_over_states_and_partitions_that_are_down_left_out() -> None:
    kinds = kinds_in(SINFO)
    assert [(kind.partition, kind.nodes, kind.gpus) for kind in kinds] == [
        ("cpu", 32, None),
        ("gpu", 4, "gpu:a100:8"),
        ("gpu", 2, "gpu:h100:4"),
    ]
    assert best_partition(kinds) == "gpu"
    assert best_partition(kinds[:1]) == "cpu"
    assert best_partition([]) is None


def test_proposal_says_what_the_cluster_says_of_each_key() -> None:
    text = proposal(kinds_in(SINFO), PARTITIONS, CONFIG, {"LOADEDMODULES": "gcc/13:cuda/12", "VIRTUAL_ENV": "/v"})
    for line in (
        "#   cpu*: 32 nodes of 64 CPUs, 251 GiB, no GPUs; time limit 2-00:00:00",
        'partition: "gpu"',
        "# account: NAME  # one of lab,other",
        "# time: 24:00:00  # of one start; at most 1-00:00:00; the partition's default: 01:00:00",
        "# The nodes of this partition differ in their GPUs (gpu:a100:8 on 4; gpu:h100:4 on 2)",
        '# gres: "gpu:a100:8"',
        "# mem: 0  # all memory of a node; the cluster's default: 4000 MiB for each CPU",
        "# SLURM requeues no jobs here",
        '# modules: ["gcc/13", "cuda/12"]  # those that are loaded now',
        '# venv: "/v"',
        "# failure_domains: {rack1: 'node[0-15]', rack2: 'node[16-31]'}  # nodes by what fails at once",
    ):
        assert f"    {line}" in text
    switches = proposal(kinds_in(SINFO), PARTITIONS, {**CONFIG, "TopologyPlugin": "topology/tree"}, {})
    assert "    # failure_domains: topology  # what fails at once" in switches


def test_proposal_is_a_site_file_also_with_all_comments_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site.yaml"
    monkeypatch.setenv(VARIABLE, str(file))
    text = proposal(kinds_in(SINFO), PARTITIONS, CONFIG, {})
    file.write_text(text)
    assert read_site().values == {"cluster": {"slurm": {"partition": "gpu"}}}
    uncommented = re.sub(r"^    # (?=[a-z_]+: )", "    ", text, flags=re.MULTILINE)
    file.write_text("\n".join(line for line in uncommented.splitlines() if "gpu:h100" not in line))
    slurm = read_site().values["cluster"]["slurm"]
    assert {"account", "time", "gres", "mem", "modules", "mail", "container", "interface", "scratch"} <= set(slurm)


def test_cluster_without_partitions_gets_a_proposal_all_the_same() -> None:
    assert "partition:" not in proposal([], {}, {}, {}).partition("cluster:")[2]


def test_init_without_slurm_ends_as_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "keepwarm", "site", "init", "-o", str(tmp_path / "site.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/nowhere"})
    assert done.returncode == 2
    assert "SLURM is not on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []
