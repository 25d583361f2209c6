"""Damaged sources are refused by name, and no fault leaves a folder that looks complete."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.errors import CheckpointError, OutputError, SpecError, TrainerError
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.faulty.conversion import converter
from tests.support.foreign.hf_models import CASES, hf_model
from tests.support.layouts import Case, whole_state, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIRST = "model-00001-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    hf_model(*CASES["llama"], torch.float32).save_pretrained(folder, max_shard_size="120KB")
    assert (folder / FIRST).is_file()
    return folder


@pytest.fixture(scope="module")
def native(sharded: Path) -> Path:
    from_huggingface(sharded, sharded.parent / "native")
    return sharded.parent / "native"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def edit_header(path: Path, change: Callable[[dict], object], pad: int = 0) -> None:  # type: ignore[type-arg]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def move_tensor(folder: Path, to: str) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": to}))


def a_second_copy(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / FIRST
    save_file(load_file(path) | {"model.norm.weight": torch.ones(64)}, path)


def a_key_twice(folder: Path) -> None:
    path = folder / FIRST
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    first = text[1:].split(b"}", 2)[1].lstrip(b",").split(b":")[0]
    text = text[:-1] + b"," + first + b":{}}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def lie(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))


HUGGINGFACE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "traversal": (lambda f: move_tensor(f, "../outside.safetensors"), r"index\.json: '\.\./outside"),
    "absolute": (lambda f: move_tensor(f, "/etc/passwd"), r"index\.json: '/etc/passwd'"),
    "missing shard": (lambda f: (f / FIRST).unlink(), FIRST + ": missing"),
    "another's place": (lambda f: move_tensor(f, FIRST), r"model\.norm\.weight"),
    "twice in two files": (a_second_copy, r"model\.norm\.weight"),
    "twice in a header": (a_key_twice, FIRST + ".*duplicate key"),
    "truncated": (lambda f: cut(f / FIRST, 1), FIRST + ".*truncated"),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), FIRST),
    "long header": (lambda f: lie(f / FIRST, 2**63), FIRST + ": claims a header of 9223372036854775808"),
    "header past the end": (lambda f: lie(f / FIRST, (f / FIRST).stat().st_size), FIRST + ": claims a header"),
    "trailing bytes": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"x"), FIRST),
    "wrong size": (
        lambda f: edit_header(f / FIRST, lambda t: t["model.embed_tokens.weight"].update(shape=[96, 65])),
        FIRST + r": model\.embed_tokens\.weight has",
    ),
    "wrong dtype": (
        lambda f: edit_header(f / FIRST, lambda t: t["model.embed_tokens.weight"].update(dtype="I32")),
        "is of dtype I32",
    ),
    "negative offset": (
        lambda f: edit_header(f / FIRST, lambda t: t["model.embed_tokens.weight"].update(data_offsets=[-8, 24568])),
        FIRST,
    ),
    "foreign tensor": (
        lambda f: (
            edit_header(f / FIRST, lambda t: t.update(adapter=t.pop("model.embed_tokens.weight"))),
            edit_json(
                f / INDEX, lambda i: i["weight_map"].update(adapter=i["weight_map"].pop("model.embed_tokens.weight"))
            ),
        ),
        r"model\.embed_tokens\.weight is missing",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "config broken": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "config of another model": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=128)),
        r"gate_proj\.weight is \[112, 64\]",
    ),
    "config with text for a number": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(vocab_size="many")),
        r"config\.json: vocab_size",
    ),
    "more layers than tensors": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=9999)),
        "9999 layers",
    ),
    "more layers than any model": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
        "config.json: num_hidden_layers = 1000000000",
    ),
    "field nobody knows": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(quantization_config={"bits": 4})),
        "quantization_config",
    ),
    "pickle": (only_pickles, r"pytorch_model\.bin: weights in a pickle"),
    "two sets of weights": (lambda f: shutil.copy(f / FIRST, f / "model.safetensors"), r"model\.safetensors"),
}


@pytest.mark.parametrize("damage", HUGGINGFACE_DAMAGE)
def test_convert_damaged_source_is_refused_and_nothing_is_written(tmp_path: Path, sharded: Path, damage: str) -> None:
    shutil.copytree(sharded, tmp_path / "hf")
    harm, message = HUGGINGFACE_DAMAGE[damage]
    harm(tmp_path / "hf")
    with pytest.raises((CheckpointError, SpecError), match=message):
        from_huggingface(tmp_path / "hf", tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


NATIVE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / "rank_00000.safetensors", 1), r"rank_00000\.safetensors: ends 1 bytes too early"),
    "missing part": (lambda f: (f / "rank_00000.safetensors").unlink(), r"rank_00000\.safetensors"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json"),
    "foreign version": (lambda f: edit_json(f / "manifest.json", lambda m: m.update(version=99)), "version 99"),
    "a part elsewhere": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["parts"][0].update(file="../rank_00000.safetensors")),
        r"manifest\.json.*not the name of a part",
    ),
    "a carried file elsewhere": (
        lambda f: edit_json(
            f / "manifest.json", lambda m: m["meta"]["huggingface"]["files"].update({"../../secret": "0"})
        ),
        r"manifest\.json: '\.\./\.\./secret'",
    ),
    "no spec": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["meta"].pop("model")),
        "does not describe the model",
    ),
    "a tensor lost": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["parts"][0]["entries"].pop()),
        r"model\.head\.weight is missing",
    ),
}


@pytest.mark.parametrize("damage", NATIVE_DAMAGE)
def test_convert_damaged_checkpoint_is_refused_by_name(tmp_path: Path, native: Path, damage: str) -> None:
    shutil.copytree(native, tmp_path / "native")
    harm, message = NATIVE_DAMAGE[damage]
    harm(tmp_path / "native")
    with pytest.raises(CheckpointError, match=message):
        to_huggingface(tmp_path / "native", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_convert_flipped_bit_is_found_anywhere(tmp_path: Path, native: Path) -> None:
    shutil.copytree(native, tmp_path / "native")
    path = tmp_path / "native/rank_00000.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), (len(content) - start) // 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: the bytes of model\..* checksum"):
            to_huggingface(tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_convert_existing_target_is_never_overwritten(tmp_path: Path, sharded: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        from_huggingface(sharded, tmp_path / "out")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        from_huggingface(sharded, tmp_path / "file")
    with pytest.raises(TrainerError, match="file"):
        from_huggingface(sharded, tmp_path / "file/below")


def faults(direction: str, format: str, kind: str, source: Path, target: Path) -> int:
    """How many there were, one after the other."""
    target.mkdir()
    command = ["-m", "tests.support.faulty.conversion", direction, format, kind, str(source), str(target)]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("direction", ["from", "to"])
def test_convert_huggingface_fault_leaves_no_partial_folder(
    tmp_path: Path, sharded: Path, native: Path, direction: str, kind: str
) -> None:
    found = faults(direction, "hf", kind, sharded if direction == "from" else native, tmp_path / "target")
    # One for each of the 21 tensors at least, and those of the manifest or config, the folder and the name.
    assert found > 26


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks with optimizer state."""
    model = ModelSpec(layers=1, hidden_size=16, heads=2, ffn_size=24, vocabulary_size=24, max_sequence_length=8)
    meta: dict[str, object] = {"model": model.model_dump(mode="json"), "ledger": {"seed": 7}}
    case = Case(spec=ParallelSpec(tensor=2))
    return write_checkpoint(tmp_path_factory.mktemp("trained"), model, case, whole_state(model, 5), meta)


@pytest.mark.long
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("direction", ["from", "to"])
@pytest.mark.parametrize("format", ["dcp", "torchtitan", "megatron", "deepspeed"])
def test_convert_other_formats_fault_leaves_no_partial_folder(
    tmp_path: Path, trained: Path, format: str, direction: str, kind: str
) -> None:
    source = trained
    if direction == "from":
        source = tmp_path / "source"
        converter("to", format)(trained, source)
    assert faults(direction, format, kind, source, tmp_path / "target") > 5
