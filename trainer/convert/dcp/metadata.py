"""DCP's `.metadata` as plain values.

The file is a pickle. It is read by an unpickler that never hands out a class, function or dtype of this process: every
name that DCP's own writers use stands for an inert record of arguments and state, every other name is refused. Keys are
hashed only if they are short, and nothing is allocated for a length that the file does not have.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.errors import CheckpointError

METADATA = ".metadata"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One global tensor."""

    shape: Shape
    dtype: str
    """As the safetensors format names it; where that has no name, torch's in capitals."""
    chunks: tuple[tuple[Shape, Shape], ...]
    """Offsets and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one chunk lies: `length` bytes from byte `start` of a file."""

    file: str
    start: int
    length: int
    transformed: bool
    """Whether an extension of DCP compressed or encrypted it."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a DCP folder holds."""

    tensors: Mapping[str, StoredTensor]
    objects: tuple[str, ...]
    """Names of pickled objects that are no tensors."""
    places: Mapping[tuple[str, Shape], Place]
    """By name and offsets of the chunk; offsets are `()` where DCP gives none."""


def read_metadata(file: Path, trust_pickle: bool) -> Metadata:
    """Read a `.metadata`; with `trust_pickle` it may run whatever code it holds.

    Raises:
        CheckpointError: it is missing, is not DCP's, or holds names that DCP's metadata do not need.
    """
    hint = "" if trust_pickle else "; --trust-pickle would run what it holds: only for files you made yourself"
    try:
        content = io.BytesIO(file.read_bytes())
        found = pickle.load(content) if trust_pickle else _Unpickler(content).load()  # noqa: S301
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; a DCP checkpoint has one, and it is written last") from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except Exception as error:
        raise CheckpointError(f"{file}: {str(error)[:200] or type(error).__name__}{hint}") from error
    if type(found).__name__ != "Metadata":
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not DCP's metadata")
    try:
        return _plain(found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Values are left out of the message: a few bytes of pickle can have a text of any length.
        raise CheckpointError(f"{file}: not DCP's metadata ({type(error).__name__})") from error


class _Record:
    """Stands for any object of the pickle: keeps what it would be made of, and does nothing."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_Record":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    # Also what keeps BUILD from the attributes of the class: called on it, this lacks an argument.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Table(dict[Any, Any]):
    """An ordered dictionary, filled item by item alone."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a dictionary")


def _records(*names: str) -> dict[str, type[Any]]:
    return {name: type(name, (_Record,), {"__slots__": ()}) for name in names}


_NAMES: Mapping[str, Mapping[str, type[Any]]] = {
    "torch.distributed.checkpoint.metadata": _records(
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": _records("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": _records("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch": _records("Size"),
    "torch.serialization": _records("_get_layout"),
    "pathlib": _records("PosixPath", "Path"),
    "collections": _records("ChainMap") | {"OrderedDict": _Table},
    "builtins": _records("set"),
}  # fmt: skip
"""All names in the metadata of DCP's own writers, by module."""

_SCALARS = (str, int, float, bytes, type(None), _Record)
_LONGEST_KEY = 64


class _Unpickler(pickle._Unpickler):
    # Python's own implementation, whose memo is a dictionary and whose operations can be replaced.
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return f"torch.{name}"
        try:
            return _NAMES[module][name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no DCP metadata need") from None

    def set_items(self) -> None:
        """SETITEMS, with keys that can be hashed in bounded time."""
        items: list[Any] = self.pop_mark()
        table = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[_short(key)] = value

    def set_item(self) -> None:
        """SETITEM, likewise."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_short(key)] = value

    def add_items(self) -> None:
        """ADDITEMS, likewise."""
        items: list[Any] = self.pop_mark()
        self.stack[-1].update(map(_short, items))

    def refuse(self) -> None:
        """Refuse an operation that no DCP metadata need."""
        raise pickle.UnpicklingError("it holds an operation that no DCP metadata need")


_Unpickler.dispatch |= {
    pickle.SETITEMS[0]: _Unpickler.set_items,
    pickle.SETITEM[0]: _Unpickler.set_item,
    pickle.ADDITEMS[0]: _Unpickler.add_items,
    **{
        code[0]: _Unpickler.refuse
        for code in (pickle.FROZENSET, pickle.DICT, pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)
    },
}


def _short(key: Any) -> Any:
    """Return a key that takes little time to hash. Raise `UnpicklingError` for others, such as tuples of tuples."""
    parts = key if type(key) is tuple else (key,)
    if len(parts) > _LONGEST_KEY or not all(isinstance(part, _SCALARS) for part in parts):
        raise pickle.UnpicklingError("it holds a key that no DCP metadata need")
    return key


def _plain(found: Any) -> Metadata:
    tensors, objects = {}, []
    for name, kept in _table(found, "state_dict_metadata").items():
        if type(kept).__name__ != "TensorStorageMetadata":
            objects.append(str(name))
            continue
        tensors[_text(name)] = StoredTensor(
            shape=_sizes(_field(kept, "size")),
            dtype=_dtype(_field(_field(kept, "properties"), "dtype")),
            chunks=tuple(
                (_sizes(_field(chunk, "offsets")), _sizes(_field(chunk, "sizes"))) for chunk in _field(kept, "chunks")
            ),
        )
    places = {}
    for index, info in _table(found, "storage_data").items():
        places[_text(_field(index, "fqn")), _sizes(_field(index, "offset", None) or ())] = Place(
            file=_text(_field(info, "relative_path")),
            start=_size(_field(info, "offset")),
            length=_size(_field(info, "length")),
            transformed=bool(_field(info, "transform_descriptors", None)),
        )
    return Metadata(tensors=tensors, objects=tuple(objects), places=places)


_REQUIRED = object()


def _field(value: Any, name: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(value, _Record):
        return getattr(value, name) if default is _REQUIRED else getattr(value, name, default)
    if isinstance(value.state, tuple):
        # `TensorProperties` keeps a tuple that begins with the dtype.
        return value.state[("dtype",).index(name)]
    return value.state[name] if default is _REQUIRED else value.state.get(name, default)


def _table(value: Any, name: str) -> dict[Any, Any]:
    found = _field(value, name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise TypeError
    return found


def _sizes(value: Any) -> Shape:
    parts = value.arguments[0] if isinstance(value, _Record) and value.arguments else value
    if isinstance(value, _Record) and not value.arguments:
        return ()
    if not isinstance(parts, tuple | list) or len(parts) > _LONGEST_KEY:
        raise TypeError
    return tuple(map(_size, parts))


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_SAFETENSORS_NAMES = {str(dtype): name for dtype, name in DTYPES.items()}


def _dtype(value: Any) -> str:
    text = _text(str(value) if isinstance(value, torch.dtype) else value)
    return _SAFETENSORS_NAMES.get(text, text.removeprefix("torch.").upper()[:40])
