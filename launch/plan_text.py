"""A plan as text for a terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from launch.plan import Plan, sampled_steps
from trainer.schedule import LrCurve

SHOWN = 8
"""Rows of one kind that are shown in full; of more, the first and the last ones."""
_CHART_COLUMNS, _CHART_ROWS = 60, 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_plan(plan: Plan) -> None:
    """To stdout, in the width of the terminal."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _spec(console, plan)
    _layout(console, plan)
    _memory(console, plan)
    _stages(console, plan)
    for stage in plan.stages:
        if stage.steps:
            console.print(f"\nlearning rate of {stage.name}, {stage.curve.kind}")
            console.print("\n".join(chart(stage.curve)))


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


def _spec(console: Console, plan: Plan) -> None:
    console.print(f"job {plan.job.name}, output {plan.job.output}\n")
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 110
    yaml.dump(plan.job.model_dump(mode="json"), console.file)


def _layout(console: Console, plan: Plan) -> None:
    layout = plan.layout
    console.print(
        f"\nlayout: data {layout.data} x pipeline {layout.pipeline} x tensor {layout.tensor} = "
        f"{layout.world_size} ranks on {layout.nodes} nodes of {layout.ranks_per_node}"
    )
    table = _table("data", "pipeline", "ranks (tensor 0 first)", "node", "layers")
    for data in ends(range(layout.data)):
        if data is None:
            table.add_row("...", "", "", "", "")
            continue
        for pipeline in ends(range(layout.pipeline)):
            if pipeline is None:
                table.add_row("", "...", "", "", "")
                continue
            ranks = plan.ranks_at(data, pipeline)
            shown = " ".join(map(str, ranks)) if len(ranks) <= SHOWN else f"{ranks[0]}-{ranks[-1]}"
            layers = ", ".join(_range(layers) for layers in plan.layers_at(pipeline))
            table.add_row(str(data), str(pipeline), shown, str(layout.node_of(ranks[0])), layers)
    console.print(table)


def _memory(console: Console, plan: Plan) -> None:
    console.print(f"\nparameters: {count(plan.parameters)} ({plan.parameters:,}) in total")
    console.print("estimate for each rank of a pipeline coordinate:")
    table = _table("pipeline", "parameters", "weights", "gradients", "optimizer", "activations", "total")
    for pipeline in ends(range(plan.layout.pipeline)):
        if pipeline is None:
            table.add_row("...", *[""] * 6)
            continue
        one = plan.estimates[pipeline]
        sizes = (one.weights, one.gradients, one.optimizer, one.activations, one.total)
        table.add_row(str(pipeline), f"{count(one.parameters)}", *map(size, sizes))
    console.print(table)


def _stages(console: Console, plan: Plan) -> None:
    console.print("\nstages:")
    table = _table("stage", "steps", "tokens", "samples", "micro-batches per rank and step", "mixture")
    for stage, spec in zip(plan.stages, plan.job.stages, strict=True):
        first, last = plan.micro_batches(stage)
        weights = sum(spec.mixture.values())
        mixture = ", ".join(f"{name} {weight / weights:.1%}" for name, weight in spec.mixture.items())
        batches = str(first) if first == last else f"{first} rising to {last}"
        table.add_row(stage.name, f"{stage.steps:,}", f"{stage.tokens:,}", f"{stage.samples:,}", batches, mixture)
    console.print(table)
    console.print(f"in total {plan.stages[-1].end_step:,} steps, {sum(stage.tokens for stage in plan.stages):,} tokens")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left", no_wrap=True)
    return table


def _range(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"
