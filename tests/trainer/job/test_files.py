"""Job files: what is read, what is refused and how the refusal reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.files import load_job, load_model, load_run, save_job
from keepwarm.trainer.job.learning_rate import CosineSpec, LinearSpec
from keepwarm.trainer.job.sections import BatchSpec, EvaluationSpec, StageSpec
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import plan_stages
from keepwarm.trainer.model.spec import ModelSpec

JOB = """\
name: small
output: out
model:
  layers: 4
  hidden_size: 64
  heads: 4
  ffn_size: 128
  vocabulary_size: 256
  max_sequence_length: 64
data:
  sources: {en: text/en.jsonl, de: /corpora/de}
  sequence_length: 64
batch: {global_batch_size: 8}
stages:
  - name: pretrain
    tokens: 1_024
    mixture: {en: 1, de: 0.5}
    lr: {max: 3e-4}
  - name: anneal
    tokens: 512
    mixture: {en: 1}
    lr: {schedule: linear, max: 1e-4}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_job(path, overrides)
    return str(caught.value)


def test_job_file_is_read_as_yaml_1_2(job_file: Path) -> None:
    job_file.write_text(JOB.replace("name: small", "name: no"))
    job = load_job(job_file)
    assert job.name == "no"
    assert job.stages[0].lr.max == 3e-4
    assert job.stages[0].tokens == 1024


def test_job_file_anchor_that_is_there_twice_means_the_latest(job_file: Path) -> None:
    twice = JOB.replace("hidden_size: 64", "hidden_size: &n 64").replace("heads: 4", "heads: &n 4")
    job_file.write_text(twice.replace("ffn_size: 128", "ffn_size: *n"))
    assert load_job(job_file, []).model.ffn_size == 4


def test_job_file_paths_are_relative_to_file_overrides_to_cwd(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    job = load_job(job_file, ["data.validation.en=v/en", "data.tokenizer=t.json"])
    assert job.data.sources == {"en": str(tmp_path / "text/en.jsonl"), "de": "/corpora/de"}
    assert job.data.validation == {"en": str(elsewhere / "v/en")}
    assert job.data.tokenizer == str(elsewhere / "t.json")
    assert job.output == str(elsewhere / "out")
    assert load_job(job_file).data.tokenizer == "bytes"


@pytest.mark.parametrize("dashes", ["", "--"])
def test_job_overrides_reach_every_kind_of_key(job_file: Path, dashes: str) -> None:
    overrides = ["stages.0.tokens=2048", "stages.anneal.lr.max=2e-4", "profile.start=3", "profile.steps=2"]
    overrides += ["optimizer.betas=[0.8, 0.9]", "batch.micro_batch_size=2", "optimizer.clip_norm=null"]
    job = load_job(job_file, [dashes + text for text in overrides])
    assert job.stages[0].tokens == 2048
    assert job.stages[1].lr.max == 2e-4
    assert job.profile is not None
    assert job.profile.start == 3
    assert job.optimizer.betas == (0.8, 0.9)
    assert job.optimizer.clip_norm is None
    assert job.batch.micro_batch_size == 2


def test_job_model_name_with_overrides_is_merged(job_file: Path) -> None:
    shipped = load_model("tiny")
    overrides = ["model.layers=2", "model=tiny"]
    job = load_job(job_file, overrides)
    assert job.model == shipped.model_copy(update={"layers": 2})


def test_job_model_file_beside_the_job_is_read(job_file: Path) -> None:
    shapes = "layers: 2\nhidden_size: 8\nheads: 2\nffn_size: 8\nvocabulary_size: 16\nmax_sequence_length: 64\n"
    (job_file.parent / "mine.yaml").write_text(shapes)
    lines = JOB.splitlines(keepends=True)
    job_file.write_text("".join([*lines[:2], "model: mine.yaml\n", *lines[9:]]))
    assert load_job(job_file).model.hidden_size == 8
    (job_file.parent / "mine.yaml").write_text(shapes.replace("heads", "haeds"))
    message = refused(job_file)
    assert f"{job_file.parent / 'mine.yaml'}:3: model.haeds: unknown key; did you mean model.heads?" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("heads: 4", "haeds: 4", ["job.yaml:6: model.haeds: unknown key; did you mean model.heads?"]),
        ("batch: {", "tensor: 2\nbatch: {", ["job.yaml:13: tensor: unknown key; did you mean parallel.tensor?"]),
        ("  ffn_size: 128\n", "", ["job.yaml:3: model.ffn_size: this key is required"]),
        ("layers: 4", "layers: four", ["job.yaml:4: model.layers: expected a whole number, got the text 'four'"]),
        ("layers: 4", "layers: 4e0", ["job.yaml:4: model.layers: expected a whole number, got 4.0; write 4"]),
        ("layers: 4", "layers: 0", ["model.layers: expected greater than 0, got 0"]),
        ("max: 3e-4", "max: .inf", ["stages.0.lr.max: expected a finite number"]),
        ("heads: 4", "heads: 3", ["job.yaml:3: model: hidden_size 64 does not divide by heads 3"]),
        ("tokens: 512", "tokens: 512\n    tokens: 5", ['job.yaml:21: found duplicate key "tokens"']),
        ("linear,", "linear, warmpu: 0,", ["stages.1.lr.warmpu: unknown key; did you mean stages.1.lr.warmup?"]),
        ("linear,", "linear, x: 0,", ["lr.x: unknown key; valid keys here: max, min, schedule, warmup"]),
        (
            "linear,",
            "linear, cooldown: cosine,",
            ["job.yaml:22: stages.1.lr.cooldown: unknown key for schedule linear; schedule infinite has it"],
        ),
        ("max: 3e-4", "max: 3e-4, anneal: 0.1", ["unknown key for schedule cosine; schedules wsd, infinite have it"]),
        ("linear,", "piecewise, points: [[0, x]],", ["stages.1.lr.points.0.1: expected a valid number, got the text"]),
        ("{schedule: linear, max: 1e-4}", "1e-4", ["stages.1.lr: expected a section with keys, got 0.0001"]),
        ("linear,", "[1],", ["stages.1.lr.schedule: expected 'constant'"]),
        ("linear, max: 1e-4", "infinite, max: 1, constant: 2", ["stages.1.lr: schedule infinite needs constant"]),
        ("linear,", "liner,", ["stages.1.lr.schedule: expected 'constant'", "did you mean linear?"]),
        ("{en: 1}", "{fr: 1}", ["stages.anneal.mixture names ['fr'], not in data.sources ['de', 'en']"]),
        ("name: anneal", "name: pretrain", ["stages: names must differ"]),
        ("sequence_length: 64\nbatch", "sequence_length: 65\nbatch", ["65 is longer than model.max_sequence_length"]),
        ("batch: {global_batch_size: 8}", "batch: 8", ["job.yaml:13: batch: expected a section with keys, got 8"]),
        ("{global_batch_size: 8}", "{global_batch_size: 8", ["job.yaml:14: not YAML"]),
    ],
)
def test_job_refusal_names_place_key_and_alternative(job_file: Path, old: str, new: str, words: list[str]) -> None:
    assert old in JOB
    job_file.write_text(JOB.replace(old, new, 1))
    message = refused(job_file)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensr=2", "command line: parallel.tensr: unknown key; did you mean parallel.tensor?"),
        ("paralel.tensor=2", "command line: paralel: unknown key; did you mean parallel?"),
        ("stages.pretran.tokens=2", "stages has no item pretran; did you mean pretrain?"),
        ("stages.7.tokens=2", "stages has no item 7; it has 2: pretrain, anneal; stages.2={...} adds one"),
        ("stages.3={name: c}", "stages has no item 3"),
        ("seed.x=1", "seed"),
        ("name.x=1", "override name.x: name is the text 'small', not a section"),
        ("parallel.tensor", "override parallel.tensor: expected KEY=VALUE"),
        ("batch.micro_batch_size=[", "override batch.micro_batch_size=[: not YAML"),
        ("model=llama", "no such model file; did you mean llama-3"),
        ("parallel.tensor=3", "model.heads = 4 does not divide by parallel.tensor = 3"),
        ("parallel.pipeline=3", "model.layers = 4 does not divide by 3 pipeline stages"),
        (
            "parallel.data=3",
            "batch.global_batch_size = 8 does not divide by parallel.data x batch.micro_batch_size = 3 x 1 = 3",
        ),
        ("cluster.ranks_per_node=3", "do not fill whole nodes of cluster.ranks_per_node = 3"),
    ],
)
def test_job_wrong_override_is_refused(job_file: Path, override: str, words: str) -> None:
    assert words in refused(job_file, override)


def test_job_several_problems_are_listed_at_once(job_file: Path) -> None:
    message = refused(job_file, "parallel.tensor=3", "parallel.pipeline=3")
    assert "problems" in message
    assert "model.heads = 4" in message
    assert "model.layers = 4" in message
    message = refused(job_file, "seed=x", "batch.global_batch_size=y", "parallel.tensro=2")
    assert message.count("command line") == 3


def test_job_pipeline_schedule_checks_micro_batches(job_file: Path) -> None:
    too_few = refused(job_file, "parallel.pipeline=4", "batch.micro_batch_size=4")
    assert "1f1b over 4 pipeline stages needs at least 4 micro-batches" in too_few
    rounds = ["parallel.pipeline=2", "parallel.schedule=interleaved", "batch.global_batch_size=7"]
    assert "does not divide" in refused(job_file, *rounds)
    assert load_job(job_file, ["parallel.pipeline=2", "parallel.schedule=interleaved"]).parallel.stages == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch={global_size: 8}", "batch.global_size: unknown key: it was renamed; write batch.global_batch_size"),
        ("batch.micro_size=2", "batch.micro_size: unknown key: it was renamed; write batch.micro_batch_size"),
        ("snapshot.silence=1", "snapshot.silence: unknown key: it was renamed; write snapshot.peer_timeout"),
        ("snapshot.busy=skip", "snapshot.busy: unknown key: it was renamed; write snapshot.when_busy"),
        ("cluster.least_data=2", "cluster.least_data: unknown key: it was renamed; write cluster.min_data_parallel"),
        ("health.hang_floor=9", "health.hang_floor: unknown key: it was renamed; write health.min_hang_timeout"),
        (
            "cluster.slurm.notice=9",
            "cluster.slurm.notice: unknown key: it was renamed; write cluster.slurm.save_before_limit",
        ),
        (
            "stages.1.replay={fraction: 0.1, law: uniform}",
            "stages.1.replay.law: unknown key: it was renamed; write stages.1.replay.distribution",
        ),
        (
            "stages.1.replay=[{fraction: 0.1, stand_in: de}]",
            "stages.1.replay.0.stand_in: unknown key: it was renamed; write stages.1.replay.0.proxy_source",
        ),
        ("model.norm_position=after", "model.norm_position: after was renamed: write post"),
        ("parallel.data_mode=replicate", "parallel.data_mode: replicate was renamed: write ddp"),
        ("optimizer.micro_size=2", "optimizer.micro_size: unknown key; did you mean batch.micro_batch_size?"),
    ],
)
def test_job_renamed_key_is_refused_with_the_new_one(job_file: Path, override: str, said: str) -> None:
    message = refused(job_file, override)
    assert message == f"command line: {said}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"# nothing\n", "the file is empty"),
        (b"- 1\n", "expected a mapping"),
        (b"\xff", "UTF-8"),
    ],
)
def test_job_file_without_a_job_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    assert words in refused(path)
    assert str(path) in refused(path)


def test_job_missing_file_names_a_shipped_one(tmp_path: Path) -> None:
    assert "did you mean tiny?" in refused(tmp_path / "tinny")
    assert "got a folder" in refused(tmp_path)


def test_job_file_yaml_cannot_build_objects(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    assert "not YAML" in refused(path)


def test_run_json_moved_folder_is_its_own_output(job_file: Path, tmp_path: Path) -> None:
    job = load_job(job_file)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    save_job(job, first / "run.json")
    first.rename(second)
    again = load_run(second / "run.json", ["seed=5"])
    assert again == job.model_copy(update={"output": str(second), "seed": 5})


def test_save_job_failure_leaves_nothing(job_file: Path, tmp_path: Path) -> None:
    job = load_job(job_file)
    with pytest.raises(OutputError, match="nowhere"):
        save_job(job, tmp_path / "nowhere" / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OutputError):
        save_job(job, tmp_path / "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", "run.json"]


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    tensor, pipeline, data = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    heads = 4 * draw(st.integers(1, 3))
    names = draw(st.lists(st.text("abc-_é", min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    rate = st.floats(1e-8, 1.0, exclude_max=True)
    high = draw(rate)
    return JobSpec(
        name=draw(st.text(min_size=1, max_size=8)),
        output="/runs/x",
        seed=draw(st.integers(0, 2**63 - 1)),
        model=ModelSpec(
            layers=8,
            hidden_size=16 * heads,
            heads=heads,
            ffn_size=64,
            vocabulary_size=256,
            max_sequence_length=128,
            tied_embeddings=draw(st.booleans()),
            norm_eps=draw(rate),
        ),
        data=DataSpec(sources={name: f"/data/{i}" for i, name in enumerate(names)}, sequence_length=64),
        batch=BatchSpec(global_batch_size=data * 4 * draw(st.integers(1, 3))),
        stages=tuple(
            StageSpec(
                name=f"stage {i}",
                tokens=draw(st.integers(1, 10**15)),
                mixture={name: draw(st.floats(0.01, 1.0)) for name in names},
                lr=draw(st.sampled_from([LinearSpec, CosineSpec]))(max=high, min=draw(st.floats(0, high))),
            )
            for i in range(draw(st.integers(1, 3)))
        ),
        optimizer=OptimizerSpec(betas=(draw(rate), draw(rate)), clip_norm=draw(st.none() | rate)),
        parallel=ParallelSpec(tensor=tensor, pipeline=pipeline, data=data),
        numerics=NumericsSpec(precision=draw(st.sampled_from(["fp32", "bf16", "fp64"]))),
        evaluation=EvaluationSpec(every=draw(st.none() | st.integers(1, 100))),
    )


@given(job=jobs())
@settings(max_examples=50, deadline=None)
def test_save_job_is_read_back_unchanged(job: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "run.json"
    save_job(job, path)
    assert load_job(path) == job
    json.loads(path.read_text())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{every: 0}", "snapshot.every: expected greater than 0, got 0"),
        ("{every: often}", "snapshot.every: expected 'auto'"),
        ("{evry: 1}", "snapshot.evry: unknown key; did you mean snapshot.every?"),
        ("{code: {data: 30, parity: 4}}", "at most 32 nodes"),
        ("{code: {data: 3, parity: 2}}", "groups of k + m = 3 + 2 = 5 nodes, there are 2"),
        ("{domains: [rack]}", "snapshot.domains names 1 node, the layout has 2"),
        ("often", "snapshot"),
    ],
)
def test_job_wrong_snapshot_section_is_named(value: str, said: str) -> None:
    overrides = ["parallel.data=2", "cluster.ranks_per_node=1", f"snapshot={value}"]
    with pytest.raises(SpecError) as caught:
        load_job(Path("configs/ci/tiny.yaml").absolute(), overrides)
    assert said in str(caught.value)


def test_job_paths_expand_home_and_variables(job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SCRATCH", "/scratch/7")
    text = JOB.replace("output: out", "output: ~/runs/y\ninit_from: s3://$BUCKET/run")
    monkeypatch.setenv("BUCKET", "b")
    text = text.replace("text/en.jsonl", "'${SCRATCH}/en.jsonl'").replace("/corpora/de", "a$$b/de")
    job_file.write_text(text)
    container = "cluster.slurm.container={image: $SCRATCH/i.sqsh, mounts: ['~/data:/data', '$SCRATCH:$SCRATCH']}"
    job = load_job(job_file, [container, "data.validation={en: $SCRATCH/v.jsonl}", "data.tokenizer=~/t.json"])
    assert job.output == "/home/ann/runs/y"
    assert job.init_from == "s3://b/run"
    assert job.data.sources == {"en": "/scratch/7/en.jsonl", "de": str(tmp_path / "a$b" / "de")}
    assert job.data.validation == {"en": "/scratch/7/v.jsonl"}
    assert job.data.tokenizer == "/home/ann/t.json"
    assert job.cluster.slurm.container is not None
    assert job.cluster.slurm.container.mounts == ("/home/ann/data:/data", "/scratch/7:/scratch/7")
    assert job.cluster.slurm.container.image == "/scratch/7/i.sqsh"


def test_run_json_is_not_expanded_again(job_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "$NOT_SET"
    folder.mkdir()
    job = load_job(job_file, ["output=./$$NOT_SET"]).model_copy(update={"output": str(folder)})
    save_job(job, folder / "run.json")
    assert load_run(folder / "run.json") == job


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("$NOT_SET/x", "the environment variable NOT_SET is not set"),
        ("${NOT_SET}", "the environment variable NOT_SET is not set"),
        ("a$", "a dollar sign must begin"),
        ("${A:-b}", "a dollar sign must begin"),
        ("~no-such-user/x", "there is no home directory for ~no-such-user"),
    ],
)
@pytest.mark.parametrize("key", ["output", "data.sources.en", "data.tokenizer", "init_from", "model"])
def test_job_path_that_cannot_be_expanded_is_refused(job_file: Path, key: str, text: str, why: str) -> None:
    assert refused(job_file, f"{key}={json.dumps(text)}").startswith(f"override {key}: {text!r}: {why}")
    job_file.write_text(JOB.replace("output: out", f"output: {json.dumps(text)}"))
    assert refused(job_file).startswith(f"{job_file}:2: output: {text!r}: {why}")


OLDER = {
    ("batch", "micro_batch_size"): "micro_size",
    ("batch", "global_batch_size"): "global_size",
    ("snapshot", "peer_timeout"): "silence",
    ("snapshot", "when_busy"): "busy",
    ("cluster", "min_data_parallel"): "least_data",
    ("cluster", "slurm", "save_before_limit"): "notice",
    ("health", "min_hang_timeout"): "hang_floor",
    ("stages", 1, "replay", "distribution"): "law",
}


def test_run_json_of_an_older_version_is_loaded_with_its_renamed_keys(job_file: Path, tmp_path: Path) -> None:
    names = "{law: text/en, notice: text/de}"  # old keys are ordinary names elsewhere
    replay = "stages.1.replay={from: [pretrain], fraction: 0.25}"
    mixture = ["stages.0.mixture={law: 2, notice: 1}", "stages.1.mixture={law: 1}"]
    asked = [f"data.sources={names}", *mixture, replay, "snapshot={}", f"output={tmp_path / 'run'}"]
    job = load_job(job_file, asked)
    values = job.model_dump(mode="json")
    for (*parents, new), old in OLDER.items():
        section: Any = values
        for key in parents:
            section = section[key]
        section[old] = section.pop(new)
    values["parallel"] |= {"data_mode": "fsdp"}
    values["model"] |= {"norm_position": {"pre": "before", "post": "after"}[values["model"]["norm_position"]]}
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(values))
    assert load_run(run / "run.json") == job
    (tmp_path / "old.yaml").write_text(json.dumps(values))
    assert "it was renamed; write batch.micro_batch_size" in refused(tmp_path / "old.yaml")


def test_job_override_of_the_first_free_position_adds_a_stage(job_file: Path) -> None:
    added = "stages.2={name: more, tokens: 512, mixture: {en: 1}, lr: {max: 1e-4}}"
    assert [stage.name for stage in load_job(job_file, [added]).stages] == ["pretrain", "anneal", "more"]


OLD_RUNS = json.loads((Path(__file__).parent / "golden" / "runs_of_0_1.json").read_text())
"""Resolved specs that keepwarm 0.1 wrote of its shipped jobs, and rates of its curves at begin, middle and end."""


@pytest.mark.parametrize("name", OLD_RUNS)
def test_run_json_that_an_older_version_wrote_is_loaded_with_its_curves(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(OLD_RUNS[name]["spec"]))
    stages = plan_stages(load_run(tmp_path / "run.json"))
    found = [[one.name, one.steps, *map(one.curve.at, (0, one.steps // 2, one.steps))] for one in stages]
    assert found == OLD_RUNS[name]["stages"]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("seed=18446744073709551616", "seed=18446744073709551616: expected a number of at most 64 bits, got 65 bits"),
        ("seed=9223372036854775808", "seed: expected a number of at most 9223372036854775807 (64 bits)"),
        ("stages.1.replay={fraction: 0.5, seed: 9223372036854775808}", "seed: expected a number of at most"),
        (f"seed=0x{'f' * 5000}", "expected a number of at most 64 bits, got 20000 bits"),
        (f"seed={'9' * 5000}", "not YAML"),
        ("stages.0.tokens=9223372036854775807", "stages.0.tokens: expected less than or equal to"),
        ("model.layers=1000000", "model.layers: expected less than or equal to 10000"),
        ("model.vocabulary_size=4294967296", "model.vocabulary_size: expected less than or equal to 2147483647"),
        ("numerics.threads_per_rank=100000", "numerics.threads_per_rank: expected less than or equal to 1024"),
        ("snapshot={port: 65536}", "snapshot.port: expected less than or equal to 65535"),
        ("snapshot={lease: 1e300}", "snapshot.lease: expected less than or equal to 1000000000"),
        ("optimizer.betas=[1.5, 0.9]", "optimizer.betas.0: expected less than 1"),
        ("optimizer.eps=.inf", "expected a finite number, got inf"),
        ("stages.0.lr.max=.nan", "expected a finite number, got nan"),
        ("stages.0.lr.max=1e999", "expected a finite number, got inf"),
        ("parallel={data: 1048576, tensor: 4}", "ranks"),
        ("batch.ramp={start: 1, increment: 1, samples: 100000000}", "a ramp takes at most 1,000,000 steps"),
        ("stages.0.mixture={en: 1, de: 1e-12}", "stages.pretrain: mixture.de is 1.00e-12 of the total, below"),
        ("stages.0.mixture={en: 1e308, de: 1e308}", "expected less than or equal to"),
        ("stages.0.mixture_steps=[{at: 0.5, mixture: {en: 1, de: 1e-9}}]", "mixture_steps.0: mixture.de is"),
        ("stages.0.mixture_ramp={to: {en: 1}, stairs: 10000, end: 0.5}", ""),
        ("stages.1.replay={fraction: 1e-6}", "stages.anneal.replay: fraction is below the smallest share, 1/65,536"),
    ],
)
def test_job_number_that_a_library_or_the_ledger_would_refuse_is_refused(
    job_file: Path, override: str, why: str
) -> None:
    if why:
        assert why in refused(job_file, override)
    else:
        load_job(job_file, [override])


def test_run_json_with_a_number_that_is_not_finite_is_refused(job_file: Path, tmp_path: Path) -> None:
    values = load_job(job_file).model_dump(mode="json")
    values["optimizer"]["eps"] = float("inf")
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert "optimizer.eps: expected a finite number, got inf" in refused(tmp_path / "run.json")
