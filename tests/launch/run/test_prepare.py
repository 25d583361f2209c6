"""Run folders: made whole or not at all, held by one process, and what an override changes."""

from pathlib import Path

import pytest

from keepwarm.launch.run.prepare import Mode, changes, prepared, stored_job
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return load_job(Path("ci/tiny"), [f"output={tmp_path / 'run'}"])


class Failure(Exception):
    pass


def fail_after(job: JobSpec, mode: Mode, *, log: str | None = None, metrics: str | None = None) -> None:
    with prepared(job, mode) as folder:
        if log is not None:
            (folder / "logs").mkdir()
        if metrics is not None:
            (folder / "metrics.jsonl").write_text(metrics)
        raise Failure


def test_prepared_failure_before_training_leaves_nothing(job: JobSpec) -> None:
    folder = Path(job.output)
    with pytest.raises(Failure):
        fail_after(job, "new", log="", metrics="")
    assert not folder.exists()


def test_prepared_failure_in_an_empty_folder_leaves_it_empty(job: JobSpec) -> None:
    folder = Path(job.output)
    folder.mkdir()
    with pytest.raises(Failure):
        fail_after(job, "new")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["new", "resume", "force"])
def test_prepared_failure_after_training_began_keeps_the_run(job: JobSpec, mode: Mode) -> None:
    with pytest.raises(Failure):
        fail_after(job, mode, metrics="{}\n")
    assert (Path(job.output) / "run.json").is_file()


def test_prepared_force_empties_the_folder(job: JobSpec) -> None:
    with prepared(job, "new") as folder:
        (folder / "checkpoints" / "step").mkdir(parents=True)
    with prepared(job, "force") as folder:
        assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("mode", ["resume", "force"])
def test_prepared_second_process_is_refused(job: JobSpec, mode: Mode) -> None:
    with prepared(job, "new") as folder:
        with pytest.raises(OutputError, match="another keepwarm process"):
            fail_after(job, mode)
        assert (folder / "run.json").is_file()


def test_stored_job_overrides_are_listed(job: JobSpec) -> None:
    with prepared(job, "new") as folder:
        before, after = stored_job(folder, ["stages.0.lr.max=1e-3", "evaluation.every=5"])
    assert before == job
    assert changes(before, after) == ["stages.0.lr.max: 0.003 -> 0.001", "evaluation.every: null -> 5"]
    assert changes(before, before) == []
