"""`keepwarm plan --find`: the fastest layouts as a table, as JSON, and as a job file."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keepwarm.files import READABLE, atomic_write
from keepwarm.launch.errors import SearchError
from keepwarm.launch.plan.search import Found, find
from keepwarm.launch.plan.text import size, spec_yaml, table
from keepwarm.parallel.cards import CARDS, Card
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.estimate import longest_sequence, model_flops_per_token
from keepwarm.trainer.job.spec import JobSpec

LOSSES = {
    "elementwise": "element-wise operations",
    "recompute": "recomputation",
    "tensor": "collectives of the tensor axis",
    "bubble": "the pipeline's bubble",
    "stages": "messages between stages",
    "data": "collectives of the data axis",
    "optimizer": "the optimizer",
    "jitter": "waiting for the slowest node",
}
_NOTE = (
    "speeds are estimates from published runs (docs/planner.md), with {link} GB/s between the cards of a node and "
    "{network} GB/s per card between nodes"
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    gpus: int | None
    gpu: str | None
    gpus_per_node: int | None
    write: Path | None
    as_json: bool


def find_layouts(job: JobSpec, request: Request) -> None:
    """Print the fastest layouts of a job, and write the job file of the fastest if asked to.

    Raises:
        SearchError: the request is incomplete, or no layout fits.
        OutputError: the job file exists, or cannot be written.
    """
    card = _card(request)
    if request.gpus is None:
        raise SearchError("--find needs the number of GPUs: --gpus 64")
    found = find(job, card, request.gpus)
    if request.as_json:
        print(json.dumps({"card": asdict(card), "layouts": [_data(one) for one in found]}))
    else:
        print("\n".join(_text(job, card, request.gpus, found)))
    if request.write is not None:
        _write(found[0], card, request.write)
        print(f"keepwarm: wrote {request.write}, the fastest of these", file=sys.stderr)


def _card(request: Request) -> Card:
    named = next((card for card in CARDS.values() if request.gpu and card.name == request.gpu.upper()), None)
    if named is None:
        given = "--find needs the kind of GPU" if request.gpu is None else f"--gpu {request.gpu}: not known"
        raise SearchError(f"{given}; choose from {', '.join(CARDS)}")
    return replace(named, per_node=request.gpus_per_node) if request.gpus_per_node else named


def _text(job: JobSpec, card: Card, gpus: int, found: list[Found]) -> Iterator[str]:
    peak = card.tflops * 1e12
    flops = model_flops_per_token(job.model, longest_sequence(job))
    rows = []
    for one in found:
        parallel, loss = one.job.parallel, one.time.largest_loss
        schedule = "-" if parallel.pipeline == 1 else f"{parallel.schedule} x {parallel.stages // parallel.pipeline}"
        rows.append(
            [
                f"{parallel.tensor} x {parallel.pipeline} x {parallel.data}",
                schedule,
                parallel.data_mode + (f" {parallel.shard_size}" if parallel.data_mode == "hsdp" else ""),
                str(one.job.batch.micro_batch_size),
                one.job.numerics.recompute,
                size(one.memory.total),
                f"{one.time.total:.3g} s",
                f"{one.tokens_per_s:,.0f}",
                f"{one.tokens_per_s * flops / peak:.0%}",
                f"{LOSSES[loss]}, {getattr(one.time, loss) / one.time.total:.0%}",
            ]
        )
    yield f"fastest layouts of {job.name} on {gpus} {card.name}, {min(card.per_node, gpus)} per node:"
    yield from table(
        (
            "tensor x pipeline x data", "schedule", "data mode", "micro-batch", "recompute", "memory", "step",
            "tokens/s/GPU", "MFU", "largest loss",
        ),
        rows,
    )  # fmt: skip
    yield ""
    yield "the fastest as overrides: " + " ".join(_overrides(found[0].job))
    yield _NOTE.format(link=f"{card.link / 1e9:g}", network=f"{card.network / 1e9:g}")


def _overrides(job: JobSpec) -> Iterator[str]:
    parallel = job.parallel.model_dump(mode="json")
    for key in ("tensor", "pipeline", "data", "sequence", "schedule", "stages_per_rank", "layer_split", "data_mode",
                "shard_size", "reshard_after_forward"):  # fmt: skip
        yield f"parallel.{key}={json.dumps(parallel[key]).replace(' ', '')}".replace('"', "")
    yield f"batch.micro_batch_size={job.batch.micro_batch_size}"
    yield f"numerics.recompute={job.numerics.recompute}"
    yield f"cluster.ranks_per_node={job.cluster.ranks_per_node}"
    yield f"cluster.gpu_memory={job.cluster.gpu_memory:g}"


def _data(one: Found) -> dict[str, Any]:
    return {
        "parallel": one.job.parallel.model_dump(mode="json"),
        "micro_batch_size": one.job.batch.micro_batch_size,
        "recompute": one.job.numerics.recompute,
        "memory": one.memory.total,
        "step_s": one.time.total,
        "parts_s": asdict(one.time),
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "overrides": list(_overrides(one.job)),
    }


def _write(one: Found, card: Card, path: Path) -> None:
    """Write the resolved job as YAML. Raise OutputError if the file exists or cannot be written."""
    if path.exists():
        raise OutputError(f"{path}: exists already; give --write a new file")
    head = (
        f"# {one.job.name} in the layout that `keepwarm plan --find` expects to be the fastest on {card.name}:\n"
        f"# {one.tokens_per_s:,.0f} tokens/s of each GPU, {one.time.total:.3g} s a step, "
        f"{size(one.memory.total)} a rank.\n"
    )
    try:
        atomic_write(path, (head + spec_yaml(one.job)).encode(), mode=READABLE, durable=False)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
