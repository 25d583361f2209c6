"""The slot table: scripted histories, and random ones that must keep its invariants."""

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keepwarm.launch.node import slot_table
from keepwarm.launch.node.slot_table import ATTRIBUTION_WINDOW_S as WINDOW
from keepwarm.launch.node.slot_table import FormerOwners, Kept, Table
from keepwarm.launch.node.view import Member


def started(count: int = 3, spares: int = 1, max_restarts: int = 2) -> Table:
    table = Table(slots=count, max_restarts=max_restarts)
    for slot in range(count):
        table = slot_table.join(table, f"n{slot}", slot)
    for spare in range(spares):
        table = slot_table.join(table, f"s{spare}", "spare")
    return arrived(table)


def arrived(table: Table) -> Table:
    for node in (*table.owners.values(), *table.spares):
        table = slot_table.arrive(table, node, table.restart)
    return table


def test_table_every_slot_has_arrived_owner_is_complete() -> None:
    table = Table(slots=2, max_restarts=0)
    table = slot_table.join(table, "a", 0)
    table = slot_table.arrive(table, "a", 0)
    table = slot_table.join(table, "s", "spare")
    assert not table.complete
    assert slot_table.arrive(table, "s", 0) == table  # a spare has no slot to arrive with
    table = slot_table.join(table, "b", "any")
    assert table.owners == {0: "a", 1: "b"}
    assert not table.complete
    assert slot_table.arrive(table, "b", 7) == table  # of another restart
    table = slot_table.arrive(table, "b", 0)
    assert table.complete
    assert (table.begun, table.charged_restarts, table.restart) == (True, 0, 0)


def test_lose_spare_takes_slot_and_survivors_keep_theirs() -> None:
    table = slot_table.lose(started(spares=2), "n1", "connection closed", 5.0)
    assert table.owners == {0: "n0", 1: "s0", 2: "n2"}
    assert (table.spares, table.restart, table.moved, table.complete) == (("s1",), 1, (1,), False)
    table = arrived(table)
    assert table.complete
    assert table.charged_restarts == 0  # losing a node is not charged
    assert [failure.slot for failure in table.root_causes] == [1]


def test_spare_that_has_not_come_to_the_next_store_takes_no_slot() -> None:
    table = slot_table.inherit(started(spares=2), 1, ())
    for node in ("n0", "n1", "s1"):
        table = slot_table.join(table, node, "any")
    table = slot_table.lose(table, "n2", "it did not come to store 1", 5.0)
    assert (table.owners, table.spares) == ({0: "n0", 1: "n1", 2: "s1"}, ("s0",))
    table = slot_table.lose(table, "s1", "its supervisor has gone", 6.0, dead=True)
    assert (table.vacant, table.spares) == ((2,), ("s0",))
    table = slot_table.fill(slot_table.join(table, "s0", "spare"))
    assert (table.owners[2], table.spares) == ("s0", ())


def test_spare_of_another_failure_domain_than_its_group_takes_the_slot() -> None:
    domains = {"n0": "a", "n1": "b", "n2": "a", "n3": "b", "s0": "b", "s1": "c", "s2": ""}
    table = msgspec.structs.replace(started(4, spares=3), groups={4: ((0, 1), (2, 3))})
    members = {node: Member(node=node, host="h", port=1, domain=domain) for node, domain in domains.items()}
    table = msgspec.structs.replace(table, members=members)
    assert slot_table.lose(table, "n0", "gone", 0.0).owners[0] == "s1", "b would have both slots of the group"
    assert slot_table.lose(table, "n1", "gone", 0.0).owners[1] == "s0", "it waits longest"
    without = msgspec.structs.replace(table, spares=("s0",))
    assert slot_table.lose(without, "n0", "gone", 0.0).owners[0] == "s0", "better than none"
    assert slot_table.lose(msgspec.structs.replace(table, groups={}), "n0", "gone", 0.0).owners[0] == "s0"


def test_root_causes_lost_node_hides_failures_that_follow() -> None:
    table = slot_table.fail(started(), "n0", 0, "failed", "rank 0 gave up", 1.0)
    table = slot_table.fail(table, "n2", 0, "failed", "rank 2 gave up", 1.1)
    assert table.restart == 1
    assert len(table.failures) == 2
    table = slot_table.lose(table, "n1", "gone", 1.2, silence=1.0)
    assert table.restart == 1
    assert [(failure.kind, failure.slot, failure.silence) for failure in table.root_causes] == [("lost", 1, 1.0)]
    assert arrived(table).charged_restarts == 0


def test_lose_replacement_before_start_is_replaced_in_same_restart() -> None:
    table = slot_table.lose(started(spares=2), "n1", "gone", 0.0)
    table = slot_table.arrive(slot_table.arrive(table, "n0", 1), "s0", 1)
    table = slot_table.lose(table, "s0", "gone too", 1.0)
    assert (table.restart, table.owners[1], table.arrived) == (1, "s1", ())  # n0 has not accepted s1


def test_drained_owner_leaves_to_a_spare_once_workers_have_handed_over() -> None:
    table = slot_table.drain(started(spares=2), "n1", 1.0)
    assert (table.draining, table.restart, table.complete) == ("n1", 0, True)
    assert slot_table.hand_over(table, 7, 2.0, on_disk=False) == table  # of another restart
    table = slot_table.hand_over(table, 0, 2.0, on_disk=False)
    assert table.owners == {0: "n0", 1: "s0", 2: "n2"}
    assert (table.draining, table.drained, table.moved) == (None, ("n1",), (1,))
    assert table.root_causes[0].cause == "n1 was drained"
    table = arrived(table)
    assert (table.complete, table.charged_restarts, table.restart) == (True, 0, 1)


def test_drain_of_one_owner_of_two_goes_on_with_the_other() -> None:
    """Its consent is not needed, as the node has left by itself: neither half waits for the other."""
    table = slot_table.hand_over(slot_table.drain(started(count=2), "n0", 0.0), 0, 0.0, on_disk=False)
    assert table.owners == {0: "s0", 1: "n1"}
    assert arrived(table).complete


def test_drained_owner_without_a_spare_shrinks_the_run_at_once_if_the_state_is_on_disk() -> None:
    table = started(spares=0)
    table = slot_table.drain(msgspec.structs.replace(table, sizes=(3, 2, 1)), "n0", 0.0)
    in_memory = slot_table.hand_over(table, 0, 0.0, on_disk=False)
    assert (in_memory.slots, in_memory.vacant, in_memory.resized) == (3, (0,), False)  # it is flushed first
    on_disk = slot_table.hand_over(table, 0, 0.0, on_disk=True)
    assert (on_disk.slots, on_disk.owners, on_disk.resized) == (2, {0: "n2", 1: "n1"}, True)
    assert arrived(on_disk).complete


def test_drain_is_refused_while_it_could_lose_something() -> None:
    table = started(spares=1)
    assert slot_table.refusal_to_drain(table, "n7") == "n7 is not part of the run"
    draining = slot_table.drain(table, "n1", 0.0)
    assert slot_table.refusal_to_drain(draining, "n1") == ""
    assert slot_table.refusal_to_drain(draining, "n0") == "n1 is being drained; one node leaves at a time"
    assert slot_table.drain(draining, "n0", 0.0) == draining
    assert "no spare could take slot 1" in slot_table.refusal_to_drain(started(spares=0), "n1")
    assert "restarting" in slot_table.refusal_to_drain(slot_table.fail(table, "n0", 0, "failed", "it broke", 0.0), "n1")
    assert "has ended: done" in slot_table.refusal_to_drain(slot_table.end(table, 0, "done"), "n1")


def test_draining_outlives_a_failure_and_ends_with_its_node() -> None:
    table = slot_table.drain(started(spares=2), "n1", 0.0)
    table = arrived(slot_table.fail(table, "n2", 0, "killed", "rank 2 was ended", 1.0))
    assert (table.draining, table.restart, table.complete) == ("n1", 1, True)
    assert slot_table.stop_draining(table, "n1").draining is None
    assert slot_table.lose(table, "n1", "gone", 2.0).draining is None
    assert slot_table.inherit(table, 1, ()).draining is None


def test_drained_spare_leaves_at_once_and_interrupts_nothing() -> None:
    table = slot_table.drain(started(spares=2), "s0", 0.0)
    assert (table.spares, table.drained, table.restart, table.complete) == (("s1",), ("s0",), 0, True)


def test_lose_without_spare_leaves_slot_vacant_until_node_joins() -> None:
    table = slot_table.lose(started(spares=0), "n2", "gone", 0.0)
    assert table.vacant == (2,)
    table = slot_table.join(table, "late", "spare")
    assert slot_table.fill(table).owners[2] == "late"
    assert slot_table.join(slot_table.lose(started(spares=0), "n2", "gone", 0.0), "late", 1).owners[2] == "late"


def test_lost_node_cannot_change_table_and_rejoins_as_spare() -> None:
    table = slot_table.lose(started(), "n1", "silent", 0.0)
    assert not table.knows("n1")
    assert slot_table.fail(table, "n1", 0, "failed", "its peers are gone", 1.0) == table
    assert slot_table.arrive(table, "n1", 1) == table
    assert slot_table.finish(table, "n1", 1) == table
    assert slot_table.join(table, "n1", "spare").spares == ("n1",)


def test_fail_more_than_max_restarts_ends_run() -> None:
    table = started(max_restarts=2)
    for count in range(3):
        assert table.ended is None
        table = arrived(slot_table.fail(table, "n1", count, "killed", "rank 1 was ended by SIGSEGV", 0.0))
    assert table.ended is not None
    assert table.ended.code == 4
    assert table.ended.reason == "rank 1 was ended by SIGSEGV, after 2 restarts (cluster.max_restarts)"


def test_finish_by_all_nodes_in_one_restart_ends_run() -> None:
    table = slot_table.finish(slot_table.finish(started(), "n0", 0), "n1", 0)
    again = slot_table.lose(table, "n2", "gone before it had finished", 0.0)
    assert (again.finished, again.ended) == ((), None)
    table = slot_table.finish(table, "n2", 0)
    assert table.ended is not None
    assert table.ended.code == 0
    assert slot_table.end(table, 3, "too late").ended == table.ended


def test_join_new_store_owners_restore_slots_and_restart() -> None:
    table = Table(slots=3, max_restarts=2)
    table = slot_table.join(table, "n2", 2, seen_restart=4)
    table = slot_table.arrive(table, "n2", table.restart)
    table = slot_table.join(table, "s0", "spare", seen_restart=-1)
    table = slot_table.join(table, "n0", 0, seen_restart=4)
    assert (table.restart, table.owners, table.arrived) == (5, {0: "n0", 2: "n2"}, ())
    late = slot_table.join(table, "n1", 1, seen_restart=5)  # it had seen one more restart
    assert (late.restart, late.arrived) == (6, ())
    assert slot_table.fill(table).owners[1] == "s0"


def test_fill_owner_lost_with_store_records_moved_slot() -> None:
    table = Table(slots=2, max_restarts=0)
    table = slot_table.join(table, "b", 1, seen_restart=4)
    table = slot_table.fill(slot_table.join(table, "s", "spare"))
    assert (table.owners, table.moved, table.failures) == ({0: "s", 1: "b"}, (0,), ())
    assert (
        slot_table.fill(slot_table.join(Table(slots=1, max_restarts=0), "s", "spare")).moved == ()
    )  # it had no owner before


def failing(table: Table, node: str, kind: slot_table.Kind, now: float) -> Table:
    return arrived(slot_table.fail(table, node, table.restart, kind, "it broke", now))


def test_fail_max_node_failures_excludes_node_for_spare() -> None:
    table = Table(slots=2, max_restarts=9, max_node_failures=3)
    for node, requested in (("a", 0), ("b", 1), ("s", "spare"), ("t", "spare")):
        table = slot_table.join(table, node, requested)
    table = failing(failing(arrived(table), "b", "failed", 1.0), "b", "killed", 2.0)
    assert table.owners == {0: "a", 1: "b"}
    table = slot_table.fail(table, "b", table.restart, "killed", "it broke", 3.0)
    table = arrived(table)
    assert table.excluded == {"b": "its workers failed 3 times, most recently: it broke"}
    assert (table.owners, table.moved, table.complete) == ({0: "a", 1: "s"}, (1,), False)
    assert slot_table.join(table, "b", "any") == table
    assert arrived(table).complete
    assert table.charged_restarts == 2  # excluding a node counts as losing it


def test_fail_hang_old_failure_or_no_spare_excludes_no_node() -> None:
    table = Table(slots=2, max_restarts=9, max_node_failures=2)
    for node, requested in (("a", 0), ("b", 1)):
        table = slot_table.join(table, node, requested)
    table = failing(failing(failing(arrived(table), "a", "failed", 0.0), "a", "failed", 1.0), "a", "failed", 2.0)
    assert (table.excluded, table.complete) == ({}, True)
    table = slot_table.join(table, "s", "spare")
    table = failing(failing(table, "b", "hung", 3.0), "b", "hung", 4.0)
    table = failing(failing(table, "b", "failed", 5.0), "b", "failed", 5.0 + WINDOW)
    assert (table.excluded, table.complete) == ({}, True)
    # Both fail, one because of the other: the failure is attributed to the first, or to one ended by a signal.
    table = slot_table.fail(table, "b", table.restart, "failed", "lost its peer", 6.0 + WINDOW)
    table = arrived(slot_table.fail(table, "a", table.restart - 1, "killed", "it broke", 7.0 + WINDOW))
    assert table.attributed == {"a": (7.0 + WINDOW,), "b": (5.0 + WINDOW,)}


def elastic(count: int = 4) -> Table:
    table = Table(slots=count, max_restarts=2, sizes=(4, 2, 1))
    for slot in range(count):
        table = slot_table.join(table, f"n{slot}", slot)
    return arrived(table)


def test_shrink_vacant_slots_resizes_to_largest_allowed() -> None:
    table = elastic()
    assert slot_table.shrink(table) == table  # nothing is vacant
    table = slot_table.lose(table, "n0", "gone", 1.0)
    table = slot_table.shrink(table)
    assert (table.slots, table.owners, table.spares) == (2, {0: "n2", 1: "n1"}, ("n3",))
    assert (table.resized, table.moved, table.arrived) == (True, (), ())
    table = arrived(table)
    assert (table.complete, table.charged_restarts) == (True, 0)
    # Now there is a spare, so that the next loss costs no slot.
    table = slot_table.lose(table, "n1", "gone", 2.0)
    assert (table.slots, table.owners, table.resized) == (2, {0: "n2", 1: "n3"}, False)
    table = slot_table.shrink(slot_table.lose(arrived(table), "n2", "gone", 3.0, dead=True))
    assert (table.slots, table.owners) == (1, {0: "n3"})
    last = slot_table.lose(arrived(table), "n3", "gone", 4.0)
    assert slot_table.shrink(last) == last  # no node is left
    fixed = slot_table.lose(started(spares=0), "n1", "gone", 1.0)
    assert slot_table.shrink(fixed) == fixed


def test_claim_flush_first_node_wins_and_changes_reset_it() -> None:
    whole = arrived(elastic())
    assert slot_table.claim_flush(whole, "n1") == whole  # nothing is vacant
    table = slot_table.lose(whole, "n2", "gone", 1.0)
    assert slot_table.claim_flush(table, "stranger") == table
    table = slot_table.claim_flush(table, "n1")
    assert slot_table.claim_flush(table, "n0") == table
    assert slot_table.announce_flush(table, "n0", 7) == table
    table = slot_table.announce_flush(table, "n1", 7)
    assert (table.flushing_node, table.flush_epoch) == ("n1", 7)
    for other in (
        slot_table.shrink(table),
        arrived(slot_table.fill(slot_table.join(table, "back", "spare"))),
        slot_table.lose(table, "n3", "gone", 2.0),  # what is in memory now is less
        slot_table.lose(table, "n1", "gone", 2.0),
    ):
        assert (other.flushing_node, other.flush_epoch) == (None, 0)


KEPT = Kept(node="n1", epoch=5, step=12)


def test_shrink_through_memory_keeps_the_owners_of_the_layout_before_until_it_is_settled() -> None:
    table = slot_table.shrink(slot_table.lose(elastic(), "n0", "gone", 1.0), KEPT)
    assert (table.generation, table.owners, table.spares) == (1, {0: "n2", 1: "n1"}, ("n3",))
    former = FormerOwners(generation=0, owners={0: "n1", 1: "n1", 2: "n2", 3: "n3"}, epoch=5, step=12)
    assert table.former == former
    assert not slot_table.must_flush_former(table)
    running = arrived(table)
    assert running.former == former  # workers run, and have not committed
    assert slot_table.settle(running, 0) == running  # said of another layout
    settled = slot_table.settle(running, 1)
    assert (settled.former, settled.generation) == (None, 1)
    alone = slot_table.lose(slot_table.lose(running, "n2", "gone", 2.0, dead=True), "n3", "gone", 3.0, dead=True)
    again = slot_table.shrink(alone)  # what the layout before holds has been written to disk
    assert (again.owners, again.generation, again.former) == ({0: "n1"}, 2, None)


def test_former_memory_is_flushed_once_workers_have_failed_or_nodes_have_changed() -> None:
    table = slot_table.shrink(slot_table.lose(elastic(), "n0", "gone", 1.0), KEPT)
    failed = slot_table.fail(arrived(table), "n1", table.restart, "failed", "it could not read", 2.0)
    before_start = slot_table.lose(table, "n2", "gone", 2.0)
    spare = slot_table.lose(table, "n3", "gone", 2.0)
    joined = slot_table.lose(slot_table.join(table, "new", "spare"), "n2", "gone", 3.0)
    for one in (failed, before_start, slot_table.lose(arrived(table), "n2", "gone", 2.0), spare, joined):
        assert one.former == table.former
        assert slot_table.must_flush_former(one)
    assert slot_table.announce_flush(failed, "n1", 9, former=True) == failed  # not the owner of slot 0
    announced = slot_table.announce_flush(failed, "n2", 9, former=True)
    assert (announced.flush_epoch, announced.flush_former) == (9, True)
    assert slot_table.announce_flush(table, "n2", 9, former=True) == table  # it is read from memory
    assert slot_table.inherit(arrived(table), 1, ()).former == table.former  # the store does not hold it alone


def test_grow_enough_spares_after_saving_resizes() -> None:
    table = arrived(slot_table.shrink(slot_table.lose(elastic(), "n0", "gone", 1.0)))
    assert slot_table.request_growth(table, in_memory=True) == table  # one spare is not enough for four
    table = slot_table.request_growth(slot_table.join(table, "back", "spare"), in_memory=False)
    assert table.growing
    assert table.complete  # its workers are still saving
    assert slot_table.request_growth(table, in_memory=True) == table  # they are saving on disk
    assert slot_table.grow(table, table.restart - 1) == table
    grown = slot_table.grow(table, table.restart)
    assert (grown.slots, grown.restart, grown.resized, grown.growing) == (4, table.restart + 1, True, False)
    assert grown.former is None
    assert grown.owners == {0: "n2", 1: "n1", 2: "n3", 3: "back"}
    assert arrived(grown).complete
    assert arrived(grown).charged_restarts == table.charged_restarts  # that was no failure
    # A node that is lost meanwhile is mended first.
    lost = slot_table.lose(table, "n1", "gone", 2.0)
    assert (lost.growing, lost.owners) == (False, {0: "n2", 1: "n3"})


def test_grow_through_memory_keeps_the_agents_of_the_smaller_layout_for_all_nodes() -> None:
    small = arrived(slot_table.shrink(slot_table.lose(elastic(), "n0", "gone", 1.0)))
    table = slot_table.request_growth(slot_table.join(small, "back", "spare"), in_memory=True)
    assert (table.growing, table.grows_in_memory) == (True, True)
    late = slot_table.request_growth(table, in_memory=False)  # workers could not commit
    assert (late.growing, late.grows_in_memory) == (True, False)
    unsure = slot_table.grow(table, table.restart, saved=False)
    assert (unsure.slots, unsure.generation, unsure.restart) == (2, table.generation, table.restart + 1)
    assert (unsure.growing, unsure.grows_in_memory, unsure.resized) == (False, False, False)

    grown = slot_table.grow(table, table.restart, Kept(node="n2", epoch=6, step=20))
    assert grown.owners == {0: "n2", 1: "n1", 2: "n3", 3: "back"}
    assert grown.former == FormerOwners(generation=1, owners={0: "n2", 1: "n1"}, epoch=6, step=20)
    assert (grown.generation, grown.grows_in_memory) == (2, False)
    assert not slot_table.must_flush_former(grown)  # nodes that hold none of it read from those that do
    other = slot_table.lose(slot_table.join(grown, "later", "spare"), "back", "gone", 3.0)
    assert other.owners[3] == "later"
    assert not slot_table.must_flush_former(other)
    assert slot_table.must_flush_former(slot_table.lose(grown, "n1", "gone", 3.0))
    failed = slot_table.fail(arrived(grown), "back", grown.restart, "killed", "before the first commit", 4.0)
    assert slot_table.must_flush_former(failed)
    assert slot_table.settle(arrived(grown), 2).former is None


def at_fault(count: int = 3, spares: int = 2, **options: Any) -> Table:
    table = Table(slots=count, **({"max_restarts": 9, "max_node_failures": 3} | options))
    for number in range(count + spares):
        table = slot_table.join(table, f"n{number}", number if number < count else "spare")
    return arrived(table)


def hung(table: Table, reporter: str, *slots: int, now: float = 1.0) -> Table:
    """All ranks have given up; nodes whose ranks ended by an error when their peers left say so, too."""
    restart = table.restart
    for number, node in enumerate([reporter, *(owner for owner in table.owners.values() if owner != reporter)]):
        if number == 0:
            table = slot_table.hang(table, node, restart, slots, "no progress", now)
        table = slot_table.fail(table, node, restart, "failed", "lost its peers", now)
    return arrived(arrived(table))


def test_hang_is_attributed_to_the_node_that_others_wait_for_and_a_spare_replaces_it() -> None:
    table = hung(at_fault(), "n0", 1)
    assert (table.attributed, table.excluded, table.complete) == ({"n1": (1.0,)}, {}, True)
    table = hung(table, "n0", 1, now=2.0)
    assert table.excluded == {"n1": "its workers failed 2 times, most recently: no progress"}
    assert (table.owners, table.charged_restarts) == ({0: "n0", 1: "n3", 2: "n2"}, 1)


def test_hang_without_a_culprit_or_with_too_many_blames_nobody() -> None:
    table = at_fault()
    for slots in ((), (1, 2), (7,)):
        table = hung(table, "n0", *slots)
    assert (table.attributed, table.excluded, table.charged_restarts) == ({}, {}, 3)


def test_broken_gpu_leaves_its_node_out_at_once() -> None:
    table = at_fault()
    table = slot_table.fail(table, "n0", 0, "failed", "lost its peer", 1.0)
    table = slot_table.fail(table, "n1", 0, "killed", "rank 1 was ended by SIGKILL", 1.1)
    table = slot_table.fail(table, "n1", 0, "gpu", "rank 1: uncorrectable ECC error encountered", 1.2)
    assert slot_table.fail(table, "n1", 0, "gpu", "again", 1.3) == table
    table = arrived(arrived(table))
    assert table.excluded == {"n1": "rank 1: uncorrectable ECC error encountered"}
    assert (table.owners, table.complete) == ({0: "n0", 1: "n3", 2: "n2"}, True)


def test_broken_gpu_without_a_spare_is_tried_again_unless_the_run_can_shrink() -> None:
    table = slot_table.fail(at_fault(spares=0), "n1", 0, "gpu", "fell off the bus", 1.0)
    assert arrived(table).excluded == {}
    table = slot_table.fail(at_fault(spares=0, sizes=(3, 2, 1)), "n1", 0, "gpu", "fell off the bus", 1.0)
    table = arrived(table)
    assert (table.excluded, table.vacant) == ({"n1": "fell off the bus"}, (1,))
    assert slot_table.shrink(table).owners == {0: "n0", 1: "n2"}


def test_excluded_node_leaves_without_a_spare_and_does_not_come_back() -> None:
    table = slot_table.fail(at_fault(spares=0), "n1", 0, "killed", "rank 1 was ended", 1.0)
    table = slot_table.exclude(table, "n1", "process 7 is still there", 2.0, dead=True)
    assert (table.vacant, table.excluded) == ((1,), {"n1": "process 7 is still there"})
    assert slot_table.join(table, "n1", 1) == table


@pytest.mark.parametrize("parity", [1, 2])
def test_failures_of_all_nodes_exclude_no_more_at_once_than_a_group_can_lose(parity: int) -> None:
    table = at_fault(6, 6, max_excluded=parity, max_node_failures=1)
    restart = table.restart
    for node in list(table.owners.values()):
        table = slot_table.fail(table, node, restart, "killed", "out of memory", 1.0)
    table = arrived(table)
    assert len(table.excluded) == len(table.moved) == parity


NODES = [f"n{number}" for number in range(6)]


class History(RuleBasedStateMachine):
    """Any order of events: a slot changes owner only when its owner is lost, and restarts never go back."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(slots=3, max_restarts=3, max_node_failures=2, sizes=(3, 2, 1))

    def become(self, after: Table, gone: str | None = None) -> None:
        before, self.table = self.table, after
        assert after.restart >= before.restart
        for slot, owner in before.owners.items():
            assert after.owners.get(slot) == owner or owner == gone or owner in after.excluded
        assert before.ended in (None, after.ended)
        if before.complete and not after.complete:
            assert after.restart == before.restart + 1
        assert len(after.excluded) <= len(before.excluded) + after.max_excluded

    @rule(node=st.sampled_from(NODES), requested=st.sampled_from([0, 1, 2, "any", "spare"]), seen=st.integers(-1, 2))
    def join(self, node: str, requested: Any, seen: int) -> None:
        if seen < self.table.restart:
            self.become(slot_table.join(self.table, node, requested, seen_restart=seen))
            assert self.table.knows(node) == (node not in self.table.excluded)

    @rule()
    def fill(self) -> None:
        self.become(slot_table.fill(self.table))

    @rule(node=st.sampled_from(NODES), late=st.integers(0, 1))
    def arrive(self, node: str, late: int) -> None:
        self.become(slot_table.arrive(self.table, node, self.table.restart - late))

    @rule(
        node=st.sampled_from(NODES),
        late=st.integers(0, 1),
        kind=st.sampled_from(get_args(slot_table.Kind)[1:]),
    )
    def fail(self, node: str, late: int, kind: Any) -> None:
        self.become(slot_table.fail(self.table, node, self.table.restart - late, kind, "because", 0.0))

    @rule(node=st.sampled_from(NODES), late=st.integers(0, 1), slots=st.sets(st.integers(0, 3), max_size=2))
    def hang(self, node: str, late: int, slots: set[int]) -> None:
        self.become(slot_table.hang(self.table, node, self.table.restart - late, slots, "because", 0.0))

    @rule(node=st.sampled_from(NODES))
    def lose(self, node: str) -> None:
        self.become(slot_table.lose(self.table, node, "gone", 0.0), gone=node)
        assert self.table.ended is not None or self.table.slot_of(node) is None

    @rule()
    def shrink(self) -> None:
        self.resize(slot_table.shrink(self.table))

    @rule(late=st.integers(0, 1), in_memory=st.booleans(), saved=st.booleans())
    def grow(self, late: int, in_memory: bool, saved: bool) -> None:
        self.become(slot_table.request_growth(self.table, in_memory=in_memory))
        kept = Kept(node="n0", epoch=1, step=1) if self.table.grows_in_memory else None
        self.resize(slot_table.grow(self.table, self.table.restart - late, kept, saved=saved))

    def resize(self, after: Table) -> None:
        """Every node stays, and owners of slots that remain keep them."""
        before, self.table = self.table, after
        assert after.restart >= before.restart
        assert {*after.owners.values(), *after.spares} == {*before.owners.values(), *before.spares}
        for slot, owner in before.owners.items():
            assert slot >= after.slots or after.owners[slot] == owner
        assert after.slots == before.slots or (after.resized and not after.vacant)

    @rule(node=st.sampled_from(NODES))
    def finish(self, node: str) -> None:
        self.become(slot_table.finish(self.table, node, self.table.restart))

    @invariant()
    def everyone_has_one_place(self) -> None:
        table = self.table
        nodes = [*table.owners.values(), *table.spares]
        assert len(nodes) == len(set(nodes))
        assert set(table.arrived) <= set(table.owners.values())
        assert set(table.finished) <= set(table.arrived)
        assert not (table.begun and table.vacant and table.spares and table.ended is None) or not table.complete


TestHistory = pytest.mark.filterwarnings("error")(History.TestCase)
TestHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
