"""Systematic Reed-Solomon code over GF(2^8): k data chunks, m parity chunks, any k of the k + m give back the rest.

`ft.galois.generator_matrix` has the matrix; XOR is the case m = 1 and mirroring the case k = 1, byte for byte.

Chunk indices: 0..k-1 are data, k..k+m-1 parity. All buffers belong to the caller, are read and written in place and
are never copied or kept; read-only ones serve as inputs. One `Codec` may be used by several threads at once.
"""

import functools
import os
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ft import isal
from ft.errors import CodecError, KernelUnavailable
from ft.galois import NumpyKernel, Region, Tables, generator_matrix, invert, matmul, region_of

Kernel = isal.IsalKernel | NumpyKernel
Buffer = Any  # anything with a C-contiguous buffer: memoryview, mmap, bytearray, bytes, ndarray

_Job = tuple[Callable[[int, int], None], tuple[int, int], "queue.SimpleQueue[BaseException | None]"]
"""What to do, on which range, and where to say that it is done."""

MAX_CHUNKS = 32

# Below this many bytes of input a second thread costs more than it gains.
_BYTES_PER_THREAD = 1 << 20
_CACHE_LINE = 64


class Codec:
    """The code (k, m) on this machine; see the module for the matrix and who owns the buffers."""

    def __init__(
        self,
        k: int,
        m: int,
        *,
        kernel: Literal["auto", "isal", "numpy"] = "auto",
        threads: int | None = None,
    ) -> None:
        """k >= 1 data and m >= 0 parity chunks, k + m <= 32; `threads` defaults to the cores of this process.

        `auto` takes ISA-L, or NumPy with one warning per process where ISA-L is not usable.

        Raises:
            CodecError: k, m or threads is out of range.
            KernelUnavailable: `isal` was asked for and is not usable.
        """
        if k < 1 or m < 0 or k + m > MAX_CHUNKS:
            raise CodecError(f"code ({k}, {m}): needs k >= 1, m >= 0 and k + m <= {MAX_CHUNKS}, k + m is {k + m}")
        if threads is not None and threads < 1:
            raise CodecError(f"threads = {threads}: needs at least one")
        self.k, self.m = k, m
        self.threads = threads or len(os.sched_getaffinity(0))
        self._kernel = _choose_kernel(kernel)
        self.kernel = self._kernel.name
        self._tables = self._kernel.prepare(generator_matrix(k, m)[k:])
        # Starts its threads at the first call that uses them; they end when the codec is collected.
        self._pool = _Threads(self.threads - 1) if self.threads > 1 else None

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Writes the m parity chunks of k data chunks, all of one size.

        Raises:
            CodecError: wrong number of chunks, unequal sizes, or a buffer that is not contiguous or not writable.
        """
        if len(data) != self.k or len(parity) != self.m:
            raise CodecError(f"code ({self.k}, {self.m}): got {len(data)} data and {len(parity)} parity chunks")
        inputs = [_region("data chunk", i, chunk) for i, chunk in enumerate(data)]
        outputs = [_region("parity chunk", i, chunk, write=True) for i, chunk in enumerate(parity, self.k)]
        self._multiply(self._tables, inputs, outputs)

    def update(self, parity: Sequence[Buffer], index: int, chunk: Buffer, offset: int = 0) -> None:
        """Adds data chunk `index`, or its bytes from `offset` on, to parity that started as zeros.

        Encoding is the sum over all k indices, in any order and in any cut into ranges. Adding the same bytes twice
        takes them out again: the caller sees to it that each range enters once.

        Raises:
            CodecError: no such data chunk, the range leaves the parity chunks, or a buffer does not serve.
        """
        if not 0 <= index < self.k or len(parity) != self.m:
            raise CodecError(f"code ({self.k}, {self.m}): got data chunk {index} and {len(parity)} parity chunks")
        source = _region("data chunk", index, chunk)
        whole = [_region("parity chunk", i, chunk, write=True) for i, chunk in enumerate(parity, self.k)]
        if not whole:
            return
        length, size = source[2], _common_size(whole)
        if not 0 <= offset <= size - length:
            raise CodecError(
                f"data chunk {index}: {length} bytes at offset {offset} leave parity chunks of {size} bytes"
            )
        _refuse_overlap([source], whole, length, offset)
        self._split(
            length,
            1 + self.m,
            lambda start, stop: self._kernel.accumulate(self._tables, index, source, whole, offset, start, stop),
        )

    def decode(self, present: Mapping[int, Buffer], missing: Mapping[int, Buffer]) -> None:
        """Writes the chunks `missing` from any k or more chunks `present`, data or parity either way.

        All buffers may be the same sub-range of their chunks. Of more than k present ones, data come first, then the
        lowest parity indices; the others are not read.

        Raises:
            CodecError: fewer than k present, an index out of range or on both sides, or a buffer does not serve.
        """
        known, wanted = sorted(present), sorted(missing)
        if stray := [i for i in known + wanted if not 0 <= i < self.k + self.m]:
            raise CodecError(f"code ({self.k}, {self.m}): there is no chunk {stray[0]}")
        if both := set(known) & set(wanted):
            raise CodecError(f"chunks {sorted(both)} are given as present and as missing")
        if len(known) < self.k:
            raise CodecError(f"code ({self.k}, {self.m}): {len(known)} chunks are left, any {self.k} are needed")
        survivors = tuple(known[: self.k])
        inputs = [_region("chunk", i, present[i]) for i in survivors]
        outputs = [_region("missing chunk", i, missing[i], write=True) for i in wanted]
        if outputs:
            self._multiply(_decoder(self._kernel, self.k, self.m, survivors, tuple(wanted)), inputs, outputs)

    def _multiply(self, tables: Tables, inputs: list[Region], outputs: list[Region]) -> None:
        size = _common_size(inputs + outputs)
        _refuse_overlap(inputs, outputs, size)
        if outputs:
            self._split(
                size,
                len(inputs) + len(outputs),
                lambda start, stop: self._kernel.multiply(tables, inputs, outputs, start, stop),
            )

    def _split(self, size: int, buffers: int, work: Callable[[int, int], None]) -> None:
        """Runs `work` on [0, size) cut into one range per thread; returns when all are done."""
        parts = min(self.threads, size * buffers // _BYTES_PER_THREAD)
        if self._pool is None or parts < 2:
            if size:
                work(0, size)
            return
        step = -(-size // parts // _CACHE_LINE) * _CACHE_LINE
        self._pool.run(work, [(start, min(start + step, size)) for start in range(0, size, step)])


class _Threads:
    """Threads that wait for ranges to work on: queues in C, as the calls take milliseconds. They end with this."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def run(self, work: Callable[[int, int], None], ranges: Sequence[tuple[int, int]]) -> None:
        """The first one on this thread; returns, or raises what one of them raised, when all are done."""
        self._start()
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for part in ranges[1:]:
            self._jobs.put((work, part, done))
        failures: list[BaseException | None] = []
        try:
            work(*ranges[0])
        finally:
            # The caller may free its buffers as soon as this returns or raises.
            failures += [done.get() for _ in ranges[1:]]
        for failure in failures:
            if failure is not None:
                raise failure

    def _start(self) -> None:
        if self._started:
            return
        with self._lock:
            if not self._started:
                for _ in range(self._count):
                    threading.Thread(target=_serve, args=(self._jobs,), name="codec", daemon=True).start()
                self._started = True

    def __del__(self) -> None:
        for _ in range(self._count):
            self._jobs.put(None)


def _serve(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        work, part, done = job
        try:
            work(*part)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        # The next job may be long in coming, and these keep the caller's buffers.
        del job, work, done


@functools.lru_cache(maxsize=1024)
def _decoder(kernel: Kernel, k: int, m: int, survivors: tuple[int, ...], wanted: tuple[int, ...]) -> Tables:
    """Survivors = G[survivors] data, so wanted = G[wanted] G[survivors]^-1 survivors."""
    generator = generator_matrix(k, m)
    inverse = invert(generator[list(survivors)])
    return kernel.prepare(matmul(generator[list(wanted)], inverse))


_NUMPY = NumpyKernel()


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"erasure coding falls back to NumPy, 20 to 60 times slower than ISA-L: {reason}", RuntimeWarning, stacklevel=4
    )


def _choose_kernel(kernel: Literal["auto", "isal", "numpy"]) -> Kernel:
    if kernel == "numpy":
        return _NUMPY
    try:
        return isal.load()
    except KernelUnavailable as error:
        if kernel == "isal":
            raise
        _warn_of_fallback(str(error))
        return _NUMPY


def _region(what: str, index: int, buffer: Buffer, *, write: bool = False) -> Region:
    try:
        region = region_of(buffer)
    except (TypeError, ValueError, BufferError) as error:
        raise CodecError(f"{what} {index}: not a contiguous buffer of bytes: {error}") from error
    if write and region[0].readonly:
        raise CodecError(f"{what} {index}: the buffer is read-only")
    return region


def _common_size(regions: list[Region]) -> int:
    sizes = {size for _, _, size in regions}
    if len(sizes) != 1:
        raise CodecError(f"chunks of one stripe have one size, got {sorted(sizes)} bytes")
    return sizes.pop()


def _refuse_overlap(inputs: list[Region], outputs: list[Region], size: int, shift: int = 0) -> None:
    """An output that shares memory with another buffer would be coded from half-written bytes.

    Of every buffer `size` bytes are meant, of outputs those from `shift` on.
    """
    starts = [(address, False) for _, address, _ in inputs]
    starts += [(address + shift, True) for _, address, _ in outputs]
    starts.sort()
    end, end_is_output = 0, False
    for start, is_output in starts if size else ():
        if start < end and (is_output or end_is_output):
            raise CodecError("an output buffer overlaps another buffer of the same call")
        # Of two inputs that overlap, the later one reaches further: all are equally long.
        end, end_is_output = start + size, is_output
