"""A `.metadata` can neither reach an object of this process nor keep the reader busy without end."""

import pathlib
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from keepwarm.trainer.convert.dcp.folder import DcpFolder
from keepwarm.trainer.convert.importer import _common_step
from keepwarm.trainer.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"w": torch.arange(4.0), "n": {"b": torch.ones(2, dtype=torch.bool)}, "loader": {"position": 7}}
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def build(module: str, name: str, attribute: str, value: bytes) -> bytes:
    """Push a global and set an attribute of it (BUILD with slot state)."""
    return f"c{module}\n{name}\n".encode() + b"(N}(" + text(attribute) + value + b"utb"


POLLUTION = {
    "a class of the standard library": build("pathlib", "Path", "name", text("../secret.pt")),
    "a class of torch": build("torch.distributed.checkpoint.metadata", "Metadata", "storage_data", b"N"),
    "a function of torch": build("torch.serialization", "_get_layout", "cache", b"N"),
    "the defaults of a function": build("torch.serialization", "_get_layout", "__defaults__", b")"),
    "a dtype": build("torch", "float32", "is_floating_point", b"N"),
    "a table": b"ccollections\nOrderedDict\n)R(N}(" + text("x") + b"Nutb",
}


@pytest.mark.parametrize("target", POLLUTION)
def test_dcp_metadata_cannot_change_an_object_of_the_process(folder: Path, target: str) -> None:
    file = folder / ".metadata"
    before = [dict(vars(one)) for one in (pathlib.Path, torch.serialization._get_layout)]
    defaults = torch.serialization._get_layout.__defaults__
    file.write_bytes(b"\x80\x02" + POLLUTION[target] + b"0" + pickle.dumps(None, 2)[2:])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        DcpFolder(folder)
    assert [dict(vars(one)) for one in (pathlib.Path, torch.serialization._get_layout)] == before
    assert torch.serialization._get_layout.__defaults__ == defaults


def test_dcp_metadata_naming_a_file_outside_the_folder_is_refused(folder: Path) -> None:
    torch.save(torch.tensor([13.0, 37.0]), folder.parent / "secret.pt")
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.pt"
    body = pickle.dumps(metadata, protocol=2)[2:]
    for prefix in (b"", POLLUTION["a class of the standard library"] + b"0"):
        (folder / ".metadata").write_bytes(b"\x80\x02" + prefix + body)
        with pytest.raises(CheckpointError):
            DcpFolder(folder).unit("w", 0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dcp_metadata_of_every_protocol_is_read(folder: Path, protocol: int) -> None:
    file = folder / ".metadata"
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol=protocol))  # noqa: S301
    opened = DcpFolder(folder)
    assert opened.unit("w", 0).view("<f4").tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (opened.dtype("n.b"), opened.shape("n.b")) == ("BOOL", (2,))


def test_dcp_metadata_read_with_trust_gives_the_same(folder: Path) -> None:
    plain, trusted = DcpFolder(folder), DcpFolder(folder, trust_pickle=True)
    assert (plain.tensors, plain.objects) == (trusted.tensors, ["loader.position"])
    assert plain.unit("w", 0).tolist() == trusted.unit("w", 0).tolist()


doubled = b")" + b"2\x86" * 45
BOMBS: dict[str, bytes] = {
    "memo index": b"\x80\x04Nr" + struct.pack("<I", 0x7FFFFFFF) + b".",
    "tuple doubled 45 times as a member of a set": b"\x80\x04" + doubled + b"\x940\x8f(h\x00\x90.",
    "the same in a frozen set": b"\x80\x04(" + doubled + b"\x91.",
    "the same as a key": b"\x80\x04}" + doubled + b"Ns.",
    "the same as one of several keys": b"\x80\x04}(" + doubled + b"Nu.",
    "the same given to set()": b"\x80\x04cbuiltins\nset\n(" + doubled + b"ltR.",
    "the same in a record used as a key": b"\x80\x04}ctorch\nSize\n" + doubled + b"\x85RNs.",
    "a byte array of any length": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "bytes of any length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS)
def test_dcp_metadata_that_would_not_end_is_refused(folder: Path, bomb: str) -> None:
    (folder / ".metadata").write_bytes(BOMBS[bomb])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        DcpFolder(folder)


def sizes_doubled(metadata: bytes) -> bytes:
    """Where the sizes of a tensor stand, a tuple of 2^45 numbers in 90 bytes."""
    good = pickle.dumps(pickle.loads(metadata), protocol=2)  # noqa: S301
    assert good.count(b"K\x04\x85") > 0
    return good.replace(b"K\x04\x85", doubled + b"\x85")


def cut(metadata: bytes) -> bytes:
    return metadata[: len(metadata) // 2]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("harm", [sizes_doubled, cut])
def test_dcp_metadata_with_strange_values_is_refused(folder: Path, harm: Callable[[bytes], bytes]) -> None:
    file = folder / ".metadata"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"\.metadata") as caught:
        DcpFolder(folder)
    assert len(str(caught.value)) < 600


@pytest.mark.timeout(60)
def test_megatron_optimizer_state_that_contains_itself_is_read_or_refused(tmp_path: Path) -> None:
    loop: dict[str, object] = {}
    loop["optimizer"] = loop
    torch.save({"optimizer": loop, "iteration": 3}, tmp_path / "common.pt")
    assert _common_step(tmp_path / "common.pt", False) == 3
