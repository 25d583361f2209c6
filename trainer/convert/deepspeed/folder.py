"""A universal checkpoint of DeepSpeed: one folder per parameter, in it the fp32 weight and AdamW's state.

    latest_universal                     the name of the folder below
    global_step100_universal/
        zero/<parameter>/fp32.pt         and exp_avg.pt, exp_avg_sq.pt, step.pt; each a tensor, or a dict around one
        zero/optimizer_state.pt          what the optimizer does not keep per parameter
        mp_rank_00_model_states.pt       counters of the engine

All of these are pickles; they are loaded with `weights_only=True`, the states of loss scalers as plain values.
"""

from pathlib import Path
from typing import Any

import torch

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.format.contents import ITEM_SIZE
from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.convert.dialects import MOMENTS, Dialect, whole
from keepwarm.trainer.convert.recipes import into_canonical, into_huggingface
from keepwarm.trainer.errors import CheckpointError

LATEST = "latest_universal"
ZERO = "zero"
STATE = "optimizer_state.pt"
WEIGHT, COUNTER, TENSOR, SPLIT_DIM, VOCABULARY = "fp32", "step", "param", "cat_dim", "vocab_tensor"
"""Names of files, and of the entries of what is in them."""


class _Values:
    """Replaces DeepSpeed's loss scalers, which would otherwise be imported: holds values and does nothing."""


_SCALERS = [(_Values, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")]


def names_of(model_type: str) -> Dialect:
    """Return DeepSpeed's names for the state of a Hugging Face model, derived from its parameter names."""
    return Dialect(
        into=lambda spec: into_canonical(spec, model_type),
        out=lambda spec: [whole(recipe) for recipe in into_huggingface(spec, model_type)],
        moment=lambda moment, name: f"optimizer.state.{name}.{moment}",
    )


def find(source: Path) -> Path:
    """Return the universal checkpoint that `source` refers to: itself, or the folder named by its `latest_universal`.

    Raises:
        CheckpointError: there is none; names the file.
    """
    if (source / ZERO).is_dir():
        return source
    try:
        tag = (source / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        hint = "make one with DeepSpeed's ds_to_universal.py" if source.is_dir() else "not a folder"
        raise CheckpointError(f"{source}: neither {ZERO}/ nor {LATEST} of a universal checkpoint: {hint}") from error
    if Path(tag).name != tag or tag in ("", ".", ".."):
        raise CheckpointError(f"{source / LATEST}: {tag!r} is not the name of a folder in it")
    if not (source / tag / ZERO).is_dir():
        raise CheckpointError(f"{source / tag / ZERO}: missing, {LATEST} names it")
    return source / tag


class DeepSpeedFolder:
    """An open folder: tensors by name, each in a file of its own. Weights have the names of their parameters."""

    def __init__(self, source: Path, *, trust_pickle: bool = False) -> None:
        """Find the files.

        Args:
            trust_pickle: let files that hold more than tensors and plain values run whatever code they hold.

        Raises:
            CheckpointError: not such a folder; names what is missing.
        """
        self.path = find(source)
        self._trust = trust_pickle
        self.objects: list[str] = []
        """Other files, which are not read."""
        self.tensors: dict[str, Path] = {}
        moment = names_of("").moment
        for folder in sorted((self.path / ZERO).iterdir()):
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                key = file.stem
                if file.suffix == ".pt" and key in (WEIGHT, COUNTER, *MOMENTS):
                    self.tensors[folder.name if key == WEIGHT else moment(key, folder.name)] = file
                else:
                    self.objects.append(f"{folder.name}/{file.name}")
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kind(name)[0]

    def dtype(self, name: str) -> str:
        kind = self._kind(name)[1]
        return DTYPES.get(kind) or str(kind).removeprefix("torch.").upper()

    def unit_bytes(self, name: str) -> int:
        return torch.Size(self.shape(name)).numel() * ITEM_SIZE[self.dtype(name)]

    def unit(self, name: str, index: int) -> Bytes:
        """Read as `keepwarm.trainer.convert.whole.Units` does; each tensor is one unit."""
        held: Bytes = self._tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
        return held

    def number(self, name: str) -> float:
        """Return the value of a single-element tensor."""
        return float(self._tensor(name))

    def steps(self) -> set[int]:
        """Return the step counts recorded in the folder's files: a single number, unless it is damaged."""
        counters = [name for name in self.tensors if name.endswith(f".{COUNTER}")]
        if counters:
            return {int(self.number(name)) for name in counters}
        file = self.path / ZERO / STATE
        try:
            return {int(state["step"]) for state in self._load(file)["optimizer_state_dict"]["state"].values()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: says no step; --weights-only leaves the optimizer behind") from error

    def _kind(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name not in self._shapes:
            tensor = self._tensor(name)
            self._shapes[name] = tuple(tensor.shape), tensor.dtype
        return self._shapes[name]

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name} is missing")
        found = self._load(self.tensors[name])
        if isinstance(found, dict):
            found = found.get(TENSOR)
        if isinstance(found, int | float):
            found = torch.tensor(found)
        if not isinstance(found, torch.Tensor):
            raise CheckpointError(f"{self.tensors[name]}: holds a {type(found).__name__}, not a tensor")
        return found.detach()

    def _load(self, file: Path) -> Any:
        try:
            with torch.serialization.safe_globals(_SCALERS):  # type: ignore[arg-type]
                # Memory-mapped: to learn a shape, the values need not be read.
                return torch.load(file, map_location="cpu", weights_only=not self._trust, mmap=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: missing; --weights-only leaves the optimizer behind") from error
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from error
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            more = "" if self._trust else "; --trust-pickle would run what it holds: only for files you made yourself"
            raise CheckpointError(f"{file}: {text}{more}") from error
