"""Convert with a fault at every write, sync and rename in turn; run as a process of its own, without torch for `hf`.

    python -m tests.support.faulty.conversion from|to FORMAT kill|error SRC FOLDER

Prints how many faults there were. Fails when FOLDER/out is there after a fault and not complete, or when the next
conversion does not succeed or leaves anything beside it.
"""

import errno
import functools
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepwarm.trainer.checkpoint import report
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.folder import HuggingFaceFolder
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.errors import TrainerError

WRITES = 60
"""Writes that fail in turn; a conversion by our own writers has no more."""


class Faults:
    """Counts operations; at the one numbered `at` the process dies or the operation fails."""

    def __init__(
        self, at: int, kind: str, operations: tuple[str, ...] = ("fsync", "rename", "replace", "mkdir")
    ) -> None:
        """`operations` are functions of `os`; writes count always."""
        self.at, self.kind, self.count, self.operations = at, kind, 0, operations
        self.seen: list[str] = []

    def now(self, what: str) -> bool:
        self.count += 1
        self.seen.append(what)
        return self.count == self.at

    def strike(self, what: str) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # A disk that is full, or a folder that may no longer be written to.
        number = errno.ENOSPC if self.at % 2 else errno.EACCES
        raise OSError(number, os.strerror(number), what)

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.now(name):
                self.strike(name)
            return real(*arguments, **options)

        return call


class CountedFile:
    """A file of which the fatal write leaves half of its bytes behind."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        if self._faults.now("write"):
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()
            self._faults.strike("write")
        return int(self._file.write(data))


def inject(faults: Faults) -> None:
    """For the rest of this process."""
    real_open = io.open

    def counted_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = real_open(file, mode, *arguments, **options)
        return CountedFile(opened, faults) if set(mode) & set("wxa+") else opened

    io.open = counted_open
    for name in faults.operations:
        setattr(os, name, faults.around(name, getattr(os, name)))
    shutil.copyfile = faults.around("copyfile", shutil.copyfile)


def converter(direction: str, format: str) -> Callable[[Path, Path], object]:
    """What converts a folder from or to a format."""
    if format == "hf":
        return from_huggingface if direction == "from" else to_huggingface
    # With torch, which those above do without.
    from keepwarm.trainer.convert.dcp.exporter import to_dcp
    from keepwarm.trainer.convert.deepspeed.exporter import to_deepspeed
    from keepwarm.trainer.convert.importer import ImportOptions, from_dcp

    if direction == "from":
        return functools.partial(from_dcp, kind=format, options=ImportOptions(trust_pickle=True))
    return to_deepspeed if format == "deepspeed" else functools.partial(to_dcp, kind=format)


def complete(direction: str, format: str, out: Path) -> None:
    """Raises when what is there is not whole."""
    if direction == "from":
        report.verify(out, lambda done, total: None)
        return
    if format == "hf":
        with HuggingFaceFolder(out) as folder:
            assert folder.tensors
            assert (out / "keepwarm.json").is_file()
        return
    back = out.with_name("back")
    converter("from", format)(out, back)
    report.verify(back, lambda done, total: None)
    shutil.rmtree(back)


def in_child(convert: Callable[[], object], faults: Faults) -> int:
    """Exit status of a child that converts: 0 no fault came, 4 done in spite of it, 1 an error of ours, -9 killed."""

    def faulty() -> int:
        inject(faults)
        try:
            convert()
        except TrainerError:
            return 1
        return 0 if faults.count < faults.at else 4

    return _forked(faulty)


def _forked(action: Callable[[], int]) -> int:
    """Exit status of a child that does it: this process never computes, so that it can be forked again."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(direction: str, format: str, kind: str, source: Path, folder: Path) -> int:
    convert = converter(direction, format)
    out = folder / "out"

    def whole() -> int:
        complete(direction, format, out)
        return 0

    points = chosen(operations_of(convert, source, out))
    for at in points:
        status = in_child(lambda at=at: convert(source, out), Faults(at, kind))  # type: ignore[misc]
        # A folder that is there already need not be made: that fault is survived.
        assert status in ((-9,) if kind == "kill" else (1, 4)), f"fault {at} ended with {status}"
        assert status != 4 or out.exists()
        if out.exists():
            assert _forked(whole) == 0
            shutil.rmtree(out)
        if kind == "error":
            assert not list(folder.iterdir()), f"fault {at} left {list(folder.iterdir())}"
    assert format != "hf" or "torch" not in sys.modules
    assert in_child(lambda: convert(source, out), Faults(0, kind)) == 4
    assert _forked(whole) == 0
    assert [path.name for path in folder.iterdir()] == ["out"]
    return len(points)


def operations_of(convert: Callable[[Path, Path], object], source: Path, out: Path) -> list[str]:
    """What a conversion does that may fail, in order; its output is deleted again."""
    told = out.with_name("operations")

    def listed() -> int:
        faults = Faults(0, "none")
        inject(faults)
        convert(source, out)
        seen = list(faults.seen)
        told.write_text(json.dumps(seen))
        return 0

    assert _forked(listed) == 0
    found: list[str] = json.loads(told.read_text())
    told.unlink()
    shutil.rmtree(out)
    return found


def chosen(operations: list[str]) -> list[int]:
    """The numbers of those to fail: all, but of a great many writes, as archives are made of, evenly some."""
    writes = [number for number, what in enumerate(operations, 1) if what == "write"]
    others = [number for number, what in enumerate(operations, 1) if what != "write"]
    return sorted({*others, *writes[:: -(-len(writes) // WRITES)]})


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5])))
