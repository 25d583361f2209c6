"""`keepwarm data tokenize`: turn text into `.bin`, `.idx` and a `.json` sidecar. Resumable."""

import fcntl
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from keepwarm.exit_code import ExitCode
from keepwarm.trainer import tool
from keepwarm.trainer.data.indexed import Sidecar
from keepwarm.trainer.data.preprocess.text import TextPart, parts
from keepwarm.trainer.data.preprocess.token_parts import merge, part_path, write_part
from keepwarm.trainer.data.preprocess.tokenize_options import (
    DEFAULT_OPTIONS,
    GOOD_BAD,
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
    on_read: Callable[[int], None] = lambda _: None,
) -> Sidecar:
    """Write the documents of `inputs`, in order, to `prefix`.bin, .idx and .json.

    Every document is followed by the tokenizer's end-of-document token. The same input gives the same bytes, whatever
    the number of processes and however often the job was killed: finished parts are kept in `prefix`.parts.

    Args:
        inputs: `.jsonl` (one document per line) or `.txt` (one document per file), optionally with .gz or .zst.
        options: how to read the inputs, which documents to take and what to put before each.
        processes: number of tokenizing processes.
        on_read: called with the number of input bytes just read.

    Raises:
        DataError: an input or the tokenizer cannot be used; names the file, and the line.
        OutputError: the output exists, is being written by another process, or its folder cannot be written.
        UnrecoverableFault: a tokenizing process was killed.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    try:
        with _parts_folder(prefix) as folder:
            texts = (parts(path, options.part_bytes, options.keep, options.prefix) for path in inputs)
            paths = list(_tokenized(texts, folder, tokenizer, options.text_key, processes, on_read))
            sidecar = merge(folder, paths, prefix, tokenizer)
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


def _tokenized(
    texts: Iterable[Iterator[TextPart]],
    folder: Path,
    tokenizer: Tokenizer,
    text_key: str,
    processes: int,
    on_read: Callable[[int], None],
) -> Iterator[Path]:
    """Yield the paths of all parts, in order, each once it is finished."""
    with _workers(processes, tokenizer.name) as submit:
        running: deque[tuple[Path, Future[None] | None, int]] = deque()
        for text in texts:
            done = 0
            for part in text:
                target = part_path(folder, part, tokenizer, text_key)
                future = None if target.exists() else submit(target, part, tokenizer, text_key)
                running.append((target, future, part.read_bytes - done))
                done = part.read_bytes
                while len(running) > 2 * processes:
                    yield _finished(*running.popleft(), on_read)
        while running:
            yield _finished(*running.popleft(), on_read)


def _finished(path: Path, future: "Future[None] | None", read_bytes: int, on_read: Callable[[int], None]) -> Path:
    if future is not None:
        future.result()
    on_read(read_bytes)
    return path


_Submit = Callable[[Path, TextPart, Tokenizer, str], "Future[None] | None"]


@contextmanager
def _workers(processes: int, tokenizer_name: str) -> Iterator[_Submit]:
    """Yield a function that tokenizes a part, here or in another process."""
    if processes == 1:
        yield write_part
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(tokenizer_name,)
    )
    try:
        yield lambda path, part, _, text_key: pool.submit(_work, path, part, text_key)
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _begin_worker(tokenizer_name: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(tokenizer_name)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(ExitCode.FAULT)


def _work(path: Path, part: TextPart, text_key: str) -> None:
    write_part(path, part, _worker_tokenizer, text_key)


@app.command()
def command(
    input: Annotated[list[Path], typer.Option(help="Text file, .jsonl or .txt, plain, .gz or .zst; repeatable.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    tokenizer: Annotated[
        str, typer.Option(help="Tokenizer: `bytes`, a tokenizer.json or a SentencePiece .model.")
    ] = "bytes",
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
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = os.cpu_count() or 1,
    text_key: Annotated[str, typer.Option(help="Key of the text in each JSON line.")] = "text",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokenize text into Megatron's .bin and .idx files.

    JSON lines hold one document each, a .txt file is one document. If killed, run it again to continue.
    """
    options = TextOptions(
        text_key=text_key,
        keep=keep_from(input, score_key, min_score, top),
        prefix=prefix_from(prefix, control_key, control_threshold, control, unmarked),
    )
    sidecar = _with_progress(input, output_prefix, tokenizer, options, processes)
    if json:
        typer.echo(msgspec.json.encode({"prefix": str(output_prefix), **msgspec.structs.asdict(sidecar)}).decode())
    else:
        typer.echo(f"{output_prefix}: {sidecar.documents:,} documents, {sidecar.tokens:,} tokens ({sidecar.tokenizer})")


def _with_progress(
    inputs: Sequence[Path], output_prefix: Path, tokenizer: str, options: TextOptions, processes: int
) -> Sidecar:
    """Run `tokenize` with a progress bar on a terminal."""
    columns = (TextColumn("tokenize"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    total = sum(path.stat().st_size for path in inputs if path.is_file())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenize", total=total)
        return tokenize(
            inputs,
            output_prefix,
            tokenizer,
            options,
            processes=processes,
            on_read=lambda read: progress.advance(task, read),
        )


if __name__ == "__main__":
    tool.run(app)
