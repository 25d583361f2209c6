"""A small model trained on text by the product's own session, for experiments: what it lost before and after."""

import json
from pathlib import Path
from typing import Any

from keepwarm.trainer.job.files import shipped_configs
from keepwarm.trainer.loop.session import run_session

CORPORA = shipped_configs() / "corpora"
LENGTH, STEP = 64, 1024
"""Tokens of a sample, and of a step."""
NARROW = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_size": 172, "vocabulary_size": 260}


def train(
    folder: Path,
    steps: int,
    model: dict[str, Any],
    *,
    seed: int,
    sources: dict[str, Path],
    validation: Path,
    origin: Path | None = None,
    peak: float = 3e-3,
    tokenizer: Path | str = "bytes",
    length: int = LENGTH,
    **stage: Any,
) -> tuple[float, float]:
    """Train with a cosine down to a tenth of the peak; the loss on `validation` before and after, nats per token.

    Args:
        sources: all of the same weight, unless `stage` has a mixture.
        stage: more keys of the one stage.
    """
    lr = {"schedule": "cosine", "max": peak, "min": peak / 10, "warmup": 0.05}
    only = {"name": "only", "tokens": steps * STEP, "mixture": dict.fromkeys(sources, 1), "lr": lr}
    job = {
        "name": folder.name,
        "output": str(folder),
        "seed": seed,
        "model": {"max_sequence_length": LENGTH} | model,
        "data": {
            "sources": {name: str(path) for name, path in sources.items()},
            "validation": {"text": str(validation)},
            "tokenizer": str(tokenizer),
            "sequence_length": length,
        },
        "batch": {"global_batch_size": STEP // length, "micro_batch_size": STEP // length},
        "stages": [only | stage],
        "evaluation": {"samples": 8192 // length},
        "log": {"every": 10**6, "tensorboard": False},
        "init_from": None if origin is None else str(origin),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    spec = folder.with_name(f"{folder.name}.job.yaml")
    spec.write_text(json.dumps(job))
    assert run_session(spec, [], resume=False)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval"]["text"] for line in lines if "eval" in line]
    return losses[0], losses[-1]


def handbook(language: str) -> dict[str, Any]:
    """The embedded corpus, as arguments of `train`."""
    held_out = CORPORA / f"handbook_{language}.valid.jsonl.zst"
    return {"sources": {"text": CORPORA / f"handbook_{language}.jsonl.zst"}, "validation": held_out}
