"""Ranks started by mpirun, srun or torchrun find one another and train as those of `keepwarm train`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.trainer.distributed.launcher_environment import PORTS, first_host, own_address, ranks_from
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job, save_job
from tests.support.runs import warm

ROOT = Path(__file__).parents[3]
SMALL = ("stages.0.tokens=1024", "log.tensorboard=false", "parallel.data=2", "evaluation.samples=2")

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "314146816",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu-[07-09,12]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


def test_ranks_from_torchrun_variables_is_none() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert ranks_from({}) is None
    assert ranks_from(torchrun | SLURM | OPEN_MPI) is None


def test_ranks_from_srun_step() -> None:
    ranks = ranks_from(SLURM | {"SLURM_RESTART_COUNT": "2", "PMI_RANK": "3", "PMI_SIZE": "8"})
    assert ranks is not None
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank) == ("srun", 3, 8, 1)
    assert (ranks.address, ranks.restarts) == ("gpu-07", 2)
    assert ranks.port in PORTS
    other_rank = ranks_from(SLURM | {"SLURM_PROCID": "7"})
    next_step = ranks_from(SLURM | {"SLURM_STEP_ID": "1"})
    assert other_rank is not None
    assert next_step is not None
    assert other_rank.port == ranks.port != next_step.port


def test_ranks_from_batch_script_is_none() -> None:
    assert ranks_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[0-3]"}) is None


def test_ranks_from_open_mpi_inside_slurm_allocation() -> None:
    ranks = ranks_from(OPEN_MPI | SLURM)
    assert ranks is not None
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank, ranks.address) == ("Open MPI", 5, 8, 1, None)
    alone = ranks_from(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
    assert alone is not None
    assert alone.address == "127.0.0.1"


def test_ranks_from_mpich() -> None:
    ranks = ranks_from({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    assert ranks is not None
    assert (ranks.launcher, ranks.rank, ranks.size, ranks.local_rank) == ("MPICH", 1, 2, 1)
    assert ranks.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node0", "node0"),
        ("node0,node1", "node0"),
        ("node[0-3]", "node0"),
        ("gpu-[07-09,12],login", "gpu-07"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("r[4,6]-ib", "r4-ib"),
        ("a[9]b,c", "a9b"),
    ],
)
def test_first_host_of_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_first_host_without_name_is_refused() -> None:
    with pytest.raises(SpecError, match="MASTER_ADDR"):
        first_host("[0-3]")


def test_own_address_faces_peer() -> None:
    assert own_address(None) is None
    assert own_address("localhost") in ("127.0.0.1", "::1")
    assert own_address("no-such-host.invalid") is None


def trained(folder: Path, *command: str) -> list[str]:
    """The metrics of a run of two ranks, without what differs between equal runs."""
    folder.mkdir()
    job = load_job(ROOT / "configs/ci/tiny.yaml", [*SMALL, f"output={folder}"])
    save_job(job, folder / "run.json")
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI", "KEEPWARM_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    result = subprocess.run(
        [*command, str(folder / "run.json")],
        capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [json.dumps({key: value for key, value in record.items() if key != "step_time_s"}) for record in records]


def with_keepwarm(folder: Path) -> list[str]:
    job = folder / "job" / "run.json"
    job.parent.mkdir(parents=True)
    save_job(load_job(ROOT / "configs/ci/tiny.yaml", [*SMALL, f"output={folder / 'run'}"]), job)
    result = warm.run(["train", str(job), f"output={folder / 'run'}"], timeout=240)
    assert result.returncode == 0, result.stdout
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [json.dumps({key: value for key, value in record.items() if key != "step_time_s"}) for record in records]


@pytest.mark.dist
def test_mpirun_trains_as_keepwarm(tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed: .ci/run installs it")
    mpirun = ("mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
    by_mpi = trained(tmp_path / "mpi", *mpirun, sys.executable, "-P", "-m", "keepwarm.trainer")
    assert len(by_mpi) >= 4
    assert by_mpi == with_keepwarm(tmp_path / "keepwarm")


@pytest.mark.dist
@pytest.mark.long
def test_torchrun_trains_as_keepwarm(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    assert trained(tmp_path / "torchrun", *torchrun, "keepwarm.trainer") == with_keepwarm(tmp_path / "keepwarm")


@pytest.mark.dist
@pytest.mark.long
def test_torchrun_on_two_nodes_trains_as_keepwarm(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = f"{sys.executable} -P -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1"
    node = f"{common} --master-port={port}"
    both = f'{node} --node-rank=1 -m keepwarm.trainer "$0" & {node} -m keepwarm.trainer "$0"'
    by_torchrun = trained(tmp_path / "torchrun", "bash", "-c", f"{both} && wait $!")
    assert by_torchrun == with_keepwarm(tmp_path / "keepwarm")


def test_adopt_launcher_several_nodes_without_mpi4py_asks_for_address(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from keepwarm.trainer.distributed.launcher_environment import adopt_launcher\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")} | OPEN_MPI
    command = [sys.executable, "-c", code + "adopt_launcher()"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=ROOT)
    assert "keepwarm[mpi]" in result.stderr
    assert "MASTER_ADDR" in result.stderr
