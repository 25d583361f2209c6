"""The bytes of a file that may be compressed by gzip or zstandard, read in pieces of bounded size. Torch-free."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from keepwarm.trainer.errors import DataError

SUFFIXES = (".gz", ".zst")
WINDOW_LIMIT = 1 << 31
"""Bytes. What `zstd --long=31` makes is read; a reader then holds up to this much of the decompressed text."""
_READ_BYTES = 1 << 20
# One byte of zstandard can stand for 128 KiB of equal ones: what a piece gives stays below half a GiB.
_ZSTANDARD_BYTES = 1 << 12


def chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of an open file, whose suffix says how it is compressed.

    Raises:
        DataError: it is truncated, damaged, or needs more memory than `WINDOW_LIMIT`; names the file.
        OSError: it cannot be read.
    """
    try:
        match path.suffix.lower():
            case ".gz":
                yield from _gzip_chunks(raw)
            case ".zst":
                yield from _zstandard_chunks(path, raw)
            case _:
                while chunk := raw.read(_READ_BYTES):
                    yield chunk
    except EOFError as error:
        raise DataError(f"{path}: truncated: {error}") from None
    except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged, or not {path.suffix[1:]}: {error}") from None


def _gzip_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Yield all members of the file."""
    with gzip.GzipFile(fileobj=raw) as stream:
        while True:
            try:
                chunk = stream.read(_READ_BYTES)
            except EOFError:
                raise EOFError("the file ends inside a gzip member") from None
            if not chunk:
                return
            yield chunk


def _zstandard_chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Yield all frames of the file; zstandard's own reader mistakes a truncated frame for the end of the data."""
    frame = None
    while chunk := raw.read(_ZSTANDARD_BYTES):
        while chunk:
            if frame is None:
                _check_window(path, chunk)
                frame = zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT).decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None or not raw.tell():
        raise EOFError("the file ends inside a zstandard frame")


def _check_window(path: Path, header: bytes) -> None:
    try:
        window = zstandard.get_frame_parameters(header).window_size
    except zstandard.ZstdError:
        return  # A header that a read has cut in two; the decompressor checks it as well, in its own words.
    if window > WINDOW_LIMIT:
        raise DataError(
            f"{path}: needs a window of {window:,} bytes to decompress, more than the {WINDOW_LIMIT:,} that are read: "
            "compress it again with --long=31 or less"
        )
