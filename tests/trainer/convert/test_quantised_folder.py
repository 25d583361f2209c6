"""Folders with fewer bits: FP8 in blocks and MXFP4 are read as the numbers that they stand for, all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.folder import HuggingFaceFolder
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.errors import CheckpointError, SpecError
from keepwarm.trainer.model.transformers.resolve import resolved
from tests.support.transformers.models import config_of, spec_from
from tests.trainer.convert.test_transformers_folder import published


def quantised(folder: Path, block: int) -> None:
    """Make the linear weights of a folder FP8 with a factor for each block, as published ones are."""
    weights, made = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim != 2:
            made[name] = weight.bfloat16()
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        factors = torch.empty(rows, columns)
        values = torch.empty(weight.shape)
        for row in range(rows):
            for column in range(columns):
                part = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
                factors[row, column] = weight[part].abs().max() / 448
                values[part] = weight[part] / factors[row, column]
        made[name], made[f"{name}_scale_inv"] = values.to(torch.float8_e4m3fn), factors
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]}, dtype="bfloat16")


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("origin", ["native", "transformers"])
def test_fp8_folder_is_read_as_transformers_reads_it(origin: str, tmp_path: Path) -> None:
    published("qwen3", tmp_path / "published")
    quantised(tmp_path / "published", 16)
    stored, theirs = load_file(tmp_path / "published" / "model.safetensors"), Fp8Dequantize(None)
    section = resolved({"transformers": str(tmp_path / "published")})
    assert "quantization_config" not in section["config"]
    from_huggingface(
        tmp_path / "published", tmp_path / "ours", model=spec_from(section["config"]) if origin != "native" else None
    )
    to_huggingface(tmp_path / "ours", tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    for name, value in exported.items():
        factors, expected = stored.get(f"{name}_scale_inv"), stored[name]
        if factors is not None:
            expected = theirs._dequantize_one(expected, factors, torch.bfloat16)
        assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, expected), name


def test_every_fp8_number_and_ragged_blocks_are_read_exactly_in_any_piece(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[: 37 * 20].view(37, 20)
    factors = torch.rand(3, 2) + 0.5
    weight = codes.view(torch.float8_e4m3fn)
    save_file({"w.weight": weight, "w.weight_scale_inv": factors}, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3", "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wide = factors.repeat_interleave(16, 0)[:37].repeat_interleave(16, 1)[:, :20]
    expected = (weight.float() * wide).bfloat16().view(torch.uint8).flatten().numpy().tobytes()
    with HuggingFaceFolder(tmp_path) as folder:
        for start, size in ((0, 37 * 20 * 2), (6, 2), (38, 900), (1000, 480)):
            out = torch.empty(size, dtype=torch.uint8).numpy()
            folder.read("w.weight", start, out)
            found = torch.frombuffer(bytearray(out), dtype=torch.bfloat16)
            wanted = torch.frombuffer(bytearray(expected[start : start + size]), dtype=torch.bfloat16)
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


def packed(folder: Path) -> None:
    """Make the linear weights of a folder MXFP4 in the layout of gpt-oss, where their columns are whole blocks."""
    weights, made = load_file(folder / "model.safetensors"), {}
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim != 2 or weight.shape[1] % 32:
            made[name] = weight.bfloat16()
            continue
        groups = weight.float().unflatten(1, (-1, 32))
        powers = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        scaled = groups / torch.exp2(powers)[..., None]
        codes = (scaled.abs()[..., None] - steps).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
        made[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        made[f"{name}_scales"] = (powers + 127).to(torch.uint8)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config=MXFP4, dtype="bfloat16")


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What transformers reads, which has weights of experts the other way round."""
    return convert_moe_packed_tensors(blocks[None], scales[None])[0].T.contiguous()


@pytest.mark.parametrize("origin", ["native", "transformers"])
def test_mxfp4_folder_is_read_as_transformers_reads_it(origin: str, tmp_path: Path) -> None:
    published("qwen3", tmp_path / "published")
    before = load_file(tmp_path / "published" / "model.safetensors")
    packed(tmp_path / "published")
    stored = load_file(tmp_path / "published" / "model.safetensors")
    section = resolved({"transformers": str(tmp_path / "published")})
    from_huggingface(
        tmp_path / "published", tmp_path / "ours", model=spec_from(section["config"]) if origin != "native" else None
    )
    to_huggingface(tmp_path / "ours", tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert sum(name.endswith("_blocks") for name in stored) == 4 * 6
    for name, value in exported.items():
        if name in stored:
            assert torch.equal(value, stored[name]), name
            continue
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, unpacked(stored[f"{name}_blocks"], stored[f"{name}_scales"])), name
        assert (value - before[name]).norm() < 0.2 * before[name].norm(), name


def test_every_mxfp4_number_is_read_exactly_in_any_piece(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255).view(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    save_file({"w.weight_blocks": blocks, "w.weight_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "quantization_config": MXFP4}))
    expected = unpacked(blocks, scales)
    with HuggingFaceFolder(tmp_path) as folder:
        assert (folder.dtype("w.weight"), folder.tensors["w.weight"].shape) == ("BF16", (255, 512))
        for start, size in ((0, 255 * 512), (3, 1), (19, 450), (100_000, 240)):
            out = torch.empty(2 * size, dtype=torch.uint8).numpy()
            folder.read("w.weight", 2 * start, out)
            found = torch.frombuffer(bytearray(out), dtype=torch.bfloat16)
            assert torch.equal(found, expected.flatten()[start : start + size])


def test_mxfp4_scale_that_is_no_number_makes_no_numbers(tmp_path: Path) -> None:
    blocks, scales = torch.zeros(1, 1, 16, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "quantization_config": MXFP4}))
    out = torch.empty(64, dtype=torch.uint8).numpy()
    with HuggingFaceFolder(tmp_path) as folder:
        folder.read("w", 0, out)
    assert torch.frombuffer(bytearray(out), dtype=torch.bfloat16).isnan().all()


U8 = torch.uint8
MISFITS = {
    "no scales": ({"w_blocks": torch.zeros(2, 1, 16, dtype=U8)}, "w_blocks has no w_scales beside it"),
    "no blocks": ({"w_scales": torch.zeros(2, 1, dtype=U8)}, "w_scales has no w_blocks beside it"),
    "other shape": (
        {"w_blocks": torch.zeros(2, 1, 16, dtype=U8), "w_scales": torch.zeros(2, 2, dtype=U8)},
        r"w_blocks is U8 \[2, 1, 16\], w_scales U8 \[2, 2\]; a matrix",
    ),
    "experts": (
        {"w_blocks": torch.zeros(2, 2, 1, 16, dtype=U8), "w_scales": torch.zeros(2, 2, 1, dtype=U8)},
        r"w_blocks is U8 \[2, 2, 1, 16\]",
    ),
    "other dtype": ({"w_blocks": torch.zeros(2, 1, 16), "w_scales": torch.zeros(2, 1, dtype=U8)}, "w_blocks is F32"),
    "weight beside them": (
        {"w": torch.zeros(2, 32), "w_blocks": torch.zeros(2, 1, 16, dtype=U8), "w_scales": torch.zeros(2, 1, dtype=U8)},
        "w stands beside w_blocks",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_mxfp4_tensors_that_do_not_fit_are_named(misfit: str, tmp_path: Path) -> None:
    tensors, reason = MISFITS[misfit]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "quantization_config": MXFP4}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {reason}"):
        HuggingFaceFolder(tmp_path)


def test_folder_quantised_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    published("qwen3", tmp_path)
    for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors"):
        change(tmp_path, quantization_config={"quant_method": method})
        with pytest.raises(CheckpointError, match=f"quantised with {method}; only fp8") as refused:
            HuggingFaceFolder(tmp_path)
        assert "\n" not in str(refused.value)
        with pytest.raises(SpecError, match=f"quantised with {method}"):
            resolved({"transformers": str(tmp_path)})


def test_fp8_weight_without_its_factors_is_refused(tmp_path: Path) -> None:
    config = {**config_of("qwen3"), "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = torch.zeros(20, 20).to(torch.float8_e4m3fn)
    for factors, reason in (({}, "is no F8_E4M3 matrix with"), ({"a.weight_scale_inv": torch.ones(1, 1)}, "not")):
        save_file({"a.weight": weight, **factors}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"a\.weight.*{reason}"):
            HuggingFaceFolder(tmp_path)
