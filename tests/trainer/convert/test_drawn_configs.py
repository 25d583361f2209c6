"""Configs with fields added, lost, of other kinds and huge: one sentence or a model, never a traceback."""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.trainer import tool
from keepwarm.trainer.convert.__main__ import app
from tests.support.foreign.hf_models import CASES, hf_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BASES = (
    "llama", "llama-llama3", "mistral-window", "qwen2-mixed-window", "qwen3", "olmo2", "olmo3-yarn", "smollm3",
    "gpt-neox", "gpt2",
)  # fmt: skip
NAMES = (
    "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "no_rope_layers", "auto_map",
    "max_window_layers", "head_dim", "quantization_config", "is_llama_config", "num_experts", "torch_dtype",
    "no_rope_layer_interval", "partial_rotary_factor", "original_max_position_embeddings", "rotary_pct", "n_inner",
    "model_type", "architectures", "_note", "task_specific_params", "ü\n\x1b[31m", "", "a" * 300,
)  # fmt: skip
ROPE = (
    "rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "beta_fast",
    "high_freq_factor", "short_factor", "long_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor", "full_attention", "sliding_attention", "mrope_section",
)  # fmt: skip
TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "proportional")


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def junk(draw: random.Random) -> Any:
    """A value of any kind."""
    simple: tuple[Any, ...] = (
        None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.5, 0.25,
        1e-320, 1e308, float("inf"), float("-inf"), float("nan"), "", "64", "silu", "gelu", "many", "\x00", [], {},
        [1], [None], [0, 1, 1], ["full_attention"], ["sliding_attention", 3], {"a": 1}, {"rope_type": "yarn"},
        {"rope_type": []},
    )  # fmt: skip
    if draw.random() < 0.1:
        return nested(draw.choice((3, 50, 400)))
    if draw.random() < 0.3:
        rope = {draw.choice(ROPE): draw.choice(simple) for _ in range(draw.randrange(1, 6))}
        return rope | {"rope_type": draw.choice(TYPES)} if draw.random() < 0.8 else rope
    return draw.choice(simple)


def changed(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The config after one to four changes."""
    made = copy.deepcopy(config)
    for _ in range(draw.randrange(1, 5)):
        kind = draw.random()
        if kind < 0.2:
            made.pop(draw.choice(sorted(made)), None)
        elif kind < 0.6:
            made[draw.choice(sorted(made))] = junk(draw)
        else:
            made[draw.choice(NAMES)] = junk(draw)
        made = made or {"model_type": "llama"}
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bases")
    for name in BASES:
        hf_model(*CASES[name]).save_pretrained(root / name)
    return [root / name for name in BASES]


def converted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["keepwarm convert", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.run(app)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_drawn_config_is_a_model_or_one_sentence(
    folders: list[Path], tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {0: 0, 2: 0}
    for index in range(count):
        draw = random.Random(f"{count} {index}")
        base = draw.choice(folders)
        config = changed(json.loads((base / "config.json").read_text()), draw)
        source, target = tmp_path / "hf", tmp_path / "native"
        shutil.copytree(base, source)
        (source / "config.json").write_text(json.dumps(config))
        told = f"draw {index} of {base.name}: {json.dumps(config)[:3000]}"
        try:
            code = converted(["--from", "hf", "--to", "native", str(source), str(target)], monkeypatch)
        except Exception as error:
            raise AssertionError(told) from error
        printed = capsys.readouterr().err
        assert code in codes, told
        codes[code] += 1
        assert target.exists() == (code == 0), told
        if code == 2:
            assert printed.startswith("error: "), told + printed
            assert printed.count("\n") == 1, told + printed
            assert len(printed) < 1000, told + printed
        shutil.rmtree(source)
        shutil.rmtree(target, ignore_errors=True)
    assert min(codes.values()) > count // 20, codes
