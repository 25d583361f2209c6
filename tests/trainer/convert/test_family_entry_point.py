"""A model family of another distribution: converted, trained and exported without a change to keepwarm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from keepwarm.trainer.convert.native import NativeCheckpoint
from tests.support import outside_family

ROOT = Path(__file__).parents[3]

Keepwarm = Callable[..., subprocess.CompletedProcess[str]]
Tensors = Mapping[str, npt.NDArray[np.float32]]


@pytest.fixture
def keepwarm(tmp_path: Path) -> Keepwarm:
    """The command, where the family is installed, and a broken one beside it."""
    folder = tmp_path / "site"
    outside_family.install(folder)
    points = folder / "outside_family-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{points.read_text()}gull = no_such_module:Gull\ntilt = outside_family:TernFamily\n")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}/src", "COLUMNS": "200"}
        command = [sys.executable, "-m", "keepwarm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)

    return run


def test_foreign_family_imported_trained_and_exported(keepwarm: Keepwarm, tmp_path: Path) -> None:
    hf, native, back = (tmp_path / name for name in ("hf", "native", "back"))
    outside_family.save_model(hf)
    done(keepwarm("convert", "--from", "hf", "--to", "native", hf, native))
    theirs, ours = load_file(hf / "model.safetensors"), parameters_of(native)
    assert_rearranged(theirs, ours)

    done(keepwarm("convert", "--from", "native", "--to", "hf", native, back))
    assert_equal(load_file(back / "model.safetensors"), theirs)
    assert json.loads((back / "config.json").read_text()) == outside_family.CONFIG

    quick = ["stages.0.tokens=1024", "log.tensorboard=false", "model.kv_heads=2"]
    for run, origin in (("from-hf", hf), ("from-native", native)):
        done(keepwarm("train", "ci/tiny", *quick, f"output={tmp_path / run}", f"init_from={origin}"))
    assert losses_of(tmp_path / "from-hf") == losses_of(tmp_path / "from-native")
    assert len(losses_of(tmp_path / "from-hf")) == 2

    exported = tmp_path / "exported"
    convert = ("convert", "--from", "native", "--to", "hf", tmp_path / "from-hf", exported, "--model-type")
    done(keepwarm(*convert, outside_family.NAME))
    trained = load_file(exported / "model.safetensors")
    assert trained.keys() == theirs.keys()
    assert not any(np.array_equal(trained[name], theirs[name]) for name in theirs)
    with NativeCheckpoint(tmp_path / "from-hf", scratch=tmp_path) as checkpoint:
        assert_rearranged(trained, parameters_of(checkpoint.path))


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        (
            "turn",
            "'turn' is not supported; it may be llama, mistral, qwen2, qwen3, olmo2, olmo3",
        ),
        ("gull", "model family 'gull' of the package outside-family cannot be loaded: No module"),
        ("tilt", "the model family registered as 'tilt' is of model_type 'tern'"),
    ],
)
def test_foreign_family_unusable_is_refused(keepwarm: Keepwarm, tmp_path: Path, model_type: str, said: str) -> None:
    outside_family.save_model(tmp_path / "hf")
    config = outside_family.CONFIG | {"model_type": model_type}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused = keepwarm("convert", "--from", "hf", "--to", "native", tmp_path / "hf", tmp_path / "native")
    assert refused.returncode == 2
    assert said in refused.stderr
    assert not (tmp_path / "native").exists()


def done(ran: subprocess.CompletedProcess[str]) -> None:
    assert ran.returncode == 0, ran.stderr


def losses_of(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def parameters_of(path: Path) -> Tensors:
    with NativeCheckpoint(path) as native:
        found = {}
        for name, tensor in native.tensors.items():
            if name.startswith("model."):
                data = b"".join(bytes(block) for block in native.blocks(name, 1 << 20))
                found[name.removeprefix("model.")] = np.frombuffer(data, np.float32).reshape(tensor.shape)
    return found


def assert_equal(one: Tensors, two: Tensors) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.tobytes() == two[name].tobytes(), name


def assert_rearranged(theirs: Tensors, ours: Tensors) -> None:
    """The family's layout by whole arrays: two groups of two query heads, one key head and one value head of 10."""
    assert np.array_equal(theirs["nest.words.weight"], ours["embedding.weight"])
    for index in range(4):
        layer, mine = f"nest.feathers.{index}.", f"layers.{index}."
        fused = theirs[f"{layer}look.qkv.weight"].reshape(2, 4, 10, 40)
        for part, heads in (("query", fused[:, :2]), ("key", fused[:, 2]), ("value", fused[:, 3])):
            assert np.array_equal(heads.reshape(-1, 40), ours[f"{mine}attention.{part}.weight"]), part
        both = np.split(theirs[f"{layer}think.gate_up.weight"], 2)
        for part, half in zip(("gate", "up"), both, strict=True):
            assert np.array_equal(half, ours[f"{mine}mlp.{part}.weight"]), part
