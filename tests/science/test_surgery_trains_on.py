"""A22, A25 and A26: what models made by `keepwarm surgery` are worth once they train on; text of the embedded corpus.

What surgery promises without training (the function kept, the way back) is in tests/trainer/surgery.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.surgery.__main__ import app
from keepwarm.trainer.surgery.weights import Array, Derivation, Model, write
from tests.support.runs.text_run import CORPORA, LENGTH, NARROW, handbook, train

pytestmark = [
    pytest.mark.science,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("seed", [1, 2, 3]),
]
ENGLISH, GERMAN = handbook("en"), handbook("de")


def surgery(*arguments: Any) -> None:
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert ran.exit_code == 0, (ran.output, ran.exception)


WIDE = {"hidden_size": 128, "heads": 8, "kv_heads": 4, "ffn_size": 344}
WIDEN = ("--hidden", 128, "--heads", 8, "--ffn", 344)
GROWN: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "stack": ({"layers": 4}, ("deepen", "--layers", 4, "--how", "stack")),
    "identity": ({"layers": 4}, ("deepen", "--layers", 4, "--how", "identity")),
    "fpi": (WIDE, ("widen", *WIDEN, "--how", "fpi")),
    "aki": (WIDE, ("widen", *WIDEN, "--how", "aki")),
}


def test_a22_grown_model_needs_fewer_steps_than_from_scratch(seed: int, tmp_path: Path) -> None:
    """Chen et al. (2021), Gong et al. (2019): twice the layers or the width, of a model trained for as long."""
    steps = 400
    train(tmp_path / "small", steps, NARROW, seed=seed, **ENGLISH)

    @lru_cache
    def scratch(size: str) -> float:
        return train(tmp_path / f"scratch-{size}", steps, NARROW | json.loads(size), seed=seed, **ENGLISH)[1]

    found = {}
    for how, (size, command) in GROWN.items():
        surgery(command[0], tmp_path / "small", *command[1:], "--to", tmp_path / how)
        run = tmp_path / f"{how}-on"
        _, last = train(run, steps * 3 // 4, NARROW | size, seed=seed, origin=tmp_path / how, **ENGLISH)
        found[how] = last, scratch(json.dumps(size))
    print(f"A22 seed {seed}, after {steps * 3 // 4} steps and of scratch after {steps}: {found}")
    assert all(grown <= whole for grown, whole in found.values())


def test_a25_larger_rope_base_adapts_to_longer_text_sooner(seed: int, tmp_path: Path) -> None:
    """Xiong et al. (2023), ABF: 10,000 to 160,000, 150 steps at four times the length."""
    model = NARROW | {"max_sequence_length": 4 * LENGTH}
    _, before = train(tmp_path / "short", 1200, model, seed=seed, **ENGLISH)
    found = {}
    for theta in (10_000, 160_000):
        surgery("rope", tmp_path / "short", "--theta", theta, "--to", tmp_path / f"{theta}")
        based = model | {"rope_theta": theta}
        run = tmp_path / f"{theta}-long"
        _, long = train(
            run, 150, based, seed=seed, origin=tmp_path / f"{theta}", peak=5e-4, length=4 * LENGTH, **ENGLISH
        )
        again, _ = train(tmp_path / f"{theta}-again", 1, based, seed=seed, origin=run, **ENGLISH)
        found[theta] = long, again
    print(f"A25 seed {seed}: short {before}, long and short after it by base {found}")
    assert math.exp(found[160_000][0] - found[10_000][0]) <= 0.95
    assert found[160_000][1] <= 1.01 * before


def test_a26_mean_rows_for_new_tokens_beat_random_rows(seed: int, tmp_path: Path) -> None:
    """Liu et al. (2023), OFA: a model of English continued on German with a German vocabulary."""
    for text in ("en", "de"):
        train_tokenizer([CORPORA / f"handbook_{text}.jsonl.zst"], tmp_path / f"{text}.json", 1024)
    model = NARROW | {"vocabulary_size": 1024}
    train(tmp_path / "english", 600, model, seed=seed, tokenizer=tmp_path / "en.json", **ENGLISH)
    vocabularies = ("--old", tmp_path / "en.json", "--new", tmp_path / "de.json")
    for start in ("mean", "neighbours"):
        surgery("vocabulary", tmp_path / "english", *vocabularies, "--start", start, "--to", tmp_path / start)
    draw_new_rows(tmp_path / "mean", tmp_path / "drawn", tmp_path, seed, like_old=False)
    draw_new_rows(tmp_path / "mean", tmp_path / "drawn alike", tmp_path, seed, like_old=True)
    found = {}
    for start in ("drawn", "drawn alike", "mean", "neighbours"):
        run, tokenizer = tmp_path / f"{start}-on", tmp_path / "de.json"
        _, found[start] = train(
            run, 100, model, seed=seed, origin=tmp_path / start, peak=1e-3, tokenizer=tokenizer, **GERMAN
        )
    print(f"A26 seed {seed}: loss after 100 steps {found}")
    assert max(found["mean"], found["neighbours"]) < min(found["drawn"], found["drawn alike"])


def draw_new_rows(source: Path, to: Path, tokenizers: Path, seed: int, *, like_old: bool) -> None:
    """The model with rows of new tokens drawn as a fresh model draws them, or with mean and deviation of old rows."""
    old, new = (json.loads((tokenizers / f"{text}.json").read_text())["model"]["vocab"] for text in ("en", "de"))
    fresh = [at for token, at in new.items() if token not in old]
    kept = [at for token, at in new.items() if token in old]
    assert len(fresh) > 200
    generator = np.random.default_rng(seed)
    with NativeCheckpoint(source) as native:
        model = Model(native)

        def make(name: str) -> Array:
            values = model.read(name)
            if name in ("embedding.weight", "head.weight"):
                rows = values[kept] if like_old else None
                mean, std = (0.0, 0.02) if rows is None else (rows.mean(axis=0), rows.std(axis=0))
                values[fresh] = generator.normal(mean, std, (len(fresh), values.shape[1]))
            return values

        write(to, model.spec, make, Derivation(parents=[model], made_by="drawn", settings={}), dtype=model.dtype)
