"""`keepwarm convert --verify`: equal models are found equal in every format, and planted errors are found."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from keepwarm.trainer.convert.__main__ import app
from keepwarm.trainer.convert.verify.comparison import allowed, found_in, prompt
from keepwarm.trainer.convert.verify.streamed import streamed
from keepwarm.trainer.errors import CheckpointError
from tests.support.foreign.hf_models import CASES, hf_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA3 = CASES["llama-llama3"][1]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **CASES,
    "llama-3.2": ("llama", LLAMA3 | {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2-square": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": LLAMA3["rope_parameters"]}),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no_dist|single process|single rank|TypedStorage).*")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def convert(given: str, wanted: str, source: Path, result: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer of the command."""
    words = ["--from", given, "--to", wanted, str(source), str(result), "--json", *options]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


def saved(folder: Path, model: str, dtype: torch.dtype = torch.float32) -> Path:
    hf_model(*MODELS[model], dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_conversion_from_and_to_huggingface_is_found_equal(tmp_path: Path, model: str) -> None:
    source = saved(tmp_path / "hf", model)
    for given, wanted, start, end in (
        ("hf", "native", source, "native"),
        ("native", "hf", tmp_path / "native", "back"),
    ):
        code, answer = convert(given, wanted, start, tmp_path / end, "--verify")
        assert (code, answer["verify"]["equal"]) == (0, True), answer
        assert answer["verify"]["relative"] < 1e-5
        assert answer["verify"]["tokens"] == MODELS[model][1].get("max_position_embeddings", 64)
    # The same class with the same weights.
    assert convert("hf", "hf", source, tmp_path / "back", "--verify-only")[1]["verify"]["difference"] == 0


@pytest.mark.parametrize("kind", ["dcp", "torchtitan", "megatron", "deepspeed"])
@pytest.mark.parametrize("model", ["llama-3.2", "llama-llama3", "qwen3", "llama"])
def test_conversion_from_and_to_other_programs_is_found_equal(tmp_path: Path, model: str, kind: str) -> None:
    convert("hf", "native", saved(tmp_path / "hf", model), tmp_path / "native")
    for given, wanted, start, end in (("native", kind, "native", kind), (kind, "native", kind, "back")):
        code, answer = convert(given, wanted, tmp_path / start, tmp_path / end, "--verify")
        assert (code, answer["verify"]["equal"]) == (0, True), answer
        assert answer["verify"]["relative"] < 1e-5
    # Straight to the class of transformers, which knows nothing of keepwarm.
    assert convert("hf", kind, tmp_path / "hf", tmp_path / kind, "--verify-only")[0] == 0


def test_copy_of_the_weights_in_another_layout_is_not_read(tmp_path: Path) -> None:
    for number, size in enumerate(("5GB", "40KB")):
        source = tmp_path / f"hf-{number}"
        hf_model(*MODELS["mistral"]).save_pretrained(source, max_shard_size=size)
        safetensors.torch.save_file({"tok_embeddings.weight": torch.ones(2, 2)}, source / "consolidated.safetensors")
        assert (source / "model.safetensors.index.json").exists() is (number == 1)
        code, answer = convert("hf", "hf", source, source, "--verify-only")
        assert (code, answer["verify"]["difference"]) == (0, 0.0)
    (source / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: no index of weights"):
        convert("hf", "hf", source, source, "--verify-only")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_on_request_is_no_difference(tmp_path: Path, dtype: str) -> None:
    code, answer = convert(
        "hf", "native", saved(tmp_path / "hf", "qwen3"), tmp_path / "native", "--dtype", dtype, "--verify"
    )
    assert code == 0
    assert answer["verify"]["rounded"] == dtype.upper().replace("FP", "F")
    assert answer["verify"]["relative"] < 1e-5
    assert convert("native", "hf", tmp_path / "native", tmp_path / "back", "--dtype", "fp32", "--verify")[0] == 0


Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."


def swap(one: str, two: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[LAYER + one], tensors[LAYER + two] = tensors[LAYER + two], tensors[LAYER + one]

    return change


def replaced(name: str, of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[LAYER + name] = of(tensors[LAYER + name]).contiguous()

    return change


def pairs(weight: torch.Tensor) -> torch.Tensor:
    """Rotary features side by side instead of half a head apart."""
    return weight.unflatten(0, (8, 2, -1)).transpose(1, 2).flatten(0, 2)


WEIGHTS: dict[str, Callable[[Tensors], object]] = {
    "gate and up swapped": swap("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "key and value swapped": swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "norms swapped": swap("input_layernorm.weight", "post_attention_layernorm.weight"),
    "matrix transposed": replaced("self_attn.o_proj.weight", torch.t),
    "rotary features of queries interleaved": replaced("self_attn.q_proj.weight", pairs),
    "heads of another order": replaced(
        "self_attn.q_proj.weight", lambda w: w.unflatten(0, (8, -1)).flip(0).flatten(0, 1)
    ),
    "bias of zeros": replaced("self_attn.q_proj.bias", torch.zeros_like),
    "one row of the head": lambda tensors: tensors["lm_head.weight"][95].mul_(1.01),
    "not a number": lambda tensors: tensors["model.norm.weight"][3].fill_(float("nan")),
}
LOST: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing bias": (lambda tensors: tensors.pop(LAYER + "self_attn.q_proj.bias"), "q_proj.bias is missing"),
    "surplus bias": (
        lambda tensors: tensors.update({LAYER + "mlp.up_proj.bias": torch.zeros(112)}),
        "up_proj.bias has no place in Qwen2ForCausalLM",
    ),
    "oblong matrix transposed": (
        replaced("mlp.down_proj.weight", torch.t),
        r"down_proj.weight is \[112, 64\], the model that computes with it has \[64, 112\]",
    ),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rope base": {"rope_theta": 5e4},
    "no scaling": {"rope_type": "default"},
    "factor": {"factor": 4.0},
    "original length": {"original_max_position_embeddings": 32},
    "another scaling": {"rope_type": "linear"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A native checkpoint with biases and scaled frequencies, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    convert("hf", "native", saved(folder / "hf", "qwen2-square"), folder / "native")
    code, answer = convert("native", "hf", folder / "native", folder / "back", "--verify")
    assert code == 0, answer
    return folder / "native", folder / "back"


def planted(exported: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = safetensors.torch.load_file(exported / "model.safetensors")
    change(tensors)
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("error", WEIGHTS)
def test_error_planted_in_an_export_is_found(tmp_path: Path, exported: tuple[Path, Path], error: str) -> None:
    result = planted(exported[1], tmp_path / "planted", WEIGHTS[error])
    code, answer = convert("native", "hf", exported[0], result, "--verify-only")
    assert (code, answer["verify"]["equal"]) == (1, False), answer
    # The same error in a native checkpoint.
    convert("hf", "native", result, tmp_path / "native")
    code, answer = convert("hf", "native", exported[1], tmp_path / "native", "--verify-only")
    assert (code, answer["verify"]["equal"]) == (1, False), answer


@pytest.mark.parametrize("error", LOST)
def test_tensor_that_an_export_lacks_or_has_too_much_is_named(
    tmp_path: Path, exported: tuple[Path, Path], error: str
) -> None:
    change, message = LOST[error]
    result = planted(exported[1], tmp_path / "planted", change)
    with pytest.raises(CheckpointError, match=message):
        convert("native", "hf", exported[0], result, "--verify-only")


@pytest.mark.parametrize("error", CONFIGS)
def test_wrong_frequencies_of_an_export_are_found(tmp_path: Path, exported: tuple[Path, Path], error: str) -> None:
    result = planted(exported[1], tmp_path / "planted", lambda tensors: None)
    config = json.loads((result / "config.json").read_text())
    config["rope_parameters"] |= CONFIGS[error]
    config.pop("rope_theta", None)
    config.pop("rope_scaling", None)
    (result / "config.json").write_text(json.dumps(config))
    code, answer = convert("native", "hf", exported[0], result, "--verify-only")
    assert (code, answer["verify"]["equal"]) == (1, False), answer


FOREIGN: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "gate and up swapped": (
        "megatron",
        lambda s: s["decoder.layers.mlp.linear_fc1.weight"].copy_(
            s["decoder.layers.mlp.linear_fc1.weight"].roll(112, dims=1)
        ),
    ),
    "matrix transposed": (
        "megatron",
        lambda s: s["decoder.layers.self_attention.linear_proj.weight"][1].copy_(
            s["decoder.layers.self_attention.linear_proj.weight"][1].t().clone()
        ),
    ),
    "projections not in groups": (
        "megatron",
        lambda s: s["decoder.layers.self_attention.linear_qkv.weight"].copy_(
            s["decoder.layers.self_attention.linear_qkv.weight"].unflatten(1, (2, 6, 8)).transpose(1, 2).flatten(1, 3)
        ),
    ),
    "gate and up exchanged": (
        "torchtitan",
        lambda s: s.update(
            {
                "layers.0.feed_forward.w1.weight": s["layers.0.feed_forward.w3.weight"],
                "layers.0.feed_forward.w3.weight": s["layers.0.feed_forward.w1.weight"],
            }
        ),
    ),
    "rotary features half a head apart": (
        "torchtitan",
        lambda s: s["layers.0.attention.qkv_linear.wq.weight"].copy_(
            s["layers.0.attention.qkv_linear.wq.weight"].unflatten(0, (8, -1, 2)).transpose(1, 2).flatten(0, 2)
        ),
    ),
}


@pytest.mark.parametrize("error", FOREIGN)
def test_error_planted_in_a_checkpoint_of_another_program_is_found(tmp_path: Path, error: str) -> None:
    kind, change = FOREIGN[error]
    convert("hf", "native", saved(tmp_path / "hf", "llama-llama3"), tmp_path / "native")
    assert convert("native", kind, tmp_path / "native", tmp_path / kind, "--verify")[0] == 0
    metadata = dcp.FileSystemReader(tmp_path / kind).read_metadata().state_dict_metadata
    state: Tensors = {name: torch.empty(kept.size) for name, kept in metadata.items()}  # type: ignore[union-attr]
    dcp.load(state, checkpoint_id=tmp_path / kind, no_dist=True)
    change(state)
    dcp.save(state, checkpoint_id=tmp_path / "planted", no_dist=True)
    note = json.loads((tmp_path / kind / "keepwarm.json").read_text())
    (tmp_path / "planted/keepwarm.json").write_text(json.dumps(note))
    code, answer = convert("native", kind, tmp_path / "native", tmp_path / "planted", "--verify-only")
    assert (code, answer["verify"]["equal"]) == (1, False), answer
    note["model"]["rope_theta"] *= 10
    (tmp_path / kind / "keepwarm.json").write_text(json.dumps(note))
    assert convert("native", kind, tmp_path / "native", tmp_path / kind, "--verify-only")[0] == 1


def test_checkpoint_of_torchtitan_before_0_3_is_read(tmp_path: Path) -> None:
    convert("hf", "native", saved(tmp_path / "hf", "llama"), tmp_path / "native")
    convert("native", "torchtitan", tmp_path / "native", tmp_path / "titan")
    metadata = dcp.FileSystemReader(tmp_path / "titan").read_metadata().state_dict_metadata
    state: Tensors = {name: torch.empty(kept.size) for name, kept in metadata.items()}  # type: ignore[union-attr]
    dcp.load(state, checkpoint_id=tmp_path / "titan", no_dist=True)
    assert {"lm_head.weight", "layers.1.attention.qkv_linear.wk.weight"} <= state.keys()
    older = {name.replace("qkv_linear.", "").replace("lm_head", "output"): value for name, value in state.items()}
    dcp.save(older, checkpoint_id=tmp_path / "older", no_dist=True)
    config = str(tmp_path / "hf/config.json")
    code, answer = convert(
        "torchtitan", "native", tmp_path / "older", tmp_path / "back", "--config", config, "--verify"
    )
    assert (code, answer["verify"]["equal"]) == (0, True)
    assert convert("native", "native", tmp_path / "native", tmp_path / "back", "--verify-only")[0] == 0


def test_text_says_what_differs_and_where(tmp_path: Path, exported: tuple[Path, Path]) -> None:
    words = ["--from", "native", "--to", "hf", str(exported[0]), "--verify-only"]
    done = CliRunner().invoke(app, [*words, str(exported[1])], catch_exceptions=False)
    assert done.exit_code == 0
    assert "logits of 64 tokens: equal; largest difference " in done.stdout
    result = planted(exported[1], tmp_path / "planted", WEIGHTS["gate and up swapped"])
    done = CliRunner().invoke(app, [*words, str(result)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "NOT EQUAL (at position " in done.stdout
    assert CliRunner().invoke(app, [*words, str(result), "--tolerance", "100"]).exit_code == 0


def test_prompt_is_fixed_and_lies_all_over_the_vocabulary() -> None:
    found = prompt(128_256, 128)
    assert found[:4].tolist() == [79266, 30277, 109543, 60554]
    assert (len(found.unique()), int(found.min()) < 2000, int(found.max()) > 126_000) == (128, True, True)


def test_value_that_is_not_a_number_is_the_largest_difference() -> None:
    logits = torch.randn(3, 5)
    broken = logits.clone()
    broken[2, 1] = float("nan")
    for one, two in ((logits, broken), (broken, logits)):
        found = found_in(one, two, 1e9, None)
        assert (found.equal, found.position, found.token) == (False, 2, 1)
    assert found_in(logits, logits, 0.0, None).equal


def test_tolerance_follows_from_the_dtypes() -> None:
    assert allowed({"F32"}, {"BF16"}) == allowed({"BF16", "F32"}, {"BF16", "F32"}) == 1e-4
    assert allowed({"F32"}, {"BF16", "F32"}) == 1e-1
    assert allowed({"F32"}, {"F16", "F32"}) == 1e-2


def test_weights_of_one_layer_alone_are_in_memory() -> None:
    kind, changes = CASES["llama"]
    whole = hf_model(kind, changes | {"num_hidden_layers": 5})
    weights = {name: value.detach().clone() for name, value in whole.named_parameters()}
    tokens = prompt(96, 16)[None]
    with torch.no_grad():
        expected = whole(tokens).logits
    for module in whole.modules():
        for key in module._parameters:
            module._parameters[key] = None if module._parameters[key] is None else _absent(module._parameters[key])
    held: list[set[str]] = []

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        held.append({name for name, value in whole.named_parameters() if not value.is_meta})
        return weights[name]

    with torch.no_grad(), streamed(whole, load):
        assert torch.equal(whole(tokens).logits, expected)
    assert len(held) == len(weights)
    assert max(len({name.rpartition(".self_attn")[0] or name for name in names if "layers" in name}) for names in held)
    for names in held:
        assert len({name.split(".")[2] if ".layers." in name else name for name in names}) <= 1
    assert all(value.is_meta for value in whole.parameters())


def _absent(value: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
