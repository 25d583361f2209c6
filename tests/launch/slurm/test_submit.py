"""What `keepwarm submit` renders and refuses; tests/slurm has what a real cluster makes of it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from keepwarm.launch.batch.sweep import combinations
from keepwarm.launch.batch_system import Array, Request
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.run.node_check import look, problems
from keepwarm.launch.slurm.check import check_cluster, waits_for
from keepwarm.launch.slurm.commands import Node, gpus_in, parse_job
from keepwarm.launch.slurm.job import Verdict, verdict
from keepwarm.launch.slurm.node import supervisor
from keepwarm.launch.slurm.script import in_container, node_step, rank_step, render
from keepwarm.launch.slurm.system import Slurm
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job, save_job
from keepwarm.trainer.job.spec import JobSpec

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "ci" / "tiny.yaml"
GOLDEN = Path(__file__).parent / "golden"
FOLDER = Path("/shared/runs/a run")

PLAIN = ("parallel.data=4", "cluster.ranks_per_node=2")
FULL = (
    *PLAIN, "name=two words", "cluster.slurm.partition=gpu,long", "cluster.slurm.account=lab", "cluster.slurm.qos=high",
    "cluster.slurm.time=2-12", "cluster.slurm.constraint=a100&ib", "cluster.slurm.exclude=[bad1, 'bad[3-4]']",
    "cluster.slurm.spares=1", "cluster.slurm.gpus_per_node=2", "cluster.slurm.cpus_per_rank=8",
    "cluster.slurm.setup=['module load cuda/12', 'export NCCL_DEBUG=WARN']", "cluster.slurm.save_before_limit=300",
    "cluster.slurm.nodelist='good[1-2],good7'", "cluster.slurm.reservation=week", "cluster.slurm.mem=64G",
    "cluster.slurm.mail={user: ann@lab.org}", "cluster.slurm.dependency=afterok:7", "cluster.slurm.begin=now+1hour",
    "cluster.slurm.modules=[gcc, mpi]", "cluster.slurm.venv=/shared/my venv", "cluster.slurm.interface=ib0",
    "cluster.slurm.scratch=/scratch/$USER", "cluster.slurm.export=[WANDB_API_KEY, HF_HOME]",
    "cluster.slurm.extra=['--licenses=a:1']",
)  # fmt: skip


def job(*overrides: str) -> JobSpec:
    return load_job(TINY, [*overrides, "output=runs/test"])


@pytest.mark.parametrize(("name", "overrides"), [("plain", PLAIN), ("full", FULL)])
def test_render_scripts_equal_golden_files(name: str, overrides: Sequence[str]) -> None:
    rendered = render(job(*overrides), FOLDER, python="/shared/venv/bin/python")
    assert rendered == (GOLDEN / f"{name}.sbatch").read_text()
    syntax = subprocess.run(["bash", "-n"], input=rendered, text=True, capture_output=True, check=False, timeout=60)
    assert syntax.stderr == ""


def test_render_sweep_sends_each_task_to_its_run() -> None:
    rendered = render(
        job("cluster.slurm.copy_code=true"), FOLDER, array=Array(members=6, max_parallel=2), python="python"
    )
    assert "#SBATCH --array=0-5%2\n" in rendered
    assert f"#SBATCH --output='{FOLDER}/%a/logs/slurm-%j.log'\n" in rendered
    assert f"export PYTHONPATH='{FOLDER}/code'${{PYTHONPATH:+:$PYTHONPATH}}\n" in rendered
    assert rendered.endswith(f"""keepwarm.launch.slurm.job '{FOLDER}'/"$SLURM_ARRAY_TASK_ID"\n""")


def test_sweep_is_every_combination_of_its_values() -> None:
    assert combinations(["seed=[1, 2]", "model.layers=[4]", "stages.0.lr.max=[1e-3, 3e-4]"]) == [
        {"seed": seed, "model.layers": 4, "stages.0.lr.max": rate} for seed in (1, 2) for rate in (1e-3, 3e-4)
    ]


@pytest.mark.parametrize("text", ["seed", "seed=", "seed=1,2", "seed=[]", "=[1]", "seed=[1", "output=[a, b]"])
def test_sweep_without_values_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--sweep"):
        combinations([text])


def test_sweep_of_layouts_or_into_existing_folder_is_refused(tmp_path: Path) -> None:
    layouts = keepwarm("submit", str(TINY), f"output={tmp_path}/runs", "--sweep=parallel.data=[1, 2]", "--dry-run")
    assert layouts.returncode == 2
    assert "submit runs of different layouts one by one" in layouts.stderr
    wrong = keepwarm("submit", str(TINY), f"output={tmp_path}/runs", "--sweep=stages.0.lr.mx=[1, 2]", "--dry-run")
    assert wrong.returncode == 2
    assert "stages.0.lr.mx" in wrong.stderr
    shown = keepwarm("submit", str(TINY), f"output={tmp_path}/runs", "--sweep=seed=[1, 2]", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"# {tmp_path}/runs/1: seed=2\n" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_rank_step_starts_ranks_on_chosen_nodes() -> None:
    step = rank_step(job(*PLAIN), FOLDER, ["n1", "n3"], resume=True, python="python")
    assert step[0] == "srun"
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=n1,n3", "--kill-on-bad-exit=1"} <= set(step)
    assert step[-6:] == ["python", "-P", "-m", "keepwarm.trainer", f"{FOLDER}/run.json", "--resume"]


def test_node_step_starts_a_supervisor_on_every_node() -> None:
    step = node_step(
        job(*PLAIN, "cluster.slurm.cpus_per_rank=3"), FOLDER, ["n1", "n2", "n4"], resume=False, python="py"
    )
    assert {"--nodes=3", "--ntasks=3", "--cpus-per-task=6", "--nodelist=n1,n2,n4", "--no-kill"} <= set(step)
    assert step[-6:] == ["py", "-P", "-m", "keepwarm.launch.slurm.node", str(FOLDER), "--vacancy-timeout=10"]


def test_supervisor_receives_its_name_and_address() -> None:
    here = {"SLURM_STEP_NODELIST": "localhost", "SLURMD_NODENAME": "n3"}
    told = supervisor(["/shared/run", "--resume"], 4, here)
    assert told[:4] == ["/shared/run", "--resume", "--slots=4", "--node=n3"]
    assert told[4] in ("--host=127.0.0.1", "--host=::1")
    lost = supervisor(["/shared/run"], 4, here | {"SLURM_STEP_NODELIST": "no-such-host.invalid"})
    assert lost[-1] == "--host=n3"


def test_container_command_fits_each_runtime() -> None:
    image = "cluster.slurm.container={image: /images/k.sqsh, mounts: ['/data:/data'], python: /opt/python}"
    pyxis = in_container(job(image).cluster.slurm, FOLDER, "python")
    mounts = f"--container-mounts={FOLDER}:{FOLDER},/data:/data"
    assert pyxis == ["--container-image=/images/k.sqsh", mounts, "/opt/python"]
    apptainer = job(image, "cluster.slurm.container.runtime=apptainer", "cluster.slurm.gpus_per_node=1").cluster.slurm
    assert in_container(apptainer, FOLDER, "python")[:4] == ["apptainer", "exec", "--nv", "--bind"]


def test_chain_jobs_are_singletons() -> None:
    request = Request(job=job(), folder=FOLDER)
    assert Slurm().command(request) == ["sbatch", "--parsable", f"--chdir={FOLDER}", f"{FOLDER}/job.sbatch"]
    assert "--dependency=singleton" in Slurm().command(replace(request, chain=3))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.slurm.partition='a; rm -rf /'", "cluster.slurm.partition"),
        ('cluster.slurm.extra=["--mem=0\\n#SBATCH --wrap=x"]', "cluster.slurm.extra"),
        ("cluster.slurm.extra=['mem=0']", "cluster.slurm.extra"),
        ("cluster.slurm.time=tomorrow", "cluster.slurm.time"),
        ("cluster.slurm.partitoin=gpu", "partition"),
    ],
)
def test_slurm_unknown_option_is_refused(override: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        job(override)


def node(name: str, partition: str = "batch", *, default: bool = True, gpus: int = 0, cpus: int = 4) -> Node:
    return Node(name=name, partition=partition, default=default, state="idle", gpus=gpus, cpus=cpus)


CLUSTER = [*(node(f"n{i}") for i in range(4)), *(node(f"g{i}", "gpu", default=False, gpus=2) for i in range(2))]


def test_check_cluster_feasible_job_is_accepted() -> None:
    check_cluster(job("parallel.data=4", "cluster.ranks_per_node=1"), CLUSTER)
    check_cluster(job(*PLAIN, "cluster.slurm.partition=gpu", "cluster.slurm.gpus_per_node=2"), CLUSTER)
    check_cluster(job("parallel.data=8", "cluster.ranks_per_node=2", "cluster.slurm.partition=batch,gpu"), CLUSTER)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.slurm.partition=gup"], ["cluster.slurm.partition = gup", "batch, gpu"]),
        (["parallel.data=8", "cluster.ranks_per_node=1"], ["8 nodes", "partition batch has 4"]),
        (["parallel.data=4", "cluster.ranks_per_node=1", "cluster.slurm.spares=1"], ["spares = 1", "5 together"]),
        (["cluster.slurm.gpus_per_node=2"], ["cluster.slurm.gpus_per_node = 2", "partition batch have none"]),
        (["cluster.slurm.partition=gpu", "cluster.slurm.gpus_per_node=8"], ["gpus_per_node = 8", "have 2"]),
        (["parallel.data=8"], ["8 ranks on a node need 8 CPUs", "have 4"]),
    ],
)
def test_check_cluster_infeasible_job_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ClusterError) as caught:
        check_cluster(job(*overrides), CLUSTER)
    assert all(word in str(caught.value) for word in words), caught.value


MIXED = [
    *(replace(node(f"n{i}", gpus=8, cpus=64), resources="gpu:a100:8(S:0-1)") for i in range(2)),
    *(replace(node(f"m{i}", gpus=4, cpus=32), resources="gpu:h100:4,shard:8") for i in range(2)),
]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gpus_per_node=8", "spares=1"], ["needs 3 nodes with 1 CPUs and 8 GPUs", "partition batch has 2"]),
        (["gres=gpu:h100:8", "spares=0"], ["2 nodes with 1 CPUs and gpu:h100:8", "has none"]),
        (["gpus_per_node=4", "spares=0"], ["a100 on n0, n1; h100 on m0, m1", "cluster.slurm.gres=gpu:h100:4"]),
        (["gres=gpu:4", "spares=0"], ["have different GPUs"]),
        (["cpus_per_rank=40", "spares=1"], ["needs 3 nodes with 40 CPUs", "has 2"]),
    ],
)
def test_check_cluster_nodes_that_differ_are_refused(overrides: list[str], words: list[str]) -> None:
    two = job("parallel.data=2", "cluster.ranks_per_node=1", *(f"cluster.slurm.{text}" for text in overrides))
    with pytest.raises(ClusterError) as caught:
        check_cluster(two, MIXED)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "override",
    ["gres=gpu:a100:8", "gres='gpu:h100:4,shard:8'", "gpus_per_node=8", "constraint=ib", "{}", "{spares: 2}"],
)
def test_check_cluster_enough_nodes_of_one_kind_are_accepted(override: str) -> None:
    text = f"cluster.slurm={override}" if override.startswith("{") else f"cluster.slurm.{override}"
    check_cluster(job("parallel.data=2", "cluster.ranks_per_node=1", text), MIXED)


def test_waits_for_names_nodes_that_are_away() -> None:
    four = job("parallel.data=4", "cluster.ranks_per_node=1")
    assert waits_for(four, CLUSTER) is None
    away = [replace(one, state="drained") if one.name == "n2" else one for one in CLUSTER]
    assert waits_for(four, away) == "it needs 4 nodes, of 4 only 3 are fit: n2 is drained"
    assert waits_for(job("parallel.data=2", "cluster.ranks_per_node=1"), away) is None
    assert waits_for(job("cluster.slurm.partition=gpu", "cluster.slurm.spares=1"), CLUSTER) is None


def test_check_cluster_excluded_nodes_do_not_count() -> None:
    with pytest.raises(ClusterError, match="has 3"):
        check_cluster(job("parallel.data=4", "cluster.ranks_per_node=1"), CLUSTER, {"n2"})


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:a100:4(S:0-1)", 4), ("shard:9,gpu:h100:8", 8), ("gpu:a:1,gpu:b:2", 3)],
)
def test_gpus_in_generic_resources_are_counted(resources: str, gpus: int) -> None:
    assert gpus_in(resources) == gpus


def test_parse_job_reads_scontrol_output() -> None:
    line = (
        "JobId=12 JobName=tiny UserId=root(0) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
        "ExitCode=0:0 RunTime=00:01:30 TimeLimit=01:00:00 NodeList=node[0-3] ReqNodeList=(null) Comment=a b NumNodes=4"
    )
    found = parse_job(line)
    assert (found.id, found.state, found.reason, found.nodes, found.restarts) == ("12", "RUNNING", "", "node[0-3]", 2)


@pytest.mark.parametrize(
    ("state", "reported", "shown"),
    [("RUNNING", "0:0", None), ("PENDING", "6:0", None), ("COMPLETED", "0:0", 0), ("FAILED", "3:0", 3),
     ("CANCELLED", "0:15", 143)],
)  # fmt: skip
def test_state_exit_code_is_that_of_an_ended_job(
    state: str, reported: str, shown: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId=12 JobState={state} ExitCode={reported}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = Slurm().state("12")
    assert found is not None
    assert found.exit_code == shown


@pytest.mark.parametrize(
    ("code", "crashed", "ending", "failures", "what"),
    [
        (0, False, False, 1, "done"),
        (130, False, False, 1, "requeue"),
        (128 + 10, False, False, 1, "requeue"),
        (128 + 15, True, False, 1, "again"),
        (130, False, True, 1, "give up"),
        (2, True, False, 1, "give up"),
        (3, True, False, 1, "give up"),
        (4, True, False, 1, "again"),
        (6, True, False, 1, "requeue"),
        (6, False, False, 3, "requeue"),
        (6, True, True, 1, "give up"),
        (6, True, False, 4, "give up"),
        (137, True, False, 3, "again"),
        (137, True, False, 4, "give up"),
    ],
)
def test_verdict_follows_from_how_the_ranks_ended(
    code: int, crashed: bool, ending: bool, failures: int, what: Verdict
) -> None:
    assert verdict(code, crashed=crashed, ending=ending, failures=failures, limit=3)[0] == what


def test_node_check_disagreeing_nodes_are_named(tmp_path: Path) -> None:
    assert problems(look(tmp_path), look(tmp_path)) == [
        "does not see the run folder: it must be on storage that all nodes share"
    ]
    save_job(job(), tmp_path / "run.json")
    here = look(tmp_path)
    assert problems(here, here) == []
    assert problems(here | {"torch": "1.0"}, here) == [f"torch is 1.0, not {here['torch']}"]
    assert problems(here | {"arithmetic": "0"}, here)[0].startswith("arithmetic is 0")
    assert problems(here | {"writable": False}, here) == ["cannot write to the run folder"]
    assert problems(here | {"memory_free": 1 << 30}, here, memory=3 << 29) == [
        "has 1.0 GiB of free memory, the run needs 1.5"
    ]


def keepwarm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "keepwarm", *arguments],
        capture_output=True, text=True, check=False, timeout=120, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


def test_submit_dry_run_needs_no_cluster_and_writes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = keepwarm("submit", str(TINY), *PLAIN, f"output={run}", "--dry-run", PATH="/nowhere")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("#!/bin/bash -l\n")
    assert f"# sbatch --parsable --chdir={run} {run}/job.sbatch" in result.stdout
    assert "not checked against a cluster" in result.stderr
    assert not run.exists()


def test_submit_without_slurm_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = keepwarm("submit", str(TINY), f"output={run}", PATH="/nowhere")
    assert result.returncode == 2
    assert "SLURM is not on this machine" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not run.exists()


def test_run_json_slurm_section_loads_again(tmp_path: Path) -> None:
    save_job(job(*FULL), tmp_path / "run.json")
    assert load_job(tmp_path / "run.json").cluster.slurm == job(*FULL).cluster.slurm
    assert json.loads((tmp_path / "run.json").read_text())["cluster"]["slurm"]["time"] == "2-12"
