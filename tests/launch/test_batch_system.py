"""A batch system of another package: found by its entry point, submitted to, asked, and made to cancel."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.launch.batch.submit import admit, messages
from keepwarm.launch.batch_system import Array, BatchSystem, Request
from keepwarm.launch.errors import PreflightError
from keepwarm.launch.run.preflight import check_job
from keepwarm.launch.run.submission import read_submission
from keepwarm.section import Section
from keepwarm.trainer.errors import DataError
from keepwarm.trainer.job.files import load_job

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "support" / "runs" / "local_queue.py"
JOB = ("ci/tiny", "parallel.data=2", "log.tensorboard=false", "evaluation.samples=2")
BACKEND = ("--backend", "local_queue")
DEADLINE = 240.0
ENTRY_POINTS = """\
[keepwarm.batch_systems]
local_queue = local_queue:LocalQueue

[keepwarm.launchers]
local_queue = local_queue:rank_from
"""


class Machine:
    """A machine on which the distribution `keepwarm-local-queue` is installed."""

    def __init__(self, root: Path) -> None:
        info = root / "site" / "keepwarm_local_queue-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: keepwarm-local-queue\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        (info.parent / "local_queue.py").write_text(PLUGIN.read_text())
        (root / "spool").mkdir()
        self.environment = os.environ | {
            "PYTHONPATH": str(info.parent),
            "LOCAL_QUEUE_SPOOL": str(root / "spool"),
        }

    def keepwarm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "keepwarm", *arguments],
            capture_output=True, text=True, check=False, timeout=DEADLINE, env=self.environment,
        )  # fmt: skip

    def row(self, run: Path) -> dict[str, object]:
        """The run as `keepwarm runs` lists it."""
        listed = self.keepwarm("runs", str(run), "--json")
        assert listed.returncode == 0, listed.stderr
        (row,) = json.loads(listed.stdout)
        assert isinstance(row, dict)
        return row


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    yield Machine(tmp_path)
    submitted = read_submission(tmp_path / "run")
    for job in submitted.jobs if submitted else ():
        if not (tmp_path / "spool" / job).exists():  # a test failed before the job ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(job), signal.SIGKILL)


def words(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "logs").iterdir()))


@pytest.mark.dist
def test_added_batch_system_runs_lists_and_shows_a_job(machine: Machine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ("stages.0.tokens=1024", 'cluster.local_queue.setup=["export SAID=hello"]')
    submitted = machine.keepwarm("submit", *JOB, *small, f"output={run}", *BACKEND)
    assert submitted.returncode == 0, submitted.stderr
    assert "keepwarm: the local queue has room" in submitted.stderr
    job = submitted.stdout.strip()
    watched = machine.keepwarm("watch", str(run), "--every", "0.1")
    assert watched.returncode == 0, watched.stderr
    row = machine.row(run)
    assert (row["state"], row["progress"]["step"]) == ("completed", row["progress"]["last_step"]), words(run)  # type: ignore[index]
    assert row["job"]["exit_code"] == 0  # type: ignore[index]
    assert f"job {job} started 2 ranks, setup said hello" in machine.keepwarm("logs", str(run)).stdout
    assert machine.keepwarm("logs", str(run), "--rank", "1").returncode == 0
    assert "no job of this run is pending or running" in machine.keepwarm("cancel", str(run)).stderr


@pytest.mark.dist
def test_added_batch_system_cancels_with_state_saved(machine: Machine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submitted = machine.keepwarm("submit", *JOB, "stages.0.tokens=1_024_000", f"output={run}", *BACKEND)
    assert submitted.returncode == 0, submitted.stderr
    end = time.monotonic() + DEADLINE
    while machine.row(run)["progress"]["step"] < 1:  # type: ignore[index]
        assert time.monotonic() < end, words(run)
        assert machine.row(run)["state"] == "running", words(run)
    again = machine.keepwarm("submit", str(run), "--resume", *BACKEND)
    assert (again.returncode, again.stderr.count("\n")) == (2, 2)
    assert f"keepwarm cancel {run} ends it first" in again.stderr
    requeued = machine.keepwarm("requeue", str(run))
    assert (requeued.returncode, requeued.stderr) == (
        2, "keepwarm: keepwarm requeue is not possible with the local queue\n"
    )  # fmt: skip
    cancelled = machine.keepwarm("cancel", str(run))
    assert "ends once its state is saved" in cancelled.stdout, cancelled.stderr
    assert machine.keepwarm("watch", str(run), "--every", "0.1").returncode == 0
    row = machine.row(run)
    assert (row["state"], row["job"]["exit_code"]) == ("failed", ExitCode.INTERRUPTED), words(run)  # type: ignore[index]
    assert (run / "checkpoints" / "latest").exists(), words(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cluster.local_queue.stup=[]"], "stup: unknown key; did you mean cluster.local_queue.setup?"),
        (["cluster.local_queue.setup=3"], "cluster.local_queue.setup: expected a valid"),
        (["cluster.local_que.setup=[]"], "cluster.local_que: unknown key; did you mean cluster.local_queue?"),
        (["--sweep", "seed=[1, 2]"], "--sweep: keepwarm submits no arrays to the local queue"),
        (["--chain", "2"], "--chain: keepwarm submits no chains to the local queue"),
    ],
)
def test_added_batch_system_refuses_wrong_options_in_one_line(
    machine: Machine, tmp_path: Path, options: list[str], message: str
) -> None:
    refused = machine.keepwarm("submit", *JOB, *options, f"output={tmp_path}/run", *BACKEND)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


class Remote(BatchSystem):
    """Has arrays, and data that this machine does not see."""

    name, title, Options = "remote", "the remote queue", Section
    sees_files = False
    has_arrays = True

    def check(self, request: Request, *, dry_run: bool) -> list[str]:
        return [f"{request.job.name} is admitted"]

    def render(self, request: Request) -> str:
        return ""


def test_admit_array_on_machine_without_its_files_checks_only_engines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (load_job(Path(JOB[0]), [f"data.sources.en=/elsewhere/{name}"]) for name in ("one", "two"))
    request = Request(job=one, folder=Path("runs"), array=Array(members=2))
    admit(Remote(), request, messages(), dry_run=True, others=[two])
    assert "is admitted" in capsys.readouterr().err
    with pytest.raises(DataError, match="/elsewhere/one"):
        check_job(one)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    apex = load_job(Path(JOB[0]), ["optimizer.implementation=apex"])
    with pytest.raises(PreflightError, match="implementation = apex"):
        admit(Remote(), request, messages(), dry_run=True, others=[two, apex])


def test_unknown_batch_system_lists_those_installed(machine: Machine, tmp_path: Path) -> None:
    refused = machine.keepwarm("submit", *JOB, f"output={tmp_path}/run", "--backend", "slrm")
    assert refused.returncode == 2
    assert refused.stderr == (
        "keepwarm: unknown batch system 'slrm'; did you mean 'slurm'? there are: slurm, kubernetes, local_queue\n"
    )


def test_cluster_section_reports_all_of_its_unknown_and_wrong_keys(machine: Machine, tmp_path: Path) -> None:
    wrong = ("cluster.local_que=1", "cluster.nodes=2", "cluster.local_queue.setup=3", "cluster.local_queue.stup=[]")
    refused = machine.keepwarm("submit", *JOB, *wrong, f"output={tmp_path}/run", *BACKEND)
    assert refused.returncode == 2
    for key in ("local_que: unknown", "nodes: unknown", "local_queue.setup: expected", "local_queue.stup: unknown"):
        assert f"cluster.{key}" in refused.stderr


def test_broken_batch_system_names_its_package(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "site" / "local_queue.py").write_text("import no_such_module\n")
    for arguments in (BACKEND, ("cluster.local_queue.setup=[]",)):
        refused = machine.keepwarm("submit", *JOB, f"output={tmp_path}/run", *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "'local_queue' of the package keepwarm-local-queue cannot be loaded: No module named" in refused.stderr
