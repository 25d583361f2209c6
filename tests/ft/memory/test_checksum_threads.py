"""Checksums of snapshot memory leave the interpreter to other threads: those that launch kernels, or serve peers."""

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from keepwarm.ft.memory.shared_memory import bucket_sums

BUCKET = 32 << 20
TRIES = 1000


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Let a thread run until it gives the interpreter up by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("no_forced_switches")
def test_checksum_lets_another_thread_run_meanwhile() -> None:
    data = np.zeros(BUCKET, np.uint8)
    go = threading.Event()
    seen: list[bool] = []

    def other() -> None:
        go.wait()
        seen.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    go.set()
    tries = 0
    while not seen and tries < TRIES:
        bucket_sums(data, BUCKET)
        tries += 1
    ran = bool(seen)
    thread.join()
    assert ran, f"no other thread ran during {TRIES} checksums of {BUCKET} bytes"
