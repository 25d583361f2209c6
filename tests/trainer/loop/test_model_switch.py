"""A run goes on with layers of the other origin, keepwarm's or transformers', where both compute the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from tests.support.runs.run_contents import steps_of
from tests.support.transformers.models import config_of
from tests.trainer.loop import test_run

CORPORA = Path(__file__).parents[3] / "configs" / "corpora"
HALF, WHOLE = 5_120, 10_240
pytestmark = pytest.mark.timeout(600)


def run(folder: Path, model: dict[str, Any], tokens: int, *flags: str) -> tuple[int, str]:
    job = {
        "name": "switch",
        "output": str(folder),
        "model": model,
        "data": {
            "sources": {"en": str(CORPORA / "handbook_en.jsonl.zst")},
            "tokenizer": "bytes",
            "sequence_length": 64,
        },
        "batch": {"global_batch_size": 8},
        "stages": [
            {
                "name": "pretrain",
                "tokens": tokens,
                "mixture": {"en": 1},
                "lr": {"schedule": "constant", "max": 1e-3, "warmup": 0.0},
            }
        ],
        "checkpoint": {"every": 10},
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(json.dumps(job))
    return test_run.run(["keepwarm", "train", str(file), *flags], folder.parent / f"{folder.name}.log")


def test_run_goes_on_with_keepwarms_layers_or_those_of_transformers(tmp_path: Path) -> None:
    config = config_of("llama", vocab_size=259)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = {"transformers": str(tmp_path / "config.json")}
    ours = model_spec_from_hf_config(config).model_dump(mode="json")
    code, log = run(tmp_path / "theirs", theirs, HALF)
    assert code == 0, log
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    code, log = run(tmp_path / "theirs", theirs, HALF, "--resume", f"stages.0.tokens={WHOLE}")
    assert code == 0, log
    more = ["--resume", f"stages.0.tokens={WHOLE}"]
    code, log = run(tmp_path / "ours", theirs, HALF, *more, f"model={json.dumps({**ours, 'norm_eps': 0.001})}")
    assert code != 0
    assert "model.norm_eps: 1e-06 -> 0.001" in log
    code, log = run(tmp_path / "ours", theirs, HALF, *more, f"model={json.dumps(ours)}")
    assert code == 0, log
    losses = [[line["loss"] for line in steps_of(tmp_path / name) if "loss" in line] for name in ("theirs", "ours")]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
