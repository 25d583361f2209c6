"""Runs of several stages, and runs that start from another: what is carried over and what stops them."""

import json
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import Manifest
from keepwarm.ft.format.reader import read_part
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError, TrainingStopped
from keepwarm.trainer.job.files import shipped_configs
from keepwarm.trainer.loop.session import run_session

STEP = 8 * 64
"""Tokens of one step."""
ENGLISH = (
    f"{{name: english, tokens: {4 * STEP}, mixture: {{en: 1}}, lr: {{schedule: constant, max: 3e-3, warmup: 0.0}}}}"
)
GERMAN = ENGLISH.replace("english", "german").replace("en: 1", "de: 1")
REPLAY = GERMAN.replace("lr:", "replay: {from: [english], fraction: 0.25}, lr:")


def job(tmp_path: Path, name: str, *stages: str) -> list[str]:
    return [f"output={tmp_path / name}", f"name={name}", f"stages=[{', '.join(stages)}]", "evaluation.samples=4"]


def train(overrides: list[str], *, resume: bool = False) -> None:
    assert run_session(shipped_configs() / "ci" / "tiny.yaml", [*overrides, "log.tensorboard=false"], resume=resume)


def manifest_of(folder: Path) -> Manifest:
    newest = publication.latest(folder / "checkpoints")
    assert newest is not None
    return publication.verify(newest)


def updates_of(folder: Path) -> int:
    """The optimizer's own count of its updates."""
    newest, manifest = publication.latest(folder / "checkpoints"), manifest_of(folder)
    assert newest is not None
    for part in manifest.parts:
        for entry, blocks in read_part(newest, part):
            content = b"".join(blocks)
            if entry.piece.name == "optimizer.step":
                return int.from_bytes(content, "little")
    raise AssertionError("no counter")


def evaluations_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval"]) for line in lines if "eval" in line]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_init_from_run_takes_weights_and_replays_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(job(tmp_path, "one", ENGLISH, REPLAY))
    parent, child = tmp_path / "one", tmp_path / "two"
    before = files_of(parent)
    train([*job(tmp_path, "two", REPLAY.replace("german", "more")), f"init_from={parent}"])

    assert [step for step, _ in evaluations_of(parent)] == [0, 4, 8]
    assert evaluations_of(child)[0][1] == evaluations_of(parent)[-1][1]
    assert updates_of(parent) == 8
    assert updates_of(child) == 12
    ledger = manifest_of(child).meta["ledger"]
    assert [(stage["run"], stage["name"], stage["samples"]) for stage in ledger["past"]] == [
        ("one", "english", 32),
        ("one", "german", 32),
    ]
    assert ledger["replayed"] == {"more": 8}
    record = manifest_of(child).meta["run"]["parent"]
    assert (record["run"], record["step"], record["ledger"]) == ("one", 8, True)
    assert "initialised with the weights and optimizer state of one at iteration 8" in capsys.readouterr().out

    fresh = ["stages.0.optimizer_state=reset", "stages.0.replay={fraction: 0.25}"]
    train([*job(tmp_path, "three", REPLAY.replace("german", "more")), f"init_from={parent}", *fresh])
    assert evaluations_of(tmp_path / "three")[0][1] == evaluations_of(parent)[-1][1]
    assert updates_of(tmp_path / "three") == 4
    assert files_of(parent) == before


def test_init_from_url_starts_a_run(tmp_path: Path, parent: Path) -> None:
    train([*job(tmp_path, "child", GERMAN.replace(f"{4 * STEP}", f"{STEP}")), f"init_from={parent.as_uri()}"])
    assert evaluations_of(tmp_path / "child")[0][1] == evaluations_of(parent)[-1][1]
    record = manifest_of(tmp_path / "child").meta["run"]["parent"]
    assert record["path"] == str(parent / "checkpoints" / "iter_0000001")
    assert (record["run"], record["ledger"]) == ("one", True)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("init_from=nosuch://bucket/run", CheckpointError, "init_from: nosuch://bucket/run: "),
        ("init_from=memory://nowhere", CheckpointError, "init_from: memory://nowhere: neither a checkpoint"),
        ("model.hidden_size=48", CheckpointError, "another architecture: model.embedding"),
        ("model.layers=3", CheckpointError, "another architecture: model.layers.3"),
        ("model.layers=5", CheckpointError, r"model\.layers\.4.* is nothing of that name there"),
        ("init_from=nowhere", CheckpointError, "neither a checkpoint nor a run folder"),
        ("output=PARENT", SpecError, "cannot be its own parent"),
        ("stages.0.replay={from: [french], fraction: 0.1}", SpecError, "'french' is neither an earlier stage"),
    ],
)
def test_init_from_unsuitable_parent_is_refused(
    tmp_path_factory: pytest.TempPathFactory, parent: Path, change: str, error: type[Exception], said: str
) -> None:
    change = change.replace("PARENT", str(parent))
    before = files_of(parent)
    overrides = [*job(tmp_path_factory.mktemp("child"), "child", GERMAN), f"init_from={parent}", change]
    with pytest.raises(error, match=said):
        train(overrides)
    assert files_of(parent).keys() >= before.keys()


def test_init_from_unsuitable_data_is_refused(tmp_path: Path, parent: Path) -> None:
    before = files_of(parent)
    corpora = shipped_configs() / "corpora"
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([corpora / "handbook_de.valid.jsonl.zst"], tokenizer, 264)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    sources = f"en: {corpora / 'handbook_en.jsonl.zst'}, de: "
    for change, error, said in (
        (f"data.tokenizer={tokenizer}", CheckpointError, "trained with a tokenizer other than"),
        (f"data.sources={{{sources}{empty}}}", DataError, r"data\.sources\.de: .*contains no text"),
        (f"data.sources={{{sources}{short}}}", DataError, r"data\.sources\.de: .*too few for one sample"),
    ):
        with pytest.raises(error, match=said):
            train([*job(tmp_path, "child", GERMAN), f"init_from={parent}", change])
        assert not (tmp_path / "child" / "checkpoints").exists()
    inside = [*job(parent, "inner", GERMAN), f"init_from={parent}"]
    with pytest.raises(SpecError, match=r"output = .* lies in init_from"):
        train(inside)
    assert files_of(parent) == before


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    train(job(folder, "one", ENGLISH.replace(f"{4 * STEP}", f"{STEP}")))
    return folder / "one"


def test_gate_stops_with_state_saved_and_run_continues_with_new_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gated = GERMAN.replace("3e-3", "0.5").replace("lr:", "gate: {domain: en, max_forgetting: 0.2}, lr:")
    overrides = [*job(tmp_path, "run", ENGLISH, gated), "evaluation.every=2"]
    with pytest.raises(TrainingStopped, match=r"stages\.german\.gate: domain en was forgotten by") as caught:
        train(overrides)
    assert caught.value.exit_code == 3
    assert manifest_of(tmp_path / "run").step == 6

    calmer = ["stages.1.lr.max=1e-3", "stages.1.gate.action=warn"]
    train([*overrides, *calmer], resume=True)
    output = capsys.readouterr().out
    assert "stages.german.lr: peak: 0.5 -> 0.001" in output
    assert "stages.english.lr" not in output
    assert "WARNING: stages.german.gate" in output
    assert manifest_of(tmp_path / "run").step == 8
    rates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in rates if "lr" in line] == [3e-3] * 4 + [0.5] * 2 + [1e-3] * 2


def test_evaluation_inside_a_stage_covers_its_named_domains(tmp_path: Path) -> None:
    stage = GERMAN.replace("lr:", "evaluate: [de], optimizer_state: reset, lr:")
    train([*job(tmp_path, "run", ENGLISH, stage), "evaluation.every=2"])
    assert [(step, sorted(losses)) for step, losses in evaluations_of(tmp_path / "run")] == [
        (0, ["de", "en"]),
        (2, ["de", "en"]),
        (4, ["de", "en"]),
        (6, ["de"]),
        (8, ["de", "en"]),
    ]
    assert updates_of(tmp_path / "run") == 4


def test_init_from_huggingface_replays_a_proxy_source(
    tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "huggingface"
    to_huggingface(parent, folder)
    before = files_of(folder)
    proxy_source = GERMAN.replace("lr:", "replay: {proxy_source: en, fraction: 0.25}, lr:")
    train([*job(tmp_path, "child", proxy_source), f"init_from={folder}"])
    child = tmp_path / "child"
    assert evaluations_of(child)[0][1] == evaluations_of(parent)[-1][1]
    assert updates_of(child) == 4
    assert not (child / "parent").exists()
    meta = manifest_of(child).meta
    assert meta["ledger"]["replayed"] == {"german": 8}
    assert [replay["known"] for replay in meta["ledger"]["replays"]] == [False]
    record = meta["run"]["parent"]
    assert (record["path"], record["optimizer_state"], record["ledger"]) == (str(folder), False, False)
    assert "replays a stand-in en: not known to have been seen" in capsys.readouterr().out

    with pytest.raises(DataError, match=r"stages\.german\.replay.*nothing was seen there"):
        train([*job(tmp_path, "blind", REPLAY.replace("from: [english], ", "")), f"init_from={folder}"])
    with pytest.raises(CheckpointError, match=r"another architecture: model\.norm is rms there"):
        train([*job(tmp_path, "other", GERMAN), f"init_from={folder}", "model.norm=layer"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"init_from: .*model\.safetensors"):
        train([*job(tmp_path, "broken", GERMAN), f"init_from={folder}"])
    assert files_of(folder).keys() == before.keys() - {str(folder / "model.safetensors")}


def test_stage_of_longer_samples_packs_its_replay(tmp_path: Path) -> None:
    train(job(tmp_path, "run", ENGLISH, REPLAY.replace("lr:", "sequence_length: 128, lr:")))
    assert [step for step, _ in evaluations_of(tmp_path / "run")] == [0, 4, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if "tokens" in line] == [8 * 64] * 4 + [8 * 128] * 2
    ledger = manifest_of(tmp_path / "run").meta["ledger"]
    assert ledger["replayed"] == {"german": 4}
    assert [replay["cut"] for replay in ledger["replays"]] == [[64, 128]]
    with pytest.raises(SpecError, match=r"stages\.german\.sequence_length = 512 is longer than model\.max_sequence"):
        train(job(tmp_path, "long", ENGLISH, REPLAY.replace("lr:", "sequence_length: 512, lr:")))
