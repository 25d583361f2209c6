"""Folders with fewer bits: FP8 in blocks is read as the numbers that it stands for, all else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

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


def test_folder_quantised_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    published("qwen3", tmp_path)
    for method in ("bitsandbytes", "gptq", "awq", "mxfp4", "compressed-tensors"):
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
