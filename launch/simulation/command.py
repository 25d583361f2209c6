"""`keepwarm simulate`: estimate the benefit of snapshots, codes and spares on a given cluster. Starts nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keepwarm.launch.simulation.cluster import Placement
from keepwarm.launch.simulation.options import Options
from keepwarm.launch.simulation.run import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Gpus = Annotated[str, typer.Option(help="Number of GPUs, 8 to 100,000, or several sizes such as 64,1024.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="Number of GPUs per node.")]
Rack = Annotated[int, typer.Option(min=1, max=256, help="Number of nodes in a rack.")]
Mtbf = Annotated[str | None, typer.Option(help="Mean time between failures of the cluster, such as 3.1h.")]
NodeMtbf = Annotated[
    str | None,
    typer.Option(help="Mean time between failures of a node, such as 5y. [default: 264d, from Llama 3's 419 failures]"),
]
Weibull = Annotated[float, typer.Option(help="Weibull shape of the times between failures; 1: exponential.")]
TraceFile = Annotated[
    Path | None, typer.Option(help="Recorded failures to replay: CSV or JSON with time_s, optional kind and node.")
]
RackShare = Annotated[float, typer.Option(help="Share of failures that take down a whole rack.")]
WorkerShare = Annotated[float, typer.Option(help="Share of failures that kill processes only.")]
Duration = Annotated[str | None, typer.Option("--duration", help="Simulated time. [default: 30d, or all of the trace]")]
Code = Annotated[str, typer.Option(help="Erasure code k,m of the snapshots.")]
GroupPlacement = Annotated[
    Placement, typer.Option(help="Spread coding groups over racks or form them of adjacent nodes.")
]
Interval = Annotated[str, typer.Option(help="Training time between snapshots; auto: Young/Daly.")]
Stall = Annotated[str, typer.Option(help="Time for which a snapshot pauses training.")]
Commit = Annotated[str, typer.Option(help="Time until a snapshot can be restored from peers.")]
Detection = Annotated[str, typer.Option(help="Time from a failure until it is detected.")]
Recovery = Annotated[str, typer.Option(help="Time from a failure to the next step, detection included.")]
WorkerRecovery = Annotated[str | None, typer.Option(help="The same if only processes died. [default: --recovery]")]
Rebuild = Annotated[
    str | None, typer.Option(help="Time from recovery until redundancy is restored. [default: the next snapshot]")
]
DrillFile = Annotated[
    Path | None, typer.Option(help="Output of `keepwarm drill --json` to take detection and recovery times from.")
]
DrillScale = Annotated[float, typer.Option(help="Ratio of a node's state in bytes to that in the drill.")]
DiskInterval = Annotated[str, typer.Option(help="Training time between checkpoints of the scheme without snapshots.")]
DiskStall = Annotated[str, typer.Option(help="Time for which such a checkpoint pauses training.")]
DiskRecovery = Annotated[str, typer.Option(help="Time from a failure to the next step when restoring from disk.")]
DurableEvery = Annotated[
    str, typer.Option(help="Training time between the durable checkpoints that agents write from snapshots.")
]
Spares = Annotated[
    str, typer.Option(help="Number of hot spare nodes; auto: enough to wait for at most 0.1 % of the time.")
]
Repair = Annotated[str, typer.Option(help="Time until a failed node returns as a spare.")]
Trials = Annotated[int, typer.Option(min=2, max=10_000, help="Number of histories to simulate.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed; the same seed gives the same result.")]
TargetGoodput = Annotated[float | None, typer.Option(help="Recommend a configuration for this goodput, such as 0.99.")]
TargetSurvival = Annotated[
    float | None,
    typer.Option(help="Recommend a configuration for this probability of never losing memory, such as 0.999."),
]
Plot = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write plots to this folder as PNG files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main(arguments: Sequence[str]) -> None:
    """Run the command. Raises SimulationError on bad input."""
    app(args=list(arguments), prog_name="keepwarm simulate", standalone_mode=True)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def simulate(
    gpus: Gpus = "16384",
    gpus_per_node: GpusPerNode = 8,
    rack: Rack = 8,
    mtbf: Mtbf = None,
    node_mtbf: NodeMtbf = None,
    weibull: Weibull = 1.0,
    trace: TraceFile = None,
    rack_share: RackShare = 0.0,
    worker_share: WorkerShare = 0.0,
    span: Duration = None,
    code: Code = "4,2",
    placement: GroupPlacement = "spread",
    interval: Interval = "auto",
    stall: Stall = "10ms",
    commit: Commit = "1s",
    detection: Detection = "5s",
    recovery: Recovery = "30s",
    worker_recovery: WorkerRecovery = None,
    rebuild: Rebuild = None,
    drill: DrillFile = None,
    drill_scale: DrillScale = 1.0,
    disk_interval: DiskInterval = "auto",
    disk_stall: DiskStall = "30s",
    disk_recovery: DiskRecovery = "10m",
    durable_every: DurableEvery = "30m",
    spares: Spares = "auto",
    repair: Repair = "24h",
    trials: Trials = 20,
    seed: Seed = 0,
    target_goodput: TargetGoodput = None,
    target_survival: TargetSurvival = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compare goodput and survival of coded snapshots, replicas and checkpoints on disk.

    keepwarm simulate --gpus 16384 --mtbf 3.1h --duration 54d

    keepwarm simulate --rack-share 0.02 --placement adjacent

    keepwarm simulate --gpus 8,64,512,4096,32768,100000 --plot out

    keepwarm drill job.yaml --kill node:2@35 --json > drill.json

    keepwarm simulate --gpus 2048 --drill drill.json --trace failures.csv

    keepwarm simulate --gpus 4096 --target-goodput 0.99 --target-survival 0.9999

    Times are written as 10ms, 30s, 5m, 3.1h, 54d, 5y. Assumptions and formulas: docs/simulator.md.
    """
    run(Options(**locals()))
