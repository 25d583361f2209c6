"""Which cases of parity are tried: every pair of values that valid cases can have, with little work."""

import random
from collections.abc import Mapping, Sequence

from tests.support.parity import Case

VALUES: Mapping[str, Sequence[object]] = {
    "tensor": (1, 2),
    "pipeline": (1, 2),
    "data": (1, 2),
    "schedule": ("1f1b", "interleaved", "zero_bubble"),
    "sequence": (False, True),
    "data_mode": ("reshard", "keep", "ddp"),
    "accumulate": ("whole", "sharded"),
    "recompute": ("none", "selective", "full"),
    "micro_batches": (2, 4),
    "tied": (False, True),
    "masks": ("unequal", "equal"),
    "documents": (False, True),
    "clipped": (False, True),
    "optimizer": ("sgd", "adamw"),
    "precision": ("fp64", "fp32"),
}
"""What is varied, and to which values."""


def is_valid(case: Case) -> bool:
    """Whether every field of the case means something: no schedule without a pipeline, and so on."""
    return (
        (case.pipeline > 1 or case.schedule == "1f1b")
        and (case.tensor > 1 or not case.sequence)
        and (case.data > 1 or case.data_mode == "reshard")
        and (case.accumulate == "whole" or (case.data > 1 and case.pipeline == 1 and case.data_mode != "ddp"))
    )


Pair = tuple[str, object, str, object]


def pairs_of(case: Case) -> set[Pair]:
    """All pairs of values that one case covers."""
    names = list(VALUES)
    return {(a, getattr(case, a), b, getattr(case, b)) for i, a in enumerate(names) for b in names[i + 1 :]}


def random_case(choose: random.Random) -> Case:
    """A valid case."""
    while True:
        case = Case(**{name: choose.choice(values) for name, values in VALUES.items()})  # type: ignore[arg-type]
        if is_valid(case):
            return case


def work(case: Case) -> float:
    """Seconds that a case takes on two slow cores, roughly; fitted to what the covering cases took there."""
    passes = case.micro_batches * 4 / case.pipeline
    passes *= (1.7 if case.documents else 1.0) * (1.0 if case.recompute == "none" else 1.6)
    dispatched = 0.057 + (0.039 * (1.3 if case.sequence else 1.0) if case.tensor > 1 else 0.0)
    sent = 0.083 * case.micro_batches if case.pipeline > 1 else 0.0
    return case.world_size * (1.2 + dispatched * passes + sent)


def covering_cases(given: Sequence[Case], *, seed: int) -> list[Case]:
    """`given` and further cases until every pair of values that valid cases can have is covered.

    Greedy: of 1,500 random cases the one that covers most of what is open for its work. Then without those that the
    others have made needless. Which pairs valid cases can have is not worked out; the random ones show it.
    """
    choose = random.Random(seed)
    pool = {case: pairs_of(case) for case in (random_case(choose) for _ in range(1_500))}
    possible = set().union(*pool.values())
    open_pairs = possible.difference(*map(pairs_of, given))
    chosen: list[Case] = []
    while open_pairs:
        best = max(pool, key=lambda case: len(pool[case] & open_pairs) / work(case) ** 0.3)
        open_pairs -= pool[best]
        chosen.append(best)
    for case in sorted(chosen, key=work, reverse=True):
        others = [*given, *(other for other in chosen if other is not case)]
        if possible <= set().union(*map(pairs_of, others)):
            chosen.remove(case)
    return [*given, *chosen]
