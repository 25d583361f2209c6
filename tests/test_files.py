"""Atomic replacement and creation of files."""

import os
import signal
import stat
from pathlib import Path

import pytest

from keepwarm.files import (
    READABLE,
    atomic_create,
    atomic_file,
    atomic_write,
    let_go_of_locks,
    lines_from_end,
    locked_folder,
)


def test_atomic_write_existing_file_is_replaced_and_no_sibling_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, b"old")
    atomic_write(path, b"new", durable=True)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mode", "expected"), [(0o600, 0o600), (READABLE, 0o640)])
def test_atomic_write_mode_is_that_of_open(tmp_path: Path, mode: int, expected: int) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == expected


def test_atomic_file_error_inside_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail_halfway() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_create_second_call_keeps_the_first_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert atomic_create(path, b"first")
    assert not atomic_create(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_create_existing_file_needs_no_room_in_its_folder() -> None:
    assert not atomic_create(Path("/proc/version"), b"a folder that takes no files")


def test_locked_folder_is_free_for_others_once_a_forked_process_lets_go(tmp_path: Path) -> None:
    ready, told = os.pipe()
    with locked_folder(tmp_path):
        child = os.fork()
        if not child:
            let_go_of_locks()
            os.write(told, b"x")
            signal.pause()
        os.read(ready, 1)
        with pytest.raises(BlockingIOError), locked_folder(tmp_path):
            pass
    try:
        with locked_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


def test_atomic_create_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_create(tmp_path / "none" / "a", b"")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"one", b"one\n", b"\n\none\ntwo", b"x" * 200_000 + b"\ny\n" + b"z" * 70_000]
)
def test_lines_from_end_are_those_from_the_start_reversed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    found = list(lines_from_end(tmp_path / "a"))
    assert [line for _, line in reversed(found)] == content.split(b"\n")
    assert all(content[:end].endswith(line) for end, line in found)
    assert [end for end, _ in found] == sorted({end for end, _ in found}, reverse=True)
