"""Systematic Reed-Solomon code over GF(2^8): k data chunks, m parity chunks, any k of the k + m recover the rest.

`keepwarm.ft.codec.galois.generator_matrix` is the matrix. XOR is the case m = 1 and mirroring the case k = 1, byte for
byte.

Chunk indices: 0..k-1 are data, k..k+m-1 parity. All buffers belong to the caller, are read and written in place and
are never copied or kept. Inputs may be read-only. Several threads may use one `Codec` concurrently, and each
call runs on the calling thread: the agent codes different stripes in parallel.
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
    """The code (k, m) on this machine. See the module for the matrix and buffer ownership."""

    def __init__(self, k: int, m: int, *, kernel: str = AUTO) -> None:
        """Create a code with k >= 1 data and m >= 0 parity chunks, k + m <= 32; `kernel` is `auto` or a name in
        `keepwarm.ft.codec.kernel.KERNELS`.

        `auto` selects ISA-L, or NumPy with one warning per process if ISA-L is not usable.

        Raises:
            CodecError: if k or m is out of range.
            KernelUnavailable: if the kernel requested by name is unknown or not usable.
        """
        if k < 1 or m < 0 or k + m > MAX_CHUNKS:
            raise CodecError(f"code ({k}, {m}): needs k >= 1, m >= 0 and k + m <= {MAX_CHUNKS}, k + m is {k + m}")
        self.k, self.m = k, m
        self.kernel = _choose_kernel(kernel)
        self._decoder = functools.lru_cache(maxsize=1024)(self._prepare_decoder)
        self._rows = tuple(ParityRow(self.kernel, row) for row in generator_matrix(k, m)[k:])

    def row(self, index: int) -> "ParityRow":
        """Return row `index` (0..m-1) of the parity, with which one stripe member computes parity chunk k + index."""
        return self._rows[index]

    def decode(self, present: Mapping[int, Buffer], missing: Mapping[int, Buffer]) -> None:
        """Write the chunks `missing` from any k or more chunks `present`; both may be data or parity.

        All buffers may be the same sub-range of their chunks. If more than k are present, data is preferred, then the
        lowest parity indices; the others are not read.

        Raises:
            CodecError: if fewer than k are present, an index is out of range or on both sides, or a buffer is unusable.
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
        """Prepare wanted = G[wanted] G[survivors]^-1 survivors, as survivors = G[survivors] data."""
        generator = generator_matrix(self.k, self.m)
        inverse = invert(generator[list(survivors)])
        return self.kernel.prepare(matmul(generator[list(wanted)], inverse))


class ParityRow:
    """One row of a code's parity: computed by a single stripe member from the data of the k others."""

    def __init__(self, kernel: Kernel, coefficients: Bytes) -> None:
        self._kernel, self._columns = kernel, len(coefficients)
        self._tables = kernel.prepare(coefficients[None, :])

    def accumulate(self, parity: Buffer, column: int, data: Buffer) -> None:
        """Add bytes of data chunk `column` to the parity bytes at the same place. Both have the same size.

        Parity starts as zeros and is complete once every byte of all k columns has been added, in any order and split.
        Adding the same bytes twice removes them again: the caller must add each exactly once.

        Raises:
            CodecError: if there is no such column, the sizes differ, or a buffer is unusable.
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
    """Return the kernel of this name, one per process, after checking that it computes the same as NumPy.

    Raises:
        KernelUnavailable: if the name is unknown, or the kernel is unusable on this machine or computes otherwise.
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
    """Return whether a kernel matches the reference. Parity over another field would only show at recovery."""
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
    """Raise if an output overlaps another buffer, because it would be coded from half-written bytes."""
    starts = [(address, False) for _, address, _ in inputs] + [(address, True) for _, address, _ in outputs]
    starts.sort()
    end, end_is_output = 0, False
    for start, is_output in starts if size else ():
        if start < end and (is_output or end_is_output):
            raise CodecError("an output buffer overlaps another buffer of the same call")
        # Of two overlapping inputs the later one reaches further, as all have the same length.
        end, end_is_output = start + size, is_output
