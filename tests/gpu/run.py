"""Measure keepwarm on the GPU of this machine and print one table: `make test-gpu`. Needs no network.

Parts run one after another, each in a process of its own and at most three minutes, all of them at most `--seconds`; a
row is printed, and appended to the file, as soon as it is known. With `--dry` the parts run on the CPU with tiny sizes,
however long each takes.
What is missing beside torch comes from `--wheels`, a folder that `python -m tests.gpu.wheels` prepares elsewhere.

Exit codes: 0 all passed, 1 something failed, 2 there is no GPU or a wheel cannot be installed.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

PARTS = (
    "snapshots",
    "training",
    "worker killed",
    "1B",
    "8B",
    "compiled",
    "two ranks",
    "node killed",
    "sanitizer",
)
"""The most telling first."""
ROOT = Path(__file__).parents[2]
PART_S, ALL_S = 180.0, 570.0
HEAD = "| part | what | value | passed |\n|---|---|---|---|"
SIGNS = {None: "", True: "yes", False: "**no**"}


class Table:
    """Rows of Markdown on the terminal and in a file."""

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        self.failed = False
        self._write(f"\n{title}\n\n{HEAD}")

    def add(self, part: str, what: str, value: str, passed: bool | None) -> None:
        self.failed |= passed is False
        self._write(f"| {part} | {what} | {value.replace('|', '/')} | {SIGNS[passed]} |")

    def _write(self, text: str) -> None:
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(text + "\n")


def run(part: str, kind: str, table: Table, seconds: float, wheels: Path | None = None) -> None:
    """Run a part and add its rows; one that fails, or does not end in time, adds a row that says so."""
    paths = [ROOT / "src", ROOT, *([wheels] if wheels else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "tests.gpu.parts", part, kind]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        late = threading.Timer(seconds, _kill, [process.pid])
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        late.start()
        reader.start()
        for line in process.stdout or ():
            if line.startswith('{"what"'):
                table.add(part, **json.loads(line))
        reader.join()
        code = process.wait()
        late.cancel()
    if code:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "")
        table.add(part, "ended", f"with {code} after at most {seconds:.0f} s: {last[:200]}", False)


def _kill(leader: int) -> None:
    """Kill a part, and what it has started in its session: that may keep the GPU and the pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def install(wheels: Path, target: Path) -> None:
    """Unpack the wheels of a folder, without network. Raise `CalledProcessError`."""
    files = sorted(map(str, wheels.glob("*.whl")))
    options = ["--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("test-gpu.md"))
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    parser.add_argument("--seconds", type=float, default=ALL_S, help="for all parts [default: %(default)s]")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use beside what is installed")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("no GPU: torch finds none. --dry runs the same parts on the CPU", file=sys.stderr)
        return 2
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="wheels") as unpacked:
        if options.wheels is not None:
            try:
                install(options.wheels, Path(unpacked))
            except subprocess.CalledProcessError as error:
                print(f"{options.wheels}: pip ended with {error.returncode}", file=sys.stderr)
                return 2
        kind = "cpu" if options.dry else "cuda"
        name = "a dry run on the CPU" if options.dry else torch.cuda.get_device_name(0)
        today = datetime.datetime.now(tz=datetime.UTC).date()
        table = Table(options.output, f"{name}, torch {torch.__version__}, {today}")
        for part in options.part or PARTS:
            left = end - time.monotonic()
            if left > 0:
                run(part, kind, table, left if options.dry else min(PART_S, left), Path(unpacked))
            else:
                table.add(part, "not run", f"{options.seconds:.0f} s are over", None)
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
