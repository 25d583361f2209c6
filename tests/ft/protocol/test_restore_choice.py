import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from keepwarm.ft.protocol import step
from keepwarm.ft.protocol.events import EpochAdvanced
from keepwarm.ft.protocol.messages import ChunkRecord, Holding, Inventory, SnapshotId, Undecodable, digest
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.restore_choice import Choice, FallBack, Wait, choose, plan, stripe_state
from tests.support.ft.cluster import Cluster

GROUPS = (StripeGroup(0, (0, 2, 4, 6), 2), StripeGroup(1, (1, 3, 5, 7), 2))
OLD, NEW = SnapshotId("run", 1, 10, "layout"), SnapshotId("run", 1, 11, "layout")


def records(group: StripeGroup, slot: int, snapshot: SnapshotId) -> tuple[ChunkRecord, ...]:
    """What a member holds of a complete snapshot."""

    def data(source: int, stripe: int) -> int:
        return digest((source, stripe, snapshot.epoch, snapshot.step))

    found = []
    for stripe in range(group.size):
        sources = tuple(data(source, stripe) for source in group.sources(stripe))
        if slot in group.sources(stripe):
            found.append(ChunkRecord(stripe, data(slot, stripe), (), 1))
        else:
            found.append(ChunkRecord(stripe, digest(sources, slot), sources, 1, (1,) * group.data))
    return tuple(found)


def everything(*snapshots: SnapshotId) -> dict[int, Inventory]:
    return {
        slot: Inventory(
            slot=slot,
            incarnation=1,
            epoch=2,
            holdings=tuple(Holding(snapshot, records(group, slot, snapshot)) for snapshot in snapshots),
        )
        for group in GROUPS
        for slot in group.members
    }


def without(inventories: dict[int, Inventory], *slots: int) -> dict[int, Inventory]:
    return {slot: inventory for slot, inventory in inventories.items() if slot not in slots}


def emptied(inventories: dict[int, Inventory], slot: int, snapshot: SnapshotId, *stripes_: int) -> dict[int, Inventory]:
    """The slot's chunks of the stripes are bad."""
    inventory = inventories[slot]
    holdings = tuple(
        Holding(each.snapshot, tuple(r for r in each.chunks if r.stripe not in stripes_))
        if each.snapshot == snapshot
        else each
        for each in inventory.holdings
    )
    return {**inventories, slot: msgspec.structs.replace(inventory, holdings=holdings)}


def emptied_all(inventories: dict[int, Inventory], *slots: int) -> dict[int, Inventory]:
    """The slots have answered, and have nothing."""
    return {
        slot: msgspec.structs.replace(inventory, holdings=()) if slot in slots else inventory
        for slot, inventory in inventories.items()
    }


def committed(inventories: dict[int, Inventory], slot: int, snapshot: SnapshotId) -> dict[int, Inventory]:
    """The slot knows that the snapshot was committed."""
    inventory = inventories[slot]
    holdings = tuple(
        Holding(each.snapshot, each.chunks, each.committed or each.snapshot == snapshot) for each in inventory.holdings
    )
    return {**inventories, slot: msgspec.structs.replace(inventory, holdings=holdings)}


def test_choose_newest_complete_snapshot_wins() -> None:
    assert choose(everything(OLD, NEW), GROUPS, range(8), False) == Choice(NEW, 0)
    again = SnapshotId("run", 2, 9, "layout")
    assert choose(everything(again, NEW), GROUPS, range(8), False) == Choice(again, 0)


def test_choose_up_to_m_lost_in_every_stripe_decodes() -> None:
    lost = emptied(without(everything(OLD, NEW), 0, 1), 3, NEW, 0, 1, 2, 3)
    assert choose(lost, GROUPS, range(8), True) == Choice(NEW, 2)
    assert choose(emptied(lost, 5, NEW, 2), GROUPS, range(8), True) == Choice(OLD, 1)


def test_choose_fall_back_names_stripe_and_slots() -> None:
    answer = choose(emptied_all(everything(NEW), 0, 2, 4), GROUPS, range(8), True)
    assert isinstance(answer, FallBack)
    assert "stripe 0 of group 0 needs 2 good chunks and has 1" in answer.reason
    assert "slots [0, 2, 4]" in answer.reason
    assert choose({}, GROUPS, (), True) == FallBack("no agent holds a snapshot in memory")


def test_choose_fall_back_names_missing_inventories() -> None:
    empty = without(everything(), 3)
    none = "no agent holds a snapshot in memory; slots [3]"
    early = FallBack(f"{none} had not answered yet, and alone cannot change that")
    assert choose(empty, GROUPS, range(8), False) == early
    assert choose(empty, GROUPS, range(8), True) == FallBack(f"{none} did not answer in time")


def test_choose_waits_only_for_slots_that_matter() -> None:
    one_away = without(everything(NEW), 0)
    assert choose(one_away, GROUPS, range(8), False) == Choice(NEW, 1)
    # The newer one is held by some and could be made whole by the silent ones.
    partly = emptied(everything(OLD, NEW), 4, NEW, 0, 1, 2, 3)
    partly = emptied(partly, 6, NEW, 0, 1, 2, 3)
    assert choose(without(partly, 0), GROUPS, range(8), False) == Wait((0,))
    assert choose(without(partly, 0), GROUPS, range(8), True) == Choice(OLD, 1)
    assert choose(without(partly, 0), GROUPS, set(range(1, 8)), False) == Choice(OLD, 1)
    # Enough silent ones in every group could hold a newer one that nobody else knows of.
    assert choose(without(everything(OLD), 0, 2, 1, 3), GROUPS, range(8), False) == Wait((0, 1, 2, 3))


def test_choose_late_inventories_count_as_missing() -> None:
    inventories = everything(OLD, NEW)
    late = {slot: msgspec.structs.replace(inventories[slot], epoch=1) for slot in (0, 2, 4)}
    assert choose({**inventories, **late}, GROUPS, range(8), True) == Wait((0, 2, 4), too_few=True)


def test_choose_minority_gives_up_nothing() -> None:
    """However late it is: one member alone, half of every group."""
    for alone in ({0}, {0, 1, 2, 3}):
        cut_off = {slot: each for slot, each in everything().items() if slot in alone}
        silent = tuple(sorted(set(range(8)) - alone))
        assert choose(cut_off, GROUPS, range(8), True) == Wait(silent, too_few=True)
    answer = choose(without(everything(), 0, 1), GROUPS, range(8), True)
    assert isinstance(answer, FallBack)


def test_choose_nothing_needs_no_majority_if_it_is_proved() -> None:
    """Three of group 0 have answered and have nothing, so the silent ones of both groups cannot help."""
    inventories = without(emptied_all(everything(NEW), 0, 2, 4), 6, 3, 5, 7)
    answer = choose(inventories, GROUPS, range(8), False)
    assert isinstance(answer, FallBack)


def test_choose_older_than_committed_needs_majority() -> None:
    inventories = everything(OLD, NEW)
    for slot in (4, 6):  # the silent ones may have what is lost there
        inventories = emptied(inventories, slot, NEW, 0)
    inventories = committed(inventories, 4, NEW)
    two_of_four = without(inventories, 0, 2)
    assert choose(two_of_four, GROUPS, range(8), True) == Wait((0, 2), too_few=True)
    assert choose(emptied(without(inventories, 0), 2, NEW, 0), GROUPS, range(8), True) == Choice(OLD, 1)
    # Nobody knows of a commit: then the newest in reach is restored once the deadline has passed.
    plain = without(emptied(emptied(everything(OLD, NEW), 4, NEW, 0), 6, NEW, 0), 0, 2)
    assert choose(plain, GROUPS, range(8), False) == Wait((0, 2))
    assert choose(plain, GROUPS, range(8), True) == Choice(OLD, 2)


def test_choose_again_takes_what_an_earlier_choice_did_not() -> None:
    """OLD was chosen in epoch 2, since NEW could not be decoded then; now it can."""
    assert choose(everything(OLD, NEW), GROUPS, range(8), True) == Choice(NEW, 0)


def undecodable(inventories: dict[int, Inventory], *holders: int) -> dict[int, Inventory]:
    """Slot 3 has found that these chunks of stripe 1 of NEW do not decode."""
    failed = (*inventories[3].undecodable, Undecodable(NEW, 1, holders))
    return {**inventories, 3: msgspec.structs.replace(inventories[3], undecodable=failed)}


def test_choose_excludes_what_did_not_decode() -> None:
    lost = emptied_all(everything(OLD, NEW), 0)
    some = undecodable(lost, 2, 4)
    assert choose(some, GROUPS, range(8), True) == Choice(NEW, 1)
    orders = [order for _, order in plan(some, GROUPS, NEW, 2, range(8)) if order.stripe == 1 and 0 in order.targets]
    assert orders
    assert not any({2, 4}.issuperset(order.sources) for order in orders)
    assert choose(undecodable(lost, 2, 4, 6), GROUPS, range(8), True) == Choice(OLD, 1)
    nothing = choose(undecodable(emptied_all(everything(NEW), 0), 2, 4, 6), GROUPS, range(8), True)
    assert isinstance(nothing, FallBack)
    assert "stripe 1 of group 0 does not decode to what was written" in nothing.reason
    # Another holder comes back: that is another set.
    assert choose(undecodable(everything(OLD, NEW), 2, 4, 6), GROUPS, range(8), True) == Choice(NEW, 0)


def test_stripe_state_chunks_of_different_data_do_not_match() -> None:
    inventories = everything(NEW)
    holding = inventories[0].holdings[0]
    other = tuple(msgspec.structs.replace(r, digest=1) if not r.sources else r for r in holding.chunks)
    inventories[0] = msgspec.structs.replace(inventories[0], holdings=(Holding(NEW, other),))
    group = GROUPS[0]
    for stripe in range(4):
        holders = stripe_state(inventories, group, NEW, stripe).holders
        assert (0 in holders) == (0 in group.parities(stripe))


def test_chunk_record_mixed_parity_is_refused() -> None:
    with pytest.raises(ValueError, match="counts"):
        ChunkRecord(0, 1, (1, 2), 1, (1,))


@settings(deadline=None)
@given(st.sampled_from(((4, 2), (5, 2), (4, 1), (8, 3), (2, 1))), st.data())
def test_orders_replacement_receives_its_state_once(shape: tuple[int, int], data: st.DataObject) -> None:
    size, m = shape
    group = StripeGroup(0, tuple(range(size)), m)
    lost = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=m))
    inventories = {
        slot: Inventory(slot=slot, incarnation=1, epoch=2, holdings=(Holding(NEW, records(group, slot, NEW)),))
        for slot in group.members
        if slot not in lost
    }
    orders = plan(inventories, (group,), NEW, 2, group.members)
    rebuilt = [(target, order.stripe) for _, order in orders for target in order.targets]
    assert sorted(rebuilt) == sorted((slot, stripe) for slot in lost for stripe in range(size))
    for decoder, order in orders:
        assert decoder == order.sources[0]
        assert len(set(order.sources)) == group.data
        assert not lost & set(order.sources)
        version = tuple(r.digest for s in group.sources(order.stripe) for r in records(group, s, NEW)
                        if r.stripe == order.stripe)  # fmt: skip
        assert order.digests == version
    # Dealt out: with f lost, the g stripes have g - f decoders.
    per_decoder = [sum(decoder == slot for decoder, _ in orders) for slot in group.members if slot not in lost]
    assert max(per_decoder) - min(per_decoder) <= 1 + len(lost)
    data_orders = [order for _, order in orders if set(order.targets) & set(group.sources(order.stripe))]
    assert list(orders[: len(data_orders)]) == [each for each in orders if each[1] in data_orders]


def test_inventory_pending_work_at_epoch_start_changes_nothing() -> None:
    """What is under way when an epoch begins changes nothing that an inventory said."""
    cluster = Cluster((4, 4), 2)
    cluster.round()
    for slot in range(8):
        for worker in range(2):
            cluster.offer(slot, worker, wait=True)
    cluster.drain()
    for slot in range(8):
        for worker in range(2):
            cluster.write(slot, worker)
    for slot in range(8):
        cluster.dispatch(slot, EpochAdvanced(9))
    before = [replace(node.state, peers=frozenset()) for node in cluster.nodes]
    said = [step.inventory(node.state) for node in cluster.nodes]
    cluster.drain()
    assert [replace(node.state, peers=frozenset()) for node in cluster.nodes] == before
    assert [step.inventory(node.state) for node in cluster.nodes] == said
