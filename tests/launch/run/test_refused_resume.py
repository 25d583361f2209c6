"""A resumed run whose ranks refuse its changed spec is left as it was; an accepted change is in `run.json`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.launch.run.prepare import prepared, stored_job
from keepwarm.trainer.job.files import load_job

ROOT = Path(__file__).parents[3]
SMALL = ("stages.0.tokens=2048", "checkpoint.every=2", "evaluation.samples=8")
RECORDS = ("logs", "events.jsonl", "goodput.jsonl", "nodes", "place.json")
"""What a refused start adds to: the record that it was tried."""


def keepwarm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, cut back to its checkpoint after two."""
    run = tmp_path_factory.mktemp("runs") / "run"
    done = keepwarm("keepwarm", "train", "ci/tiny", f"output={run}", *SMALL)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run / "checkpoints" / "iter_0000004")
    (run / "checkpoints" / "latest").write_text("iter_0000002\n")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def kept(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {
        str(path.relative_to(run)): path.read_bytes() for path in files if path.relative_to(run).parts[0] not in RECORDS
    }


def foreign_tokens(folder: Path) -> Path:
    (folder / "foreign.idx").write_bytes(b"not an index")
    (folder / "foreign.bin").write_bytes(b"")
    return folder / "foreign"


def foreign_tokenizer(folder: Path) -> Path:
    (folder / "t.json").write_text("{}")
    return folder / "t.json"


@pytest.mark.parametrize(
    "override",
    [
        lambda folder: "model.hidden_size=64",
        lambda folder: f"data.sources.en={foreign_tokens(folder)}",
        lambda folder: f"data.tokenizer={foreign_tokenizer(folder)}",
    ],
    ids=["model", "data", "tokenizer"],
)
@pytest.mark.parametrize("nodes", [(), ("--nodes", "1")], ids=["ranks", "emulated nodes"])
def test_refused_resume_leaves_the_run_as_it_was(run: Path, nodes: tuple[str, ...], override: object) -> None:
    assert callable(override)
    before = kept(run)
    refused = keepwarm("keepwarm", "train", run, "--resume", override(run.parent), *nodes)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert kept(run) == before


def test_accepted_resume_is_in_run_json_and_a_plain_resume_after_a_refusal_works(run: Path) -> None:
    assert keepwarm("keepwarm", "train", run, "--resume", "model.hidden_size=64").returncode == 2
    done = keepwarm("keepwarm", "train", run, "--resume", "checkpoint.every=1")
    assert done.returncode == 0, done.stderr
    assert "changed for the rest of the run, once its ranks accept it: checkpoint.every: 2 -> 1" in done.stderr
    assert json.loads((run / "run.json").read_text())["checkpoint"]["every"] == 1
    assert not (run / "run.proposed.json").exists()
    assert (run / "checkpoints" / "iter_0000003").is_dir()


def test_submitted_proposal_is_not_taken_by_a_plain_resume_and_is_by_its_job(run: Path) -> None:
    _, changed = stored_job(run, ["checkpoint.every=1"])
    with prepared(changed, "resume", submitted=True) as spec:
        pass
    refused = keepwarm("keepwarm", "train", run, "--resume", "log.every=2")
    assert refused.returncode == 2
    assert f"{spec}: a submitted job is to resume this run with checkpoint.every: 2 -> 1" in refused.stderr
    assert spec.exists()
    job = keepwarm("keepwarm.trainer", spec, "--resume")
    assert job.returncode == 0, job.stderr
    assert load_job(run / "run.json").checkpoint.every == 1
    assert not spec.exists()


def test_plain_resume_says_which_changes_wait_for_a_submitted_job(run: Path) -> None:
    _, changed = stored_job(run, ["checkpoint.every=1"])
    with prepared(changed, "resume", submitted=True) as spec:
        pass
    done = keepwarm("keepwarm", "train", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"not used, as it waits for a submitted job in {spec}: checkpoint.every: 2 -> 1" in done.stderr
    assert load_job(run / "run.json").checkpoint.every == 2
