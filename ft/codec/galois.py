"""Arithmetic over GF(2^8) in NumPy: the field, the code's matrices, and the reference kernel.

The field is GF(2)[x] / (x^8 + x^4 + x^3 + x^2 + 1), 0x11d, as in ISA-L: addition is XOR.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.kernel import Region
from keepwarm.ft.errors import CodecError

POLYNOMIAL = 0x11D

# Keeps the kernel's blocks of input, product and sum in the lower cache levels.
_PIECE = 1 << 15


def region_of(buffer: Any) -> Region:
    """Return the region of a whole buffer. Raise `TypeError`, `ValueError` or `BufferError` if it is unusable."""
    view = memoryview(buffer)
    size = view.nbytes
    if not view.c_contiguous:
        raise ValueError("its items are not next to each other")
    if not size:
        return view, 0, 0
    if view.readonly:
        return view, int(np.frombuffer(view, np.uint8).ctypes.data), size
    # Several times faster than NumPy's own way to get the address, which matters in calls of a few milliseconds.
    return view, ctypes.addressof(ctypes.c_char.from_buffer(view)), size


def generator_matrix(k: int, m: int) -> Bytes:
    """Return the (k + m, k) matrix that maps data to all chunks: the identity above m parity rows.

    The parity rows are those of ISA-L's `gf_gen_cauchy1_matrix`, 1 / (i xor j) for i in k..k+m-1 and j in 0..k-1, with
    columns, then rows, scaled so that the first row and the first column are ones. Scaling keeps every square submatrix
    of a Cauchy matrix invertible (Bloemer et al., 1995: An XOR-based erasure-resilient coding scheme), so any k rows of
    the result are invertible.
    """
    i, j = np.arange(k, k + m)[:, None], np.arange(k)[None, :]
    cauchy = INVERSES[i ^ j]
    by_column = PRODUCTS[INVERSES[cauchy[:1]], cauchy]
    normalised = PRODUCTS[INVERSES[by_column[:, :1]], by_column]
    return np.concatenate([np.eye(k, dtype=np.uint8), normalised])


def matmul(a: Bytes, b: Bytes) -> Bytes:
    """Return the matrix product over the field."""
    product: Bytes = np.bitwise_xor.reduce(PRODUCTS[a[:, :, None], b[None, :, :]], axis=1)
    return product


def invert(matrix: Bytes) -> Bytes:
    """Return the inverse of a square matrix over the field, by Gauss-Jordan elimination.

    Raises:
        CodecError: if the matrix is singular, which never occurs for k chunks of this code.
    """
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        pivots = np.flatnonzero(work[column:, column])
        if not pivots.size:
            raise CodecError(f"singular matrix of {size} rows")
        pivot = column + int(pivots[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = PRODUCTS[INVERSES[work[column, column]], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= PRODUCTS[factors[:, None], work[column][None, :]]
    return work[:, size:]


def _field_tables() -> tuple[Bytes, Bytes]:
    """Return all 256 x 256 products and the inverses (0 stands for that of 0), from powers of the generator x."""
    exponents, logarithms = np.zeros(510, np.uint8), np.zeros(256, np.int64)
    power = 1
    for exponent in range(255):
        exponents[exponent] = exponents[exponent + 255] = power
        logarithms[power] = exponent
        power <<= 1
        if power & 0x100:
            power ^= POLYNOMIAL
    products = exponents[logarithms[:, None] + logarithms[None, :]]
    products[0, :] = products[:, 0] = 0
    inverses = exponents[255 - logarithms]
    inverses[0] = 0
    return products, inverses


PRODUCTS, INVERSES = _field_tables()


class NumpyKernel:
    """Reference kernel: one table lookup per byte and coefficient."""

    name = "numpy"

    def prepare(self, rows: Bytes) -> Bytes:
        """Return coefficient rows of shape (outputs, inputs) unchanged."""
        return rows

    def multiply(self, tables: Bytes, inputs: Sequence[Region], outputs: Sequence[Region]) -> None:
        """Compute outputs[i] = sum over j of rows[i, j] * inputs[j]."""
        sources = [_bytes(source) for source in inputs]
        for row, output in zip(tables, outputs, strict=True):
            target = _bytes(output)
            target[...] = 0
            for coefficient, source in zip(row, sources, strict=True):
                _add_product(int(coefficient), source, target)

    def accumulate(self, tables: Bytes, column: int, source: Region, output: Region) -> None:
        """Compute output += rows[0, column] * source."""
        _add_product(int(tables[0, column]), _bytes(source), _bytes(output))


def _bytes(region: Region) -> Bytes:
    return np.frombuffer(region[0], np.uint8)


def _add_product(coefficient: int, source: Bytes, output: Bytes) -> None:
    product = np.empty(min(_PIECE, source.size), np.uint8)
    for at in range(0, source.size, _PIECE):
        piece, target = source[at : at + _PIECE], output[at : at + _PIECE]
        # Every byte is a valid index; "clip" avoids NumPy's buffered, checked pass.
        np.take(PRODUCTS[coefficient], piece, out=product[: piece.size], mode="clip")
        np.bitwise_xor(target, product[: piece.size], out=target)
