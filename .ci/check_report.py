#!/usr/bin/env python3
"""Check a page that `keepwarm report` wrote: it holds figures, and every local file that it refers to exists."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FIGURES = 2
"""Validation losses; training loss with the learning rate."""


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0
        self.files: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.drawn += tag in ("svg", "img")
        for name, value in attrs:
            address = urlsplit(value or "")
            if name in ("src", "href") and address.path and not address.scheme and not address.netloc:
                self.files.append(unquote(address.path))


def main(file: str) -> str | None:
    """Return what is wrong with the page, None where nothing is."""
    path, page = Path(file), Page()
    if not path.is_file():
        return f"{path}: no such file"
    page.feed(path.read_text(encoding="utf-8"))
    if page.drawn < FIGURES:
        return f"{path}: {page.drawn} figures, at least {FIGURES} are expected"
    missing = [name for name in page.files if not (path.parent / name).is_file()]
    return f"{path}: refers to missing files: {', '.join(missing)}" if missing else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
