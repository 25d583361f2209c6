"""Print a plan to the terminal. Plain text, because importing rich would double the command's import time."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from ruamel.yaml import YAML

from keepwarm.launch.plan import rank_cpus
from keepwarm.launch.plan.placement import is_placed
from keepwarm.launch.plan.plan import Plan, sampled_steps
from keepwarm.launch.plan.room import Room
from keepwarm.text import counted
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.job.estimate import RESERVED_GIB
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan

SHOWN = 8
"""Maximum number of rows of a kind to show in full; of a longer list, the first and last rows are shown."""
_CHART_COLUMNS, _CHART_ROWS = 60, 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_plan(plan: Plan, *, spec: bool = False) -> None:
    """Print a plan to stdout, with `spec` the resolved spec after it."""
    cpus = rank_cpus.lines(plan.job, rank_cpus.of_this_machine(plan.job))
    parts = [_layout(plan), cpus, _memory(plan), _stages(plan), _curve(plan), *([_site(plan)] if plan.site else [])]
    print("\n\n".join("\n".join(part) for part in parts))
    if spec:
        print(f"\n# {plan.job.name}: the resolved spec")
        print(spec_yaml(plan.job), end="")


def spec_yaml(job: JobSpec) -> str:
    """Return the resolved spec of a job as YAML, without where its values come from."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096  # a path is one word
    text = io.StringIO()
    yaml.dump(job.model_dump(mode="json", exclude={"cluster": {"sources"}}), text)
    return text.getvalue()


def count(number: float) -> str:
    """Format a count with three digits: 1.30 M, 530 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Format bytes in binary units."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= bytes_:
            return f"{number / bytes_:.1f} {unit}"
    return f"{number:.0f} B"


ONE_PORT = "through the disk: the agents of both layouts cannot have one port"


def route(room: Room) -> str:
    """Format which way a run goes that shrinks or grows, and why."""
    way = "memory" if room.enough else "the disk"
    return f"through {way}: both layouts need {size(room.needed)} of {size(room.total)}"


def route_to_larger(room: Room | None, job: JobSpec, failed: str = "") -> tuple[bool, str]:
    """Return whether a run grows through memory, and format its way. `failed`: why it could not the last time. Pure."""
    spec = job.snapshot
    if spec == "off" or spec.durable is None:
        return False, "through the disk: without snapshot.durable, a fault meanwhile could lose what memory holds"
    if failed:
        return False, f"through the disk: {failed}"
    return (False, ONE_PORT) if room is None else (room.enough, route(room))


def chart(rate: Callable[[int], float], last: int, marks: Mapping[int, str]) -> list[str]:
    """Draw the rate of steps 0 to `last` - 1 as a bar chart, highest on top, with `marks` below the axis."""
    steps = sampled_steps(last, _CHART_COLUMNS)
    values = [rate(step) for step in steps]
    peak = max(values)
    lines = []
    for row in reversed(range(_CHART_ROWS)):
        cells = (round((value / peak * _CHART_ROWS - row) * 8) for value in values)
        label = f"{peak:.2e}" if row == _CHART_ROWS - 1 else f"{0:.2e}" if row == 0 else ""
        lines.append(f"{label:>9} ┤" + "".join(_EIGHTHS[min(8, max(0, cell))] for cell in cells))
    end = f"step {last - 1}"
    at = {next(i for i, step in enumerate(steps) if step >= mark): name for mark, name in marks.items()}
    lines.append(f"{'':>9} └" + "".join("┴" if i in at and i else "─" for i in range(len(values))))
    lines.append(f"{'':>11}0{end:>{max(len(values) - 1, len(end) + 1)}}")
    names = ""
    for column, name in at.items():
        if len(names) <= column:
            names = names.ljust(column) + name + " "
    return [*lines, f"{'':>11}{names}".rstrip()]


def ends(items: Sequence[int]) -> Iterator[int | None]:
    """Yield all items if they are few, else the first and last ones with None in between."""
    if len(items) <= SHOWN:
        yield from items
        return
    yield from items[: SHOWN // 2]
    yield None
    yield from items[-SHOWN // 2 + 1 :]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to their widest cell, two spaces apart."""
    lines = [header, ["-" * len(cell) for cell in header], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _site(plan: Plan) -> list[str]:
    rows = [[key, json.dumps(each["value"]), each["source"]] for key, each in plan.site.items()]
    return ["taken from the site, as the job does not set it:", *table(("key", "value", "source"), rows)]


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    replica = layout.pipeline * layout.tensor
    rows = []
    for data in range(layout.data if layout.world_size <= SHOWN * SHOWN else 1):
        for pipeline in ends(range(layout.pipeline)):
            if pipeline is None:
                rows.append(["", "...", "", "", ""])
                continue
            ranks = plan.ranks_at(data, pipeline)
            shown = " ".join(map(str, ranks)) if len(ranks) <= SHOWN else f"{ranks[0]}-{ranks[-1]}"
            layers = ", ".join(_range(layers) for layers in plan.layers_at(pipeline))
            rows.append([str(data), str(pipeline), shown, str(layout.node_of(ranks[0])), layers])
    if layout.data > 1 and layout.world_size > SHOWN * SHOWN:
        rows.append(
            [f"1-{layout.data - 1}", "the same", f"+ {replica} each", f"+ {replica / layout.ranks_per_node:g}", ""]
        )
    return [
        f"layout: data {layout.data} x pipeline {layout.pipeline} x tensor {layout.tensor} = "
        f"{counted(layout.world_size, 'rank')} on {counted(layout.nodes, 'node')} of {layout.ranks_per_node}",
        *table(("data", "pipeline", "ranks by tensor", "node", "layers"), rows),
    ]


def _memory(plan: Plan) -> list[str]:
    rows = []
    for pipeline in ends(range(plan.layout.pipeline)):
        if pipeline is None:
            rows.append(["...", *[""] * 6])
            continue
        one = plan.estimates[pipeline]
        sizes = (one.weights, one.gradients, one.optimizer, one.activations, one.total)
        rows.append([str(pipeline), count(one.parameters), *map(size, sizes)])
    return [
        f"parameters: {count(plan.parameters)} ({plan.parameters:,}) in total; estimate for each rank, by pipeline:",
        *table(("pipeline", "parameters", "weights", "gradients", "optimizer", "activations", "memory"), rows),
        *_decided(plan),
        *_host_memory(plan),
        *_placement(plan),
        *_smaller(plan),
    ]


def _decided(plan: Plan) -> list[str]:
    """What the plan chose for memory, and whether the ranks fit."""
    lines = []
    if plan.job.parallel.accumulate == "auto" and max(max(plan.micro_batches(stage)) for stage in plan.stages) > 1:
        lines.append(
            "gradients are reduced after each micro-batch (parallel.accumulate: sharded)"
            if plan.parallel.accumulate == "sharded"
            else "gradients are reduced once per step (parallel.accumulate: whole)"
        )
    if plan.job.parallel.reshard_after_forward is None and plan.parallel.reshard_after_forward is False:
        lines.append("gathered weights are kept between micro-batches (parallel.reshard_after_forward: false)")
    if not plan.fits:
        lines.append(
            f"this does not fit in a GPU of {plan.job.cluster.gpu_memory:g} GiB (cluster.gpu_memory), of which "
            f"{RESERVED_GIB:g} GiB are for CUDA and NCCL: more of parallel.tensor, pipeline or data, a smaller "
            "batch.micro_batch_size, or numerics.recompute"
        )
    return lines


def _host_memory(plan: Plan) -> list[str]:
    host = plan.host_memory
    if host is None:
        return []
    parts = {
        "data buffers": host.data,
        "parity buffers": host.parity,
        "durable": host.durable,
        "receiving": host.receiving,
        "decoding": host.decoding,
        "reading": host.reading,
    }
    shown = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    return ["", f"snapshots: {size(host.total)} of each node's host memory: {shown}"]


def _placement(plan: Plan) -> list[str]:
    if plan.placement is not None:
        return ["", "failure domains, if the job gets the first of the nodes that it names:", *plan.placement.lines]
    if is_placed(plan.job):
        return ["", "failure domains: the cluster's switches, known when the job starts; its log shows the placement"]
    return []


def _smaller(plan: Plan) -> list[str]:
    rows = [
        [
            str(one.layout.nodes),
            str(one.layout.data),
            size(max(each.total for each in one.estimates)),
            "-" if one.host_memory is None else size(one.host_memory.total),
            ONE_PORT if (room := plan.room_beside(one)) is None else route(room),
            route_to_larger(one.room_beside(plan, lost=0), plan.job)[1],
        ]
        for one in plan.smaller
    ]
    header = (
        "nodes", "data", "memory of a rank", "snapshots on a node", "a shrink goes, with the memory free here",
        "growing back goes",
    )  # fmt: skip
    return ["", "while nodes are missing (cluster.elastic: shrink):", *table(header, rows)] if rows else []


def _stages(plan: Plan) -> list[str]:
    rows = []
    for stage, spec in zip(plan.stages, plan.job.stages, strict=True):
        first, last = plan.micro_batches(stage)
        batches = str(first) if first == last else f"{first} to {last}"
        replay = ", ".join(map(_replay, spec.replays)) or "-"
        numbers = [f"{stage.steps:,}", f"{stage.tokens:,}", f"{stage.samples:,}", batches]
        rows.append([stage.name, *numbers, replay, _mixture(spec.mixture)])
        for moved in ends(range(1, len(stage.mixtures))):
            at, mixture = (None, {}) if moved is None else stage.mixtures[moved]
            shown = "..." if at is None else f"from sample {at:,}: {_mixture(mixture)}"
            rows.append([*[""] * 6, shown])
    steps, tokens = plan.stages[-1].end_step, sum(stage.tokens for stage in plan.stages)
    return [
        f"stages: {steps:,} steps, {tokens:,} tokens; micro-batches are per step and data-parallel rank:",
        *table(("stage", "steps", "tokens", "samples", "micro-batches", "replay", "mixture"), rows),
    ]


def _mixture(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.1%}" for name, weight in weights.items())


def _replay(clause: ReplaySpec) -> str:
    law = clause.distribution if clause.exponent is None else f"{clause.distribution} {clause.exponent:g}"
    origins = f"stand-in {clause.proxy_source}" if clause.proxy_source else " and ".join(clause.origins) or "all seen"
    return f"{clause.fraction:.1%} of {origins}, {law}"


def _curve(plan: Plan) -> list[str]:
    begins = {stage.start_step: stage.name for stage in plan.stages}
    rows = [[stage.name, stage.curve.kind, *map("{:.3e}".format, _rates(stage))] for stage in plan.stages]
    return [
        "learning rate:",
        *chart(plan.rate_at, plan.stages[-1].end_step, begins),
        *table(("stage", "schedule", "first", "highest", "last"), rows),
    ]


def _rates(stage: StagePlan) -> tuple[float, float, float]:
    """Return the first, highest and last rate."""
    peak = max(stage.curve.at(step) for step in {*sampled_steps(stage.steps, 1000), *stage.curve.corners})
    return stage.curve.at(0), peak, stage.curve.at(stage.steps - 1)


def _range(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
