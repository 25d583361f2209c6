"""Kernels that multiply over GF(2^8): their interface, and their registry.

A kernel of another package is selected with `snapshot.code.kernel: NAME` once its distribution declares it:

    [project.entry-points."keepwarm.codecs"]
    NAME = "package.module:make_kernel"

The field, and so every byte of parity, is the same for all of them: 0x11d, as in ISA-L and `keepwarm.ft.codec.galois`.
Imports nothing large, because job specs are validated with it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from keepwarm.registry import Registry

if TYPE_CHECKING:
    from keepwarm.ft.arrays import Bytes

AUTO = "auto"
"""Selects ISA-L, or NumPy with a warning if ISA-L is not usable."""

Region = tuple[memoryview, int, int]
"""A caller's buffer, the address of its first byte, and its size in bytes. The view keeps the buffer alive.

A plain tuple, because one is created for every buffer of every call, when the previous call has filled the caches with
data.
"""


class Kernel(Protocol):
    """The three operations of a codec. The agent's threads call one kernel concurrently.

    The codec has checked the buffers: all buffers of a call have the same size, at least one byte, and no output
    overlaps another buffer. A kernel reads and writes them in place, keeps none, and should release the GIL.
    """

    @property
    def name(self) -> str:
        """The registered name, used in logs and errors."""
        ...

    def prepare(self, rows: "Bytes") -> Any:
        """Return whatever the other two methods need for the coefficients `rows`, uint8 of shape (outputs, inputs)."""
        ...

    def multiply(self, tables: Any, inputs: Sequence[Region], outputs: Sequence[Region]) -> None:
        """Compute outputs[i] = sum over j of rows[i, j] * inputs[j], overwriting the outputs."""
        ...

    def accumulate(self, tables: Any, column: int, source: Region, output: Region) -> None:
        """Compute output += rows[0, column] * source, for `tables` of a single row."""
        ...


KERNELS: Registry[Callable[[], Kernel]] = Registry(
    "codec kernel",
    "keepwarm.codecs",
    {"isal": "keepwarm.ft.codec.isal:load", "numpy": "keepwarm.ft.codec.galois:NumpyKernel"},
)
"""Functions without arguments that return a kernel, or raise `KernelUnavailable` if it cannot run."""
