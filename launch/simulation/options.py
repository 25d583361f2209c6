"""Options of `keepwarm simulate`, and their conversion to questions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.cluster import Cluster, Placement
from keepwarm.launch.simulation.drill import apply_drill
from keepwarm.launch.simulation.durations import duration, seconds
from keepwarm.launch.simulation.failures import LLAMA_3_NODE_MTBF, Renewal, Trace, load_trace
from keepwarm.launch.simulation.scheme import Restart, Times
from keepwarm.launch.simulation.study import Question, fitting_code, with_intervals, with_spares

LARGEST = 100_000
"""Maximum number of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options; times, sizes and the code are unparsed text."""

    gpus: str
    gpus_per_node: int
    rack: int
    mtbf: str | None
    node_mtbf: str | None
    weibull: float
    trace: Path | None
    rack_share: float
    worker_share: float
    span: str | None
    code: str
    placement: Placement
    interval: str
    stall: str
    commit: str
    detection: str
    recovery: str
    worker_recovery: str | None
    rebuild: str | None
    drill: Path | None
    drill_scale: float
    disk_interval: str
    disk_stall: str
    disk_recovery: str
    durable_every: str
    spares: str
    repair: str
    trials: int
    seed: int
    target_goodput: float | None
    target_survival: float | None
    plot: Path | None
    as_json: bool


def sizes(options: Options) -> list[int]:
    """Return the number of nodes of each cluster. Raises SimulationError if a size is invalid."""
    return [_nodes(size, options.gpus_per_node) for size in options.gpus.split(",")]


def questions(options: Options) -> Iterator[Question]:
    """Yield one question per size, in order.

    Raises:
        SimulationError: an option is invalid or conflicts with another one.
    """
    times, each = _times(options), sizes(options)
    disk = replace(
        times,
        interval=_interval(options.disk_interval, "--disk-interval"),
        stall=seconds(options.disk_stall, "--disk-stall"),
        commit=0.0,
    )
    recorded = _recorded(options)
    if options.mtbf is not None and (options.node_mtbf is not None or len(each) > 1):
        raise SimulationError("--mtbf is that of the whole cluster: for several sizes give --node-mtbf, and never both")
    k, m = _code(options.code)
    for nodes in each:
        question = Question(
            cluster=Cluster(
                nodes=nodes,
                gpus_per_node=options.gpus_per_node,
                rack=options.rack,
                repair=_above_zero(options.repair, "--repair"),
            ),
            failures=recorded or _renewal(options, nodes),
            horizon=_horizon(options.span, recorded),
            times=times,
            disk=disk,
            code=(k, m) if len(each) == 1 else fitting_code(nodes, k, m),
            placement=options.placement,
            trials=options.trials,
            seed=options.seed,
        )
        yield with_spares(with_intervals(question), _spares(options.spares))


def _times(options: Options) -> Times:
    noticed = seconds(options.detection, "--detection")
    node, worker, rebuild = _restart(options.recovery, noticed, "--recovery"), options.worker_recovery, options.rebuild
    times = Times(
        interval=_interval(options.interval, "--interval"),
        stall=seconds(options.stall, "--stall"),
        commit=seconds(options.commit, "--commit"),
        worker=node if worker is None else _restart(worker, noticed, "--worker-recovery"),
        node=node,
        durable=_restart(options.disk_recovery, noticed, "--disk-recovery"),
        rebuild=None if rebuild is None else seconds(rebuild, "--rebuild"),
        durable_every=_above_zero(options.durable_every, "--durable-every"),
    )
    return times if options.drill is None else apply_drill(times, options.drill, options.drill_scale)


def _recorded(options: Options) -> Trace | None:
    if options.trace is None:
        return None
    recorded = load_trace(options.trace)
    if options.mtbf or options.node_mtbf or options.weibull != 1 or options.rack_share or options.worker_share:
        raise SimulationError("--trace says when what fails: leave out --mtbf, --weibull and the shares")
    return recorded


def _renewal(options: Options, nodes: int) -> Renewal:
    """Return random failures at the rate of the whole cluster."""
    of_node = _above_zero(options.node_mtbf, "--node-mtbf") if options.node_mtbf else None
    return Renewal(
        mtbf=_above_zero(options.mtbf, "--mtbf")
        if options.mtbf
        else (of_node or LLAMA_3_NODE_MTBF * options.gpus_per_node / 8) / nodes,
        shape=options.weibull,
        rack_share=options.rack_share,
        worker_share=options.worker_share,
    )


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
