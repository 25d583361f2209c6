"""Present answers as tables and as plain data."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from keepwarm.launch.plan.text import table
from keepwarm.launch.simulation.durations import duration
from keepwarm.launch.simulation.recommend import Recommendation
from keepwarm.launch.simulation.scheme import Restart, Times
from keepwarm.launch.simulation.study import Answer, Question

Asked = tuple[Question, list[Answer]]

HEADER = ("scheme", "memory", "every", "goodput", "formula", "stall", "lost", "detect", "recover", "wait")
SURVIVAL_HEADER = (
    "scheme",
    "memory",
    "losses per run",
    "by",
    "no loss",
    "groups lost",
    "from memory",
    "from disk",
    "crowded",
)


def print_report(asked: Sequence[Asked], recommendation: Recommendation | None) -> None:
    """Print a report to stdout: rich tables on a terminal, plain text otherwise."""
    for question, answers in asked:
        print("\n".join(assumptions(question)))
        _print_table("where the time goes", HEADER, [_time_row(answer) for answer in answers])
        _print_table("what is lost", SURVIVAL_HEADER, [_loss_row(answer) for answer in answers if answer.scheme.groups])
        if any(answer.crowded for answer in answers):
            print("  crowded: groups that one rack failure takes; spread them, or use smaller racks or a larger m\n")
    if recommendation is not None:
        question = asked[-1][0]
        rows = [
            (
                f"({one.k}, {one.m})",
                f"{one.scheme.memory:.0%}",
                f"{one.m} x state",
                _number(one.losses.expected, one.losses.error),
                f"{one.losses.survival:.6f}",
                "recommended" if one is recommendation.chosen else "",
            )
            for one in recommendation.candidates
        ]
        _print_table("codes that survive", ("code", "memory", "sent", "losses per run", "no loss", ""), rows)
        print("\n".join(_advice(question, recommendation)))


def assumptions(question: Question) -> list[str]:
    """Return the assumptions behind an answer, in words."""
    cluster, times, disk, failures = question.cluster, question.times, question.disk, question.failures
    model = getattr(failures, "shape", None)
    drawn = "from the trace" if model is None else "exponential" if model == 1 else f"Weibull of shape {model:g}"
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes:,} nodes"
    return [
        f"{cluster.gpus:,} GPUs on {nodes} in racks of {cluster.rack}, {cluster.spares} spares, "
        f"nodes back after {duration(cluster.repair)}",
        f"  {duration(question.horizon)} in {question.trials} trials, seed {question.seed}; a failure every "
        f"{duration(question.mtbf)} on average, {drawn}",
        f"  {failures.rack_share:.1%} of the failures take a rack, {failures.worker_share:.1%} only processes",
        f"  snapshots: {_cost(times)}; a node's failure {_restart(times.node)}",
        f"  groups for code {question.code}, {question.placement}, whole again {duration(times.window)} after a failure"
        f"; a checkpoint every {duration(times.durable_every)} below",
        f"  disk alone: {_cost(disk)}; any failure {_restart(disk.durable)}",
        "",
    ]


def as_data(asked: Sequence[Asked], recommendation: Recommendation | None) -> dict[str, Any]:
    """Return plain values for JSON: seconds, shares and counts. The same question gives the same data."""
    data: dict[str, Any] = {"sizes": [_size_data(question, answers) for question, answers in asked]}
    if recommendation is not None:
        chosen, question = recommendation.chosen, asked[-1][0]
        data["recommendation"] = {
            "gpus": question.cluster.gpus,
            "code": [chosen.k, chosen.m],
            "interval_s": question.times.period,
            "spares": recommendation.spares,
            **_answer_data(recommendation.answer),
        }
    return data


def _size_data(question: Question, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "gpus": question.cluster.gpus,
        "nodes": question.cluster.nodes,
        "spares": question.cluster.spares,
        "rack": question.cluster.rack,
        "repair_s": _finite(question.cluster.repair),
        "placement": question.placement,
        "horizon_s": question.horizon,
        "mtbf_s": question.mtbf,
        "rack_share": question.failures.rack_share,
        "worker_share": question.failures.worker_share,
        "trials": question.trials,
        "seed": question.seed,
        "schemes": [_answer_data(answer) for answer in answers],
    }


def _answer_data(answer: Answer) -> dict[str, Any]:
    times, scheme = answer.scheme.times, answer.scheme
    restart = times.durable if scheme.groups is None else times.node
    goodput, error = answer.goodput
    return {
        "scheme": scheme.name,
        "code": scheme.code,
        "memory": scheme.memory,
        "interval_s": times.period,
        "stall_s": times.stall,
        "detection_s": restart.detection,
        "recovery_s": restart.recovery,
        "window_s": None if scheme.groups is None else _finite(times.window),
        "goodput": goodput,
        "goodput_error": _finite(error),
        "goodput_first_order": answer.first_order,
        "goodput_daly": answer.exact,
        "shares": answer.shares,
        "failures": answer.per_trial("failures")[0],
        "from_memory": answer.per_trial("from_memory")[0],
        "from_durable": answer.per_trial("from_durable")[0],
        "losses_simulated": answer.per_trial("losses")[0],
        "groups_lost_simulated": answer.per_trial("groups_lost")[0],
        "losses": answer.losses.expected,
        "losses_error": _finite(answer.losses.error),
        "losses_by": answer.losses.method,
        "survival": answer.losses.survival,
        "crowded_groups": answer.crowded,
    }


def _time_row(answer: Answer) -> tuple[str, ...]:
    goodput, error = answer.goodput
    shares = answer.shares
    wasted = (shares[name] for name in ("stall", "lost", "detection", "recovery", "waiting"))
    return (
        answer.scheme.name,
        f"{answer.scheme.memory:.0%}",
        duration(answer.scheme.times.period),
        f"{goodput:.2%}" + (f" ± {error * 100:.2g}" if math.isfinite(error) else ""),
        f"{answer.exact if answer.exact is not None else answer.first_order:.2%}",
        *(f"{share:.3%}" for share in wasted),
    )


def _loss_row(answer: Answer) -> tuple[str, ...]:
    return (
        answer.scheme.name,
        f"{answer.scheme.memory:.0%}",
        _number(answer.losses.expected, answer.losses.error),
        answer.losses.method,
        f"{answer.losses.survival:.6f}",
        _number(*answer.per_trial("groups_lost")),
        f"{answer.per_trial('from_memory')[0]:.1f}",
        f"{answer.per_trial('from_durable')[0]:.1f}",
        str(answer.crowded or ""),
    )


def _advice(question: Question, recommendation: Recommendation) -> list[str]:
    goodput, error = recommendation.answer.goodput
    chosen = recommendation.chosen
    return [
        f"recommended: code ({chosen.k}, {chosen.m}), a snapshot every {duration(question.times.period)}, "
        f"{recommendation.spares} spares",
        f"  simulated goodput {goodput:.2%} ± {error * 100:.2g}, memory kept throughout with probability "
        f"{recommendation.answer.losses.survival:.6f}",
    ]


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    if not sys.stdout.isatty():
        print("\n".join([f"{title}:", *table(header, rows), ""]))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def _number(value: float, error: float) -> str:
    return f"{value:.2g}" + (f" ± {error:.1g}" if error and math.isfinite(error) else "")


def _cost(times: Times) -> str:
    commit = f", committed {duration(times.commit)} later" if times.commit else ""
    return f"every {duration(times.period)}, each a stall of {duration(times.stall)}{commit}"


def _restart(restart: Restart) -> str:
    return f"costs {duration(restart.total)} ({duration(restart.detection)} to notice)"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
