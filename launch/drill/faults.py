"""Faults of a drill: parse them, check them against a job and draw random ones. Pure."""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from keepwarm.launch.errors import DrillError

Action = Literal["kill", "freeze", "corrupt", "stop"]
Target = Literal["worker", "node", "agent", "keeper", "supervisor", "chunk", "store", "disk"]

TARGETS: dict[Action, tuple[Target, ...]] = {
    "kill": ("worker", "node", "agent", "keeper", "supervisor", "store"),
    "freeze": ("node",),
    "corrupt": ("chunk",),
    "stop": ("disk",),
}
"""Targets of each option."""
UNNUMBERED = ("store", "disk")
KEEP_MEMORY = ("worker", "agent", "store", "disk")
"""Targets whose loss takes nothing from the memory of a node."""
MOMENTS = (0.0, 0.0, 0.5, 2.0)
"""Seconds between two drawn faults of one step: at once, or in the recovery from the first."""
EXAMPLES = {"kill": "node:2@35", "freeze": "node:1@55", "corrupt": "chunk:1@60", "stop": "disk@70"}

_GRAMMAR = re.compile(r"(?P<target>[a-z]+)(?::(?P<numbers>\d+(?:,\d+)*))?@(?P<step>\d+)(?:\+(?P<after>\d+(?:\.\d+)?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault injected into a run from outside, `after` seconds after its `step`-th step has completed."""

    action: Action
    target: Target
    numbers: tuple[int, ...] = ()
    """Ranks of workers, or slots of other targets; empty for a store or a disk."""
    step: int
    after: float = 0.0

    def __str__(self) -> str:
        name = f"{self.target}{'s' if len(self.numbers) > 1 else ''}"
        numbers = f":{','.join(map(str, self.numbers))}" if self.numbers else ""
        later = f"+{self.after:g}" if self.after else ""
        return f"{self.action} {name}{numbers}@{self.step}{later}"

    @property
    def option(self) -> str:
        """Return the fault in command-line form."""
        return f"--{self}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Properties of a job that determine which faults apply to it."""

    steps: int
    ranks: int
    nodes: int
    spares: int
    durable: bool
    """Whether agents write checkpoints to disk."""
    supervised: bool
    """Whether every node has its own supervisor and the nodes rendezvous through a store."""


def parse(action: Action, text: str) -> Fault:
    """Parse the value of a fault option, such as `node:2@35` or `nodes:0,3@50+1.5`.

    Raises:
        DrillError: the text is invalid; says what is expected.
    """
    known = TARGETS[action]
    found = _GRAMMAR.fullmatch(text.strip())
    if found is None:
        raise DrillError(f"--{action} {text}: expected TARGET@STEP, as --{action} {EXAMPLES[action]}")
    name = found["target"]
    numbers = tuple(int(number) for number in (found["numbers"] or "").split(",") if number)
    target = next((target for target in known if name in (target, f"{target}s")), None)
    if target is None:
        raise DrillError(f"--{action} {text}: cannot {action} a {name!r}; it can be {' or '.join(known)}")
    if target in UNNUMBERED and numbers:
        raise DrillError(f"--{action} {text}: a {target} has no number, write {target}@{found['step']}")
    if target not in UNNUMBERED and not numbers:
        raise DrillError(f"--{action} {text}: says not which {target}, write {target}:0@{found['step']}")
    if len(numbers) > 1 and name == target:
        raise DrillError(
            f"--{action} {text}: {target} takes one number, for several write {target}s:{found['numbers']}"
        )
    if len(numbers) > 1 and target == "chunk":
        raise DrillError(f"--{action} {text}: one chunk at a time; give the option once for each")
    if len(set(numbers)) < len(numbers):
        raise DrillError(f"--{action} {text}: names the same {target} twice")
    return Fault(
        action=action, target=target, numbers=numbers, step=int(found["step"]), after=float(found["after"] or 0)
    )


def check(faults: Sequence[Fault], stage: Stage) -> None:
    """Check that all faults apply to the job.

    Raises:
        DrillError: a fault does not apply; names the first one.
    """
    for fault in faults:
        if not 1 <= fault.step < stage.steps:
            raise DrillError(
                f"{fault.option}: that step never comes with anything left to train after it: the job has "
                f"{stage.steps} steps, choose one from 1 to {stage.steps - 1}"
            )
        word, count = ("rank", stage.ranks) if fault.target == "worker" else ("node", stage.nodes)
        if missing := [number for number in fault.numbers if number >= count]:
            raise DrillError(f"{fault.option}: there is no {word} {missing[0]}, the job has {_range(word, count)}")
        if fault.target in ("node", "supervisor", "store") and not stage.supervised:
            raise DrillError(
                f"{fault.option}: the job runs on one node, which cannot be lost here; set cluster.ranks_per_node "
                "below the number of ranks to emulate several"
            )
        if fault.target == "disk" and not stage.durable:
            raise DrillError(f"{fault.option}: nothing is written to disk while the job runs; set snapshot.durable")
        frozen = {slot for other in faults if other.step == fault.step for slot in _frozen(other)}
        if fault.action == "freeze" and _stops_the_others(frozen, stage):
            names = ", ".join(map(str, sorted(frozen)))
            raise DrillError(
                f"{fault.option}: nodes {names} of {stage.nodes} would be frozen at once, and the others would "
                "wait: so many may go on elsewhere. Freeze fewer than half of the nodes"
            )
    if (needed := spares_needed(faults)) > stage.spares:
        raise DrillError(
            f"the faults need {needed} {'spare' if needed == 1 else 'spares'}, and there "
            f"{'is' if stage.spares == 1 else 'are'} {stage.spares or 'none'}: training would wait for a node that "
            f"never comes; give --spares {needed}, or take fewer nodes"
        )


def _frozen(fault: Fault) -> tuple[int, ...]:
    return fault.numbers if fault.action == "freeze" else ()


def _stops_the_others(frozen: Collection[int], stage: Stage) -> bool:
    """Return whether these nodes could be a majority, as one half with slot 0 is: silence is not death."""
    return 2 * len(frozen) > stage.nodes or (2 * len(frozen) == stage.nodes and 0 in frozen)


def spares_needed(faults: Sequence[Fault]) -> int:
    """Return the number of spares that replace every lost node. A frozen node becomes a spare once it is resumed."""
    needed = gone = 0
    for fault in sorted(faults, key=lambda fault: (fault.step, fault.after)):
        if fault.target in ("node", "supervisor"):
            needed = max(needed, gone + len(fault.numbers))
            gone += len(fault.numbers) if fault.action == "kill" else 0
    return needed


def _range(word: str, count: int) -> str:
    return f"{word} 0 alone" if count == 1 else f"{word}s 0 to {count - 1}"


def draw(count: int, seed: int, stage: Stage, parity: int) -> list[Fault]:
    """Draw `count` faults; the same arguments give the same faults. They lose no more nodes than there are spares, and
    the memory of no more than `parity` nodes at once. Several faults of one step are at most a moment apart."""
    random_ = random.Random(f"keepwarm drill {seed}")
    places = range(2, stage.steps - 1, 3)
    if not places:
        raise DrillError(f"--random {count}: the job has only {stage.steps} steps, too few to draw faults for")
    steps = sorted(random_.sample(places, count) if count <= len(places) else random_.choices(places, k=count))
    spares = stage.spares if stage.supervised else 0
    made: list[Fault] = []
    for step in steps:
        together = _together(made, step)
        action, target, most = random_.choice(_possible(stage, spares, parity, together))
        ranks = stage.ranks if target == "worker" else stage.nodes
        chosen = () if target in UNNUMBERED else random_.sample(range(ranks), random_.randint(1, most))
        after = max((fault.after for fault in together if fault.step == step), default=None)
        later = 0.0 if after is None else after + random_.choice(MOMENTS)
        made.append(Fault(action=action, target=target, numbers=tuple(sorted(chosen)), step=step, after=later))
        if target in ("node", "supervisor"):
            spares -= len(chosen)
    return made


def _together(made: Sequence[Fault], step: int) -> list[Fault]:
    """Return the faults, in the order of their steps, from which a run may not have recovered when the next one comes
    at `step`: those of the same step, and those before it that came later than their own step."""
    found: list[Fault] = []
    for fault in reversed(made):
        if fault.step != step and fault.after == 0 and (not found or found[-1].step != fault.step):
            break
        found.append(fault)
    return found


def _possible(stage: Stage, spares: int, parity: int, together: Sequence[Fault]) -> list[tuple[Action, Target, int]]:
    """Return (action, target, maximum number at once) of every fault that is possible right after others."""
    found: list[tuple[Action, Target, int]] = [
        ("kill", "worker", min(2, stage.ranks)),
        ("kill", "agent", stage.nodes),
    ]
    if stage.supervised:
        found.append(("kill", "store", 1))
    if stage.durable and not any(fault.target == "disk" for fault in together):
        found.append(("stop", "disk", 1))
    lost = sum(len(fault.numbers) for fault in together if fault.target not in KEEP_MEMORY)
    more = parity - lost
    if lost and more <= 0:
        return found
    found.append(("corrupt", "chunk", 1))
    if parity:
        found.append(("kill", "keeper", 1))
    if spares > 0:
        found += [("kill", "node", max(1, min(spares, more, stage.nodes))), ("kill", "supervisor", 1)]
        silent = sum(len(_frozen(fault)) for fault in together)
        if 2 * (silent + 1) < stage.nodes:
            found.append(("freeze", "node", 1))
    return found
