"""Stages with replay, moving mixtures and gates: what is read, and what is refused before anything starts."""

from pathlib import Path

import pytest

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job, save_job

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
  sources: {en: text/en.jsonl, de: text/de.jsonl, code: text/code.jsonl}
  validation: {en: text/en.valid.jsonl}
  sequence_length: 64
batch: {global_batch_size: 8}
stages:
  - name: english
    tokens: 1_024
    mixture: {en: 1}
    lr: {max: 3e-4}
  - name: german
    tokens: 1_024
    mixture: {de: 1}
    replay: {from: [english], fraction: 0.25}
    lr: {max: 3e-4}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_stage_replay_one_or_several_clauses_survive_run_json(job_file: Path, tmp_path: Path) -> None:
    job = load_job(job_file)
    (clause,) = job.stages[1].replays
    assert (clause.origins, clause.fraction, clause.distribution) == (("english",), 0.25, "uniform")
    (changed,) = load_job(job_file, ["stages.german.replay.fraction=0.5"]).stages[1].replays
    assert changed.fraction == 0.5
    two = "stages.german.replay=[{from: [english], fraction: 0.1}, {fraction: 0.1, distribution: power, exponent: 0.5}]"
    both = load_job(job_file, [two])
    assert [clause.exponent for clause in both.stages[1].replays] == [None, 0.5]
    save_job(both, tmp_path / "run.json")
    assert load_job(tmp_path / "run.json") == both
    assert '"from"' in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.german.replay.fraction=1.0", "stages.1.replay.fraction: expected less than 1, got 1.0"),
        ("stages.german.replay.fraction=0", "expected greater than 0"),
        ("stages.german.replay=[{fraction: 0.6}, {fraction: 0.4}]", "stages.german.replay: the fractions add up to 1"),
        ("stages.german.replay.from=[german]", "a stage cannot replay itself"),
        ("stages.german.replay.from=[englisch]", "'englisch' is neither an earlier stage nor in data.sources"),
        ("stages.german.replay.from=[code]", "nothing of source 'code' was seen before"),
        ("stages.english.replay={fraction: 0.1}", "nothing was seen before the first stage"),
        ("stages.english.replay={fraction: 0.1, from: [german]}", "nothing was seen before the first stage"),
        ("stages.german.replay.distribution=power", "distribution power needs an exponent"),
        ("stages.german.replay.exponent=1", "exponent belongs to distribution power"),
        ("stages.german.replay={fraction: 0.1, proxy_source: en}", "there is no init_from"),
        ("stages.german.replay={fraction: 0.1, form: [english]}", "did you mean stages.1.replay.from?"),
        ("stages.german.mixture_steps=[{at: 0.5, mixture: {fr: 1}}]", "['fr'], not in data.sources"),
        ("stages.german.mixture_steps=[{at: 0.5, mixture: {en: 1}}, {at: 0.5, mixture: {de: 1}}]", "must grow"),
        ("stages.german.mixture_ramp={to: {en: 1}, start: 0.5, end: 0.5}", "start 0.5 is not before end 0.5"),
        ("stages.german.evaluate=[de]", "evaluate names 'de', a domain without data in data.validation ['en']"),
        ("stages.german.gate={domain: de, max_forgetting: 0.1}", "gate.domain = 'de', a domain without data"),
    ],
)
def test_stage_invalid_option_is_refused(job_file: Path, override: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_job(job_file, [override])
    assert said in str(caught.value)


def test_stage_named_like_a_source_is_refused_only_if_ambiguous(job_file: Path) -> None:
    renamed = ["stages.english.name=en", "stages.german.replay={fraction: 0.25}"]
    assert load_job(job_file, renamed).stages[0].name == "en"
    with pytest.raises(SpecError, match="'en' is both a stage and a source"):
        load_job(job_file, [*renamed, "stages.german.replay.from=[en]"])


def test_stage_replay_of_parent_stages_is_left_to_the_ledger(job_file: Path) -> None:
    overrides = ["init_from=runs/parent", "stages.english.replay={from: [pretrain], fraction: 0.1}"]
    assert load_job(job_file, overrides).stages[0].replays[0].origins == ("pretrain",)
    with pytest.raises(SpecError, match="cannot replay itself"):
        load_job(job_file, [*overrides, "stages.english.replay.from=[english]"])
