"""`keepwarm simulate`: what snapshots, codes and spares buy on a cluster of a given size. Starts nothing."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from launch.errors import SimulationError
from launch.simulation.cluster import Cluster, Placement
from launch.simulation.drill import apply_drill
from launch.simulation.durations import duration, seconds
from launch.simulation.failures import LLAMA_3_NODE_MTBF, Renewal, Trace, load_trace
from launch.simulation.recommend import recommend
from launch.simulation.report import Asked, as_data, print_report
from launch.simulation.scheme import Restart, Times
from launch.simulation.study import Question, ask, fitting_code, schemes_for, with_intervals, with_spares

LARGEST = 100_000
"""GPUs."""
GOODPUT, SURVIVAL = 0.9, 0.999
"""Targets where only the other one is given."""
PATIENCE = 2.0
"""Seconds of computing after which progress is shown."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises SimulationError on bad input."""
    app(args=list(arguments), prog_name="keepwarm simulate", standalone_mode=True)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def simulate(
    gpus: Annotated[str, typer.Option(help="GPUs, 8 to 100,000; several sizes as 64,1024,16384.")] = "16384",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share a node and its memory.")] = 8,
    rack: Annotated[int, typer.Option(min=1, max=256, help="Nodes of a rack.")] = 8,
    mtbf: Annotated[str | None, typer.Option(help="Time between failures of the whole cluster, as 3.1h.")] = None,
    node_mtbf: Annotated[
        str | None, typer.Option(help="The same of one node, as 5y. [default: 264d, from Llama 3's 419 failures]")
    ] = None,
    weibull: Annotated[float, typer.Option(help="Weibull shape of these times; 1: exponential.")] = 1.0,
    trace: Annotated[
        Path | None, typer.Option(help="Recorded failures instead: CSV or JSON with time_s, optional kind and node.")
    ] = None,
    rack_share: Annotated[float, typer.Option(help="Share of failures that take a whole rack.")] = 0.0,
    worker_share: Annotated[float, typer.Option(help="Share of failures that end processes only.")] = 0.0,
    span: Annotated[
        str | None, typer.Option("--duration", help="Cluster time. [default: 30d, or all of the trace]")
    ] = None,
    code: Annotated[str, typer.Option(help="Erasure code k,m of the snapshots.")] = "4,2",
    placement: Annotated[Placement, typer.Option(help="Groups over racks, or of neighbours.")] = "spread",
    interval: Annotated[str, typer.Option(help="Training between snapshots; auto: Young/Daly.")] = "auto",
    stall: Annotated[str, typer.Option(help="What one snapshot stops the training for.")] = "10ms",
    commit: Annotated[str, typer.Option(help="Time until it can be restored from the peers.")] = "1s",
    detection: Annotated[str, typer.Option(help="From a failure until it is noticed.")] = "5s",
    recovery: Annotated[str, typer.Option(help="From a failure to the next step, detection included.")] = "30s",
    worker_recovery: Annotated[
        str | None, typer.Option(help="The same when only processes died. [default: as --recovery]")
    ] = None,
    rebuild: Annotated[
        str | None, typer.Option(help="From then until redundancy is whole. [default: the next snapshot]")
    ] = None,
    drill: Annotated[
        Path | None, typer.Option(help="Detection and recovery from `keepwarm drill --json`, medians by rung.")
    ] = None,
    drill_scale: Annotated[float, typer.Option(help="Bytes of state of a node over those in the drill.")] = 1.0,
    disk_interval: Annotated[str, typer.Option(help="Training between checkpoints on disk alone.")] = "auto",
    disk_stall: Annotated[str, typer.Option(help="What one of these stops the training for.")] = "30s",
    disk_recovery: Annotated[str, typer.Option(help="From a failure to the next step, from disk.")] = "10m",
    durable_every: Annotated[
        str, typer.Option(help="Training between durable checkpoints below the snapshots, written by the agents.")
    ] = "30m",
    spares: Annotated[str, typer.Option(help="Hot spare nodes; auto: waiting below 0.1 %.")] = "auto",
    repair: Annotated[str, typer.Option(help="Until a broken node is back as a spare.")] = "24h",
    trials: Annotated[int, typer.Option(min=2, max=10_000, help="Histories simulated.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")] = 0,
    target_goodput: Annotated[float | None, typer.Option(help="Recommend for this goodput, as 0.99.")] = None,
    target_survival: Annotated[
        float | None, typer.Option(help="Recommend for this probability of never losing memory, as 0.999.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write PNG files into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Goodput and survival of a cluster: coded snapshots beside replicas and checkpoints on disk.

    What Llama 3's cluster would have kept:

        keepwarm simulate --gpus 16384 --mtbf 3.1h --duration 54d

    Does placement matter when one failure in fifty takes a rack?

        keepwarm simulate --rack-share 0.02 --placement adjacent

    From one node to 100,000 GPUs, as pictures:

        keepwarm simulate --gpus 8,64,512,4096,32768,100000 --plot out

    With the recovery times of your own fire drill, and failures of your own cluster:

        keepwarm drill job.yaml --kill node:2@35 --json > drill.json

        keepwarm simulate --gpus 2048 --drill drill.json --trace failures.csv

    What to configure for a goal:

        keepwarm simulate --gpus 4096 --target-goodput 0.99 --target-survival 0.9999

    Times are written as 10ms, 30s, 5m, 3.1h, 54d, 5y. Assumptions and formulas: docs/simulator.md.
    """
    noticed = seconds(detection, "--detection")
    node = _restart(recovery, noticed, "--recovery")
    times = Times(
        interval=_interval(interval, "--interval"),
        stall=seconds(stall, "--stall"),
        commit=seconds(commit, "--commit"),
        worker=node if worker_recovery is None else _restart(worker_recovery, noticed, "--worker-recovery"),
        node=node,
        durable=_restart(disk_recovery, noticed, "--disk-recovery"),
        rebuild=None if rebuild is None else seconds(rebuild, "--rebuild"),
        durable_every=_above_zero(durable_every, "--durable-every"),
    )
    if drill is not None:
        times = apply_drill(times, drill, drill_scale)
    disk_only = replace(
        times,
        interval=_interval(disk_interval, "--disk-interval"),
        stall=seconds(disk_stall, "--disk-stall"),
        commit=0.0,
    )
    sizes = [_nodes(size, gpus_per_node) for size in gpus.split(",")]
    recorded = None if trace is None else load_trace(trace)
    if recorded is not None and (mtbf or node_mtbf or weibull != 1 or rack_share or worker_share):
        raise SimulationError("--trace says when what fails: leave out --mtbf, --weibull and the shares")
    if mtbf is not None and (node_mtbf is not None or len(sizes) > 1):
        raise SimulationError("--mtbf is that of the whole cluster: for several sizes give --node-mtbf, and never both")
    each = _above_zero(node_mtbf, "--node-mtbf") if node_mtbf else LLAMA_3_NODE_MTBF * gpus_per_node / 8
    asked: list[Asked] = []
    advice = None
    wanted = target_goodput is not None or target_survival is not None
    with _progress(trials * 4 * len(sizes) + (trials + 20) * wanted) as step:
        for nodes in sizes:
            failures = recorded or Renewal(
                mtbf=_above_zero(mtbf, "--mtbf") if mtbf else each / nodes,
                shape=weibull,
                rack_share=rack_share,
                worker_share=worker_share,
            )
            k, m = _code(code)
            question = Question(
                cluster=Cluster(
                    nodes=nodes, gpus_per_node=gpus_per_node, rack=rack, repair=_above_zero(repair, "--repair")
                ),
                failures=failures,
                horizon=_horizon(span, recorded),
                times=times,
                disk=disk_only,
                code=(k, m) if len(sizes) == 1 else fitting_code(nodes, k, m),
                placement=placement,
                trials=trials,
                seed=seed,
            )
            question = with_spares(with_intervals(question), _spares(spares))
            asked.append((question, ask(question, schemes_for(question), step)))
        if wanted:
            advice = recommend(asked[-1][0], target_goodput or GOODPUT, target_survival or SURVIVAL, step)
    if plot is not None:
        from launch.simulation.plot import plot as draw

        for path in draw(asked, plot):
            print(f"wrote {path}", file=sys.stderr)
    if as_json:
        print(json.dumps(as_data(asked, advice), allow_nan=False))
    else:
        print_report(asked, advice)


def _above_zero(text: str, name: str) -> float:
    value = seconds(text, name)
    if value <= 0:
        raise SimulationError(f"{name} = {text}: must be above 0")
    return value


def _interval(text: str, name: str) -> float | None:
    return None if text == "auto" else _above_zero(text, name)


def _restart(text: str, detection: float, name: str) -> Restart:
    total = seconds(text, name)
    if total < detection:
        raise SimulationError(f"{name} = {text} contains the detection, which takes {duration(detection)} alone")
    return Restart(detection, total - detection)


def _horizon(text: str | None, recorded: Trace | None) -> float:
    if text is not None:
        return _above_zero(text, "--duration")
    return 30 * 86400.0 if recorded is None else max(recorded.span, 1.0)


def _nodes(text: str, gpus_per_node: int) -> int:
    try:
        gpus = int(text)
    except ValueError:
        raise SimulationError(f"--gpus: {text!r} is not a number; several sizes are written as 64,1024") from None
    if not gpus_per_node <= gpus <= LARGEST or gpus % gpus_per_node:
        raise SimulationError(
            f"--gpus {gpus}: must be a multiple of the {gpus_per_node} GPUs of a node, up to {LARGEST:,}"
        )
    return gpus // gpus_per_node


def _code(text: str) -> tuple[int, int]:
    try:
        k, m = (int(part) for part in text.strip("()").split(","))
    except ValueError:
        raise SimulationError(f"--code {text!r}: write k,m, such as 4,2") from None
    return k, m


def _spares(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) > LARGEST:
        raise SimulationError(f"--spares {text!r}: must be auto or a number of nodes from 0")
    return int(text)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A step counter that shows itself on stderr once the work has taken longer than anyone waits unasked."""
    began = shown = monotonic()
    done = 0

    def step() -> None:
        nonlocal done, shown
        done += 1
        now = monotonic()
        if now - began > PATIENCE and now - shown > (0.2 if live else 5 * PATIENCE):
            shown = now
            line = f"simulating: {min(done / total, 1):.0%} after {now - began:.0f} s"
            print(f"\r{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    live = sys.stderr.isatty()
    try:
        yield step
    finally:
        if live and shown > began:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
