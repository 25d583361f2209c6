"""Measure keepwarm on the GPU of this machine and print one table: `make test-gpu`. Needs no network.

Parts run one after another, each in a process of its own and at most three minutes; a row is printed, and appended to
the file, as soon as it is known. With `--dry` the parts run on the CPU with tiny sizes.

Exit codes: 0 all passed, 1 something failed, 2 there is no GPU.
"""

import argparse
import datetime
import json
import subprocess
import sys
import threading
from pathlib import Path

import torch

PARTS = ("snapshots", "training", "speed", "compiled")
PART_S = 180.0
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


def run(part: str, kind: str, table: Table, seconds: float) -> None:
    """Run a part and add its rows; one that fails, or does not end in time, adds a row that says so."""
    command = [sys.executable, "-m", "tests.gpu.parts", part, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        late = threading.Timer(seconds, process.kill)
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
        table.add(part, "ended", f"with {code} after at most {seconds:g} s: {last[:200]}", False)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--output", type=Path, default=Path("test-gpu.md"))
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("no GPU: torch finds none. --dry runs the same parts on the CPU", file=sys.stderr)
        return 2
    kind = "cpu" if options.dry else "cuda"
    name = "a dry run on the CPU" if options.dry else torch.cuda.get_device_name(0)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    table = Table(options.output, f"{name}, torch {torch.__version__}, {today}")
    for part in options.part or PARTS:
        run(part, kind, table, PART_S)
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
