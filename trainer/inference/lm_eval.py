"""`keepwarm eval`: run the LM Evaluation Harness (EleutherAI's lm-eval), offline by default."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.folder import CONFIG, NOTE, strict_json_file
from keepwarm.trainer.data.preprocess.text import PART_BYTES, documents, parts
from keepwarm.trainer.errors import CheckpointError, DataError, OutputError, SpecError
from keepwarm.trainer.job.url import local_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_TEXT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


Tasks = Annotated[list[str] | None, typer.Option(help="Task of lm-eval; repeatable.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Compute the perplexity of a .jsonl or .txt (.gz, .zst) file."),
]
Shots = Annotated[int | None, typer.Option(min=0, help="Number of examples before each question; default: the task's.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `keepwarm eval`; the command's help explains each."""

    path: Path
    tasks: list[str] | None
    text: list[str] | None
    include_path: Path | None
    limit: int | None
    shots: int | None
    batch_size: int
    dtype: str
    device: str
    online: bool
    output: Path | None
    as_json: bool


@app.command()
def command(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, checkpoint or Hugging Face folder.")],
    tasks: Tasks = None,
    text: Texts = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of documents per task.")] = None,
    shots: Shots = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of requests to compute at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "",
    online: Annotated[bool, typer.Option("--online", help="Let lm-eval download the data of its tasks.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export the newest checkpoint of a run and score it with the LM Evaluation Harness.

    keepwarm eval runs/demo --text german=configs/corpora/handbook_de.valid.jsonl.zst

    keepwarm eval exports/demo --include-path my_tasks --tasks my_task --json

    keepwarm eval runs/large --tasks hellaswag --tasks arc_easy --online
    """
    run(Options(**locals()))


def run(options: Options) -> None:
    """Score what the options name and print the result.

    Raises:
        SpecError, DataError, CheckpointError, OutputError: nothing was scored, or the result cannot be written.
    """
    texts = [_named_file(one) for one in options.text or []]
    if not options.tasks and not texts:
        raise SpecError("nothing to score: give --tasks or --text NAME=FILE")
    if options.output is not None and options.output.exists():
        raise OutputError(f"{options.output}: exists already; remove it or choose another --output")
    with tempfile.TemporaryDirectory(prefix="keepwarm-eval-") as name:
        work = Path(name)
        with _offline(work) if not options.online else contextlib.nullcontext():
            local = [_text_task(task, file, work) for task, file in texts]
            model, note = _model(options.path, work)
            found = _scores(model, [*(options.tasks or []), *local], options)
    result = {"path": str(options.path), **note, "tasks": found}
    if options.output is not None:
        try:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"{options.output}: {error.strerror}") from error
    if options.as_json:
        typer.echo(json.dumps(result))
    else:
        _print(found)


def _print(found: Mapping[str, Mapping[str, float | str]]) -> None:
    for task, scores in found.items():
        for metric, value in scores.items():
            typer.echo(
                f"{task:<24} {metric:<24} {value:.4f}" if isinstance(value, float) else f"{task} {metric} {value}"
            )


def _named_file(text: str) -> tuple[str, Path]:
    name, sign, file = text.partition("=")
    if not sign or not name.isidentifier() or not file:
        raise SpecError(f"--text {text}: write NAME=FILE, the name as in Python")
    return name, Path(file)


def _text_task(name: str, file: Path, work: Path) -> dict[str, Any]:
    """Return a task for the documents of a file: the log-likelihood of each in windows of the model's context."""
    lines = 0
    with (work / f"{name}.jsonl").open("w") as written:
        for part in parts(file, PART_BYTES):
            for document in documents(part, "text"):
                written.write(json.dumps({"text": document}) + "\n")
                lines += 1
    if not lines:
        raise DataError(f"{file}: holds no text")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(work / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in _TEXT_METRICS],
    }


def _model(path: Path, work: Path) -> tuple[Path, dict[str, Any]]:
    """Return a Hugging Face folder with a tokenizer, and what is known about its origin."""
    path = local_path(path)
    if (path / CONFIG).is_file():
        folder = path
    else:
        folder = work / "model"
        to_huggingface(path, folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise DataError(
            f"{path}: has no tokenizer that transformers reads, and lm-eval needs one; a run has one when its "
            "data.tokenizer is a tokenizer.json"
        )
    note = strict_json_file(folder / NOTE).get("parent", {}) if (folder / NOTE).is_file() else {}
    return folder, {key: note[key] for key in ("run", "step") if key in note}


@contextlib.contextmanager
def _offline(work: Path) -> Iterator[None]:
    """Prevent downloads and leave no cache behind. Must be entered before any of the libraries is imported."""
    changes = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _scores(model: Path, tasks: Sequence[str | dict[str, Any]], options: Options) -> dict[str, dict[str, float | str]]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SpecError(f"lm-eval is not installed: pip install 'keepwarm[eval]' ({error})") from error
    named = any(isinstance(task, str) for task in tasks)
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": options.dtype},
            tasks=list(tasks),
            task_manager=TaskManager(
                include_path=None if options.include_path is None else str(options.include_path),
                include_defaults=named,
            ),
            num_fewshot=options.shots,
            limit=options.limit,
            batch_size=options.batch_size,
            device=options.device or _device(),
            log_samples=False,
            bootstrap_iters=0,
        )
    except OSError as error:
        hint = "" if options.online else "; nothing is downloaded without --online"
        raise CheckpointError(f"{model}: {str(error).splitlines()[0]}{hint}") from error
    except (KeyError, ValueError) as error:
        known = "--tasks must name tasks of lm-eval, or of --include-path"
        raise SpecError(f"{str(error.args[0] if error.args else error).splitlines()[0]}; {known}") from error
    scores = (found or {}).get("results", {})
    return {str(task): dict(_metrics(values)) for task, values in scores.items()}


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float | str]]:
    """Yield metrics, omitting filters that did nothing and errors that were not estimated."""
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and value not in ("N/A", None):
            yield metric if kind == "none" else key, float(value)


if __name__ == "__main__":
    tool.run(app)
