"""Convert with a fault at every write, sync and rename in turn; run as a process of its own, without torch.

    python -m tests.support.faulty_conversion to-native|to-hf kill|error SRC FOLDER

Prints how many faults there were. Fails when FOLDER/out is there after a fault and not complete, or when the next
conversion does not succeed or leaves anything beside it.
"""

import contextlib
import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import checkpoint_report
from trainer.convert.from_huggingface import from_huggingface
from trainer.convert.huggingface_folder import HuggingFaceFolder
from trainer.convert.to_huggingface import to_huggingface
from trainer.errors import TrainerError


class Faults:
    """Counts operations; at the one numbered `at` the process dies or the operation fails."""

    def __init__(
        self, at: int, kind: str, operations: tuple[str, ...] = ("fsync", "rename", "replace", "mkdir")
    ) -> None:
        """`operations` are functions of `os`; writes count always."""
        self.at, self.kind, self.count, self.operations = at, kind, 0, operations

    def now(self, what: str) -> bool:
        self.count += 1
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

    io.open = counted_open  # type: ignore[assignment]
    for name in faults.operations:
        setattr(os, name, faults.around(name, getattr(os, name)))
    shutil.copyfile = faults.around("copyfile", shutil.copyfile)


def complete(direction: str, out: Path) -> None:
    """Raises when what is there is not whole."""
    if direction == "to-native":
        checkpoint_report.verify(out, lambda done, total: None)
        return
    with HuggingFaceFolder(out) as folder:
        assert folder.tensors
        assert (out / "keepwarm.json").is_file()


def in_child(convert: Callable[[], object], faults: Faults) -> int:
    """Exit status of a child that converts: 0 no fault came, 4 done in spite of it, 1 an error of ours, -9 killed."""
    child = os.fork()
    if child == 0:
        status = 3
        with contextlib.suppress(BaseException):
            inject(faults)
            try:
                convert()
                status = 0 if faults.count < faults.at else 4
            except TrainerError:
                status = 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(direction: str, kind: str, source: Path, folder: Path) -> int:
    convert = from_huggingface if direction == "to-native" else to_huggingface
    out = folder / "out"
    for at in range(1, 10_000):
        status = in_child(lambda: convert(source, out), Faults(at, kind))
        if status == 0:
            break
        # A folder that is there already need not be made: that fault is survived.
        assert status in ((-9,) if kind == "kill" else (1, 4)), f"fault {at} ended with {status}"
        assert status != 4 or out.exists()
        if out.exists():
            complete(direction, out)
            shutil.rmtree(out)
        if kind == "error":
            assert not list(folder.iterdir()), f"fault {at} left {list(folder.iterdir())}"
    assert "torch" not in sys.modules
    complete(direction, out)
    assert [path.name for path in folder.iterdir()] == ["out"]
    return at - 1


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
