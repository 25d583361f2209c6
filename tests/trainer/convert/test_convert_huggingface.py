"""Hugging Face folders in and out: equal logits, equal bytes, equal config fields, through files on disk."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.dcp.exporter import to_dcp
from keepwarm.trainer.convert.huggingface.config import computes, config_for
from keepwarm.trainer.convert.huggingface.exporter import model_spec_of, to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.convert.importer import from_dcp
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from keepwarm.trainer.data.tokenizer import load_tokenizer
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.families.registry import FAMILIES
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.foreign.hf_models import CASES, hf_model, old_dialect
from tests.support.foreign.huggingface_oracle import rearranged
from tests.support.layouts import Case as LayoutCase
from tests.support.layouts import whole_state, write_checkpoint
from tests.support.models import load_parameters
from tests.support.runs.registered import registered

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def saved(folder: Path, case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    kind, changes = CASES[case]
    model = hf_model(kind, changes, dtype)
    model.save_pretrained(folder, **options)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """What a folder's safetensors files hold, by their own library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def native_parameters(path: Path) -> dict[str, torch.Tensor]:
    with NativeCheckpoint(path) as native:
        found = {}
        for name, tensor in native.tensors.items():
            data = b"".join(bytes(block) for block in native.blocks(name, 1 << 20))
            flat = torch.frombuffer(bytearray(data), dtype=TORCH[tensor.dtype])
            found[name.removeprefix("model.")] = flat.reshape(tensor.shape)
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


def assert_config_kept(one: Path, two: Path) -> None:
    """Every field is there with its value, and `transformers` reads the same config from both."""
    from transformers import AutoConfig

    before, after = (json.loads((path / "config.json").read_text()) for path in (one, two))
    assert {name: after.get(name, "absent") for name in before} == before
    read = [AutoConfig.from_pretrained(path).to_dict() for path in (one, two)]
    for config in read:
        config.pop("_name_or_path", None)
        # An attribute that nothing reads once it is in rope_parameters.
        if config["model_type"] == "gpt_neox":
            config.pop("rope_theta", None)
    assert read[0] == read[1]


OLD = (
    "llama-llama3", "olmo3-yarn", "smollm3", "llama-head-dim-theta", "mistral-window", "qwen2-window", "olmo2",
    "gpt-neox-half-rotary", "gpt2",
)  # fmt: skip


@pytest.mark.parametrize(("case", "dialect"), [*((case, 5) for case in CASES), *((case, 4) for case in OLD)])
def test_huggingface_round_trip_keeps_bytes_and_logits(tmp_path: Path, case: str, dialect: int) -> None:
    theirs = saved(tmp_path / "hf", case)
    if dialect == 4:
        old_dialect(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    publication.verify(tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    assert_config_kept(tmp_path / "hf", tmp_path / "back")

    spec = model_spec_of(NativeCheckpoint(tmp_path / "native"))
    ours = Decoder(spec, seed=1).build_stage(range(spec.layers), embed=True, head=True)
    parameters = native_parameters(tmp_path / "native")
    load_parameters(ours, parameters)
    tokens = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(5))
    again = type(theirs).from_pretrained(tmp_path / "back", attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.1
        assert (ours(tokens) - expected).abs().max() <= 1e-5
        assert torch.equal(again(tokens).logits, expected)
    # The oracle for the rearrangement: whole tensors, by torch.
    oracle = rearranged(tensors_of(tmp_path / "hf"), CASES[case][0], spec)
    assert_same(parameters, {name: oracle[name].contiguous() for name in parameters})


@pytest.mark.parametrize("case", CASES)
def test_huggingface_export_of_native_model_gets_equivalent_config(tmp_path: Path, case: str) -> None:
    """As a model trained here: its checkpoint holds a spec and nothing of Hugging Face's."""
    from transformers import AutoModelForCausalLM

    theirs = saved(tmp_path / "hf", case)
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    manifest = json.loads((tmp_path / "native/manifest.json").read_text())
    del manifest["meta"]["huggingface"]
    (tmp_path / "native/manifest.json").write_text(json.dumps(manifest))
    to_huggingface(tmp_path / "native", tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="sdpa").eval()
    tokens = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    from_huggingface(tmp_path / "back", tmp_path / "native2")
    specs = [model_spec_of(NativeCheckpoint(tmp_path / name)) for name in ("native", "native2")]
    assert computes(specs[0]) == computes(specs[1])


@pytest.mark.parametrize("case", ["qwen3", "gpt-neox", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_huggingface_half_precision_and_shards_round_trip(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    saved(tmp_path / "hf", case, dtype, max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    done = to_huggingface(tmp_path / "native", tmp_path / "back", max_shard_bytes=30_000)
    assert len(done["files"]) > 2
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "back").values())
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    assert_config_kept(tmp_path / "hf", tmp_path / "back")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == dtype


@pytest.mark.parametrize("case", ["llama-grouped-tied", "gpt-neox", "gpt2"])
def test_huggingface_dtypes_are_converted_as_by_torch(tmp_path: Path, case: str) -> None:
    saved(tmp_path / "hf", case)
    original = tensors_of(tmp_path / "hf")
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        from_huggingface(tmp_path / "hf", tmp_path / f"in-{name}", dtype=name)
        to_huggingface(tmp_path / f"in-{name}", tmp_path / f"out-{name}")
        assert_same(tensors_of(tmp_path / f"out-{name}"), {key: t.to(dtype) for key, t in original.items()})
        assert json.loads((tmp_path / f"out-{name}/config.json").read_text())["dtype"] == str(dtype).split(".")[1]
        to_huggingface(tmp_path / f"in-{name}", tmp_path / f"wide-{name}", dtype="F32")
        assert_same(tensors_of(tmp_path / f"wide-{name}"), {key: t.to(dtype).float() for key, t in original.items()})


def test_huggingface_value_too_large_for_dtype_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "hf", "llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"final_norm\.weight: 1e\+05 does not fit into float16"):
        from_huggingface(tmp_path / "hf", tmp_path / "native", dtype="F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_huggingface_extra_files_are_carried_and_others_named(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "llama")
    texts = {"tokenizer.json": '{"a": 1}', "merges.txt": "a b", "tokenizer.model": "\0x", "LICENSE": "free"}
    for name, text in texts.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"\x80\x04N.")
    done = from_huggingface(tmp_path / "hf", tmp_path / "native")
    assert done["left"] == ["pytorch_model.bin"]
    assert set(done["carried"]) == {*texts, "generation_config.json"}
    to_huggingface(tmp_path / "native", tmp_path / "back")
    for name, text in texts.items():
        assert (tmp_path / "back" / name).read_text() == text
    (tmp_path / "native/huggingface/merges.txt").write_text("b a")
    with pytest.raises(CheckpointError, match=r"merges\.txt: does not match"):
        to_huggingface(tmp_path / "native", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_huggingface_export_of_a_run_has_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text("the tokenizer goes along with the model that knows its tokens " * 20)
    train_tokenizer([text], tmp_path / "words.json", 270)
    ours = load_tokenizer(str(tmp_path / "words.json"))
    spec = ModelSpec(
        layers=1, hidden_size=16, heads=2, ffn_size=16, vocabulary_size=ours.vocabulary_size, max_sequence_length=24
    )
    data = {"sources": {}, "tokenizer": str(tmp_path / "words.json")}
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"model": spec.model_dump(mode="json"), "data": data}))
    meta: dict[str, object] = {"run": {"tokenizer": ours.hash}}
    write_checkpoint(run / "checkpoints", spec, LayoutCase(spec=ParallelSpec()), whole_state(spec, 1), meta)
    done = to_huggingface(run, tmp_path / "hf")
    assert done["carried"] == ["tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the model")["input_ids"] == ours.encode_batch(["the model"])[0]
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.end_of_document, 24)
    assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == ours.end_of_document

    (tmp_path / "words.json").unlink()
    done = to_huggingface(run, tmp_path / "without")
    assert any("no such tokenizer file" in one for one in done["left"])


def test_huggingface_every_artefact_names_its_parent(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "llama")
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    meta = read_manifest(tmp_path / "native").meta
    assert meta["parent"]["path"] == str(tmp_path / "hf")
    assert meta["weights_only"]
    to_huggingface(tmp_path / "native", tmp_path / "back")
    assert json.loads((tmp_path / "back/keepwarm.json").read_text())["parent"]["path"] == str(tmp_path / "native")
    from_huggingface(tmp_path / "hf", tmp_path / "half", dtype="BF16")
    assert read_manifest(tmp_path / "half").meta["parent"]["hash"] == meta["parent"]["hash"]


def test_huggingface_tied_head_copy_is_kept_and_a_different_one_refused(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "llama-grouped-tied")
    file = tmp_path / "hf/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"}
    )
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    safetensors.torch.save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        from_huggingface(tmp_path / "hf", tmp_path / "other")


def test_huggingface_gpt2_without_prefix_and_with_constants_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "gpt2")
    file = tmp_path / "hf/model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file, {"format": "pt"})
    done = from_huggingface(tmp_path / "hf", tmp_path / "native")
    assert "h.0.attn.bias" in done["left"] or "transformer.h.0.attn.bias" in done["left"]
    to_huggingface(tmp_path / "native", tmp_path / "back")
    back = {name.removeprefix("transformer."): t for name, t in tensors_of(tmp_path / "back").items()}
    assert_same(back, tensors)


def test_huggingface_model_without_a_class_is_refused_by_field(tmp_path: Path) -> None:
    spec = ModelSpec(layers=1, hidden_size=8, heads=2, ffn_size=8, vocabulary_size=8, max_sequence_length=8)
    assert config_for(spec)["model_type"] == "llama"
    with pytest.raises(SpecError, match=r"model\.parallel_residual"):
        config_for(spec.model_copy(update={"parallel_residual": True}))
    with pytest.raises(SpecError, match=r"model\.qk_norm"):
        config_for(spec.model_copy(update={"qk_norm": "head"}), "llama")


def test_huggingface_conversion_imports_no_torch(tmp_path: Path) -> None:
    saved(tmp_path / "hf", "qwen2", torch.bfloat16)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from keepwarm.trainer.convert.__main__ import command, Format\n"
        "command(Path(sys.argv[1]), Path(sys.argv[2]), Format.HF, Format.NATIVE, 'fp32', '5GB', as_json=True)\n"
        "command(Path(sys.argv[2]), Path(sys.argv[3]), Format.NATIVE, Format.HF, 'bf16', '1MB', as_json=True)\n"
        "assert 'torch' not in sys.modules\n"
    )
    places = [str(tmp_path / name) for name in ("hf", "native", "back")]
    ran = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)["tensors"] for line in ran.stdout.splitlines()] == [27, 27]
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))


@pytest.mark.parametrize("section", ["manifest", "export"])
def test_spec_stored_by_an_earlier_version_is_read(tmp_path: Path, section: str) -> None:
    saved(tmp_path / "hf", "olmo2")
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    spec = model_spec_of(NativeCheckpoint(tmp_path / "native"))
    assert spec.norm_position == "post"
    file = tmp_path / "native/manifest.json"
    if section == "export":
        to_dcp(tmp_path / "native", tmp_path / "dcp", kind="dcp")
        file = tmp_path / "dcp/keepwarm.json"
    table = json.loads(file.read_text())
    model = table["meta"]["model"] if section == "manifest" else table["model"]
    model["norm_position"] = "after"
    file.write_text(json.dumps(table))
    if section == "export":
        from_dcp(tmp_path / "dcp", tmp_path / "again", kind="dcp")
        assert model_spec_of(NativeCheckpoint(tmp_path / "again")) == spec
    else:
        assert model_spec_of(NativeCheckpoint(tmp_path / "native")) == spec
        to_huggingface(tmp_path / "native", tmp_path / "back")


def test_export_skips_families_of_other_packages_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(layers=1, hidden_size=8, heads=2, ffn_size=8, vocabulary_size=8, max_sequence_length=8)

    class Misregistered(FAMILIES.get("llama")):  # type: ignore[misc]
        model_type = "another"

    broken = EntryPoint("broken", "no.such.module:Family", FAMILIES.group)
    monkeypatch.setattr(FAMILIES, "_offered", {"broken": broken})
    assert "broken" in FAMILIES.names()
    with registered(FAMILIES, "misregistered", Misregistered):
        assert config_for(spec)["model_type"] == "llama"
        # Asked for one that fits none, all are tried.
        with pytest.raises(SpecError, match=r"model\."):
            config_for(spec.model_copy(update={"parallel_residual": True}))
