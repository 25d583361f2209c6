"""Systematic Reed-Solomon code over GF(2^8): k data chunks, m parity chunks, any k of the k + m give back the rest.

`keepwarm.ft.codec.galois.generator_matrix` has the matrix; XOR is the case m = 1 and mirroring the case k = 1, byte for
byte.

Chunk indices: 0..k-1 are data, k..k+m-1 parity. All buffers belong to the caller, are read and written in place and
are never copied or kept; read-only ones serve as inputs. One `Codec` may be used by several threads at once, and each
call works on the thread that makes it: the agent codes different stripes in parallel.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.galois import NumpyKernel, generator_matrix, invert, matmul, region_of
from keepwarm.ft.codec.kernel import AUTO, KERNELS, Kernel, Region
from keepwarm.ft.errors import CodecError, KernelUnavailable
from keepwarm.registry import UnknownName, UnusableComponent

Buffer = Any  # anything with a C-contiguous buffer: memoryview, mmap, bytearray, bytes, ndarray

MAX_CHUNKS = 32


class Codec:
    """The code (k, m) on this machine; see the module for the matrix and who owns the buffers."""

    def __init__(self, k: int, m: int, *, kernel: str = AUTO) -> None:
        """k >= 1 data and m >= 0 parity chunks, k + m <= 32; `kernel` is `auto` or a name in
        `keepwarm.ft.codec.kernel.KERNELS`.

        `auto` takes ISA-L, or NumPy with one warning per process where ISA-L is not usable.

        Raises:
            CodecError: k or m is out of range.
            KernelUnavailable: the kernel asked for by name is unknown or not usable.
        """
        if k < 1 or m < 0 or k + m > MAX_CHUNKS:
            raise CodecError(f"code ({k}, {m}): needs k >= 1, m >= 0 and k + m <= {MAX_CHUNKS}, k + m is {k + m}")
        self.k, self.m = k, m
        self.kernel = _choose_kernel(kernel)
        self._decoder = functools.lru_cache(maxsize=1024)(self._prepare_decoder)
        self._rows = tuple(ParityRow(self.kernel, row) for row in generator_matrix(k, m)[k:])

    def row(self, index: int) -> "ParityRow":
        """Return row 0..m-1 of the parity, by which one member of a stripe makes its parity chunk k + index."""
        return self._rows[index]

    def decode(self, present: Mapping[int, Buffer], missing: Mapping[int, Buffer]) -> None:
        """Write the chunks `missing` from any k or more chunks `present`, data or parity either way.

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
        size = _common_size(inputs + outputs)
        _refuse_overlap(inputs, outputs, size)
        if outputs and size:
            self.kernel.multiply(self._decoder(survivors, tuple(wanted)), inputs, outputs)

    def _prepare_decoder(self, survivors: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
        """Survivors = G[survivors] data, so wanted = G[wanted] G[survivors]^-1 survivors."""
        generator = generator_matrix(self.k, self.m)
        inverse = invert(generator[list(survivors)])
        return self.kernel.prepare(matmul(generator[list(wanted)], inverse))


class ParityRow:
    """One row of the parity of a code: what a single member of a stripe makes, out of the data of the k others."""

    def __init__(self, kernel: Kernel, coefficients: Bytes) -> None:
        self._kernel, self._columns = kernel, len(coefficients)
        self._tables = kernel.prepare(coefficients[None, :])

    def accumulate(self, parity: Buffer, column: int, data: Buffer) -> None:
        """Add bytes of data chunk `column` into the parity bytes of the same place; both have one size.

        Parity starts as zeros and is complete when every byte of all k columns has been added, in any order and cut.
        Adding the same bytes twice takes them out again: the caller sees to it that each enters once.

        Raises:
            CodecError: there is no such column, the sizes differ, or a buffer does not serve.
        """
        if not 0 <= column < self._columns:
            raise CodecError(f"there is no data chunk {column}, but {self._columns} of them from 0 on")
        source = _region("data chunk", column, data)
        target = _region("parity chunk", self._columns, parity, write=True)
        size = _common_size([source, target])
        _refuse_overlap([source], [target], size)
        if size:
            self._kernel.accumulate(self._tables, column, source, target)


def _choose_kernel(name: str) -> Kernel:
    if name != AUTO:
        return load_kernel(name)
    try:
        return load_kernel("isal")
    except KernelUnavailable as error:
        _warn_of_fallback(str(error))
        return load_kernel("numpy")


@functools.cache
def load_kernel(name: str) -> Kernel:
    """Return the kernel of this name, one for the process, once it has shown that it computes what NumPy does.

    Raises:
        KernelUnavailable: there is none of this name, it cannot be used on this machine, or it computes otherwise.
    """
    try:
        kernel = KERNELS.get(name)()
        agrees = _agrees(kernel)
    except KernelUnavailable:
        raise
    except (UnknownName, UnusableComponent) as error:
        raise KernelUnavailable(f"snapshot.code.kernel: {error}") from error
    except Exception as error:
        raise KernelUnavailable(f"codec kernel {name!r} cannot be used: {error}") from error
    if not agrees:
        raise KernelUnavailable(f"codec kernel {name!r} does not compute the products of GF(2^8), 0x11d")
    return kernel


def _agrees(kernel: Kernel) -> bool:
    """Whether a kernel computes the bytes of the reference. Parity of another field would show at recovery only."""
    rows = generator_matrix(3, 2)[3:]
    data = np.random.default_rng(0).integers(0, 256, (3, 1000), np.uint8)
    inputs = [region_of(chunk) for chunk in data]

    def computed(by: Kernel) -> Bytes:
        sums = np.zeros((3, 1000), np.uint8)
        by.multiply(by.prepare(rows), inputs, [region_of(out) for out in sums[:2]])
        one_row = by.prepare(rows[1:])
        for column, source in enumerate(inputs):
            by.accumulate(one_row, column, source, region_of(sums[2]))
        return sums

    return np.array_equal(computed(kernel), computed(NumpyKernel()))


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"erasure coding falls back to NumPy, 10 to 60 times slower than ISA-L: {reason}", RuntimeWarning, stacklevel=4
    )


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


def _refuse_overlap(inputs: list[Region], outputs: list[Region], size: int) -> None:
    """An output that shares memory with another buffer would be coded from half-written bytes."""
    starts = [(address, False) for _, address, _ in inputs] + [(address, True) for _, address, _ in outputs]
    starts.sort()
    end, end_is_output = 0, False
    for start, is_output in starts if size else ():
        if start < end and (is_output or end_is_output):
            raise CodecError("an output buffer overlaps another buffer of the same call")
        # Of two inputs that overlap, the later one reaches further: all are equally long.
        end, end_is_output = start + size, is_output
