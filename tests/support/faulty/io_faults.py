"""Whole commands in which the C library's calls on chosen files fail, and what must be whole afterwards."""

import atexit
import errno
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from keepwarm.ft.format import publication
from keepwarm.trainer.data.indexed import TokenFile
from tests.support.runs import warm

KINDS = {
    "ENOSPC": str(errno.ENOSPC),
    "EIO": str(errno.EIO),
    "EROFS": str(errno.EROFS),
    "short": "short",
    "slow": "slow",
    "hang": "hang",
}
DEADLINE = 120.0


@cache
def library() -> Path:
    """The compiled faults; skips the test without a C compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = Path(tempfile.mkdtemp(prefix="keepwarm-io-faults-"))
    atexit.register(shutil.rmtree, folder)
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        [
            "gcc",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            folder / "io_faults.so",
            source,
            "-ldl",
        ],
        check=True,
    )
    return folder / "io_faults.so"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Calls that fail: see io_faults.c."""

    path: str
    """A glob of the whole path, as `*@(one|other)`; `*` matches slashes too."""
    kind: str
    """A key of `KINDS`."""
    calls: str = "open,write,sync,rename,truncate,mkdir"
    first: int = 1
    last: int | None = None
    rank: int | None = None
    hold: Path | None = None
    """The file for whose life calls hang, or for whose life alone they fail."""

    def environment(self, log: Path) -> dict[str, str]:
        """The settings for the processes of a run; the faults that strike are listed in `log`."""
        given = {
            "IO_FAULT_PATH": self.path,
            "IO_FAULT_CALLS": self.calls,
            "IO_FAULT_KIND": KINDS[self.kind],
            "IO_FAULT_FIRST": str(self.first),
            "IO_FAULT_LOG": str(log),
        }
        given |= {} if self.hold is None else {"IO_FAULT_HOLD": str(self.hold)}
        given |= {} if self.last is None else {"IO_FAULT_LAST": str(self.last)}
        return given | ({} if self.rank is None else {"IO_FAULT_RANK": str(self.rank)})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int
    output: str
    struck: tuple[str, ...]
    """`CALL PATH` of every fault."""


def run(arguments: list[str], fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """`keepwarm ARGUMENTS` with a fault; `folder` takes its output."""
    log = folder / "faults"
    for name, value in fault.environment(log).items():
        monkeypatch.setenv(name, value)
    process = warm.Process(arguments, folder / "output", preload=library())
    code = process.wait(DEADLINE)
    for name in fault.environment(log):
        monkeypatch.delenv(name)
    struck = log.read_text().splitlines() if log.exists() else []
    return Outcome(code=code, output=process.output, struck=tuple(struck))


def assert_whole(folder: Path) -> None:
    """Assert that every file under a final name is complete, and that no temporary one is left."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.name
        assert not name.endswith(".tmp"), path
        if name.endswith(".json"):
            json.loads(path.read_bytes())
        elif name.endswith(".jsonl"):
            text = path.read_bytes()
            assert text.endswith(b"\n") or not text, path
            for line in text.splitlines():
                json.loads(line)
        elif name.endswith(".idx"):
            TokenFile(path.with_suffix(""))
    checkpoints = folder / "checkpoints"
    for checkpoint in checkpoints.glob("iter_*"):
        publication.verify(checkpoint)
    if (checkpoints / publication.LATEST).exists():
        assert (checkpoints / (checkpoints / publication.LATEST).read_text().strip()).is_dir()
