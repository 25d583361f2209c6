"""Tokenize parts beside one another, in threads of this process or in processes of their own. Torch-free.

`tokenizers` and SentencePiece have threads of their own, so that one process uses every core for them; two parts are
under way in it, since one can be read and stored while the other is being encoded. More processes help where many cores
wait for the Python around the library.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.data.preprocess.text import TextPart
from keepwarm.trainer.data.preprocess.token_parts import write_part
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer

CORES_OF_A_PROCESS = 8
BYTES_OF_A_PROCESS = 256 << 20
FEWEST_BYTES_OF_A_PROCESS = 32 << 20
"""A process takes a second to start, in which another one that uses the same cores encodes some 5 MB."""
_THREADS = "RAYON_NUM_THREADS"

Submit = Callable[[Path, TextPart, str], "Future[None]"]


def process_count(most: int | None, input_bytes: int, cores: int) -> int:
    """Return a number of processes: at most `most`, and at most one for every 32 MiB of input; if it is None, one for
    every 8 cores and 256 MiB."""
    if most is None:
        return max(1, min(cores // CORES_OF_A_PROCESS, input_bytes // BYTES_OF_A_PROCESS))
    return max(1, min(most, input_bytes // FEWEST_BYTES_OF_A_PROCESS))


@contextmanager
def part_pool(processes: int, tokenizer: Tokenizer) -> Iterator[Submit]:
    """Yield a function that tokenizes a part in the background. At an error or interruption, parts that have begun are
    finished and kept, and the others never begin."""
    pool: ProcessPoolExecutor | ThreadPoolExecutor
    if processes == 1:
        pool = ThreadPoolExecutor(2)

        def submit(path: Path, part: TextPart, key: str) -> "Future[None]":
            return pool.submit(write_part, path, part, tokenizer, key)

    else:
        threads = max(1, cores() // processes)
        pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(tokenizer.name, tokenizer.end_of_document, threads),
        )

        def submit(path: Path, part: TextPart, key: str) -> "Future[None]":
            with _interrupts_blocked():
                return pool.submit(_work, path, part, key)

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread, and for good in the processes that it starts meanwhile: Ctrl-C reaches the whole
    process group, and the parent decides what it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


_worker_tokenizer: Tokenizer


def _begin_worker(name: str, end_of_document: int, threads: int) -> None:
    global _worker_tokenizer
    os.environ.setdefault(_THREADS, str(threads))
    _worker_tokenizer = load_tokenizer(name, end_of_document)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(ExitCode.FAULT)


def _work(path: Path, part: TextPart, text_key: str) -> None:
    write_part(path, part, _worker_tokenizer, text_key)
