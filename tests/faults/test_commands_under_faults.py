"""Launchers, supervisors, agents and tools on a disk that fails, without their terminal, and under ignored signals."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from keepwarm.ft.format import publication
from keepwarm.trainer.checkpoint import report
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.monitor import events
from tests.support.faulty.io_faults import DEADLINE, Fault, assert_whole, library, run
from tests.support.runs import warm
from tests.support.runs.run_contents import steps_of, tensors_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "ci"
KEEPWARM = f"{sys.executable} -P -m keepwarm"
SMALL = "evaluation.samples=4 log.tensorboard=false"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A folder for the sockets of agents, with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="kw-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.dist
def test_nodes_without_logs_under_ignored_signals_train_to_the_end(tmp_path: Path, runtime: Path) -> None:
    folder = tmp_path / "run"
    fault = Fault(path="*@(/events.jsonl|/goodput.jsonl|/agents/agent-*.log|/nodes/.node-*)", kind="ENOSPC")
    environment = {
        **os.environ, **fault.environment(tmp_path / "faults"), "LD_PRELOAD": str(library()),
        "XDG_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    job = f"{CONFIGS}/snapshot.yaml output={folder} {SMALL} stages.0.tokens=8192 parallel.data=2"
    command = f"trap '' HUP INT; exec {KEEPWARM} train {job} snapshot.code.data=1 snapshot.code.parity=1 --nodes 2"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + DEADLINE
        while not (folder / "metrics.jsonl").exists() or len(steps_of(folder)) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(everyone) >= 7  # launcher, nodes, two supervisors, two ranks, fork servers
        for number in (signal.SIGHUP, signal.SIGINT):
            for one in everyone:
                one.send_signal(number)
        assert process.wait(DEADLINE) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait(DEADLINE)
    assert_whole(folder)
    assert steps_of(folder)[-1]["step"] == 16
    struck = {
        Path(line.split()[1]).name.lstrip(".").partition(".")[0]
        for line in (tmp_path / "faults").read_text().splitlines()
    }
    assert {"events", "goodput", "agent-0", "agent-1", "node-0", "node-1"} <= struck


def test_launcher_whose_output_nobody_reads_trains_to_the_end(tmp_path: Path) -> None:
    job = f"{CONFIGS}/tiny.yaml output={tmp_path}/run {SMALL} stages.0.tokens=2048"
    command = f"set -o pipefail; {KEEPWARM} train {job} 2>&1 | head -1"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=DEADLINE, stdout=subprocess.PIPE, check=False)
    assert ended.returncode == 0
    assert ended.stdout.startswith(b"keepwarm: tiny: starting 1 rank")
    assert steps_of(tmp_path / "run")[-1]["step"] == 4
    (lost,) = [event for event in events.read(tmp_path / "run").of(events.OutputLost) if event.output == "stdout"]
    assert "Broken pipe" in lost.reason


FULL_DISK = """
mount -t tmpfs -o size=16m keepwarm-test disk
$KEEPWARM train $JOB output=disk/run & train=$!
until [ -e disk/run/checkpoints/latest ]; do kill -0 $train; sleep 0.02; done
head -c 1G /dev/zero >> disk/filler 2>/dev/null || true
code=0; wait $train || code=$?
echo $code > code; cp -r disk/run full
rm disk/filler
$KEEPWARM train disk/run --resume
cp -r disk/run resumed
"""
"""A file system in a mount namespace of its own: filled once the run has a checkpoint, and freed afterwards."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system to fill")
def test_run_on_a_disk_that_fills_ends_with_6_and_resumes_bitwise(tmp_path: Path) -> None:
    job = f"{CONFIGS}/tiny.yaml {SMALL} checkpoint.every=2 stages.0.tokens=5120"
    whole = warm.run(["train", *job.split(), f"output={tmp_path}/whole"], timeout=DEADLINE)
    assert whole.returncode == 0, whole.stdout
    (tmp_path / "disk").mkdir()
    environment = os.environ | {"KEEPWARM": KEEPWARM, "JOB": job, "PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "log").open("wb") as log:
        command = ["unshare", "--mount", "bash", "-ec", FULL_DISK]
        subprocess.run(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, timeout=DEADLINE, check=True)
    assert (tmp_path / "code").read_text() == "6\n", (tmp_path / "log").read_text()
    assert "No space left on device" in (tmp_path / "log").read_text()
    for folder in ("full", "resumed"):
        assert_whole(tmp_path / folder)
    assert publication.latest(tmp_path / "full" / "checkpoints") is not None
    assert tensors_of(tmp_path / "resumed") == tensors_of(tmp_path / "whole")


TEXT = '{"text": "one two three"}\n' * 200


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ("write", "short"),
        *(
            pytest.param(calls, kind, marks=pytest.mark.long)
            for calls, kind in [("open", "EROFS"), ("write", "EIO"), ("sync", "EIO"), ("rename", "ENOSPC")]
        ),
    ],
)
def test_tokenize_on_a_failing_disk_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: str, kind: str
) -> None:
    (tmp_path / "text.jsonl").write_text(TEXT)
    arguments = ["data", "tokenize", "--input", str(tmp_path / "text.jsonl"), "--output-prefix", f"{tmp_path}/out/text"]
    (tmp_path / "out").mkdir()
    outcome = run(arguments, Fault(path=f"{tmp_path}/out/*", calls=calls, kind=kind), tmp_path, monkeypatch)
    assert outcome.struck
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert f"{tmp_path}/out" in outcome.output.splitlines()[-1]
    assert not (tmp_path / "out" / "text.idx").exists()
    again = warm.run(arguments, timeout=DEADLINE)
    assert again.returncode == 0, again.stdout
    TokenFile(tmp_path / "out" / "text")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text.bin", "text.idx", "text.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = warm.run(
        ["train", f"{CONFIGS}/tiny.yaml", f"output={folder}", *SMALL.split(), "stages.0.tokens=512"], timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ("write", "short"),
        *(
            pytest.param(calls, kind, marks=pytest.mark.long)
            for calls, kind in [("mkdir", "EROFS"), ("open", "ENOSPC"), ("sync", "EIO"), ("rename", "ENOSPC")]
        ),
    ],
)
def test_convert_on_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path, calls: str, kind: str
) -> None:
    arguments = ["convert", "--from", "native", "--to", "hf", str(trained), str(tmp_path / "export")]
    outcome = run(arguments, Fault(path=f"{tmp_path}/*export*", calls=calls, kind=kind), tmp_path, monkeypatch)
    assert outcome.struck
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert "nothing was written to" in outcome.output
    assert [path for path in tmp_path.iterdir() if "export" in path.name] == []


def test_checkpoint_copy_on_a_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    arguments = ["checkpoint", "copy", str(trained), str(tmp_path / "copies")]
    fault = Fault(path=f"{tmp_path}/copies/*", calls="write", kind="short")
    outcome = run(arguments, fault, tmp_path, monkeypatch)
    assert outcome.struck
    assert outcome.code == 2, outcome.output
    assert publication.checkpoints(tmp_path / "copies") == []
    again = warm.run(arguments, timeout=DEADLINE)
    assert again.returncode == 0, again.stdout
    report.verify(tmp_path / "copies", lambda done, total: None)
