"""What one family of transformers does at toy size: built, trained on one rank and on eight, exported, read back."""

import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Piece
from keepwarm.ft.format.writer import write_part_blocks
from keepwarm.ft.worker.snapshotter import DTYPES
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.verify.comparison import compare
from keepwarm.trainer.convert.verify.of_huggingface import of_folder
from keepwarm.trainer.convert.verify.of_native import NativeModel
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.transformers_spec import TransformersSpec
from tests.support.parity import Outcome, State
from tests.support.transformers.models import Run, batch_of, config_of, spec_from, train, whole_stage

STEPS = 5
WITHIN = 1e-4
"""Of loss and gradient norm, between one rank and the covering layout, and of logits."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found; `reason` says why it stopped."""

    family: str
    class_name: str = ""
    stage: str = "builds"
    """What was tried last: builds, trains, splits, documents, exports, or passed."""
    reason: str = ""
    layout: str = ""
    loss: float | None = None
    norm: float | None = None
    """Largest relative differences between one rank and the layout over the steps."""
    isolated: bool | None = None
    logits: float | None = None
    """Of the export, read by transformers, against the model that was trained."""
    divided: float | None = None
    """Share of the multiplications by weights that the tensor axis divides."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def families() -> tuple[list[str], list[str]]:
    """Return the causal families with tensor and pipeline plans: dense ones, and mixtures of experts."""
    dense: list[str] = []
    experts: list[str] = []
    for kind in sorted(CONFIG_MAPPING):
        config = CONFIG_MAPPING[kind]
        if config not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        tensor, pipeline = (getattr(config, f"base_model_{axis}_plan", None) for axis in ("tp", "pp"))
        if tensor and pipeline:
            (experts if _has_experts(config, tensor) else dense).append(kind)
    return dense, experts


def _has_experts(config: Any, plan: Mapping[str, str]) -> bool:
    return bool(getattr(config, "base_model_ep_plan", None)) or any("expert" in f"{key}.{plan[key]}" for key in plan)


def tried(family: str) -> Row:
    """Try a family; whatever it raises becomes the reason in its row."""
    row = Row(family=family)
    try:
        spec = spec_from(config_of(family))
        row = replace(row, class_name=spec.description.class_name, divided=divided(spec), stage="trains")
        alone = train(spec, Run(steps=STEPS, documents=True))
        covering = _covering(spec)
        row = replace(row, stage="splits", layout=f"{covering.tensor} x {covering.pipeline} x {covering.data}")
        found = train(spec, covering)
        loss, norm = _apart(alone, found)
        row = replace(row, loss=loss, norm=norm)
        if not (loss <= WITHIN and norm <= WITHIN):
            return replace(row, reason=f"loss differs by {loss:.1e}, the gradient norm by {norm:.1e}")
        row = replace(row, stage="documents", isolated=_isolates(spec))
        if not row.isolated:
            return replace(row, reason="a document changes another")
        row = replace(row, stage="exports", logits=_exported(spec, found.state))
        if not (row.logits is not None and row.logits <= WITHIN):
            return replace(row, reason=f"logits of the export differ by {row.logits:.1e}")
    except SpecError as error:
        return replace(row, reason=str(error))
    except Exception as error:  # the page names the reason, whatever it is
        traceback.print_exc()
        return replace(row, reason=_line(error))
    return replace(row, stage="passed")


def _line(error: Exception) -> str:
    """Return the last line of what an error, also one of a rank, says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _covering(spec: TransformersSpec) -> Run:
    tensor = 1 if spec.description.no_tensor else 2
    return Run(tensor=tensor, pipeline=2, data=2, sequence=tensor > 1, documents=True, steps=STEPS)


def divided(spec: TransformersSpec) -> float:
    """Return the share of the multiplications by weights that the tensor axis divides.

    A matrix costs two operations for each of its elements and each token; an embedding is looked up.
    """
    styles = {} if spec.description.no_tensor else spec.description.styles
    split = whole = 0
    for name, shape in spec.shapes(range(spec.layers), embed=True, head=True).items():
        module = name.rpartition(".")[0]
        if len(shape) < 2 or module == "embedding":
            continue
        parts = module.split(".")
        pattern = ".".join(["layers", "*", *parts[2:]]) if parts[0] == "layers" else module
        cost = shape[0] * shape[1]
        whole += cost
        split += cost if styles.get(pattern) in ("column", "row", "head", "key_value") else 0
    if spec.tied_embeddings:
        head = spec.vocabulary_size * spec.hidden_size
        whole, split = whole + head, split + (head if styles.get("head") == "head" else 0)
    return split / whole


def _apart(one: Outcome, other: Outcome) -> tuple[float, float]:
    pairs = list(zip(one.steps, other.steps, strict=True))
    loss = max(abs(b.loss - a.loss) / abs(a.loss) for a, b in pairs)
    norm = max(abs(b.grad_norm - a.grad_norm) / a.grad_norm for a, b in pairs)
    return loss, norm


def _isolates(spec: TransformersSpec) -> bool:
    part = whole_stage(spec)
    tokens, _, documents = batch_of(0)
    length = int((documents[0] == documents[0, 0]).sum())
    changed = tokens.clone()
    changed[0, :length] = (changed[0, :length] + 1) % spec.vocabulary_size
    with torch.no_grad():
        before, after = (part(text, documents=documents)[0] for text in (tokens, changed))
    return bool(torch.equal(before[length:], after[length:])) and not torch.equal(before[:length], after[:length])


def _exported(spec: TransformersSpec, state: State) -> float:
    """Write the weights as a checkpoint, export it, and compare the logits of transformers with ours."""
    with tempfile.TemporaryDirectory(prefix="keepwarm-family-") as made:
        native, folder = Path(made) / "native", Path(made) / "export"
        weights = {name: value.contiguous() for name, value in state.items() if name.startswith("model.")}
        pieces = [
            Piece(
                name=name,
                global_shape=tuple(value.shape),
                offsets=(0,) * value.ndim,
                shape=tuple(value.shape),
                dtype=DTYPES[value.dtype],
            )
            for name, value in weights.items()
        ]
        native.mkdir()
        write_part_blocks(
            native, 0, pieces, lambda piece: iter([weights[piece.name].reshape(-1).view(torch.uint8).numpy()])
        )
        identity = publication.Identity(run="family", epoch=0, step=STEPS, layout="whole")
        publication.write_manifest(native, identity, ranks=1, meta={"model": spec.model_dump(mode="json")})
        to_huggingface(native, folder)
        return compare(NativeModel(native), of_folder(folder)).relative
