"""`keepwarm surgery`: derive models from models. SRC is a native checkpoint or a run; DST is written atomically."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.convert.dtypes import SHORT
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.surgery import arithmetic, depth, vocabulary, width
from keepwarm.trainer.surgery.weights import Derivation, Model, write
from keepwarm.trainer.surgery.width import Widths

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Derive models from models: task vectors, more or fewer layers, wider ones, other vocabularies.",
)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Native checkpoint, or run folder for its newest one.")]
Destination = Annotated[Path, typer.Option("--to", metavar="DST", help="Checkpoint to create; must not exist.")]
Dtype = Annotated[
    str | None, typer.Option(help="Type of the weights: bf16, fp32 or fp16; default: that of the first SRC.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Size = Annotated[int | None, typer.Option(min=1, help="New value; default: unchanged.")]


@app.command()
def difference(
    source: Source,
    base: Annotated[Path, typer.Option(help="Checkpoint to subtract.")],
    to: Destination,
    as_json: AsJson = False,
) -> None:
    """Write what training from BASE to SRC changed as a task vector."""
    with _Opened([source, base]) as (one, two):
        _tell(arithmetic.difference(one, two, to), as_json)


@app.command()
def add(
    source: Source,
    vectors: Annotated[
        list[Path], typer.Option("--vector", help="Task vector, the output of `difference`; repeatable.")
    ],
    to: Destination,
    scales: Annotated[str | None, typer.Option(help="Factor of each vector, as 1,-0.5; default: 1 each.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Add task vectors to a model; a negative scale removes the task."""
    numbers = [1.0] * len(vectors) if scales is None else _numbers("--scales", scales)
    with _Opened([source, *vectors]) as models:
        _tell(arithmetic.add(models[0], models[1:], numbers, to, _dtype(dtype)), as_json)


@app.command()
def prune(
    source: Source,
    keep: Annotated[str, typer.Option(help="Layers to keep, as 0-3,6.")],
    to: Destination,
    as_json: AsJson = False,
) -> None:
    """Keep only the given layers."""
    with _Opened([source]) as (model,):
        _tell(depth.keep_layers(model, depth.parse_layers(keep), to), as_json)


@app.command()
def deepen(
    source: Source,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers of the new model.")],
    to: Destination,
    how: Annotated[str, typer.Option(help="Method: identity (same function), stack or repeat.")] = "identity",
    as_json: AsJson = False,
) -> None:
    """Add layers: silent copies that keep the function, or the whole stack again."""
    if how not in ("identity", "stack", "repeat"):
        raise SpecError(f"--how {how}: not known; it may be identity, stack or repeat")
    with _Opened([source]) as (model,):
        _tell(depth.grow_depth(model, layers, how, to), as_json)  # type: ignore[arg-type]


@app.command()
def widen(
    source: Source,
    to: Destination,
    hidden: Size = None,
    ffn: Size = None,
    heads: Size = None,
    how: Annotated[
        str, typer.Option(help="Method: fpi (same function) or aki (new units from the layer above).")
    ] = "fpi",
    as_json: AsJson = False,
) -> None:
    """Increase hidden size, feed-forward size or the number of heads, as bert2BERT does."""
    if how not in ("fpi", "aki"):
        raise SpecError(f"--how {how}: not known; it may be fpi or aki")
    with _Opened([source]) as (model,):
        _tell(width.grow_width(model, Widths(hidden=hidden, ffn=ffn, heads=heads), how, to), as_json)  # type: ignore[arg-type]


@app.command()
def coalesce(
    source: Source,
    to: Destination,
    hidden: Size = None,
    ffn: Size = None,
    heads: Size = None,
    as_json: AsJson = False,
) -> None:
    """Shrink a model by merging neighbouring units; undoes `widen`."""
    if hidden is None and ffn is None and heads is None:
        raise SpecError("coalesce: give some of --hidden, --ffn and --heads")
    with _Opened([source]) as (model,):
        _tell(width.coalesce_width(model, Widths(hidden=hidden, ffn=ffn, heads=heads), to), as_json)


@app.command()
def coalesce_layers(
    source: Source,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers of the new model.")],
    to: Destination,
    as_json: AsJson = False,
) -> None:
    """Shrink a model by merging neighbouring layers; undoes `deepen --how repeat`."""
    with _Opened([source]) as (model,):
        _tell(depth.coalesce_depth(model, layers, to), as_json)


@app.command("vocabulary")
def vocabulary_(
    source: Source,
    old: Annotated[Path, typer.Option(help="The tokenizer.json of SRC.")],
    new: Annotated[Path, typer.Option(help="The tokenizer.json of DST.")],
    to: Destination,
    size: Annotated[
        int | None, typer.Option(min=1, help="Number of rows of the embedding; default: what the IDs need.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="Initial rows of new tokens: neighbours (similar in text) or mean.")
    ] = "neighbours",
    as_json: AsJson = False,
) -> None:
    """Give a model another vocabulary; tokens in both keep their rows."""
    if start not in ("mean", "neighbours"):
        raise SpecError(f"--start {start}: not known; it may be neighbours or mean")
    before, after = vocabulary.read_vocabulary(old), vocabulary.read_vocabulary(new)
    with _Opened([source]) as (model,):
        _tell(vocabulary.change_vocabulary(model, before, after, size, start, to), as_json)  # type: ignore[arg-type]


@app.command()
def rope(
    source: Source,
    theta: Annotated[float, typer.Option(min=1, help="New base; 500000 for 8 times the context of 10000.")],
    to: Destination,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="New maximum sequence length; default: unchanged.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change the base of the rotary embedding before training on longer sequences (ABF, Xiong et al., 2023)."""
    with _Opened([source]) as (model,):
        if model.spec.position != "rotary":
            raise SpecError(f"{model.native.path}: model.position = {model.spec.position!r} has no rotary base")
        changes = {"rope_theta": theta, "max_sequence_length": max_sequence_length or model.spec.max_sequence_length}
        spec = model.spec.model_copy(update=changes)
        done = write(
            to,
            spec,
            model.read,
            Derivation(parents=[model], made_by="given another RoPE base", settings=changes),
            dtype=model.dtype,
        )
        _tell(done, as_json)


class _Opened(ExitStack):
    """The models of several checkpoints, open until the block ends."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._paths = paths

    def __enter__(self) -> list[Model]:  # type: ignore[override]
        super().__enter__()
        return [Model(self.enter_context(NativeCheckpoint(path))) for path in self._paths]


def _tell(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done))
        return
    spec = done["model"]
    typer.echo(
        f"{done['destination']}: {done['made_by']}: {done['parameters']:,} parameters, {spec['layers']} layers, hidden "
        f"{spec['hidden_size']}, vocabulary {spec['vocabulary_size']}"
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"{option} {text}: write numbers as 0.5,0.3,0.2") from None


def _dtype(text: str | None) -> str | None:
    if text is not None and text not in SHORT:
        raise SpecError(f"--dtype {text}: not known; it may be bf16, fp32 or fp16")
    return None if text is None else SHORT[text]


if __name__ == "__main__":
    tool.run(app)
