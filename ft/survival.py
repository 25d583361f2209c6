"""Probability that simultaneous node failures lose data. Pure arithmetic, exact until the last division."""

import itertools
import math
from collections.abc import Iterable

from keepwarm.ft.groups import Group


def loss_probability(groups: Iterable[Group], failures: int) -> float:
    """Return the probability that losing `failures` distinct nodes, with all sets equally likely, loses data.

    Data is lost if any group loses more than m members. With N nodes in groups of g, the number of sets of f nodes that
    every group survives is the coefficient of x^f in the product over groups of sum(C(g, i) x^i, i <= m), out of
    C(N, f). Failures of a whole domain are not random in this sense: see `Group.crowded`.

    Raises:
        ValueError: if there are fewer nodes than failures.
    """
    shapes = [(group.size, group.m) for group in groups]
    nodes = sum(size for size, _ in shapes)
    if not 0 <= failures <= nodes:
        raise ValueError(f"{failures} of {nodes} nodes cannot fail")
    survived = [1]
    for size, m in shapes:
        factor = [math.comb(size, lost) for lost in range(min(size, m) + 1)]
        product = [0] * min(len(survived) + len(factor) - 1, failures + 1)
        for (i, a), (j, b) in itertools.product(enumerate(survived), enumerate(factor)):
            if i + j < len(product):
                product[i + j] += a * b
        survived = product
    total = math.comb(nodes, failures)
    return (total - (survived[failures] if failures < len(survived) else 0)) / total
