"""A codec kernel of another distribution: a module of pure Python and its metadata, on the path of new processes."""

import os
from pathlib import Path

import pytest

NAME = "translate"
MODULE = """
import os

def product(a, b):
    found = 0
    for bit in range(8):
        found ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        found ^= (0x11D << bit - 8) * (found >> bit & 1)
    return found

class Translate:
    name = "translate"

    def prepare(self, rows):
        return [[bytes(product(factor, byte) for byte in range(256)) for factor in row] for row in rows.tolist()]

    def multiply(self, tables, inputs, outputs):
        note("multiply", outputs[0])
        for row, output in zip(tables, outputs):
            total = 0
            for table, source in zip(row, inputs):
                total ^= number(source, table)
            output[0].cast("B")[:] = total.to_bytes(output[2], "little")

    def accumulate(self, tables, column, source, output):
        note("accumulate", output)
        total = number(output) ^ number(source, tables[0][column])
        output[0].cast("B")[:] = total.to_bytes(output[2], "little")

def number(region, table=None):
    return int.from_bytes(bytes(region[0].cast("B")).translate(table), "little")

def note(operation, region):
    with open(os.environ["OUTSIDE_KERNEL_CALLS"], "a") as file:
        file.write(f"{os.getpid()} {operation} {region[2]}\\n")
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Offer the kernel `NAME` to processes that start from now on; `calls` tells what they did with it."""
    folder.mkdir()
    (folder / "outside_kernel.py").write_text(MODULE)
    info = folder / "outside_kernel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-kernel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[keepwarm.codecs]\n{NAME} = outside_kernel:Translate\n")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    patch.setenv("OUTSIDE_KERNEL_CALLS", str(folder / "calls"))


def calls(folder: Path) -> list[tuple[int, str, int]]:
    """(pid, operation, bytes) of every call."""
    lines = (folder / "calls").read_text().splitlines()
    return [(int(pid), operation, int(size)) for pid, operation, size in map(str.split, lines)]
