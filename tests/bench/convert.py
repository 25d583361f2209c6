"""Conversion of a model of 1 GB against copying its bytes and against transformers' own load and save.

Prints one JSON object: medians of seconds, ratios and peak memory, once for a folder in memory and once for one on
disk, where everybody waits for the same device. Every round copies before each conversion, so that a slow moment of the
machine meets all of them. `seconds` count from the end of the imports until the data are on disk; `command_seconds` are
those of the whole process. Memory is `anonymous` beyond the imports, and `resident`: the peak of the whole process,
mapped files included.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from keepwarm.trainer.convert.recipes import source_shapes
from keepwarm.trainer.convert.safetensors_file import write_tensors
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config

BLOCK = 16 << 20
ROUNDS = 3
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65536,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

OURS = """
import sys
from pathlib import Path
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
work = {"in": from_huggingface, "out": to_huggingface}[sys.argv[1]]
run = lambda: work(Path(sys.argv[2]), Path(sys.argv[3]))
"""
THEIRS = """
import sys
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
import os
def run():
    AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto").save_pretrained(sys.argv[3])
    for name in os.listdir(sys.argv[3]):
        descriptor = os.open(os.path.join(sys.argv[3], name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
"""
MEASURED = """
import json, threading, time
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
def anonymous():
    return status("RssAnon")
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
run()
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "anonymous": peak - before, "resident": status("VmHWM")}))
"""


def make_model(folder: Path) -> dict[str, int]:
    """A model folder with random bf16 weights; returns its size and that of its largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = source_shapes(model_spec_from_hf_config(CONFIG), "qwen3")
    random = np.random.default_rng(0)
    noise = (random.standard_normal(8 << 20, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}

    def blocks(name: str):  # type: ignore[no-untyped-def]
        for start in range(0, sizes[name], len(noise)):
            yield noise[: min(len(noise), sizes[name] - start)]

    write_tensors(folder / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()}, blocks)
    return {"bytes": sum(sizes.values()), "largest_tensor": max(sizes.values())}


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a file with blocks of 16 MB and to sync it."""
    block = memoryview(bytearray(BLOCK))
    began = time.perf_counter()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while count := read.readinto(block):
            written.write(block[:count])
        os.fsync(written.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def measured(code: str, *arguments: str | Path) -> dict[str, float]:
    """Seconds and peak anonymous bytes beyond the imports of a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", code + MEASURED, *map(str, arguments)]
    began = time.perf_counter()
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(ran.stdout.splitlines()[-1])) | {"command_seconds": time.perf_counter() - began}


def compare(where: str | None) -> dict[str, Any]:
    """All rounds in a folder in `where`."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        root = Path(name)
        model = make_model(root / "hf")
        weights = root / "hf/model.safetensors"
        runs: dict[str, list[dict[str, float]]] = {"in": [], "out": [], "transformers": []}
        copies: list[float] = []
        for _ in range(ROUNDS):
            copies.append(copy(weights, root / "copy"))
            runs["in"].append(measured(OURS, "in", root / "hf", root / "native"))
            copies.append(copy(weights, root / "copy"))
            runs["out"].append(measured(OURS, "out", root / "native", root / "back"))
            runs["transformers"].append(measured(THEIRS, "", root / "hf", root / "theirs"))
            for folder in ("native", "back", "theirs"):
                shutil.rmtree(root / folder)
        middle = {
            what: {field: statistics.median(run[field] for run in found) for field in found[0]}
            for what, found in runs.items()
        }
        theirs, copied = middle["transformers"], statistics.median(copies)
        result: dict[str, Any] = {"model": model, "copy_seconds": copied, **middle}
        result["anonymous_limit"] = 2 * model["largest_tensor"] + 300_000_000
        for way in ("in", "out"):
            ours = middle[way]
            result[f"{way}_ratios"] = {
                "throughput_of_copy": copied / ours["seconds"],
                "times_faster_than_transformers": theirs["seconds"] / ours["seconds"],
                "command_times_faster_than_transformers": theirs["command_seconds"] / ours["command_seconds"],
                "resident_of_transformers": ours["resident"] / theirs["resident"],
            }
        return result


def main() -> None:
    memory = "/dev/shm"
    result = {"load": os.getloadavg(), "disk": compare(os.environ.get("BENCH_FOLDER"))}
    if Path(memory).is_dir() and shutil.disk_usage(memory).free > 8 * 2**30:
        result["memory"] = compare(memory)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
