"""`keepwarm data tokenize`: turn text into `.bin`, `.idx` and a `.json` sidecar. Resumable."""

import fcntl
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from keepwarm.trainer import tool
from keepwarm.trainer.data.indexed import Sidecar
from keepwarm.trainer.data.preprocess.part_pool import Submit, cores, part_pool, process_count
from keepwarm.trainer.data.preprocess.progress import Observer, input_bytes, observer
from keepwarm.trainer.data.preprocess.text import TextPart, parts
from keepwarm.trainer.data.preprocess.token_parts import bad_lines, merge, part_path
from keepwarm.trainer.data.preprocess.tokenize_options import (
    DEFAULT_OPTIONS,
    GOOD_BAD,
    EndOfDocument,
    Inputs,
    Processes,
    SkipBadLines,
    TextOptions,
    keep_from,
    prefix_from,
)
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError, OutputError, UnrecoverableFault

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def tokenize(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_name: str,
    options: TextOptions = DEFAULT_OPTIONS,
    *,
    processes: int = 1,
    observer: Observer | None = None,
) -> Sidecar:
    """Write the documents of `inputs`, in order, to `prefix`.bin, .idx and .json.

    Every document is followed by the end-of-document token, which occurs nowhere else. The same input gives the same
    bytes, whatever the number of processes and however often the job was killed: finished parts are kept in
    `prefix`.parts.

    Args:
        inputs: JSON lines (one document per line) or `.txt` (one document per file), optionally with .gz or .zst.
        options: how to read the inputs, which documents to take, what to put before each and what after.
        processes: number of tokenizing processes; each uses its share of the cores.
        observer: follows the work.

    Raises:
        DataError: an input or the tokenizer cannot be used; names the file, and the line.
        OutputError: the output exists, is being written by another process, or its folder cannot be written.
        UnrecoverableFault: a tokenizing process was killed.
    """
    tokenizer = load_tokenizer(tokenizer_name, options.end_of_document)
    observer = Observer() if observer is None else observer
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    try:
        with _parts_folder(prefix) as folder:
            texts = (parts(path, options.part_bytes, options.selection) for path in inputs)
            with part_pool(processes, tokenizer) as submit:
                waiting = _submitted(texts, folder, tokenizer, options.text_key, submit)
                paths = list(_finished(waiting, 2 * processes, observer))
            sidecar = merge(folder, paths, prefix, tokenizer, observer)
            for part in folder.glob("*.npz"):
                part.unlink()
            return sidecar
    except OSError as error:
        where = error.filename or prefix.parent
        raise OutputError(f"{where}: cannot write: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise UnrecoverableFault(
            "a tokenizing process was killed, perhaps for lack of memory; run the same command again to continue, "
            "with fewer --processes if need be"
        ) from None


@contextmanager
def _parts_folder(prefix: Path) -> Iterator[Path]:
    """Yield the folder of finished parts, locked for the lifetime of this process."""
    if Path(f"{prefix}.idx").exists():
        raise OutputError(f"{prefix}.idx: exists already; remove it or choose another --output-prefix")
    folder = Path(f"{prefix}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder}: another process is writing {prefix}.bin; wait for it") from None
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        try:
            yield folder
        finally:
            if not any(folder.glob("*.npz")):
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A part that is written, or will be once `future` is done."""

    path: Path
    part: TextPart
    future: "Future[None] | None"
    new_bytes: int
    """Bytes of its file that were read since the part before it."""


def _submitted(
    texts: Iterable[Iterator[TextPart]], folder: Path, tokenizer: Tokenizer, text_key: str, submit: Submit
) -> Iterator[_Pending]:
    for text in texts:
        done = 0
        for part in text:
            path = part_path(folder, part, tokenizer, text_key)
            future = None if path.exists() else submit(path, part, text_key)
            yield _Pending(path, part, future, part.read_bytes - done)
            done = part.read_bytes


def _finished(waiting: Iterator[_Pending], ahead: int, observer: Observer) -> Iterator[Path]:
    """Yield the paths of all parts, in order, each once it is written; at most `ahead` are under way."""
    running: deque[_Pending] = deque()
    for pending in waiting:
        running.append(pending)
        if len(running) > ahead:
            yield _written(running.popleft(), observer)
    while running:
        yield _written(running.popleft(), observer)


def _written(pending: _Pending, observer: Observer) -> Path:
    if pending.future is not None:
        pending.future.result()
    if pending.part.selection.skip_bad_lines:
        observer.left_out(*bad_lines(pending.path, pending.part))
    observer.read(pending.new_bytes)
    return pending.path


@app.command()
def command(
    input: Inputs,
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    tokenizer: Annotated[
        str, typer.Option(help="Tokenizer: `bytes`, a tokenizer.json or a SentencePiece .model.")
    ] = "bytes",
    end_of_document: EndOfDocument = None,
    score_key: Annotated[
        str | None, typer.Option(help="Key of a score in each JSON line, to keep the best documents.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="With --score-key: minimum score to keep.")] = None,
    top: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --score-key: fraction of documents to keep.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help=r"Text before each document, without loss, such as 'URL: {url}\n\n' (MeCo).")
    ] = None,
    control_key: Annotated[
        str | None, typer.Option(help="Key of a score in each JSON line that selects a control token for the document.")
    ] = None,
    control_threshold: Annotated[
        float, typer.Option(help="With --control-key: minimum score of a good document.")
    ] = 0.0,
    control: Annotated[str, typer.Option(help="With --control-key: tokens for good and bad ones.")] = GOOD_BAD,
    unmarked: Annotated[
        float, typer.Option(min=0, max=1, help="With --control-key: fraction of documents without a control token.")
    ] = 0.01,
    skip_bad_lines: SkipBadLines = False,
    processes: Processes = None,
    text_key: Annotated[str, typer.Option(help="Key of the text in each JSON line.")] = "text",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokenize text into Megatron's .bin and .idx files.

    JSON lines hold one document each, a .txt file is one document. If killed, run it again to continue.
    """
    options = TextOptions(
        text_key=text_key,
        keep=keep_from(input, score_key, min_score, top, skip_bad_lines=skip_bad_lines),
        prefix=prefix_from(prefix, control_key, control_threshold, control, unmarked),
        skip_bad_lines=skip_bad_lines,
        end_of_document=end_of_document,
    )
    total = input_bytes(input)
    processes = process_count(processes, total, cores())
    with observer("tokenize", total) as seen:
        sidecar = tokenize(input, output_prefix, tokenizer, options, processes=processes, observer=seen)
    seen.report()
    if json:
        typer.echo(msgspec.json.encode({"prefix": str(output_prefix), **msgspec.structs.asdict(sidecar)}).decode())
    else:
        typer.echo(f"{output_prefix}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens ({sidecar.tokenizer})")


if __name__ == "__main__":
    tool.run(app)
