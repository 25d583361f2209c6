"""Kernels that multiply over GF(2^8): what the codec needs of one, and where they are found by name.

A kernel of another package is chosen with `snapshot.code.kernel: NAME` once its distribution offers it:

    [project.entry-points."keepwarm.codecs"]
    NAME = "package.module:make_kernel"

The field, and so every byte of parity, is the same for all of them: 0x11d, as in ISA-L and `keepwarm.ft.codec.galois`.
Imports nothing that is large, as job specs are checked with it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from keepwarm.registry import Registry

if TYPE_CHECKING:
    from keepwarm.ft.arrays import Bytes

AUTO = "auto"
"""ISA-L, or NumPy with a warning where ISA-L cannot be used."""

Region = tuple[memoryview, int, int]
"""A caller's buffer, the address of its first byte, and its size in bytes. The view keeps the buffer alive.

A plain tuple, as one is made for every buffer of every call, with caches that the call before has filled with data.
"""


class Kernel(Protocol):
    """The three operations of a codec. The agent's threads call one kernel at once: it must not depend on a turn.

    The codec has checked the buffers: all of one call have one size, at least one byte, and no output shares bytes
    with another buffer. A kernel reads and writes them in place, keeps none, and should release the GIL meanwhile.
    """

    @property
    def name(self) -> str:
        """The name under which it is registered; logs and errors say it."""
        ...

    def prepare(self, rows: "Bytes") -> Any:
        """Return whatever the other two methods need for the coefficients `rows`, uint8 of shape (outputs, inputs)."""
        ...

    def multiply(self, tables: Any, inputs: Sequence[Region], outputs: Sequence[Region]) -> None:
        """outputs[i] = sum over j of rows[i, j] * inputs[j]; what was in the outputs does not matter."""
        ...

    def accumulate(self, tables: Any, column: int, source: Region, output: Region) -> None:
        """output += rows[0, column] * source, for `tables` of a single row."""
        ...


KERNELS: Registry[Callable[[], Kernel]] = Registry(
    "codec kernel",
    "keepwarm.codecs",
    {"isal": "keepwarm.ft.codec.isal:load", "numpy": "keepwarm.ft.codec.galois:NumpyKernel"},
)
"""Functions without arguments that return a kernel, or raise `KernelUnavailable` where it cannot run."""
