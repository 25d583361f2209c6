"""DeepSpeed's universal checkpoint in and out: written by its converter, loaded by its engine, trained on with the same
bits."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.writer import write_part
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.deepspeed.exporter import to_deepspeed
from keepwarm.trainer.convert.importer import ImportOptions, from_dcp
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.foreign import deepspeed_llama
from tests.support.foreign.hf_models import CASES, hf_model
from tests.support.foreign.huggingface_oracle import rearranged
from tests.support.layouts import Case, whole_state, write_checkpoint
from tests.support.ranks import run_ranks

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install 'keepwarm[deepspeed]'",
)
MODEL = ModelSpec(
    layers=2, hidden_size=24, heads=4, kv_heads=2, head_dim=8, ffn_size=12, vocabulary_size=24, max_sequence_length=8
)
META: dict[str, object] = {"model": MODEL.model_dump(mode="json"), "ledger": {"seed": 7}}


def native_state(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    with NativeCheckpoint(path) as native:
        for name, tensor in native.tensors.items():
            out = np.empty(tensor.bytes, np.uint8)
            native.read(name, 0, out)
            dtype = {"F32": torch.float32, "I64": torch.int64}[tensor.dtype]
            found[name] = torch.from_numpy(out).view(dtype).reshape(tensor.shape)
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.shape == two[name].shape, name
        assert torch.equal(tensor, two[name]), name


CASES_AND_STAGES = [
    ("llama", 1, 2),
    pytest.param("llama-grouped-tied", 2, 1, marks=pytest.mark.long),
    pytest.param("gpt-neox", 1, 2, marks=pytest.mark.long),
    pytest.param("llama", 3, 2, marks=pytest.mark.long),
    pytest.param("gpt2", 3, 1, marks=pytest.mark.long),
]


@needs_deepspeed
@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "stage", "ranks_after"), CASES_AND_STAGES)
def test_deepspeed_checkpoint_round_trips_and_trains_on_bitwise(
    tmp_path: Path, model: str, stage: int, ranks_after: int
) -> None:
    wholes = run_ranks(2, deepspeed_llama.train_and_save, model, stage, tmp_path / "theirs", deadline=250.0)
    _, half, end = wholes[0]
    theirs = hf_model(*CASES[model], torch.float32)
    theirs.config.save_pretrained(tmp_path)
    done = from_dcp(
        tmp_path / "theirs",
        tmp_path / "native",
        kind="deepspeed",
        options=ImportOptions(config=tmp_path / "config.json"),
    )
    assert done["moments"] == ["exp_avg", "exp_avg_sq"]

    # The oracle for names and layout: whole tensors, by torch.
    spec = model_spec_from_hf_config(theirs.config.to_dict())
    expected = {"optimizer.step": torch.tensor(deepspeed_llama.HALF)}
    for prefix, ours in (("", "model."), ("exp_avg.", "optimizer.exp_avg."), ("exp_avg_sq.", "optimizer.exp_avg_sq.")):
        whole = {name.removeprefix(prefix): value for name, value in half.items() if name.startswith(prefix)}
        whole = {name: value for name, value in whole.items() if not name.startswith("exp_avg")}
        arranged = rearranged(whole, CASES[model][0], spec)
        expected |= {ours + name: value for name, value in arranged.items() if name != "head.weight" or not _tied(spec)}
    assert_same(native_state(tmp_path / "native"), expected)

    to_deepspeed(tmp_path / "native", tmp_path / "ours", model_type=CASES[model][0])
    again = run_ranks(ranks_after, deepspeed_llama.load_and_train, model, stage, tmp_path / "ours", deadline=250.0)
    assert_same(again[0][1], half)
    if ranks_after == 2:
        assert [one[0] for one in again] == [one[0] for one in wholes]
        assert_same(again[0][2], end)


def _tied(spec: ModelSpec) -> bool:
    return spec.tied_embeddings


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    """The state of a checkpoint of eight ranks, and the folder that was made of it."""
    folder, state = tmp_path_factory.mktemp("deepspeed"), whole_state(MODEL, seed=5)
    path = write_checkpoint(folder / "run", MODEL, Case(spec=ParallelSpec(tensor=2, pipeline=2, data=2)), state, META)
    done = to_deepspeed(path, folder / "out")
    assert (done["moments"], done["left"]) == (["exp_avg", "exp_avg_sq"], [])
    return state, folder / "out"


def test_deepspeed_export_comes_back_with_optimizer_and_ledger(
    tmp_path: Path, exported: tuple[dict[str, torch.Tensor], Path]
) -> None:
    state, out = exported
    done = from_dcp(out, tmp_path / "native", kind="deepspeed")
    assert_same(native_state(tmp_path / "native"), state)
    manifest = publication.verify(tmp_path / "native")
    assert (manifest.step, manifest.meta["ledger"]) == (1, {"seed": 7})
    assert done["left"] == []
    from_dcp(out, tmp_path / "weights", kind="deepspeed", options=ImportOptions(weights_only=True))
    assert_same(native_state(tmp_path / "weights"), {n: t for n, t in state.items() if n.startswith("model.")})


class Harm:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self._target,)


WEIGHT = "global_step1_universal/zero/model.layers.1.mlp.up_proj.weight"


def test_deepspeed_damage_is_named_and_pickles_run_nothing(
    tmp_path: Path, exported: tuple[dict[str, torch.Tensor], Path]
) -> None:
    def cut(folder: Path) -> None:
        file = folder / WEIGHT / "exp_avg.pt"
        file.write_bytes(file.read_bytes()[:-700])

    def reshaped(folder: Path) -> None:
        torch.save({"param": torch.zeros(3)}, folder / WEIGHT / "fp32.pt")

    harms: dict[str, tuple[Any, str]] = {
        "code": (lambda f: torch.save(Harm(tmp_path / "harm"), f / WEIGHT / "fp32.pt"), r"fp32\.pt: .*--trust-pickle"),
        "cut": (cut, r"up_proj\.weight/exp_avg\.pt: "),
        "shape": (reshaped, r"up_proj\.weight is \[3\]"),
        "moment": (lambda f: (f / WEIGHT / "exp_avg.pt").unlink(), r"exp_avg is missing; --weights-only"),
        "lost": (lambda f: shutil.rmtree(f / WEIGHT), r"up_proj\.weight is missing"),
        "elsewhere": (lambda f: (f / "latest_universal").write_text("../../secret"), r"latest_universal: '\.\./"),
        "extra": (lambda f: shutil.copytree(f / WEIGHT, (f / WEIGHT).parent / "adapter"), r"adapter has no place"),
        "steps": (lambda f: torch.save(torch.tensor(9.0), f / WEIGHT / "step.pt"), "2 different step counts"),
    }
    for name, (harm, message) in harms.items():
        shutil.copytree(exported[1], tmp_path / name)
        harm(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            from_dcp(tmp_path / name, tmp_path / "native", kind="deepspeed")
        assert not (tmp_path / "native").exists()
    assert not (tmp_path / "harm").exists()


def test_deepspeed_optimizer_other_than_adamw_is_refused(tmp_path: Path) -> None:
    state = {
        name.replace("exp_avg.", "momentum."): tensor
        for name, tensor in whole_state(MODEL, seed=5).items()
        if "exp_avg_sq" not in name
    }
    tmp = publication.staging(tmp_path, 0, 1)
    tmp.mkdir()
    from keepwarm.ft.format.contents import Piece

    def piece(name: str, tensor: torch.Tensor) -> Piece:
        shape = tuple(tensor.shape)
        dtype = "I64" if tensor.dtype == torch.int64 else "F32"
        return Piece(name=name, global_shape=shape, offsets=(0,) * len(shape), shape=shape, dtype=dtype)

    pairs = [(piece(n, t), t.reshape(-1).view(torch.uint8).numpy()) for n, t in state.items()]
    write_part(tmp, 0, pairs)
    publication.write_manifest(tmp, publication.Identity(run="r", epoch=0, step=1, layout="l"), ranks=1, meta=META)
    with pytest.raises(SpecError, match=r"optimizer\.momentum: .*--weights-only"):
        to_deepspeed(tmp, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    to_deepspeed(tmp, tmp_path / "out", weights_only=True)
