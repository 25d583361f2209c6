"""A folder of 1B parameters through files on disk: converted both ways and verified, in the memory of a few tensors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.trainer.convert.huggingface.config import config_for, with_dtype
from keepwarm.trainer.convert.recipes import source_shapes
from keepwarm.trainer.convert.safetensors_file import write_tensors
from keepwarm.trainer.job.files import load_model
from keepwarm.trainer.model.spec import ModelSpec

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]
NEEDED = 9 * 10**9
"""Bytes on the disk: the folder, its checkpoint and its export."""


def large_folder(folder: Path, spec: ModelSpec) -> int:
    """Write a folder with random bf16 weights, tensor by tensor; return the bytes of its weights."""
    folder.mkdir()
    config = with_dtype(config_for(spec, "llama"), "BF16")
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(1)
    shapes = source_shapes(spec, "llama")

    def blocks(name: str) -> Iterator[Any]:
        elements, at = int(np.prod(shapes[name])), 0
        while at < elements:
            count = min(elements - at, 1 << 22)
            values = random.standard_normal(count, np.float32) * 0.02 + float("norm" in name)
            yield (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            at += count

    write_tensors(folder / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}, blocks)
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def peak(*arguments: str) -> tuple[int, Any]:
    """Most bytes that a command has had in memory, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, answer, memory = done.stdout.strip().splitlines()
    return int(memory), json.loads(answer)


_MEASURED = """
import os, resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def test_folder_of_1b_parameters_is_converted_and_verified_in_bounded_memory(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip(f"{NEEDED / 1e9:.0f} GB of disk are needed")
    spec = load_model("llama-3.2-1b")
    size = large_folder(tmp_path / "hf", spec)
    largest = 4 * spec.vocabulary_size * spec.hidden_size
    idle, _ = peak("-c", "import torch, transformers.models.llama.modeling_llama; print(0)")
    found = {"weights": size, "idle": idle}
    try:
        for given, wanted, start, end in (("hf", "native", "hf", "native"), ("native", "hf", "native", "back")):
            words = ("--from", given, "--to", wanted, str(tmp_path / start), str(tmp_path / end), "--json")
            found[f"convert to {wanted}"], _ = peak("-m", "keepwarm", "convert", *words)
            found[f"verify {wanted}"], answer = peak("-m", "keepwarm", "convert", *words, "--verify-only")
            assert answer["verify"]["equal"], answer
            assert found[f"convert to {wanted}"] < size / 5
            # The largest tensor as it is stored and in fp32, and logits of two models.
            assert found[f"verify {wanted}"] < idle + 2 * largest < idle + size, found
            print(answer["verify"])
    finally:
        print({name: f"{value / 1e9:.2f} GB" for name, value in found.items()})
        for name in ("hf", "native", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
