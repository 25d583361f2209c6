"""Slots outlive the processes that write into them, and are given to nobody while such a process may still live."""

import array
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from keepwarm.ft.errors import AgentError, AuthenticationFailed, MemoryTooSmall
from keepwarm.ft.keeper import memory_file
from keepwarm.ft.memory import shared_memory
from keepwarm.ft.memory.shared_memory import Holder, SharedBuffer
from keepwarm.ft.transport.auth import create_secret, load_secret

WRITER = """
import array, mmap, os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
_, ancillary, *_ = sock.recvmsg(1, socket.CMSG_SPACE(4))
fd = array.array("i", ancillary[0][2])[0]
memory = mmap.mmap(fd, os.fstat(fd).st_size)
memory[:8] = b"herebusy"
sock.send(b"!")
while True:
    memory[4:8] = b"busy"
"""


def writer(buffer: SharedBuffer) -> tuple["subprocess.Popen[bytes]", Holder]:
    """A process that maps the buffer and writes into it for as long as it lives."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    with ours:
        ours.settimeout(20)
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [buffer.descriptor]))])
        assert ours.recv(1) == b"!"
    left, right = socket.socketpair()
    with left, right:
        holder = Holder(left)
    holder.close()
    holder._pidfd = os.pidfd_open(process.pid)
    holder.pid = process.pid
    return process, holder


def test_shared_buffer_writer_killed_keeps_contents() -> None:
    buffer = SharedBuffer.of(memory_file("test"), 1 << 20)
    process, holder = writer(buffer)
    assert holder.alive
    holder.kill()
    assert select.select([holder], [], [], 10.0)[0] == [holder]  # its mappings are gone
    assert not holder.alive
    assert bytes(buffer.data[:8]) == b"herebusy"
    assert process.wait(10) == -signal.SIGKILL
    buffer.data[4:8] = 0
    assert bytes(buffer.data[4:8]) == bytes(4)
    holder.close()
    buffer.close()


def test_shared_buffer_resize_is_refused() -> None:
    buffer = SharedBuffer.of(memory_file("test"), 1 << 16)
    for size in (0, 1 << 17):
        with pytest.raises(PermissionError):
            os.ftruncate(buffer.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(buffer.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    buffer.close()


def test_shared_buffer_smaller_than_announced_is_refused() -> None:
    buffer = SharedBuffer.of(memory_file("test"), 1 << 16)
    with pytest.raises(AgentError, match="announced"):
        SharedBuffer(os.dup(buffer.descriptor), 1 << 17)
    buffer.close()


def test_shared_buffer_that_took_its_memory_is_written_without_faults() -> None:
    size = 16 << 20
    buffer = SharedBuffer.of(memory_file("test"), size)
    buffer.take(0, size)
    source = np.ones(size, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.copyto(buffer.data, source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < size // mmap.PAGESIZE // 100
    buffer.close()


def test_shared_buffer_empty_is_allowed() -> None:
    buffer = SharedBuffer.of(memory_file("test"), 0)
    assert len(buffer.data) == 0
    buffer.close()


def test_require_memory_too_little_reports_arithmetic() -> None:
    shared_memory.require_memory({"data buffers": 1 << 20})
    with pytest.raises(
        MemoryTooSmall, match=r"1048576\.00 GiB data buffers \+ 524288\.00 GiB parity buffers = 1572864\.00 GiB"
    ):
        shared_memory.require_memory({"data buffers": 2**50, "parity buffers": 2**49})


def test_bucket_sums_match_xxhash_per_bucket() -> None:
    data = np.arange(10, dtype=np.uint8)
    assert shared_memory.bucket_sums(data, 4) == tuple(
        xxhash.xxh3_64_intdigest(bytes(part)) for part in (data[:4], data[4:8], data[8:])
    )
    assert shared_memory.bucket_sums(data[:0], 4) == ()


def test_secret_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = create_secret(path)
    assert create_secret(path) == secret == load_secret(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_secret_readable_by_others_or_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    create_secret(path)
    path.chmod(0o640)
    with pytest.raises(AuthenticationFailed, match=r"mode 0640.*chmod 600"):
        load_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(AuthenticationFailed, match="too few"):
        load_secret(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(AuthenticationFailed, match="cannot be read"):
        load_secret(link)
    with pytest.raises(AuthenticationFailed, match="cannot be read"):
        load_secret(tmp_path / "none")
