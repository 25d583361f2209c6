"""The bytes of a durable checkpoint, piece by piece."""

from pathlib import Path

from keepwarm.ft.format.manifest import Part
from keepwarm.ft.format.reader import read_part


def stored_bytes(directory: Path, part: Part) -> dict[str, bytes]:
    """What a part holds, by the name of its pieces, which must differ; the sums are not checked."""
    return {
        entry.piece.name: b"".join(bytes(block) for block in blocks) for entry, blocks in read_part(directory, part)
    }
