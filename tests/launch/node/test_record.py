"""Records of nodes and stores in the run folder."""

from pathlib import Path

import msgspec

from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.record import NodeRecord, StoreRecord


def test_node_records_are_replaced_and_read_by_name(tmp_path: Path) -> None:
    assert node_record.read_all(tmp_path) == []
    first = NodeRecord(node="node-1", host="127.0.0.1", slot=None, supervisor=11, state="spare")
    node_record.write(tmp_path, first)
    node_record.write(tmp_path, NodeRecord(node="node-0", host="h", slot=0, supervisor=10))
    taken = msgspec.structs.replace(first, slot=3, agent=12, workers={6: 13, 7: 14}, restart=2, state="running")
    node_record.write(tmp_path, taken)
    assert [record.node for record in node_record.read_all(tmp_path)] == ["node-0", "node-1"]
    assert node_record.read_all(tmp_path)[1] == taken
    assert sorted(path.name for path in (tmp_path / "nodes").iterdir()) == ["node-0.json", "node-1.json"]


def test_newest_store_has_the_highest_number(tmp_path: Path) -> None:
    assert node_record.newest_store(tmp_path) is None
    assert node_record.newest_claim(tmp_path) == -1
    for number in (2, 10, 9):
        assert node_record.claim_store(tmp_path, number)
        assert not node_record.claim_store(tmp_path, number)
        record = StoreRecord(number=number, pid=number, host="127.0.0.1", port=1, heartbeat_port=2)
        node_record.write_store(tmp_path, record)
    assert node_record.newest_claim(tmp_path) == 10
    newest = node_record.newest_store(tmp_path)
    assert newest is not None
    assert newest.number == 10
    assert node_record.read_all(tmp_path) == []
