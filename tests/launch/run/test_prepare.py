"""Run folders: made whole or not at all, held by one process, and what an override changes."""

from pathlib import Path

import pytest

from keepwarm.launch.local.train import new_job
from keepwarm.launch.run.prepare import Mode, changes, prepared, stored_job, waiting
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import accept, find_job, find_model, load_job, load_run
from keepwarm.trainer.job.sections import StageSpec
from keepwarm.trainer.job.spec import JobSpec


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return load_job(Path("ci/tiny"), [f"output={tmp_path / 'run'}"])


class Failure(Exception):
    pass


def fail_after(job: JobSpec, mode: Mode, *, log: str | None = None, metrics: str | None = None) -> None:
    with prepared(job, mode) as spec:
        folder = spec.parent
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
    if mode == "resume":
        with prepared(job, "new"):
            pass
    with pytest.raises(Failure):
        fail_after(job, mode, metrics="{}\n")
    assert (Path(job.output) / "run.json").is_file()


def test_prepared_force_deletes_what_keepwarm_wrote_and_leaves_the_rest(
    job: JobSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, hashed = Path(job.output), f"a-{'0' * 32}"
    ours = [
        "checkpoints/iter_0000005/manifest.json", "checkpoints/latest", "checkpoints/.publishing", "metrics.jsonl",
        f"data/{hashed}.bin", f"data/{hashed}.lock", "logs/rank_00001.log", "logs/pids.json", "tensorboard/events",
        "report.html", "job.sbatch", ".run.json.12.ab34cd56.tmp", "code/keepwarm/x.py", "run.submitted.json",
    ]  # fmt: skip
    theirs = ["notes.txt", "data/mine.jsonl", "checkpoints/best/model.safetensors", "logs/why.md"]
    with prepared(job, "new"):
        pass
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    with prepared(job, "force"):
        left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"run.json", "place.json", *theirs}
    assert "left in place, as keepwarm did not write it: checkpoints, data, logs, notes.txt" in capsys.readouterr().err


def test_prepared_force_on_an_untouched_run_leaves_run_json_alone(job: JobSpec) -> None:
    with prepared(job, "new"):
        pass
    with prepared(job, "force") as spec:
        assert sorted(path.name for path in spec.parent.iterdir()) == ["place.json", "run.json"]


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _through_a_link(run: Path) -> Path:
    """A path outside the run that reaches a file outside the run by a link inside it."""
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "x.jsonl").write_text('{"text": "a"}\n')
    (run / "inner").symlink_to(outside)
    (run.parent / "way").symlink_to(run / "inner")
    return run.parent / "way" / "x.jsonl"


INPUTS = {
    "data.sources.en": lambda run: run / "corpus" / "x.jsonl",
    "data.validation.en": lambda run: run / "logs" / ".." / "corpus" / "x.jsonl",
    "data.sources.de": _through_a_link,
    "data.tokenizer": lambda run: run.parent / "link" / "corpus" / "t.json",
    "init_from": lambda run: run.parent / "link" / "checkpoints",
    "cluster.slurm.container.mounts.0": lambda run: f"{run}/corpus:/data",
    "cluster.slurm.container.image": lambda run: run / "corpus" / "x.jsonl",
}


@pytest.mark.parametrize("key", INPUTS)
def test_prepared_force_refuses_an_input_in_the_output_and_deletes_nothing(tmp_path: Path, key: str) -> None:
    run = tmp_path / "run"
    (run / "corpus").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (tmp_path / "link").symlink_to(run)
    for name in ("corpus/x.jsonl", "corpus/t.json", "metrics.jsonl"):
        (run / name).write_text('{"text": "a"}\n')
    (run / "run.json").write_text("{}")
    path = INPUTS[key](run)
    if key.startswith("cluster.slurm.container"):
        image = "/i.sqsh" if key.endswith("0") else path
        mounts = f"['{path}']" if key.endswith("0") else "[]"
        override = f"cluster.slurm.container={{image: {image}, mounts: {mounts}}}"
    else:
        override = f"{key}={path}"
    job = load_job(Path("ci/tiny"), [f"output={run}", override])
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=r"--force|is only read") as refusal, prepared(job, "force"):
        pass
    assert key in str(refusal.value)
    assert str(run) in str(refusal.value)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize(("inside", "key"), [("job.yaml", "the job file"), ("model.yaml", "model")])
def test_new_job_force_refuses_a_description_in_the_output(tmp_path: Path, inside: str, key: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    place = {name: (run if name == inside else tmp_path) / name for name in ("job.yaml", "model.yaml")}
    place["model.yaml"].write_text(find_model("tiny", tmp_path).read_text())
    text = (
        find_job(Path("ci/tiny")).read_text().replace("../corpora", str(find_job(Path("demo")).parents[1] / "corpora"))
    )
    place["job.yaml"].write_text(text.replace("model: tiny", f"model: {place['model.yaml']}"))
    with pytest.raises(OutputError, match=f"{key}: .*{inside} lies in output = {run}"):
        new_job(place["job.yaml"], [f"output={run}"], "force")
    assert new_job(place["job.yaml"], [f"output={run}2"], "force").name == "tiny"


def test_changes_of_an_added_stage_are_one_line(job: JobSpec) -> None:
    values = {"name": "more", "tokens": 512, "mixture": {"en": 1}, "lr": {"max": 1e-4}}
    more = StageSpec.model_validate(values)
    longer = job.model_copy(update={"stages": (*job.stages, more), "seed": 9})
    seed, stage = changes(job, longer)
    assert seed == f"seed: {job.seed} -> 9"
    assert stage.startswith(f'stages.{len(job.stages)}: absent -> {{"name": "more", "tokens": 512, "mixture"')
    assert "null" not in stage
    assert changes(longer, job)[1].endswith("-> absent")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("seed=4", "its ledger"),
        ("init_from=/x/y", "first start"),
        ("optimizer.name=muon", "hold the moments of adamw; start a new run, with init_from="),
    ],
)
def test_stored_job_key_that_a_run_keeps_is_refused(job: JobSpec, override: str, why: str) -> None:
    with prepared(job, "new") as spec, pytest.raises(SpecError, match=why):
        stored_job(spec.parent, [override])


@pytest.mark.parametrize(
    ("before", "after", "is_refused"),
    [
        (["optimizer.name=muon"], ["optimizer.name=adamw"], True),
        (["optimizer.name=sgd"], ["optimizer.momentum=0.9"], True),
        (["optimizer.name=sgd", "optimizer.momentum=0.9"], ["optimizer.momentum=0.8"], False),
        (["optimizer.name=muon"], ["optimizer.name=sgd"], False),
        ([], ["optimizer.weight_decay=0.2"], False),
    ],
)
def test_stored_job_keeps_an_optimizer_with_moments(
    tmp_path: Path, before: list[str], after: list[str], is_refused: bool
) -> None:
    with prepared(new_job(Path("ci/tiny"), [f"output={tmp_path / 'run'}", *before], "new"), "new") as spec:
        if is_refused:
            with pytest.raises(
                SpecError, match=r"override optimizer\.(name|momentum)=.*: the checkpoints of the run hold"
            ):
                stored_job(spec.parent, after)
        else:
            stored_job(spec.parent, after)


def test_prepared_resume_leaves_run_json_until_the_proposal_is_accepted(job: JobSpec) -> None:
    with prepared(job, "new") as file:
        pass
    folder, before = file.parent, file.read_bytes()
    _, changed = stored_job(folder, ["evaluation.every=5"])
    with prepared(job, "resume") as spec:
        assert spec == file
    with prepared(changed, "resume") as spec:
        assert (spec.name, load_run(spec)) == ("run.proposed.json", changed)
        assert file.read_bytes() == before
    assert (file.read_bytes(), spec.exists()) == (before, False)
    with prepared(changed, "resume") as spec:
        accept(spec)
        assert load_run(spec) == load_run(file) == changed  # as of a rank that starts again
    assert not spec.exists()


def test_prepared_submitted_proposal_waits_and_the_next_submission_replaces_it(job: JobSpec) -> None:
    with prepared(job, "new") as file:
        pass
    _, changed = stored_job(file.parent, ["evaluation.every=5"])
    with prepared(changed, "resume", submitted=True) as spec:
        assert spec.name == "run.submitted.json"
    assert waiting(file.parent) == ["evaluation.every: null -> 5"]
    with prepared(job, "resume") as here:
        assert here == file
    assert spec.exists()
    with prepared(job, "resume", submitted=True):
        pass
    assert not spec.exists()
    assert waiting(file.parent) == []


@pytest.mark.parametrize("mode", ["resume", "force"])
def test_prepared_second_process_is_refused(job: JobSpec, mode: Mode) -> None:
    with prepared(job, "new") as spec:
        with pytest.raises(OutputError, match="another keepwarm process"):
            fail_after(job, mode)
        assert spec.is_file()


def test_stored_job_overrides_are_listed(job: JobSpec) -> None:
    with prepared(job, "new") as spec:
        before, after = stored_job(spec.parent, ["stages.0.lr.max=1e-3", "evaluation.every=5"])
    assert before == job
    assert changes(before, after) == ["stages.0.lr.max: 0.003 -> 0.001", "evaluation.every: null -> 5"]
    assert changes(before, before) == []
