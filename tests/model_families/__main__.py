"""Try every dense causal family of the installed transformers, and write the table in docs/models.md.

    python -m tests.model_families [--families NAME...] [--seconds N] [--cache FOLDER]

What was found lies in the cache, a file for each family, and is not tried again with the same transformers; the page
has all rows of the cache.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from tests.model_families.family import Row, families, tried
from tests.model_families.page import replaced, table
from tests.support.ranks import ROOT, close_pools

PAGE = ROOT / "docs/models.md"


def main() -> None:
    """Fill the cache, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", help="only these; default: all")
    parser.add_argument("--seconds", type=float, default=7200.0, help="begin no other family after this time")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/model-families")
    options = parser.parse_args()
    cache = options.cache / version("transformers")
    cache.mkdir(parents=True, exist_ok=True)
    dense, experts = families()
    began = time.monotonic()
    for family in options.families or dense:
        file = cache / f"{family}.json"
        if file.exists() or time.monotonic() - began > options.seconds:
            continue
        row = tried(family)
        file.write_text(json.dumps(row.as_json()))
        print(f"{time.monotonic() - began:6.0f} s  {family}: {row.stage} {row.reason}", flush=True)
    close_pools()
    rows = [Row(**json.loads(file.read_text())) for file in sorted(cache.glob("*.json")) if file.stem in dense]
    section = table(rows, dense, experts, version("transformers"))
    PAGE.write_text(replaced(PAGE.read_text(), section))


if __name__ == "__main__":
    main()
