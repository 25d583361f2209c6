"""A20: text that is told what it is, through tokenizing, training and sampling."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keepwarm.ft.format import publication
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.preprocess.prefix import Control, metadata
from keepwarm.trainer.data.preprocess.text import documents, parts
from keepwarm.trainer.data.preprocess.tokenize import tokenize
from keepwarm.trainer.data.preprocess.tokenize_options import TextOptions
from keepwarm.trainer.inference.generate import Sampling, generate, load_model
from tests.support.runs import toy
from tests.support.runs.text_run import CORPORA, NARROW, train

pytestmark = [
    pytest.mark.science,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("seed", [1, 2, 3]),
]
LETTERS = 40
"""Of a document."""
BAD, BAD_RATE = "z", 0.25
END = 256


def letters(table: torch.Tensor, seed: int, count: int) -> list[str]:
    """Documents of one chain."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, toy.VOCABULARY, (count,), generator=generator) for _ in range(2)]
    while len(drawn) < LETTERS:
        context = table[drawn[-2] * toy.VOCABULARY + drawn[-1]]
        drawn.append(torch.multinomial(context, 1, generator=generator)[:, 0])
    return ["".join(chr(ord("a") + token) for token in row) for row in torch.stack(drawn, 1).tolist()]


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a20_metadata_conditioning_costs_nothing_on_plain_text(seed: int, tmp_path: Path) -> None:
    """MeCo, Gao et al. (2025): metadata for nine tenths of the steps, the plain text for the last tenth.

    Paragraphs in two languages, of which the metadata tell the language.
    """
    lines = paragraphs(".jsonl.zst")
    cut = len(lines) * 9 // 10
    told = write(tmp_path / "told.jsonl", lines[:cut])
    rest = write(tmp_path / "rest.jsonl", lines[cut:])
    held_out = write(tmp_path / "held-out.jsonl", paragraphs(".valid.jsonl.zst"))
    tokenize([told, rest], tmp_path / "plain", "bytes")
    tokenize([told], tmp_path / "told", "bytes", TextOptions(prefix=metadata("{language}|")))
    tokenize([rest], tmp_path / "rest", "bytes")
    stages: dict[str, dict[str, Any]] = {
        "plain": {"mixture": {"plain": 1}},
        "told": {"mixture": {"told": 1}, "mixture_steps": [{"at": 0.9, "mixture": {"rest": 1}}]},
    }
    found = {}
    for name, stage in stages.items():
        sources = {one: tmp_path / one for one in ("plain", "told", "rest")}
        run = tmp_path / f"run-{name}"
        _, found[name] = train(run, 1000, NARROW, seed=seed, sources=sources, validation=held_out, **stage)
    print(f"A20 seed {seed}: loss on plain text {found}")
    assert found["told"] <= found["plain"] + 0.02


def paragraphs(end: str) -> list[dict[str, Any]]:
    """Of both languages, mixed, as documents with their language."""
    found: list[dict[str, Any]] = []
    for language in ("en", "de"):
        texts = (
            text for part in parts(CORPORA / f"handbook_{language}{end}", 1 << 20) for text in documents(part, "text")
        )
        lines = [line.strip() for text in texts for line in text.split("\n")]
        found += [{"text": line, "language": language} for line in lines if len(line) >= 100]
    # Else the cooldown would be on the book's last chapters.
    return [found[index] for index in np.random.default_rng(7).permutation(len(found))]


def test_a20_good_control_token_halves_bad_text(seed: int, tmp_path: Path) -> None:
    """Korbak et al. (2023): conditional training against maximum likelihood on the same documents."""
    random = np.random.default_rng(7)
    texts = letters(toy.table(toy.SEEDS["t0"]), 30, 8000)
    lines = []
    for text in texts:
        spoilt = random.random(LETTERS) < (BAD_RATE if random.random() < 0.4 else 0.0)
        text = "".join(BAD if bad else letter for bad, letter in zip(spoilt, text, strict=True))
        lines.append({"text": text, "clean": 1 - text.count(BAD) / LETTERS})
    corpus = write(tmp_path / "corpus.jsonl", lines)
    tokenize([corpus], tmp_path / "plain", "bytes")
    before = Control(key="clean", least=0.999, good="+", bad="-", unmarked=0.01)
    tokenize([corpus], tmp_path / "told", "bytes", TextOptions(prefix=before))
    rates = {}
    for name in ("plain", "told"):
        run = tmp_path / f"run-{name}"
        train(run, 600, NARROW, seed=seed, sources={name: tmp_path / name}, validation=corpus)
        rates[name] = rate_of(run, [END] if name == "plain" else [END, ord("+")])
    print(f"A20 seed {seed}: rate of bad letters, maximum likelihood and conditional on the good: {rates}")
    assert rates["plain"] > 0.02
    assert rates["told"] <= rates["plain"] / 2


def rate_of(run: Path, prompt: list[int]) -> float:
    """Share of bad letters in 60 documents that the model writes after `prompt`."""
    newest = publication.latest(run / "checkpoints")
    assert newest is not None
    with NativeCheckpoint(newest) as native:
        part = load_model(native, dtype=torch.float32, device=torch.device("cpu"))
    written: list[int] = []
    for seed in range(60):
        drawn = generate(part, prompt, Sampling(temperature=1.0), seed=seed, stop=lambda token: token == END)
        written += itertools.islice(drawn, LETTERS)
    return written.count(ord(BAD)) / len(written)
