"""Generation from a checkpoint: the tokens that transformers generates, and draws that follow the distribution."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.errors import DataError
from keepwarm.trainer.inference.generate import Sampling, choose
from keepwarm.trainer.inference.sample import app
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.layouts import Case, whole_state, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = ModelSpec(
    layers=2,
    hidden_size=32,
    heads=4,
    kv_heads=2,
    ffn_size=48,
    vocabulary_size=260,
    max_sequence_length=24,
    tied_embeddings=True,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of four ranks."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(
        json.dumps(
            {"model": MODEL.model_dump(mode="json"), "data": {"sources": {"a": "a.jsonl"}, "tokenizer": "bytes"}}
        )
    )
    case = Case(spec=ParallelSpec(tensor=2, pipeline=2))
    state = {
        name: tensor * 0.3 if tensor.is_floating_point() else tensor for name, tensor in whole_state(MODEL, 2).items()
    }
    write_checkpoint(folder / "checkpoints", MODEL, case, state, {"run": {"tokenizer": "bytes"}})
    return folder


def sample(*arguments: str) -> dict[str, object]:
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return dict(json.loads(ran.stdout))


def test_sample_greedy_equals_transformers(tmp_path: Path, run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        to_huggingface(run, tmp_path / "hf")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        ids = torch.tensor([list(b"The node")])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
    found = sample(str(run), "--prompt", "The node", "--temperature", "0", "--tokens", "14")
    tokens = found["samples"][0]["tokens"]  # type: ignore[index]
    assert len(set(tokens)) > 3
    assert tokens == theirs[0, ids.shape[1] :].tolist()


def test_sample_seed_fixes_text_beyond_context_length(run: Path) -> None:
    texts = [
        sample(str(run), "--prompt", "a", "--prompt", "", "--tokens", "30", "--seed", seed)["samples"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sample_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(0)
    random = torch.Generator().manual_seed(0)

    def shares(**options: float | int) -> torch.Tensor:
        sampling = Sampling(**options)  # type: ignore[arg-type]
        draws = torch.tensor([choose(logits, sampling, random) for _ in range(4000)])
        return draws.bincount(minlength=4) / 4000

    # Three standard deviations of a share are at most 0.024.
    for found, expected in (
        (shares(temperature=1.0), logits.softmax(0)),
        (shares(temperature=0.5), (2 * logits).softmax(0)),
        (shares(temperature=1.0, top_k=2), torch.cat([logits[:2].softmax(0), torch.zeros(2)])),
        (shares(temperature=1.0, top_p=0.7), torch.cat([logits[:2].softmax(0), torch.zeros(2)])),
        (shares(temperature=1.0, top_p=1e-9), torch.tensor([1.0, 0, 0, 0])),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_sample_unknown_or_foreign_tokenizer_is_refused(tmp_path: Path, run: Path) -> None:
    (tmp_path / "copied").mkdir()
    for file in (run / "checkpoints/iter_0000001").iterdir():
        os.link(file, tmp_path / "copied" / file.name)
    manifest = tmp_path / "copied/manifest.json"
    table = json.loads(manifest.read_text())
    table["meta"]["model"] = MODEL.model_dump(mode="json")
    manifest.unlink()
    manifest.write_text(json.dumps(table))
    with pytest.raises(DataError, match="give --tokenizer"):
        sample(str(tmp_path / "copied"), "--prompt", "a")
    assert sample(str(tmp_path / "copied"), "--prompt", "a", "--tokenizer", "bytes", "--tokens", "1")["step"] == 1
