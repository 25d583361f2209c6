"""`keepwarm sample`: continue a prompt with a trained model."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.convert.huggingface.tokenizer import find_tokenizer
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TopK = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Sample from the k likeliest tokens only.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability only.")]

EndOfDocument = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="Token at which to stop; default: the end of a document.")
]


@app.command()
def command(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or checkpoint.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeatable.")],
    prefix: Annotated[
        str,
        typer.Option(help="Text to put before each prompt, such as a control token; special tokens are recognized."),
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0: always the likeliest token.")
    ] = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random numbers.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: `bytes`, tokenizer.json or .model; default: the run's.")
    ] = None,
    end_of_document: EndOfDocument = None,
    dtype: Annotated[str, typer.Option(help="Compute in fp32 or bf16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="Device: cpu or cuda; default: cuda if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a prompt with the newest checkpoint of a run.

    keepwarm sample runs/demo --prompt "The first thing to know"

    keepwarm sample runs/demo/checkpoints/iter_0000300 --prompt "Die" --temperature 0 --json

    keepwarm sample runs/polite --prefix "<|good|>" --prompt "You"
    """
    if not 0 < top_p <= 1:
        raise SpecError(f"--top-p {top_p}: must be above 0 and at most 1")
    if dtype not in ("fp32", "bf16"):
        raise SpecError(f"--dtype {dtype}: not known; it may be fp32 or bf16")
    import torch

    from keepwarm.trainer.inference.generate import Sampling, generate, load_model

    where = _device(device)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    with NativeCheckpoint(path) as native:
        words = (
            find_tokenizer(native, end_of_document) if tokenizer is None else load_tokenizer(tokenizer, end_of_document)
        )
        part = load_model(native, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, device=where)
        found: dict[str, Any] = {"path": str(native.path), "step": native.manifest.step, "samples": []}
    _check_fits(words, words.largest_id, part.spec.vocabulary_size)
    for text in prompt:
        ids = [*words.encode_marked(prefix), *words.encode_batch([text])[0]] or [words.end_of_document]
        _check_fits(words, max(ids), part.spec.vocabulary_size)
        drawn = generate(part, ids, sampling, seed=seed, stop=lambda token: token == words.end_of_document)
        new = list(itertools.islice(drawn, tokens))
        sample = {"prompt": text, "text": words.decode(new), "tokens": new, "ended": len(new) < tokens}
        found["samples"].append(sample)
        if not as_json:
            typer.echo(f"{text}{sample['text']}\n")
    if as_json:
        typer.echo(json.dumps(found))


def _tokenizer(native: NativeCheckpoint, name: str | None, end_of_document: str | None) -> Tokenizer:
    return find_tokenizer(native, end_of_document) if name is None else load_tokenizer(name, end_of_document)


def _check_fits(words: Tokenizer, id: int, vocabulary_size: int) -> None:
    if id >= vocabulary_size:
        raise DataError(
            f"{words.name}: has {words.vocabulary_size} tokens, the model knows {vocabulary_size}: "
            "give the one it was trained with as --tokenizer"
        )


def _device(name: str | None) -> Any:
    import torch

    try:
        return torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    except RuntimeError as error:
        raise CheckpointError(f"--device {name}: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(tool.run(app))
