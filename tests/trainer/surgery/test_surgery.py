"""Operations on models against what they promise: the function kept, the way back, the arithmetic."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.continual.lineage import describe
from keepwarm.trainer.convert.huggingface.exporter import model_spec_of
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.surgery.__main__ import app
from tests.support.layouts import Case, whole_state, write_checkpoint
from tests.support.models import load_parameters

LLAMA = ModelSpec(
    layers=2, hidden_size=24, heads=4, kv_heads=2, ffn_size=20, vocabulary_size=40, max_sequence_length=16
)
MODELS = {
    "grouped": LLAMA,
    "tied": LLAMA.model_copy(update={"tied_embeddings": True, "kv_heads": 4, "qk_norm": "head"}),
    "olmo2": LLAMA.model_copy(update={"norm_position": "post", "qk_norm": "projection"}),
    "gpt": LLAMA.model_copy(
        update={
            "norm": "layer",
            "activation": "gelu",
            "position": "learned",
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
            "tied_embeddings": True,
        }
    ),
    "neox": LLAMA.model_copy(
        update={"norm": "layer", "activation": "gelu", "parallel_residual": True, "head_dim": 8, "rotary_fraction": 0.5}
    ),
}
TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % 40


def checkpoint(root: Path, spec: ModelSpec, seed: int = 1) -> Path:
    """Of two ranks, with weights that all matter and of the size that trained ones have."""
    state = {
        name: tensor * 0.2 + float("norm.weight" in name) if name.startswith("model.") else tensor
        for name, tensor in whole_state(spec, seed).items()
    }
    meta: dict[str, object] = {"model": spec.model_dump(mode="json")}
    return write_checkpoint(root, spec, Case(spec=ParallelSpec(tensor=2)), state, meta)


def weights(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    with NativeCheckpoint(path) as native:
        for name, tensor in native.tensors.items():
            if name.startswith("model."):
                out = np.empty(tensor.bytes, np.uint8)
                native.read(name, 0, out)
                dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[tensor.dtype]
                found[name.removeprefix("model.")] = torch.from_numpy(out).view(dtype).reshape(tensor.shape)
    return found


def logits(path: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with NativeCheckpoint(path) as native:
        spec = model_spec_of(native)
    part = Decoder(spec, seed=0).build_stage(range(spec.layers), embed=True, head=True)
    load_parameters(part, weights(path))
    with torch.no_grad():
        found: torch.Tensor = part(tokens)
    return found


def run(*arguments: Any) -> dict[str, Any]:
    ran = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    assert ran.exit_code == 0, ran.output
    return dict(json.loads(ran.stdout))


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", [{"ffn": 33}, {"heads": 8}, {"hidden": 48, "ffn": 40, "heads": 12}])
def test_widen_keeps_the_function_and_coalesces_back(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    path = checkpoint(tmp_path / "run", MODELS[kind])
    wider = [option for name, size in sizes.items() for option in (f"--{name}", size)]
    run("widen", path, "--to", tmp_path / "wide", *wider)
    before, after = logits(path), logits(tmp_path / "wide")
    assert before.std() > 0.3
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    narrow = {"hidden": 24, "ffn": 20, "heads": 4}
    back = [option for name in sizes for option in (f"--{name}", narrow[name])]
    run("coalesce", tmp_path / "wide", "--to", tmp_path / "back", *back)
    assert_equal(weights(tmp_path / "back"), weights(path), tolerance=1e-6)


def test_widen_aki_copies_from_the_layer_above(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run", LLAMA)
    run("widen", path, "--to", tmp_path / "wide", "--ffn", 30, "--how", "aki")
    old, new = weights(path), weights(tmp_path / "wide")
    assert torch.equal(new["layers.0.mlp.up.weight"][:20], old["layers.0.mlp.up.weight"])
    assert torch.equal(new["layers.0.mlp.up.weight"][20:], old["layers.1.mlp.up.weight"][:10])
    assert torch.equal(new["layers.1.mlp.up.weight"][20:], old["layers.1.mlp.up.weight"][:10])
    assert not torch.allclose(logits(tmp_path / "wide"), logits(path), atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_deepen_silent_layers_keep_the_function(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path / "run", MODELS[kind])
    run("deepen", path, "--layers", 5, "--to", tmp_path / "deep")
    assert torch.equal(logits(tmp_path / "deep"), logits(path))
    old, new = weights(path), weights(tmp_path / "deep")
    assert torch.equal(new["layers.1.attention.query.weight"], old["layers.0.attention.query.weight"])


def test_deepen_stacked_and_repeated_layers_coalesce_back(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run", LLAMA)
    old = weights(path)
    for how, order in (("stack", (0, 1, 0, 1)), ("repeat", (0, 0, 1, 1))):
        run("deepen", path, "--layers", 4, "--how", how, "--to", tmp_path / how)
        new = weights(tmp_path / how)
        for index, source in enumerate(order):
            assert torch.equal(new[f"layers.{index}.mlp.up.weight"], old[f"layers.{source}.mlp.up.weight"])
    run("coalesce-layers", tmp_path / "repeat", "--layers", 2, "--to", tmp_path / "back")
    assert_equal(weights(tmp_path / "back"), old)
    run("prune", tmp_path / "stack", "--keep", "2-3", "--to", tmp_path / "pruned")
    assert torch.equal(logits(tmp_path / "pruned"), logits(path))


def test_task_vectors_add_up_and_are_no_models(tmp_path: Path) -> None:
    base, tuned = (checkpoint(tmp_path / f"run{seed}", LLAMA, seed) for seed in (1, 2))
    run("difference", tuned, "--base", base, "--to", tmp_path / "vector")
    run("add", base, "--vector", tmp_path / "vector", "--to", tmp_path / "again")
    assert_equal(weights(tmp_path / "again"), weights(tuned), tolerance=1e-6)
    artefact = describe(tmp_path / "again")
    assert artefact is not None
    assert [parent.path for parent in artefact.parents] == [base, tmp_path / "vector"]
    run("add", tuned, "--vector", tmp_path / "vector", "--scales", "-1", "--to", tmp_path / "forgotten")
    assert_equal(weights(tmp_path / "forgotten"), weights(base), tolerance=1e-6)
    with pytest.raises(CheckpointError, match="is the difference of two models"):
        run("difference", tmp_path / "vector", "--base", base, "--to", tmp_path / "no")
    with pytest.raises(CheckpointError, match="is a model, not a difference"):
        run("add", base, "--vector", tuned, "--to", tmp_path / "no")


def tokenizer(path: Path, tokens: Sequence[str]) -> Path:
    import tokenizers

    model = tokenizers.models.WordLevel({text: at for at, text in enumerate(tokens)}, unk_token=tokens[0])
    tokenizers.Tokenizer(model).save(str(path))
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("start", ["mean", "neighbours"])
def test_vocabulary_kept_tokens_keep_their_logits(tmp_path: Path, tied: bool, start: str) -> None:
    path = checkpoint(tmp_path / "run", LLAMA.model_copy(update={"tied_embeddings": tied}))
    old = [f"word{at:02d}" for at in range(40)]
    new = [*reversed(old[5:]), "word071", "quite else", "zzz"]
    options = ("--old", tokenizer(tmp_path / "old.json", old), "--new", tokenizer(tmp_path / "new.json", new))
    done = run("vocabulary", path, *options, "--start", start, "--size", 48, "--to", tmp_path / "other")
    assert (done["shared"], done["new"]) == (35, 3)
    ids = torch.tensor([[new.index(old[at]) for at in (7, 9, 30, 12)]])
    after, before = logits(tmp_path / "other", ids), logits(path, torch.tensor([[7, 9, 30, 12]]))
    torch.testing.assert_close(after[..., :35], before[..., 5:].flip(-1), rtol=0, atol=1e-6)
    rows, theirs = weights(tmp_path / "other")["embedding.weight"], weights(path)["embedding.weight"]
    mean = theirs.double().mean(0).float()
    torch.testing.assert_close(rows[40:], mean.expand(8, -1))
    # Unlike every old token: there is nothing better than the mean.
    torch.testing.assert_close(rows[new.index("zzz")], mean)
    if start == "neighbours":
        alike = theirs[[at for at in range(40) if old[at] in ("word07", "word71")]].mean(0)
        made = rows[new.index("word071")]
        assert torch.nn.functional.cosine_similarity(made, alike, dim=0) > 0.2
        assert not torch.allclose(made, mean, atol=1e-3)


def test_rope_theta_changes_the_spec_alone(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run", LLAMA)
    done = run("rope", path, "--theta", 500000, "--max-sequence-length", 64, "--to", tmp_path / "long")
    assert (done["model"]["rope_theta"], done["model"]["max_sequence_length"]) == (500000.0, 64)
    assert_equal(weights(tmp_path / "long"), weights(path))
    assert not torch.allclose(logits(tmp_path / "long"), logits(path), atol=1e-3)


@dataclasses.dataclass(frozen=True)
class Refusal:
    command: tuple[Any, ...]
    said: str


REFUSALS = {
    "hidden that norms would see": Refusal(("widen", "--hidden", 30), "--hidden 30: must be a multiple of 24"),
    "fewer units": Refusal(("widen", "--ffn", 10), "--ffn 10: the model has 20 already"),
    "heads that share keys": Refusal(("widen", "--heads", 5), "--heads 5: must be a multiple of 2"),
    "fewer layers": Refusal(("deepen", "--layers", 1), "--layers 1: the model has 2 already"),
    "no whole stack": Refusal(("deepen", "--layers", 3, "--how", "stack"), "stack needs a multiple"),
    "a layer that is not there": Refusal(("prune", "--keep", "1,2"), r"--keep \[1, 2\]"),
    "a layer twice": Refusal(("prune", "--keep", "0,0"), r"--keep \[0, 0\]"),
    "no layers": Refusal(("prune", "--keep", "x"), "write layers as"),
    "nothing to coalesce": Refusal(("coalesce",), "give some of --hidden"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_surgery_impossible_request_is_refused_and_writes_nothing(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "run", LLAMA)
    command, *options = REFUSALS[name].command
    with pytest.raises(SpecError, match=REFUSALS[name].said):
        run(command, path, *options, "--to", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_difference_of_other_architectures_is_refused(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "one", LLAMA), checkpoint(tmp_path / "two", MODELS["gpt"])
    with pytest.raises(SpecError, match="missing"):
        run("difference", one, "--base", two, "--to", tmp_path / "no")
