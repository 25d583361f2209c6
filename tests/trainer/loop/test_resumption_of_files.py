"""Real runs on disk, continued with another layout, batch or content of their data; and what their readers report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.run.progress import progress
from keepwarm.trainer.checkpoint.report import show
from keepwarm.trainer.continual.branch import branched
from keepwarm.trainer.continual.report_data import gather
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.job.files import shipped_configs
from keepwarm.trainer.loop.session import run_session
from tests.support.corpus import write_json_lines
from tests.support.runs import warm
from tests.trainer.loop.test_continual import files_of

TINY = shipped_configs() / "ci" / "tiny.yaml"
STEP = 8 * 64
"""Tokens of one step."""
LR = "{schedule: constant, max: 3e-3, warmup: 0.0}"


def stages(first: int, second: int) -> str:
    return (
        f"stages=[{{name: one, tokens: {first * STEP}, mixture: {{en: 1}}, lr: {LR}}}, "
        f"{{name: two, tokens: {second * STEP}, mixture: {{de: 1}}, lr: {LR}}}]"
    )


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def changes_of(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line["change"] for line in lines if line["event"] == "data_changed"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after 4 steps of stage one and after 2 of stage two; only the latter is left."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert run_session(
        TINY,
        [stages(4, 4), f"output={folder}", "checkpoint={every: 1, keep: 20}", "log.tensorboard=false"],
        resume=False,
    )
    for step in (7, 8):
        shutil.rmtree(folder / "checkpoints" / f"iter_{step:07d}")
    (folder / "checkpoints" / "latest").write_text("iter_0000006")
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("layout", [("parallel.data=2", "batch.micro_batch_size=2"), ("parallel.engine=deepspeed",)])
def test_resumption_other_layout_and_batch_trains_what_is_left(
    layout: tuple[str, ...], interrupted: Path, tmp_path: Path
) -> None:
    if "parallel.engine=deepspeed" in layout:
        pytest.importorskip("deepspeed")
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    command = ["train", str(folder), "--resume", f"output={folder}", "batch.global_batch_size=4", *layout]
    process = warm.Process(command, tmp_path / "log")
    try:
        assert process.wait(timeout=280) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait(timeout=280)
    found = steps_of(folder)
    assert [line["stage"] for line in found] == 4 * ["one"] + (2 + 4) * ["two"]
    assert [line["tokens"] for line in found[6:]] == 4 * [4 * 64]
    assert progress(folder).step == progress(folder).last_step == 10
    report = gather(folder)
    assert [(plan.start_step, plan.end_step) for plan in report.plans] == [(0, 4), (4, 10)]
    assert [drawn.samples for drawn in report.drawn()] == [32, 32]


def test_resumption_branch_uses_the_stages_of_its_checkpoint(interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    spec = json.loads((folder / "run.json").read_text())
    spec["output"] = str(folder)
    spec["batch"]["global_batch_size"] = 2
    (folder / "run.json").write_text(json.dumps(spec))
    assert branched(folder, 3, 4096).stages[0].mixture == {"en": 1.0}
    assert branched(folder, 6, 4096).stages[0].mixture == {"de": 1.0}


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """A job on text files of the test's own."""
    for name in ("en", "de"):
        write_json_lines(tmp_path / f"{name}.jsonl", [f"{name} {i} " + "words " * 30 for i in range(200)])
    paths = [
        f"data.{part}.{name}={tmp_path / name}.jsonl" for part in ("sources", "validation") for name in ("en", "de")
    ]
    return [stages(4, 4), f"output={tmp_path / 'run'}", "checkpoint.every=2", "log.tensorboard=false", *paths]


def test_resumption_changed_source_and_domain_are_reported(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_session(TINY, small, resume=False)
    with (tmp_path / "de.jsonl").open("a") as file:
        file.write('{"text": "one more line"}\n')
    assert run_session(folder / "run.json", [f"stages.1.tokens={8 * STEP}"], resume=True)
    source, domain = changes_of(folder)
    assert source.startswith("data.sources.de: content ")
    assert "32 samples of the old content were seen" in source
    assert domain.startswith("data.validation.de: content/length ")
    given = show(folder)["ledger"]["given"]
    assert sorted(given.values()) == [32, 32, 32]
    assert sum(name.startswith("de (content ") for name in given) == 2
    assert run_session(folder / "run.json", [f"stages.1.tokens={9 * STEP}"], resume=True)
    assert len(changes_of(folder)) == 2


def test_resumption_other_tokenizer_is_refused_and_changes_no_file(small: list[str], tmp_path: Path) -> None:
    from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer

    folder = tmp_path / "run"
    train_tokenizer([tmp_path / "en.jsonl"], tmp_path / "tokenizer.json", 258)
    assert run_session(TINY, small, resume=False)
    before = {name: seen for name, seen in files_of(folder).items() if "/data/" not in name}
    with pytest.raises(SpecError, match="another tokenizer"):
        run_session(
            folder / "run.json",
            [f"data.tokenizer={tmp_path / 'tokenizer.json'}", f"stages.1.tokens={8 * STEP}"],
            resume=True,
        )
    assert {name: seen for name, seen in files_of(folder).items() if "/data/" not in name} == before


@pytest.mark.parametrize(
    "change",
    ["model.layers=3", "model.tied_embeddings=true", "model.heads=2", "model.norm_eps=1e-2", "model.activation=gelu"],
)
def test_resumption_other_model_is_refused_and_changes_no_file(change: str, interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    before = files_of(folder)
    with pytest.raises((SpecError, CheckpointError), match="model"):
        run_session(folder / "run.json", [change], resume=True)
    assert files_of(folder) == before


def test_resumption_longer_context_is_a_legal_change(interrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    assert run_session(folder / "run.json", ["model.rope_theta=50000"], resume=True)


def test_resumption_keeps_the_evaluation_at_the_end_of_an_extended_stage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = [stages(2, 2), f"output={folder}", "log.tensorboard=false", "evaluation.samples=4"]
    assert run_session(TINY, short, resume=False)
    assert run_session(folder / "run.json", [f"stages.1.tokens={4 * STEP}"], resume=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4, 6]
