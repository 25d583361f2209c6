"""A plan as text for a terminal. Plain text: rich takes as long to import as everything else here does together."""

import sys
from collections.abc import Iterator, Sequence

from ruamel.yaml import YAML

from launch.plan import Plan, sampled_steps
from trainer.schedule import LrCurve

SHOWN = 8
"""Rows of one kind that are shown in full; of more, the first and the last ones."""
_CHART_COLUMNS, _CHART_ROWS = 60, 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_plan(plan: Plan) -> None:
    """To stdout."""
    print(f"# {plan.job.name}: the resolved spec")
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096  # a path is one word
    yaml.dump(plan.job.model_dump(mode="json"), sys.stdout)
    for part in (_layout(plan), _memory(plan), _stages(plan), *_curves(plan)):
        print("\n".join(["", *part]))


def count(number: float) -> str:
    """A number of things in three digits: 1.30 M, 530 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in binary units."""
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= bytes_:
            return f"{number / bytes_:.1f} {unit}"
    return f"{number:.0f} B"


def chart(curve: LrCurve) -> list[str]:
    """The curve as a bar chart, highest learning rate on top, with its axes labelled."""
    steps = sampled_steps(curve.end, _CHART_COLUMNS)
    values = [curve.at(step) for step in steps]
    peak = max(values)
    lines = []
    for row in reversed(range(_CHART_ROWS)):
        cells = (round((value / peak * _CHART_ROWS - row) * 8) for value in values)
        label = f"{peak:.2e}" if row == _CHART_ROWS - 1 else f"{0:.2e}" if row == 0 else ""
        lines.append(f"{label:>9} ┤" + "".join(_EIGHTHS[min(8, max(0, cell))] for cell in cells))
    end = f"step {curve.end - 1}"
    lines.append(f"{'':>9} └" + "─" * len(values))
    lines.append(f"{'':>11}0{end:>{max(len(values) - 1, len(end) + 1)}}")
    return [*lines, f"{'':>11}first {values[0]:.3e}, highest {peak:.3e}, last {values[-1]:.3e}"]


def ends(items: Sequence[int]) -> Iterator[int | None]:
    """All items if they are few, else the first and last ones with None for those between."""
    if len(items) <= SHOWN:
        yield from items
        return
    yield from items[: SHOWN // 2]
    yield None
    yield from items[-SHOWN // 2 + 1 :]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    lines = [header, ["-" * len(cell) for cell in header], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


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
        f"{_plural(layout.world_size, 'rank')} on {_plural(layout.nodes, 'node')} of {layout.ranks_per_node}",
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
    ]


def _stages(plan: Plan) -> list[str]:
    rows = []
    for stage, spec in zip(plan.stages, plan.job.stages, strict=True):
        first, last = plan.micro_batches(stage)
        weights = sum(spec.mixture.values())
        mixture = ", ".join(f"{name} {weight / weights:.1%}" for name, weight in spec.mixture.items())
        batches = str(first) if first == last else f"{first} to {last}"
        rows.append([stage.name, f"{stage.steps:,}", f"{stage.tokens:,}", f"{stage.samples:,}", batches, mixture])
    steps, tokens = plan.stages[-1].end_step, sum(stage.tokens for stage in plan.stages)
    return [
        f"stages: {steps:,} steps, {tokens:,} tokens; micro-batches are per step and data-parallel rank:",
        *table(("stage", "steps", "tokens", "samples", "micro-batches", "mixture"), rows),
    ]


def _curves(plan: Plan) -> Iterator[list[str]]:
    for stage in plan.stages:
        yield [f"learning rate of {stage.name}, {stage.curve.kind}:", *chart(stage.curve)]


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _range(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
