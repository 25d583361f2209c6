"""What a shared folder that is full, read-only or gone does to agents: it delays, it ends none of them."""

import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from keepwarm import side_writer
from keepwarm.ft.agent.log import Journal
from keepwarm.ft.discovery.config import AgentConfig, DurableConfig
from keepwarm.ft.discovery.registry import KEPT_EPOCHS, TEMPLATE_FILE, Registry
from keepwarm.ft.protocol.messages import Choice, Decision, SnapshotId
from keepwarm.ft.worker import client
from tests.support.faulty.io_faults import Fault, library
from tests.support.ft.nodes import Nodes, nodes, random_state, together, wait_committed
from tests.support.ft.team import Team


def wait_for(ready: Callable[[], Any], deadline: float = 60.0) -> None:
    end = time.monotonic() + deadline
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@contextlib.contextmanager
def nothing_can_be_written(pids: list[int]) -> Iterator[None]:
    """Every write of these processes to a file fails, as on a full disk. Memory files are not concerned."""
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def alive(world: Nodes) -> bool:
    return all(psutil.Process(pid).status() != "zombie" for pid in world.pids.values())


def test_agents_restore_while_the_folder_is_full(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, groups=[((0, 1, 2), 1)]) as world:
        committed_once(world, 3, 5)
        for client in world.clients:
            client.close()
        fresh = world.snapshotters([random_state(rank, 3, seed=9) for rank in range(3)])
        with nothing_can_be_written(list(world.pids.values())):
            found = together(lambda each: each.restore(2), fresh)
            assert [each.step for each in found] == [5, 5, 5]
            assert alive(world)
        wait_for(lambda: Registry(tmp_path / "shared").choice(2) is not None)


def in_calls_that_hang(log: Path) -> set[str]:
    """The calls that hang or have hung, by name."""
    return {line.split()[0] for line in log.read_text().splitlines()} if log.exists() else set()


def test_folder_that_hangs_stops_neither_signs_of_life_nor_commits_nor_restores_nor_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every access of the agents hangs for longer than they wait for a silent peer, also while an epoch begins."""
    hold, struck = tmp_path / "hold", tmp_path / "struck"
    fault = Fault(
        path=f"{tmp_path}/shared/*", kind="hang", calls="open,write,sync,rename,mkdir,read", hold=hold
    )  # fmt: skip
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(struck) | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        world = Nodes(tmp_path, 3, groups=[((0, 1, 2), 1)], silence=3.0)
        world.start_all()
    try:
        snapshotters = world.snapshotters([random_state(rank, 3) for rank in range(3)])
        wait_for(lambda: all(len(world.status(slot).peers) == 2 for slot in range(3)))
        together(lambda each: each.restore(1), snapshotters)
        hold.touch()
        began, step = time.monotonic(), 4
        while time.monotonic() < began + 6.0 or "write" not in in_calls_that_hang(struck):
            step += 1
            for each in snapshotters:
                each.offer(step, b"meta")
            for each in snapshotters:
                each.join()
                wait_committed(each)
        assert {len(world.status(slot).peers) for slot in range(3)} == {2}
        for client in world.clients:
            client.close()
        fresh = world.snapshotters([random_state(rank, 3, seed=9) for rank in range(3)])
        epoch = max(world.status(slot).epoch for slot in range(3)) + 1
        found = together(lambda each: each.restore(epoch), fresh)
        assert [each.step for each in found] == [step, step, step]
        hold.unlink()
        wait_for(lambda: all("decided" in world.log(slot) for slot in range(3)))
        assert not any("lost a peer" in world.log(slot) for slot in range(3))
    finally:
        hold.unlink(missing_ok=True)
        world.close()


def test_agents_find_each_other_again_after_the_folder_of_addresses_was_deleted(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as world:
        snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
        together(lambda each: each.restore(1), snapshotters)
        for each in snapshotters:
            each.offer(5, b"meta")
        for each in snapshotters:
            each.join()
            wait_committed(each)
        # Agents may write there at the same moment.
        (tmp_path / "shared" / "agents").rename(tmp_path / "deleted")
        world.kill(0)
        for client in world.clients:
            client.close()
        world.start(0)
        fresh = world.snapshotters([random_state(rank, 2, seed=9) for rank in range(2)])
        restored = together(lambda each: each.restore(2), fresh)
        assert [each.step for each in restored] == [5, 5]
        wait_for(
            lambda: {path.name for path in (tmp_path / "shared" / "agents").glob("?.json")} == {"0.json", "1.json"}
        )


def committed_once(world: Nodes, count: int, step: int) -> list[Any]:
    """Snapshotters whose agents have committed a step of epoch 1."""
    snapshotters = world.snapshotters([random_state(rank, count) for rank in range(count)])
    together(lambda each: each.restore(1), snapshotters)
    for each in snapshotters:
        each.offer(step, b"meta")
    for each in snapshotters:
        each.join()
        wait_committed(each)
    return snapshotters


def test_files_that_were_deleted_while_ranks_train_are_written_again(tmp_path: Path) -> None:
    """A spare starts its agent from the template, and the choice in force numbers the next epoch."""
    agents = tmp_path / "shared" / "agents"
    with nodes(tmp_path, 2) as world:
        committed_once(world, 2, 5)
        before = Registry(tmp_path / "shared").choice(1)
        assert before is not None
        agents.rename(tmp_path / "deleted")  # agents may write there at the same moment
        wait_for(lambda: {"0.json", "1.json", "choice-1.json", "template.json"} <= {p.name for p in agents.glob("*")})
        assert Registry(tmp_path / "shared").choice(1) == before
        template = msgspec.json.decode((agents / TEMPLATE_FILE).read_bytes(), type=AgentConfig)
        assert template == world.configs[0]


def test_template_of_a_layout_without_workers_is_not_written_again(tmp_path: Path) -> None:
    agents = tmp_path / "shared" / "agents"
    with nodes(tmp_path, 1) as world:
        committed_once(world, 1, 5)
        world.clients[0].close()
        wait_for(lambda: not world.status(0).workers)
        agents.rename(tmp_path / "deleted")  # agents may write there at the same moment
        wait_for(lambda: (agents / "0.json").exists())
        assert not (agents / TEMPLATE_FILE).exists()


def test_agent_killed_while_the_folder_hangs_comes_back_with_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, struck = tmp_path / "hold", tmp_path / "struck"
    calls = "open,write,sync,rename,mkdir,read"
    fault = Fault(path=f"{tmp_path}/@(shared*|secret)", kind="hang", calls=calls, hold=hold)
    with monkeypatch.context() as environment:
        for name, value in (fault.environment(struck) | {"LD_PRELOAD": str(library())}).items():
            environment.setenv(name, value)
        world = Nodes(tmp_path, 2)
        world.start_all()
    try:
        committed_once(world, 2, 5)
        hold.touch()
        world.crash(1)
        assert world.status(1).committed == (1, 5)
        assert [(held.step, held.phase) for held in world.status(1).held] == [(5, "committed")]
    finally:
        hold.unlink(missing_ok=True)
        world.close()


HASTY = """
import sys
from keepwarm.ft import keeper
from keepwarm.ft.agent import agent
if __name__ == "__main__":
    agent.FAREWELL, keeper.AGENT_MODULE = 0.2, "hasty"
    sys.exit(agent.main(sys.argv[1:]) if "," in sys.argv[1] else keeper.main(sys.argv[1:]))
"""


def test_agent_asked_to_end_while_its_disk_hangs_gives_signs_of_life_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hasty.py").write_text(HASTY)
    hold, struck = tmp_path / "hold", tmp_path / "struck"
    fault = Fault(path=f"{tmp_path}/checkpoints/*", kind="hang", hold=hold)
    hold.touch()
    with monkeypatch.context() as environment:
        environment.setattr(client, "KEEPER_MODULE", "hasty")
        preload = {"LD_PRELOAD": str(library()), "PYTHONPATH": str(tmp_path)}
        for name, value in (fault.environment(struck) | preload).items():
            environment.setenv(name, value)
        world = Nodes(tmp_path, 1, durable=DurableConfig(root=str(tmp_path / "checkpoints"), deadline=3.0))
        world.start_all()
    try:
        committed_once(world, 1, 5)
        wait_for(lambda: in_calls_that_hang(struck))
        world.clients[0].close()
        os.kill(world.keepers[0], signal.SIGTERM)
        waited = time.monotonic() + 1.0
        wait_for(lambda: world.status(0).pid and time.monotonic() > waited)
        world.wait_dead(0, 30.0)
        assert "its storage does not answer" in world.log(0)
    finally:
        hold.unlink()
        world.close()


def test_agent_starts_without_a_folder_and_is_found_once_there_is_one(tmp_path: Path) -> None:
    made = Team(tmp_path, [((0, 1), 1)])
    try:
        made.until(made.connected, "all links")
        made.kill(1)
        agents = tmp_path / "shared" / "agents"
        agents.rename(tmp_path / "away")
        agents.parent.chmod(0o700)
        agents.write_text("not a folder")
        made.start(1)
        made.turn()
        agents.unlink()
        (tmp_path / "away").rename(agents)
        made.until(lambda: made.agents[1].registry.endpoint(1) is not None, "its address")
        made.until(lambda: made.connected() and made.agents[1].network.links, "all links")
    finally:
        made.close()


def choice(epoch: int, step: int) -> Choice:
    snapshot = SnapshotId("run", 1, step, "layout")
    return Choice(decision=Decision(epoch=epoch, snapshot=snapshot, incarnations=(1,)))


def test_registry_choice_that_cannot_be_written_is_none_until_it_can(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.folder.write_text("not a folder")
    assert registry.choose(choice(1, 5)) is None
    assert str(registry.folder) in registry.failure
    registry.explain(1, "nothing is left")
    assert registry.reason(1) == "nothing is left"
    assert not registry.publish(0, ("127.0.0.1", 1), 1)
    assert registry.newest_epoch() == 0
    registry.folder.unlink()
    assert registry.publish(0, ("127.0.0.1", 1), 1)
    assert registry.choose(choice(1, 5)) == choice(1, 5)
    assert registry.choose(choice(1, 6)) == choice(1, 5)
    assert registry.failure == ""


def test_registry_newest_epoch_never_shrinks(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.choose(choice(7, 5))
    assert registry.newest_epoch() == 7
    (registry.folder / "choice-7.json").unlink()
    assert registry.newest_epoch() == 7
    assert Registry(tmp_path).newest_epoch() == 0


def test_registry_keeps_the_files_of_few_epochs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for epoch in range(1, 40):
        registry.explain(epoch, "nothing is left")
        registry.choose(choice(epoch, 5))
    names = {path.name for path in registry.folder.iterdir()}
    assert names == {f"choice-{e}.json" for e in range(40 - KEPT_EPOCHS, 40)} | {
        f"reason-{e}.txt" for e in range(40 - KEPT_EPOCHS, 40)
    }
    assert registry.choice(39) == choice(39, 5)


def test_journal_writes_once_its_folder_is_there(tmp_path: Path) -> None:
    (tmp_path / "agents").write_text("not a folder")
    journal = Journal(tmp_path / "agents" / "log", slot=1)
    side_writer.forget()
    journal.write("info", "lost")
    wait_for(lambda: "log" in side_writer.losses(), 30.0)
    (tmp_path / "agents").unlink()
    journal.write("info", "kept")
    journal.close()
    assert [line.count("kept") for line in (tmp_path / "agents" / "log").read_text().splitlines()] == [1]


def test_journal_whose_folder_was_deleted_goes_on_in_a_new_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "agents" / "log", slot=1)
    journal.write("info", "before")
    wait_for(lambda: (tmp_path / "agents" / "log").exists() and (tmp_path / "agents" / "log").stat().st_size)
    shutil.rmtree(tmp_path / "agents")
    journal.write("info", "after")
    journal.close()
    assert [line.count("after") for line in (tmp_path / "agents" / "log").read_text().splitlines()] == [1]
