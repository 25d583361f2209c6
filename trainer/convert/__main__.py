"""`keepwarm convert`: convert weights from and to other programs' formats."""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepwarm.trainer import tool
from keepwarm.trainer.convert.dtypes import SHORT
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import Progress, from_huggingface, silent
from keepwarm.trainer.errors import SpecError

if TYPE_CHECKING:
    from keepwarm.trainer.convert.verify.comparison import Comparison

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Format(StrEnum):
    HF = "hf"
    NATIVE = "native"
    DCP = "dcp"
    TORCHTITAN = "torchtitan"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"


Dtype = Annotated[str | None, typer.Option(help="Type of the weights: bf16, fp32 or fp16; default: as stored.")]
ModelType = Annotated[
    str | None, typer.Option(help="To hf, deepspeed: model family, as llama or qwen3; default: the parent's.")
]
Config = Annotated[Path | None, typer.Option(help="From all but hf: config.json or model spec; default: found in SRC.")]
IgnoreKey = Annotated[
    list[str] | None, typer.Option(help="A field of config.json that changes nothing, and that keepwarm does not know.")
]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="Leave out the optimizer state.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let pickles in SRC run code: only for files you trust.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Then compute logits of SRC and of DST; exit code 1 if they differ.")
]
VerifyOnly = Annotated[bool, typer.Option("--verify-only", help="The same for a DST that exists; convert nothing.")]
Tolerance = Annotated[
    float | None,
    typer.Option(min=0.0, help="With --verify: largest difference, relative to the largest logit; default: 1e-4."),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `keepwarm convert`; the command's help explains each."""

    source: Path
    destination: Path
    given: Format
    wanted: Format
    dtype: str | None
    max_shard_size: str
    model_type: str | None
    config: Path | None
    ignore_key: list[str] | None
    weights_only: bool
    trust_pickle: bool
    verify: bool
    verify_only: bool
    tolerance: float | None
    as_json: bool


@app.command()
def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Model folder, checkpoint or run folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create; must not exist.")],
    given: Annotated[Format, typer.Option("--from", help="Format of SRC.")],
    wanted: Annotated[Format, typer.Option("--to", help="Format of DST.")],
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="To hf: maximum size of a file, as 5GB or 500MB.")] = "5GB",
    model_type: ModelType = None,
    config: Config = None,
    ignore_key: IgnoreKey = None,
    weights_only: WeightsOnly = False,
    trust_pickle: TrustPickle = False,
    verify: Verify = False,
    verify_only: VerifyOnly = False,
    tolerance: Tolerance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert checkpoints from and to the formats of other programs. DST is written whole or not at all.

    keepwarm convert --from hf --to native ~/models/Qwen3-8B checkpoints/qwen3-8b

    keepwarm convert --from native --to hf runs/demo exports/demo --dtype bf16

    keepwarm convert --from native --to megatron runs/demo exports/demo-megatron

    keepwarm convert --from hf --to native ~/models/Qwen3-8B checkpoints/qwen3-8b --verify

    keepwarm convert --from torchtitan --to native outputs/checkpoint/step-1000 checkpoints/llama --config config.json

    Formats: hf (folder of transformers), native (keepwarm), dcp (torch.distributed.checkpoint with keepwarm's names),
    torchtitan (Llama 3, Qwen 3), megatron (Megatron Core torch_dist, GPT), deepspeed (universal checkpoint, with the
    names of a Hugging Face model). All but hf carry AdamW's state.
    """
    options = Options(**locals())
    if options.verify_only:
        answer: dict[str, Any] = {"source": str(source), "destination": str(destination)}
    else:
        began = time.perf_counter()
        answer = convert(options, _bar() if sys.stderr.isatty() and not as_json else silent)
        answer["seconds"] = round(time.perf_counter() - began, 3)
        if not as_json:
            _print(answer)
    equal = True
    if verify or verify_only:
        found = _verified(options, Path(answer["source"]))
        equal = found.equal
        answer["verify"] = found.as_json()
        if not as_json:
            typer.echo(f"{destination}: {found}")
    if as_json:
        typer.echo(json.dumps(answer))
    if not equal:
        raise typer.Exit(1)


def convert(options: Options, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint that the options ask for; return a summary.

    Raises:
        SpecError, CheckpointError, OutputError: nothing is left at the destination.
    """
    source, destination, dtype = options.source, options.destination, _dtype(options.dtype)
    match options.given, options.wanted:
        case Format.HF, Format.NATIVE:
            return from_huggingface(
                source, destination, dtype=dtype, ignored_keys=options.ignore_key or (), progress=progress
            )
        case Format.NATIVE, Format.HF:
            return to_huggingface(
                source,
                destination,
                dtype=dtype,
                max_shard_bytes=_size(options.max_shard_size),
                model_type=options.model_type,
                progress=progress,
            )
        case ((Format.DCP | Format.TORCHTITAN | Format.MEGATRON | Format.DEEPSPEED) as kind, Format.NATIVE):
            from keepwarm.trainer.convert.importer import ImportOptions, from_dcp

            chosen = ImportOptions(
                config=options.config,
                dtype=dtype,
                weights_only=options.weights_only,
                trust_pickle=options.trust_pickle,
                ignored_keys=tuple(options.ignore_key or ()),
            )
            return from_dcp(source, destination, kind=kind, options=chosen, progress=progress)
        case Format.NATIVE, (Format.DCP | Format.TORCHTITAN | Format.MEGATRON) as kind:
            from keepwarm.trainer.convert.dcp.exporter import to_dcp

            weights_only = options.weights_only
            return to_dcp(source, destination, kind=kind, dtype=dtype, weights_only=weights_only, progress=progress)
        case Format.NATIVE, Format.DEEPSPEED:
            from keepwarm.trainer.convert.deepspeed.exporter import to_deepspeed

            if dtype is not None:
                raise SpecError("--dtype: a universal checkpoint of DeepSpeed is fp32 throughout")
            return to_deepspeed(
                source,
                destination,
                model_type=options.model_type,
                weights_only=options.weights_only,
                progress=progress,
            )
        case given, wanted:
            raise SpecError(f"--from {given} --to {wanted}: nothing to convert; one of them must be native")


def _verified(options: Options, source: Path) -> "Comparison":
    # Imports torch and transformers, which a conversion between hf and native does without.
    from keepwarm.trainer.convert.importer import ImportOptions
    from keepwarm.trainer.convert.verify.comparison import compare
    from keepwarm.trainer.convert.verify.open import opened

    chosen = ImportOptions(
        config=options.config, trust_pickle=options.trust_pickle, ignored_keys=tuple(options.ignore_key or ())
    )
    return compare(
        opened(source, options.given, chosen), opened(options.destination, options.wanted, chosen), options.tolerance
    )


def _print(done: dict[str, Any]) -> None:
    typer.echo(
        f"{done['destination']}: {done['model_type']}, {done['parameters']:,} parameters in {done['tensors']} tensors, "
        f"{done['bytes'] / 1e9:.2f} GB of {', '.join(done['dtypes'])} in {done['seconds']:.1f} s"
    )
    if done["carried"]:
        typer.echo(f"carried along: {', '.join(done['carried'])}")
    for title, names in (("left behind", done["left"]), ("fields of config.json not read", done.get("unread"))):
        if names:
            rest = len(names) - 8
            typer.echo(f"{title}: {', '.join(names[:8])}{f' and {rest} more' if rest > 0 else ''}")


def _bar() -> Callable[[int, int], None]:
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        if percent != shown:
            shown = percent
            print(f"\r{percent:3d} % of {total / 1e9:.1f} GB", end="\n" if done == total else "", file=sys.stderr)

    return show


def _dtype(text: str | None) -> str | None:
    if text is not None and text not in SHORT:
        raise SpecError(f"--dtype {text}: not known; it may be bf16, fp32 or fp16")
    return None if text is None else SHORT[text]


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise SpecError(f"--max-shard-size {text}: not a size; write 5GB or 500MB")
    return max(1, int(float(found[1]) * _UNITS[found[2]]))


if __name__ == "__main__":
    tool.run(app)
