"""Binding to Intel ISA-L's erasure-code kernels, as bundled in the `pyeclib` wheel.

Only the block kernels are bound: pyeclib's own Python API copies every chunk and is more than ten times slower. ctypes
releases the GIL during each call.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec.kernel import Region
from keepwarm.ft.errors import KernelUnavailable

# Supported releases: 2.30 to 2.39.
MAJOR = 2
MINORS = range(30, 40)

# The kernels take their length as a C int.
MAX_LENGTH = 1 << 30

_pointer, _int = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "ec_init_tables": (_int, _int, _pointer, _pointer),
    "ec_encode_data": (_int, _int, _int, _pointer, _pointer, _pointer),
    "ec_encode_data_update": (_int, _int, _int, _int, _pointer, _pointer, _pointer),
}
# Table bytes per coefficient.
_TABLE = 32
_CACHE_LINE = 64


class Tables(NamedTuple):
    """ISA-L's multiplication tables for a matrix, of shape (outputs, inputs, 32), and their address."""

    array: Bytes
    address: int


class IsalKernel:
    """The loaded library. It holds only function pointers, so threads may share it."""

    name = "isal"

    def __init__(self, path: Path) -> None:
        """Load the library at `path` and check its version.

        Raises:
            KernelUnavailable: if it cannot be loaded, has no supported version, or lacks a function.
        """
        try:
            library = ctypes.CDLL(str(path))
            library.isal_get_version_str.restype = ctypes.c_char_p
            self.version: str = library.isal_get_version_str().decode()
            for function, arguments in _SIGNATURES.items():
                getattr(library, function).argtypes = arguments
                getattr(library, function).restype = None
        except (OSError, AttributeError) as error:
            raise KernelUnavailable(f"{path.name} is not a usable ISA-L: {error}") from error
        check_version(self.version)
        self._library = library

    def prepare(self, rows: Bytes) -> Tables:
        """Return multiplication tables of shape (outputs, inputs, 32) for coefficients of shape (outputs, inputs)."""
        outputs, inputs = rows.shape
        coefficients = np.ascontiguousarray(rows)
        # Align to a cache line: the kernels load from the tables for every line of data.
        room = np.zeros(outputs * inputs * _TABLE + _CACHE_LINE, np.uint8)
        start = -room.ctypes.data % _CACHE_LINE
        tables = room[start : start + outputs * inputs * _TABLE].reshape(outputs, inputs, _TABLE)
        self._library.ec_init_tables(inputs, outputs, coefficients.ctypes.data, tables.ctypes.data)
        return Tables(tables, tables.ctypes.data)

    def multiply(self, tables: Tables, inputs: Sequence[Region], outputs: Sequence[Region]) -> None:
        """Compute outputs[i] = sum over j of rows[i, j] * inputs[j]."""
        size = outputs[0][2]
        for at in range(0, size, MAX_LENGTH):
            length = min(MAX_LENGTH, size - at)
            self._library.ec_encode_data(
                length, len(inputs), len(outputs), tables.address, _pointers(inputs, at), _pointers(outputs, at)
            )

    def accumulate(self, tables: Tables, column: int, source: Region, output: Region) -> None:
        """Compute output += rows[0, column] * source."""
        _, address, size = source
        columns = tables.array.shape[1]
        for at in range(0, size, MAX_LENGTH):
            length = min(MAX_LENGTH, size - at)
            self._library.ec_encode_data_update(
                length, columns, 1, column, tables.address, address + at, _pointers([output], at)
            )


def check_version(version: str) -> None:
    """Reject releases that this binding does not support.

    Raises:
        KernelUnavailable: if the version is not in the series 2.30 to 2.39.
    """
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if not (major.isdigit() and minor.isdigit() and int(major) == MAJOR and int(minor) in MINORS):
        raise KernelUnavailable(
            f"ISA-L {version} is not in the series {MAJOR}.{MINORS.start} to {MAJOR}.{MINORS.stop - 1}; "
            "install the pyeclib release that this package pins"
        )


def bundled_library() -> Path:
    """Return the path of the ISA-L bundled in the `pyeclib` wheel.

    Raises:
        KernelUnavailable: if pyeclib is not installed or was built without the library.
    """
    try:
        files = metadata.files("pyeclib") or []
    except metadata.PackageNotFoundError as error:
        raise KernelUnavailable("pyeclib, which carries ISA-L, is not installed; pip install pyeclib") from error
    for file in files:
        if file.name.startswith("libisal") and ".so" in file.name:
            return Path(str(file.locate()))
    raise KernelUnavailable("the installed pyeclib carries no ISA-L: install its wheel, not its source package")


@functools.cache
def load() -> IsalKernel:
    """Return the bundled library, loaded once per process.

    Raises:
        KernelUnavailable: see `bundled_library` and `IsalKernel`.
    """
    return IsalKernel(bundled_library())


def _pointers(regions: Sequence[Region], at: int) -> bytes:
    """Return the addresses from byte `at` on as an array of C pointers, cheaper than an array of ctypes objects."""
    return _PACKERS[len(regions)].pack(*[address + at for _, address, _ in regions])


_PACKERS = [struct.Struct(f"{count}P") for count in range(33)]
