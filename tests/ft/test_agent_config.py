"""What is checked before an agent starts: its folder, its buckets, the time it gets."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.ft.discovery.config import AgentConfig, DurableConfig, GroupConfig, private_folder
from keepwarm.ft.errors import AgentError, PlacementError
from keepwarm.ft.groups import MAX_BUCKETS, check_bucket
from keepwarm.ft.memory.buffers import host_memory
from keepwarm.ft.protocol.messages import Restored, Seal, SnapshotId, WorkerMessage, encode
from keepwarm.ft.transport.channel import decoder_of

GIB = 1 << 30


def test_private_folder_makes_both_folders_private(tmp_path: Path) -> None:
    path = private_folder(tmp_path / "keepwarm" / "run-0")
    assert [folder.stat().st_mode & 0o777 for folder in (path.parent, path)] == [0o700, 0o700]
    path.chmod(0o755)
    assert private_folder(path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o1777])
def test_private_folder_parent_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    parent = tmp_path / "keepwarm"
    parent.mkdir()
    parent.chmod(mode)
    with pytest.raises(AgentError, match=r"keepwarm: other users can change it \(mode .*chmod go-w"):
        private_folder(parent / "run-0")
    assert list(parent.iterdir()) == [parent / "run-0"] or not list(parent.iterdir())


@pytest.mark.parametrize("link", ["parent", "child"])
def test_private_folder_that_is_a_link_is_refused(tmp_path: Path, link: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path = tmp_path / "keepwarm" / "run-0"
    if link == "child":
        path.parent.mkdir(mode=0o700)
    (path if link == "child" else path.parent).symlink_to(elsewhere)
    with pytest.raises(AgentError, match="must be a folder of user"):
        private_folder(path)
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which every user may create files, as /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="kw-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def refused_as(user: int, path: Path, words: "multiprocessing.SimpleQueue[str]") -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        private_folder(path)
        words.put("accepted")
    except AgentError as error:
        words.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two other users")
def test_private_folder_parent_of_another_user_is_refused(open_folder: Path) -> None:
    parent = open_folder / "keepwarm-4343"
    parent.mkdir()
    os.chown(parent, 4242, 4242)
    parent.chmod(0o777)
    context = multiprocessing.get_context("fork")
    words = context.SimpleQueue()
    process = context.Process(target=refused_as, args=(4343, parent / "run-0", words))
    process.start()
    process.join(30)
    assert words.get() == f"{parent}: must be a folder of user 4343, it is not: remove it"
    assert list(parent.iterdir()) == []


def config(state_bytes: int, bucket_bytes: int, durable: DurableConfig | None = None) -> AgentConfig:
    groups = (GroupConfig(members=(0, 1, 2), parity=1),)
    return AgentConfig(
        run="run", slot=0, folder="/x/y", shared="/x", secret="", groups=groups, state_bytes=state_bytes,
        bucket_bytes=bucket_bytes, durable=durable,
    )  # fmt: skip


def test_start_deadline_grows_with_the_memory_to_fault_in() -> None:
    assert config(0, 4 << 20).start_seconds == 60.0
    assert config(640 * GIB, 4 << 20).start_seconds == 60.0 + 3 * 640
    assert config(640 * GIB, 4 << 20, DurableConfig(root="/x")).start_seconds == 60.0 + 4 * 640


def test_bucket_too_small_for_the_state_is_refused_before_anything_starts() -> None:
    words = r"snapshot.bucket = 4096: .* 1073745920 bytes, which are 262145 buckets.*choose a bucket of at least 8192"
    with pytest.raises(PlacementError, match=words):
        config(GIB + 4096, 4096)
    with pytest.raises(PlacementError, match=words):
        host_memory(GIB + 4096, members=3, parity=1, bucket_bytes=4096, durable=False)
    check_bucket(GIB, 4096)
    check_bucket(GIB + 4096, 8192)
    check_bucket(16 << 40, 64 << 20)


def test_checksums_of_the_largest_state_fit_into_a_message() -> None:
    sums, decode = (2**64 - 1,) * MAX_BUCKETS, decoder_of(WorkerMessage)
    snapshot = SnapshotId("run", 1, 2, "layout")
    for message in (Seal(snapshot=snapshot, sums=sums), Restored(epoch=1, snapshot=snapshot, sums=sums)):
        assert decode(memoryview(encode(message))) == message
