"""`keepwarm convert`: convert weights from and to other programs' formats."""

import json
import re
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.trainer.convert.dtypes import SHORT
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.data.preprocess import tool
from keepwarm.trainer.errors import SpecError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Format(StrEnum):
    HF = "hf"
    NATIVE = "native"
    DCP = "dcp"
    TORCHTITAN = "torchtitan"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"


@app.command()
def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Model folder, checkpoint or run folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create; must not exist.")],
    given: Annotated[Format, typer.Option("--from", help="Format of SRC.")],
    wanted: Annotated[Format, typer.Option("--to", help="Format of DST.")],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: bf16, fp32 or fp16; default: as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="To hf: maximum size of a file, as 5GB or 500MB.")] = "5GB",
    model_type: Annotated[
        str | None, typer.Option(help="To hf, deepspeed: model family, as llama or qwen3; default: the parent's.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="From all but hf: config.json or model spec; default: found in SRC."),
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave out the optimizer state.")] = False,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Let pickles in SRC run code: only for files you trust.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert checkpoints from and to the formats of other programs. DST is written whole or not at all.

    keepwarm convert --from hf --to native ~/models/Qwen3-8B checkpoints/qwen3-8b

    keepwarm convert --from native --to hf runs/demo exports/demo --dtype bf16

    keepwarm convert --from native --to megatron runs/demo exports/demo-megatron

    keepwarm convert --from torchtitan --to native outputs/checkpoint/step-1000 checkpoints/llama --config config.json

    Formats: hf (folder of transformers), native (keepwarm), dcp (torch.distributed.checkpoint with keepwarm's names),
    torchtitan (Llama 3), megatron (Megatron Core torch_dist, GPT), deepspeed (universal checkpoint, with the names of a
    Hugging Face model). All but hf carry AdamW's state.
    """
    began = time.perf_counter()
    progress = _bar() if sys.stderr.isatty() and not as_json else lambda done, total: None
    match given, wanted:
        case Format.HF, Format.NATIVE:
            done = from_huggingface(source, destination, dtype=_dtype(dtype), progress=progress)
        case Format.NATIVE, Format.HF:
            done = to_huggingface(
                source,
                destination,
                dtype=_dtype(dtype),
                max_shard_bytes=_size(max_shard_size),
                model_type=model_type,
                progress=progress,
            )
        case ((Format.DCP | Format.TORCHTITAN | Format.MEGATRON | Format.DEEPSPEED), Format.NATIVE):
            from keepwarm.trainer.convert.dcp.importer import from_dcp

            done = from_dcp(
                source,
                destination,
                kind=given,
                config=config,
                dtype=_dtype(dtype),
                weights_only=weights_only,
                trust_pickle=trust_pickle,
                progress=progress,
            )
        case Format.NATIVE, (Format.DCP | Format.TORCHTITAN | Format.MEGATRON):
            from keepwarm.trainer.convert.dcp.exporter import to_dcp

            done = to_dcp(
                source, destination, kind=wanted, dtype=_dtype(dtype), weights_only=weights_only, progress=progress
            )
        case Format.NATIVE, Format.DEEPSPEED:
            from keepwarm.trainer.convert.deepspeed.exporter import to_deepspeed

            if dtype is not None:
                raise SpecError("--dtype: a universal checkpoint of DeepSpeed is fp32 throughout")
            done = to_deepspeed(
                source, destination, model_type=model_type, weights_only=weights_only, progress=progress
            )
        case _:
            raise SpecError(f"--from {given} --to {wanted}: nothing to convert; one of them must be native")
    _print(done | {"seconds": round(time.perf_counter() - began, 3)}, as_json)


def _print(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done))
        return
    typer.echo(
        f"{done['destination']}: {done['model_type']}, {done['parameters']:,} parameters in {done['tensors']} tensors, "
        f"{done['bytes'] / 1e9:.2f} GB of {', '.join(done['dtypes'])} in {done['seconds']:.1f} s"
    )
    if done["carried"]:
        typer.echo(f"carried along: {', '.join(done['carried'])}")
    if done["left"]:
        rest = len(done["left"]) - 8
        typer.echo(f"left behind: {', '.join(done['left'][:8])}{f' and {rest} more' if rest > 0 else ''}")


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
