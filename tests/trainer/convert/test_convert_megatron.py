"""Megatron Core's GPTModel in and out, written and read back by its own `dist_checkpointing`, with equal logits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.dcp.exporter import to_dcp
from keepwarm.trainer.convert.importer import ImportOptions, from_dcp
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.verify.open import opened
from keepwarm.trainer.convert.verify.opened import Rounding
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec, RopeScalingSpec
from tests.support.layouts import Case, whole_state, write_checkpoint
from tests.support.models import load_parameters

ROOT = Path(__file__).parents[3]
SPECS = {
    "llama": ModelSpec(
        layers=3, hidden_size=32, heads=4, kv_heads=2, ffn_size=48, vocabulary_size=40, max_sequence_length=16
    ),
    "gpt": ModelSpec(
        layers=2,
        hidden_size=32,
        heads=4,
        ffn_size=64,
        vocabulary_size=40,
        max_sequence_length=16,
        norm="layer",
        activation="gelu",
        position="learned",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    ),
}
SPECS["llama-3.2"] = SPECS["llama"].model_copy(
    update={
        "tied_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": RopeScalingSpec(type="llama3", factor=32, original_max_sequence_length=8192),
    }
)
SPECS["qwen3"] = SPECS["llama"].model_copy(update={"head_dim": 16, "qk_norm": "head", "rope_theta": 1e6})
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 7 % 40


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.support.foreign.megatron_gpt` leaves."""
    folder = tmp_path_factory.mktemp("megatron")
    for kind, spec in SPECS.items():
        (folder / kind).mkdir()
        (folder / kind / "model.yaml").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "tests.support.foreign.megatron_gpt", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def logits(path: Path, spec: ModelSpec) -> torch.Tensor:
    """Of our own model."""
    part = Decoder(spec, seed=0).build_stage(range(spec.layers), embed=True, head=True)
    values = {}
    with NativeCheckpoint(path) as native:
        for name, tensor in native.tensors.items():
            out = np.empty(tensor.bytes, np.uint8)
            native.read(name, 0, out)
            values[name.removeprefix("model.")] = torch.from_numpy(out).view(torch.float32).reshape(tensor.shape)
    load_parameters(part, {name: values[name] for name, _ in part.named_parameters()})
    with torch.no_grad():
        found: torch.Tensor = part(TOKENS)
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SPECS)
def test_megatron_checkpoint_computes_the_same_and_goes_back(converted: Path, kind: str) -> None:
    folder = converted / kind
    theirs, back = (safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("theirs", "back"))
    torch.testing.assert_close(logits(folder / "native", SPECS[kind]), theirs["logits"], rtol=1e-5, atol=1e-5)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name
    # What --verify computes from their checkpoint is what their model computes.
    plain = opened(folder / "theirs", "megatron", ImportOptions(config=folder / "model.yaml"))
    found = torch.stack([plain.logits(tokens, Rounding()) for tokens in TOKENS])
    torch.testing.assert_close(found, theirs["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPECS)
def test_megatron_moments_follow_weights_and_come_back(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    state = whole_state(spec, seed=6)
    meta: dict[str, object] = {"model": spec.model_dump(mode="json"), "ledger": {"seed": 3}}
    case = Case(spec=ParallelSpec(tensor=2, data=2))
    path = write_checkpoint(tmp_path / "run", spec, case, state, meta)
    to_dcp(path, tmp_path / "megatron", kind="megatron")
    from_dcp(tmp_path / "megatron", tmp_path / "native", kind="megatron")
    with NativeCheckpoint(tmp_path / "native") as native:
        assert set(native.tensors) == set(state)
        for name, tensor in native.tensors.items():
            out = np.empty(tensor.bytes, np.uint8)
            native.read(name, 0, out)
            dtype = torch.int64 if name == "optimizer.step" else torch.float32
            assert torch.equal(torch.from_numpy(out).view(dtype).reshape(tensor.shape), state[name]), name
        assert native.manifest.step == 1
        assert native.manifest.meta["ledger"] == {"seed": 3}


def test_megatron_unsupported_model_is_refused(tmp_path: Path) -> None:
    spec = SPECS["llama"].model_copy(update={"norm_position": "post"})
    meta: dict[str, object] = {"model": spec.model_dump(mode="json")}
    path = write_checkpoint(tmp_path / "run", spec, Case(spec=ParallelSpec()), whole_state(spec, seed=1), meta)
    with pytest.raises(SpecError, match=r"model\.norm_position = 'post' cannot be expressed by Megatron"):
        to_dcp(path, tmp_path / "megatron", kind="megatron")
    assert not (tmp_path / "megatron").exists()


class Arguments:
    """A value that no library lists as safe to unpickle, as Megatron Core does pathlib's when it is imported."""


def test_megatron_state_beyond_plain_values_is_refused(tmp_path: Path) -> None:
    spec = SPECS["llama"]
    meta: dict[str, object] = {"model": spec.model_dump(mode="json")}
    path = write_checkpoint(tmp_path / "run", spec, Case(spec=ParallelSpec()), whole_state(spec, seed=1), meta)
    to_dcp(path, tmp_path / "megatron", kind="megatron")
    torch.save({"iteration": 1, "args": Arguments()}, tmp_path / "megatron/common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: .*--weights-only.*--trust-pickle"):
        from_dcp(tmp_path / "megatron", tmp_path / "native", kind="megatron")
    from_dcp(tmp_path / "megatron", tmp_path / "native", kind="megatron", options=ImportOptions(weights_only=True))
