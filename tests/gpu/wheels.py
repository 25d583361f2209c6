"""Fill a folder with the wheels that `make test-gpu` needs beside torch, for a machine without network.

`python -m tests.gpu.wheels FOLDER [--python 3.12]`: the version of Python there, if it is not the one here.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT = ("torch", "numpy", "tensorboard", "matplotlib")
"""Comes with torch, or is not used by what is measured."""
MOST_MB = 50.0


def needed() -> list[str]:
    """Return the project's requirements that have to be carried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [one for one in project["dependencies"] if re.split(r"[^\w-]", one)[0] not in WITHOUT]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", metavar="VERSION", help="such as 3.12")
    options = parser.parse_args(arguments)
    version = ["--python-version", options.python] if options.python else []
    download = ["download", "--quiet", "--only-binary=:all:", "--dest", str(options.folder), *version]
    subprocess.run([sys.executable, "-m", "pip", *download, *needed()], check=True)
    size = sum(path.stat().st_size for path in options.folder.glob("*.whl")) / 1e6
    print(f"{options.folder}: {size:.0f} MB")
    if size > MOST_MB:
        print(f"more than {MOST_MB:.0f} MB", file=sys.stderr)
    return int(size > MOST_MB)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
