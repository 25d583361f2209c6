"""torch's DCP and torchtitan in and out, checked with `torch.distributed.checkpoint` itself; pickles that run code."""

import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.__main__ import app
from keepwarm.trainer.convert.dcp.exporter import to_dcp
from keepwarm.trainer.convert.importer import ImportOptions, from_dcp
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.rotary import plain_frequencies, rotate, rotation
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.layouts import Case, State, whole_state, write_checkpoint

MODEL = ModelSpec(
    layers=2, hidden_size=24, heads=4, kv_heads=2, head_dim=8, ffn_size=12, vocabulary_size=24, max_sequence_length=8
)
META: dict[str, object] = {"model": MODEL.model_dump(mode="json"), "ledger": {"seed": 7}}
TORCH = {"F32": torch.float32, "I64": torch.int64, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no_dist|single process|single rank|TypedStorage).*")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """A checkpoint of eight ranks with optimizer state, and what is in it."""
    state = whole_state(MODEL, seed=5)
    case = Case(spec=ParallelSpec(tensor=2, pipeline=2, data=2))
    return state, write_checkpoint(tmp_path_factory.mktemp("run"), MODEL, case, state, META)


def native_state(path: Path) -> State:
    found = {}
    with NativeCheckpoint(path) as native:
        for name, tensor in native.tensors.items():
            out = np.empty(tensor.bytes, np.uint8)
            native.read(name, 0, out)
            found[name] = torch.from_numpy(out).view(TORCH[tensor.dtype]).reshape(tensor.shape)
    return found


def assert_same(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
        assert torch.equal(tensor, two[name]), name


def read_dcp(folder: Path) -> State:
    """Everything in a folder, by torch's own reader."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)  # type: ignore[union-attr]
        for name, kept in metadata.state_dict_metadata.items()
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)  # type: ignore[arg-type]
    return state


def write_dcp(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def test_dcp_export_holds_whole_state_and_comes_back(tmp_path: Path, run: tuple[State, Path]) -> None:
    state, path = run
    done = to_dcp(path, tmp_path / "dcp", kind="dcp")
    assert_same(read_dcp(tmp_path / "dcp"), state)
    assert (done["moments"], done["left"]) == (["exp_avg", "exp_avg_sq"], [])
    from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    assert_same(native_state(tmp_path / "native"), state)
    manifest = publication.verify(tmp_path / "native")
    assert (manifest.step, manifest.meta["ledger"]) == (1, {"seed": 7})
    assert manifest.meta["parent"] == {"format": "dcp", "path": str(tmp_path / "dcp")}


def test_dcp_saved_by_torch_is_imported(tmp_path: Path, run: tuple[State, Path]) -> None:
    nested: dict[str, Any] = {"model": {}, "optimizer": {"step": torch.tensor(5), "exp_avg": {}, "exp_avg_sq": {}}}
    for name, tensor in run[0].items():
        section, _, rest = name.partition(".")
        if section == "model":
            nested["model"][rest] = tensor
        elif rest != "step":
            moment, _, rest = rest.partition(".")
            nested["optimizer"][moment][rest] = tensor
    write_dcp(tmp_path / "dcp", nested | {"dataloader": {"position": 7}})
    config = tmp_path / "model.yaml"
    config.write_text(MODEL.model_dump_json())
    done = from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp", options=ImportOptions(config=config))
    assert_same(native_state(tmp_path / "native"), run[0])
    assert done["left"] == ["dataloader.position"]


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_dcp_weights_only_round_trips(tmp_path: Path, run: tuple[State, Path], dtype: str | None) -> None:
    state, path = run
    to_dcp(path, tmp_path / "dcp", kind="dcp", weights_only=True, dtype=dtype)
    weights = {
        name: tensor.to(torch.bfloat16 if dtype else torch.float32)
        for name, tensor in state.items()
        if name.startswith("model.")
    }
    assert_same(read_dcp(tmp_path / "dcp"), weights)
    from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    assert_same(native_state(tmp_path / "native"), weights)
    assert read_manifest(tmp_path / "native").meta["weights_only"]


def test_torchtitan_export_has_its_names_and_comes_back(tmp_path: Path, run: tuple[State, Path]) -> None:
    state, path = run
    to_dcp(path, tmp_path / "titan", kind="torchtitan")
    titan = read_dcp(tmp_path / "titan")
    for theirs, ours in {
        "tok_embeddings.weight": "embedding.weight",
        "layers.1.attention.qkv_linear.wv.weight": "layers.1.attention.value.weight",
        "layers.0.feed_forward.w2.weight": "layers.0.mlp.down.weight",
        "layers.0.ffn_norm.weight": "layers.0.mlp_norm.weight",
        "lm_head.weight": "head.weight",
    }.items():
        assert torch.equal(titan[theirs], state[f"model.{ours}"])
        assert torch.equal(titan[f"optimizer.state.{theirs}.exp_avg_sq"], state[f"optimizer.exp_avg_sq.{ours}"])
        assert titan[f"optimizer.state.{theirs}.step"] == torch.tensor(5.0)
    from_dcp(tmp_path / "titan", tmp_path / "native", kind="torchtitan")
    assert_same(native_state(tmp_path / "native"), state)


def test_torchtitan_query_key_products_equal_native(tmp_path: Path, run: tuple[State, Path]) -> None:
    """Its rotary embedding turns neighbouring features as complex numbers; ours turns features half a head apart."""
    state, path = run
    to_dcp(path, tmp_path / "titan", kind="torchtitan", weights_only=True)
    titan = read_dcp(tmp_path / "titan")
    x, size, positions = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(1)), 8, torch.arange(8)
    angles = positions[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def theirs(name: str) -> torch.Tensor:
        heads = (x @ titan[f"layers.1.attention.qkv_linear.{name}.weight"].T).unflatten(-1, (-1, size))
        return torch.view_as_real(torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def ours(name: str) -> torch.Tensor:
        heads = (x @ state[f"model.layers.1.attention.{name}.weight"].T).unflatten(-1, (-1, size))
        cosine, sine = rotation(positions, plain_frequencies(size, 10000.0, torch.float32))
        return rotate(heads, cosine[None], sine[None])

    scores = [
        torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2))
        for query, key in ((theirs("wq"), theirs("wk")), (ours("query"), ours("key")))
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dcp", "torchtitan", "megatron"])
def test_convert_command_converts_both_ways(tmp_path: Path, run: tuple[State, Path], kind: str) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    said = CliRunner().invoke(app, ["--from", "native", "--to", kind, str(run[1]), str(out)], catch_exceptions=False)
    assert said.stdout.startswith(f"{out}: {kind}, ")
    ran = CliRunner().invoke(
        app, ["--from", kind, "--to", "native", str(out), str(back), "--json"], catch_exceptions=False
    )
    assert json.loads(ran.stdout)["moments"] == ["exp_avg", "exp_avg_sq"]
    assert_same(native_state(back), run[0])
    assert read_manifest(back).meta["parent"]["format"] == kind


def test_torchtitan_unsupported_model_is_refused(tmp_path: Path, run: tuple[State, Path]) -> None:
    changed = MODEL.model_copy(update={"qk_norm": "projection"})
    root = tmp_path / "run"
    state = whole_state(changed, seed=1)
    meta: dict[str, object] = {"model": changed.model_dump(mode="json")}
    path = write_checkpoint(root, changed, Case(spec=ParallelSpec()), state, meta)
    with pytest.raises(SpecError, match=r"model\.qk_norm = 'projection' cannot be expressed by torchtitan"):
        to_dcp(path, tmp_path / "titan", kind="torchtitan")
    assert not (tmp_path / "titan").exists()


class Harm:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self._target,)


def test_dcp_pickle_that_runs_code_is_refused(tmp_path: Path, run: tuple[State, Path]) -> None:
    to_dcp(run[1], tmp_path / "dcp", kind="dcp")
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*--trust-pickle"):
        from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    assert not (tmp_path / "harm").exists()
    with pytest.raises(CheckpointError, match=r"not DCP's metadata"):
        from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp", options=ImportOptions(trust_pickle=True))
    assert (tmp_path / "harm").exists()


def test_dcp_tensor_that_runs_code_is_refused(tmp_path: Path, run: tuple[State, Path]) -> None:
    to_dcp(run[1], tmp_path / "dcp", kind="dcp")
    metadata = dcp.FileSystemReader(tmp_path / "dcp").read_metadata()
    index, info = next(iter(metadata.storage_data.items()))
    torch.save(Harm(tmp_path / "harm"), tmp_path / "bad")
    bad = (tmp_path / "bad").read_bytes()
    (tmp_path / "dcp" / info.relative_path).write_bytes(bad)
    metadata.storage_data[index] = type(info)(info.relative_path, 0, len(bad))
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"distcp"):
        from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "native").exists()


def test_dcp_damage_is_named(tmp_path: Path, run: tuple[State, Path]) -> None:
    to_dcp(run[1], tmp_path / "dcp", kind="dcp")
    file = tmp_path / "dcp/__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: too short"):
        from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    (tmp_path / "dcp/.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata: missing"):
        from_dcp(tmp_path / "dcp", tmp_path / "native", kind="dcp")
    write_dcp(tmp_path / "other", {"model": {"a": torch.ones(1)}})
    with pytest.raises(SpecError, match="--config"):
        from_dcp(tmp_path / "other", tmp_path / "native", kind="dcp")
    assert not (tmp_path / "native").exists()


def test_dcp_tensor_of_wrong_shape_or_name_is_named(tmp_path: Path, run: tuple[State, Path]) -> None:
    weights = {name: tensor for name, tensor in run[0].items() if name.startswith("model.")}
    config = tmp_path / "model.yaml"
    config.write_text(MODEL.model_dump_json())
    for name, change, message in (
        ("shape", {"model.final_norm.weight": torch.ones(25)}, r"final_norm\.weight is \[25\]"),
        ("extra", {"model.adapter": torch.ones(1)}, r"model\.adapter has no place"),
    ):
        write_dcp(tmp_path / name, weights | change)
        with pytest.raises(CheckpointError, match=message):
            from_dcp(tmp_path / name, tmp_path / "native", kind="dcp", options=ImportOptions(config=config))
