"""Drawn histories of slot tables with a node that is always at fault, or with faults that are no node's."""

import signal
from collections.abc import Sequence
from random import Random

import pytest

from keepwarm.exit_code import ExitCode
from keepwarm.ft.groups import code_for, place
from keepwarm.launch.node import slot_table
from keepwarm.launch.node.elastic_agent import explain
from keepwarm.launch.node.shared_table import Fail, apply
from keepwarm.launch.node.slot_table import Table
from keepwarm.trainer.monitor.last_words import BrokenGpu, Hang, OnGpu, Word

HISTORIES = 10_000
PER_NODE = 2
End = tuple[int, Sequence[Word]]
"""How a rank ends: its exit code and its last words."""
ABORTED: End = (-signal.SIGABRT, [OnGpu()])
"""By NCCL's watchdog."""
GAVE_UP: End = (ExitCode.FAULT, [OnGpu()])
"""As its peers have gone."""
KILLED: End = (-signal.SIGKILL, [])


class History:
    """One run: all restarts of a slot table, checked after each."""

    def __init__(self, draw: Random, max_node_failures: int = 3) -> None:
        self.draw, slots = draw, draw.randint(2, 9)
        code, parity = code_for(slots, None)
        self.groups = place(slots, code, parity)
        self.table = Table(slots=slots, max_restarts=100, max_node_failures=max_node_failures, max_excluded=parity)
        for number in range(slots):
            self.table = slot_table.join(self.table, f"n{number}", number)
        for number in range(slots + draw.randint(1, 3)):
            self.table = slot_table.join(self.table, f"s{number}", "spare")
        self.arrive()

    def arrive(self) -> None:
        """Let all nodes arrive, in any order, until workers run. Those that are excluded end, and others take over."""
        for _ in range(2):
            for node in self.table.excluded:
                self.table = slot_table.lose(self.table, node, "its supervisor has gone", 0.0, dead=True)
            self.table = slot_table.fill(self.table)
            nodes = [*self.table.owners.values(), *self.table.spares]
            for node in self.draw.sample(nodes, len(nodes)):
                self.table = slot_table.arrive(self.table, node, self.table.restart)
        assert self.table.complete

    def lose(self, node: str) -> None:
        """Lose a node, as by a loss of power."""
        self.table = slot_table.lose(self.table, node, f"{node} is gone", 0.0, dead=True)
        self.arrive()

    def end(self, ends: Sequence[tuple[int, End]], now: float) -> None:
        """Let one rank of some slots end, in this order, and start again; no group loses more than its parity."""
        before, restart = dict(self.table.owners), self.table.restart
        for slot, (code, words) in ends:
            kind, cause, late = explain(slot * PER_NODE, code, words)
            at_fault = {rank // PER_NODE for rank in late}
            fail = Fail(restart=restart, kind=kind, cause=cause, at_fault=tuple(at_fault))
            self.table = apply(self.table, before[slot], fail, now)
        self.arrive()
        for group in self.groups:
            replaced = [slot for slot in group.members if self.table.owners[slot] != before[slot]]
            assert len(replaced) <= group.m

    def others(self, slot: int) -> list[int]:
        """The other slots, some of them, in any order: supervisors end their workers before all have failed."""
        slots = [other for other in range(self.table.slots) if other != slot]
        return self.draw.sample(slots, self.draw.randint(0, len(slots)))


@pytest.fixture(scope="module", params=range(4))
def draws(request: pytest.FixtureRequest) -> list[Random]:
    return [Random(f"{request.param} {number}") for number in range(HISTORIES // 4)]


def test_node_that_is_always_at_fault_is_replaced_within_two_starts(draws: list[Random]) -> None:
    for draw in draws:
        history = History(draw)
        slot = draw.randrange(history.table.slots)
        node, starts = history.table.owners[slot], 0
        while history.table.slot_of(node) is not None:
            starts += 1
            assert starts <= 2, f"{node} still owns slot {slot} after two faults"
            if draw.random() < 0.2 and history.table.spares[1:]:
                history.lose(draw.choice([other for other in history.table.owners.values() if other != node]))
            late = slot * PER_NODE + draw.randrange(PER_NODE)
            verdict: End = (ExitCode.HUNG, [OnGpu(), Hang((late,))])
            others = [(other, draw.choice([verdict, verdict, ABORTED, GAVE_UP])) for other in history.others(slot)]
            if draw.random() < 0.3:
                broken: End = (draw.choice([1, -signal.SIGABRT]), [OnGpu(), BrokenGpu("uncorrectable ECC error")])
                ends = [(slot, broken), *((other, draw.choice([ABORTED, GAVE_UP])) for other, _ in others)]
            else:
                # Some rank has reported the verdict: perhaps one of the node itself, whose process is alive.
                reporter = draw.randrange(history.table.slots)
                ends = [(reporter, verdict), *((other, end) for other, end in others if other != reporter)]
            history.end(draw.sample(ends, len(ends)), 1000.0 + starts)
        assert set(history.table.excluded) == {node}


def test_sigabrt_everywhere_blames_nobody(draws: list[Random]) -> None:
    for draw in draws:
        history = History(draw, max_node_failures=1)
        owners = dict(history.table.owners)
        for now in range(draw.randint(1, 4)):
            first = draw.randrange(history.table.slots)
            history.end([(slot, ABORTED) for slot in (first, *history.others(first))], float(now))
        assert (history.table.attributed, history.table.excluded) == ({}, {})
        assert history.table.owners == owners


def test_faults_of_many_nodes_at_once_cost_no_group_more_than_its_parity(draws: list[Random]) -> None:
    for draw in draws[::5]:
        history = History(draw, max_node_failures=draw.randint(1, 3))
        for now in range(6):
            if not history.table.spares:
                break
            first = draw.randrange(history.table.slots)
            broken: End = (ExitCode.FAULT, [OnGpu(), BrokenGpu("NVLink")])
            ends = [(slot, draw.choice([KILLED, KILLED, broken])) for slot in (first, *history.others(first))]
            history.end(ends, float(now))


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (ExitCode.HUNG, [Hang((3, 4))], ("hung", "rank 1 detected a hang: the others wait for ranks 3, 4", (3, 4))),
        (ExitCode.HUNG, [OnGpu(), Hang(())], ("hung", "rank 1 detected a hang", ())),
        (-signal.SIGABRT, [], ("killed", "rank 1 was ended by SIGABRT", ())),  # on a CPU it is a fault of its own
        (-signal.SIGKILL, [OnGpu()], ("killed", "rank 1 was ended by SIGKILL", ())),
        (ExitCode.FAULT, [OnGpu()], ("failed", "rank 1 ended with exit code 1", ())),
        (ExitCode.FAULT, [OnGpu(), BrokenGpu("ECC")], ("gpu", "rank 1: ECC", ())),
    ],
)
def test_explain_exit_code_and_last_words(code: int, words: list[Word], expected: tuple[object, ...]) -> None:
    assert explain(1, code, words) == expected


def test_explain_sigabrt_on_a_gpu_is_a_hang_without_a_culprit() -> None:
    kind, cause, at_fault = explain(1, *ABORTED)
    assert (kind, at_fault) == ("hung", ())
    assert "NCCL's watchdog" in cause
