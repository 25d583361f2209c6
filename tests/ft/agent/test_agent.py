"""Real agent processes: snapshots are committed, survive their workers, come back to the bit, and leave nothing."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from keepwarm.ft.discovery.config import AgentConfig, DurableConfig, GroupConfig
from keepwarm.ft.errors import AgentError, AuthenticationFailed, ChunkCorrupt, ForeignSnapshot, MemoryTooSmall
from keepwarm.ft.format import publication
from keepwarm.ft.worker.client import AgentClient, ensure_agent
from tests.support.checkpoint_bytes import stored_bytes
from tests.support.ft.nodes import BUCKET, Nodes, equal, nodes, random_state, together, wait_committed


def recover(world: Nodes, snapshotters: list[Any], epoch: int) -> list[Any]:
    return together(lambda s: s.restore(epoch), snapshotters)


def take(snapshotters: list[Any], step: int) -> None:
    for snapshotter in snapshotters:
        snapshotter.offer(step, f"meta {step} {snapshotter.place.rank}".encode())
    for snapshotter in snapshotters:
        snapshotter.join()
        assert snapshotter.failure is None
    for snapshotter in snapshotters:
        wait_committed(snapshotter)


def test_agent_single_node_commits_and_restores(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, workers=2) as world:
        states = [random_state(rank, 2) for rank in range(2)]
        snapshotters = world.snapshotters(states)
        assert recover(world, snapshotters, 1) == ["no agent holds a snapshot in memory"] * 2
        take(snapshotters, 5)
        for state in states:
            for tensor in state.values():
                tensor.local.zero_()
        for each in world.clients:
            each.close()
        fresh = [random_state(rank, 2, seed=9) for rank in range(2)]
        restored = recover(world, world.snapshotters(fresh), 2)
        assert [(r.step, r.meta) for r in restored] == [(5, b"meta 5 0"), (5, b"meta 5 1")]
        assert all(equal(a, random_state(rank, 2)) for rank, a in enumerate(fresh))


def test_agent_sigterm_serves_workers_until_they_leave(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as world:
        snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
        recover(world, snapshotters, 1)
        for slot in range(2):
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
                os.kill(world.pids[slot], number)
        take(snapshotters, 5)
        for each in world.clients:
            each.close()
        for slot in range(2):
            world.wait_dead(slot)
            assert '"text": "ended", "reason": "SIGTERM"' in world.log(slot)


def test_agent_rot_after_choice_is_found_before_update(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as world:
        (snapshotter,) = world.snapshotters([random_state(0, 1)])
        recover(world, [snapshotter], 1)
        take([snapshotter], 5)
        chosen = snapshotter.client.restore(2)
        buffer = snapshotter.client.buffers[chosen.buffer].data
        # Not in the bucket of the contents, which is checked before they are read.
        last = max(at for _, at in snapshotter.plan.entries)
        assert last > BUCKET
        buffer[last] ^= 1
        assert snapshotter.restore(2).step == 5
        with pytest.raises(ChunkCorrupt, match="does not match its checksum"):
            snapshotter.join()
        # The agents find it as well when they decide on the next epoch, and here there is no parity.
        assert snapshotter.restore(3) == "no agent holds a snapshot in memory"
        snapshotter.join()


@pytest.mark.parametrize(
    ("count", "parity", "together"),
    [(2, 1, True), (3, 1, True), (4, 2, True), pytest.param(4, 2, False, marks=pytest.mark.long)],
)
def test_agent_lost_agents_are_rebuilt_from_group(tmp_path: Path, count: int, parity: int, together: bool) -> None:
    with nodes(tmp_path, count, groups=[(range(count), parity)]) as world:
        states = [random_state(rank, count) for rank in range(count)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        for step in (5, 6, 7):
            take(snapshotters, step)
        for each in world.clients:
            each.close()
        for slot in range(parity):
            world.kill(slot)
            if not together:
                world.start(slot)
        for slot in range(parity) if together else ():
            world.start(slot)
        fresh = [random_state(rank, count, seed=9) for rank in range(count)]
        restored = recover(world, world.snapshotters(fresh), 2)
        assert [(r.step, r.meta) for r in restored] == [(7, f"meta 7 {rank}".encode()) for rank in range(count)]
        assert all(equal(state, random_state(rank, count)) for rank, state in enumerate(fresh))


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.ft.nodes import BUCKET, Nodes, random_state, wait_committed
rank, moment = int(sys.argv[3]), sys.argv[4]
world = Nodes(Path(sys.argv[2]), 2, groups=[((0, 1), 1)])
import keepwarm.ft.worker.snapshotter
from keepwarm.ft.worker.snapshotter import SnapshotOptions, Snapshotter
state = random_state(rank, 2)
snapshotter = Snapshotter(
    world.connect(rank), state, world.place(rank), layout="layout",
    options=SnapshotOptions(deadline=60.0, meta_bytes=1024),
)
snapshotter.restore(1)
def say(text):
    print(text, flush=True)
def take(step):
    for tensor in state.values():
        tensor.local.add_(1)
    snapshotter.offer(step, b"meta")
    snapshotter.join()
    assert snapshotter.failure is None, snapshotter.failure
if moment == "committed":
    take(1)
    wait_committed(snapshotter)
    say("ready"); sys.stdin.read()
take(1)
wait_committed(snapshotter)
if moment == "copying":
    original = keepwarm.ft.worker.snapshotter.np.copyto
    def stop(*arguments):
        original(*arguments)
        say("ready"); sys.stdin.read()
    keepwarm.ft.worker.snapshotter.np.copyto = stop
if moment == "granted":
    def stop(*arguments):
        say("ready"); sys.stdin.read()
    snapshotter._copy = stop
take(2)
say("ready"); sys.stdin.read()
"""


def run_workers(world: Nodes, moment: str) -> None:
    """Two worker processes that are killed with SIGKILL when (one of) them has reached a moment of step 2."""
    root = str(Path(__file__).parents[3])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, root, str(world.folder), str(rank), moment],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("moment", "allowed"),
    [("committed", {1}), ("granted", {1}), ("copying", {1}), ("sealed", {1, 2})],  # a seal may die with its sender
)
def test_agent_workers_killed_at_any_moment_restores_a_whole_step(
    tmp_path: Path, moment: str, allowed: set[int]
) -> None:
    with nodes(tmp_path, 2) as world:
        run_workers(world, moment)
        fresh = [random_state(rank, 2, seed=9) for rank in range(2)]
        restored = recover(world, world.snapshotters(fresh), 2)
        (step,) = {r.step for r in restored}
        assert step in allowed
        for rank, state in enumerate(fresh):
            expected = random_state(rank, 2)
            for _ in range(step):
                for tensor in expected.values():
                    tensor.local.add_(1)
            assert equal(state, expected)


def test_agent_rotten_chunk_is_repaired_by_scrub_and_restore(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, groups=[((0, 1, 2), 1)], scrub=0.2) as world:
        states = [random_state(rank, 3) for rank in range(3)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        snapshotters[1].client.buffers[0].data[70_000] ^= 255
        snapshotters[1].client.buffers[1].data[70_000] ^= 255
        wait_for(lambda: "a chunk is back" in world.log(1))
        assert world.status(1).scrub["damaged"] >= 1
        for each in world.clients:
            each.close()
        fresh = [random_state(rank, 3, seed=9) for rank in range(3)]
        restored = recover(world, world.snapshotters(fresh), 2)
        assert [r.step for r in restored] == [1] * 3
        assert all(equal(state, random_state(rank, 3)) for rank, state in enumerate(fresh))


def test_agent_more_losses_than_parity_reports_reason(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, groups=[((0, 1, 2), 1)]) as world:
        snapshotters = world.snapshotters([random_state(rank, 3) for rank in range(3)])
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        for each in world.clients:
            each.close()
        for slot in (0, 2):  # both before one comes back, or it is rebuilt in between
            world.kill(slot)
        for slot in (0, 2):
            world.start(slot)
        # The agents find out by themselves, and give up what is left: whoever asks later is told why all the same.
        wait_for(lambda: any('"epoch": 2, "snapshot": null' in world.log(slot) for slot in range(3)))
        fresh = [random_state(rank, 3, seed=9) for rank in range(3)]
        restored = recover(world, world.snapshotters(fresh), 5)
        # The second when the two empty agents answered before the one that has a chunk, which then is not waited for.
        reason = r"needs 2 good chunks and has 1|slots \[1\] had not answered yet, and alone cannot change that"
        assert all(re.search(reason, text) for text in restored), restored
        assert all(equal(state, random_state(rank, 3, seed=9)) for rank, state in enumerate(fresh))


def test_agent_restarted_is_filled_by_next_snapshot(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as world:
        states = [random_state(rank, 2) for rank in range(2)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        world.kill(1)
        assert snapshotters[1].client.gone or wait_for(lambda: snapshotters[1].client.gone) is None
        snapshotters[1].offer(2, b"")
        assert snapshotters[1].join() == 0.0
        world.start(1)
        again = world.snapshotters(states, only=1)[0]
        wait_for(lambda: world.status(1).mode == "active" and world.status(0).epoch == world.status(1).epoch)
        wait_for(lambda: snapshotters[0].client.epoch == again.client.epoch == world.status(0).epoch)
        take([snapshotters[0], again], 3)
        assert {held.step for held in world.status(1).held} >= {3}


def test_agent_slot_given_to_another_node_steps_down(tmp_path: Path) -> None:
    """Its supervisor died alone. Nobody dials the highest slot anew while it is connected with the former agent."""
    with nodes(tmp_path, 3) as world:
        states = [random_state(rank, 3) for rank in range(3)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        snapshotters[2].client.close()
        former = Path(world.configs[2].folder)
        world.configs[2] = replace(world.configs[2], folder=str(tmp_path / "runtime" / "another node"))
        world.start(2)
        wait_for(lambda: not former.exists())
        assert "the slot has another agent, on another node" in world.log(2)
        state = random_state(2, 3, seed=1)
        again = world.snapshotters([*states[:2], state], only=2)[0]
        restored = recover(world, [*snapshotters[:2], again], 9)
        assert [found.step for found in restored] == [1, 1, 1]
        assert torch.equal(state["w"].local, states[2]["w"].local)


def test_agent_job_end_or_kill_leaves_nothing_behind(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as world:
        snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        snapshotters[0].client.close(end_of_job=True)
        world.wait_dead(0)
        assert not Path(world.configs[0].folder).exists()
        assert not (tmp_path / "shared/agents/0.json").exists()
        world.kill(1)
        assert Path(world.configs[1].folder).exists()
        snapshotters[1].client.close()
        world.start(0)
        assert not Path(world.configs[1].folder).exists()
        assert "removed what a killed agent left" in world.log(0)


def test_agent_without_clients_ends(tmp_path: Path) -> None:
    with nodes(tmp_path, 1, lease=0.3) as world:
        world.wait_dead(0)
        assert "no process has needed this agent" in world.log(0)
        assert not Path(world.configs[0].folder).exists()


def test_agent_too_little_memory_is_refused_at_start(tmp_path: Path) -> None:
    world = Nodes(tmp_path, 3, state_bytes=2**43, bucket_bytes=1 << 26)
    with pytest.raises(MemoryTooSmall, match=r"\+ 0.31 GiB in buckets under way = .* is available"):
        world.start(0)


def test_agent_socket_path_too_long_is_refused_at_start(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 25)
    config = AgentConfig(
        run="run", slot=0, folder=str(deep), shared=str(tmp_path), secret="", state_bytes=0,
        groups=(GroupConfig(members=(0,), parity=0),),
    )  # fmt: skip
    with pytest.raises(AgentError, match=r"at most 107 bytes, this one .*: set XDG_RUNTIME_DIR to a folder"):
        ensure_agent(config)
    assert not deep.exists()


def _python_that_ends(path: Path, end: str, times: int) -> Path:
    """Write a program that is Python, but first ends `times` times as the shell command `end` says."""
    starts = path.with_suffix(".starts")
    path.write_text(
        f'#!/bin/sh\necho >> "{starts}"\nif [ $(wc -l < "{starts}") -le {times} ]; then {end}; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(0o700)
    return path


KEEPER_KILLED, AGENT_KILLED = "kill -9 $$", "exit 137"


@pytest.mark.parametrize("end", [KEEPER_KILLED, AGENT_KILLED])
def test_agent_that_a_signal_ends_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(sys, "executable", str(_python_that_ends(tmp_path / "python", end, times=2)))
    with nodes(tmp_path, 1) as world:
        assert set(world.pids) == {0}


def test_agent_that_signals_end_in_every_start_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(_python_that_ends(tmp_path / "python", KEEPER_KILLED, times=99)))
    world = Nodes(tmp_path, 1)
    with pytest.raises(AgentError, match="signals have ended 4 starts of the agent"):
        world.start(0)


@pytest.mark.parametrize("secret", [b"x" * 64, b""])
def test_agent_unauthenticated_client_is_refused(tmp_path: Path, secret: bytes) -> None:
    with nodes(tmp_path, 1) as world:
        with pytest.raises(AuthenticationFailed):
            AgentClient(world.configs[0].socket, run=world.run, secret=secret, deadline=120.0)
        wait_for(lambda: "refused a process on the socket" in world.log(0))
        assert world.configs[0].socket.stat().st_mode & 0o777 == 0o600
        assert Path(world.configs[0].folder).stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(world.configs[0].socket))
            sock.sendall(b"\xff" * 100)
            while sock.recv(4096):
                pass
        assert world.status(0).slot == 0


def test_agent_process_is_small_and_imports_no_torch() -> None:
    code = "import sys, keepwarm.ft.agent.agent, psutil; assert 'torch' not in sys.modules; "
    code += "print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) < 60 << 20


def test_agent_committed_snapshots_become_checkpoints(tmp_path: Path) -> None:
    config = DurableConfig(root=str(tmp_path / "checkpoints"), every=2, keep=1, compress=True)
    with nodes(tmp_path, 2, durable=config) as world:
        states = [random_state(rank, 2) for rank in range(2)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        take(snapshotters, 2)
        wait_for(lambda: publication.latest(tmp_path / "checkpoints") is not None)
        latest = publication.latest(tmp_path / "checkpoints")
        assert latest == tmp_path / "checkpoints" / "iter_0000002"
        manifest = publication.verify(latest)
        names = {entry.piece.name for part in manifest.parts for entry in part.entries}
        assert names == set(states[0])
        for rank, part in enumerate(manifest.parts):
            assert part.rank == rank
        weight = states[1]["w"].local
        assert stored_bytes(latest, manifest.parts[1])["w"] == weight.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_agent_missing_checkpoint_parts_do_not_block_job_end(tmp_path: Path) -> None:
    """The other one passes a due snapshot over, as while it writes another, and the job ends before the next."""
    config = DurableConfig(root=str(tmp_path / "checkpoints"), every=2)
    world = Nodes(tmp_path, 2, durable=config)
    world.configs[1] = replace(world.configs[1], durable=replace(config, every=3))
    try:
        world.start_all()
        snapshotters = world.snapshotters([random_state(rank, 2) for rank in range(2)])
        recover(world, snapshotters, 1)
        take(snapshotters, 2)
        wait_for(lambda: any((tmp_path / "checkpoints").glob("tmp-*/rank_00000*")))
        for client in world.clients:
            client.close(end_of_job=True)
        for slot in range(2):
            world.wait_dead(slot, 60.0)
        assert "the agents have left that were to write ranks [1]" in world.log(0)
        assert publication.latest(tmp_path / "checkpoints") is None
    finally:
        world.close()


def test_agent_failing_disk_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with nodes(tmp_path, 1, durable=DurableConfig(root=str(tmp_path / "checkpoints"))) as world:
        snapshotters = world.snapshotters([random_state(0, 1)])
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        wait_for(lambda: "Error" in world.status(0).durable["last_error"])
        take(snapshotters, 2)
        (tmp_path / "checkpoints").unlink()
        wait_for(lambda: publication.latest(tmp_path / "checkpoints") is not None)
        assert world.status(0).durable["failed"] == 0


def test_agent_failing_disk_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    config = DurableConfig(root=str(tmp_path / "checkpoints"), deadline=0.1)
    with nodes(tmp_path, 1, durable=config) as world:
        snapshotters = world.snapshotters([random_state(0, 1)])
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        wait_for(lambda: "a checkpoint failed, the next is tried" in world.log(0))
        (tmp_path / "checkpoints").unlink()
        take(snapshotters, 2)
        wait_for(lambda: publication.latest(tmp_path / "checkpoints") is not None)
        assert world.status(0).durable["failed"] == 1


def test_agent_other_layout_restores_by_name_and_offset(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, workers=2) as world:
        states = [random_state(rank, 4) for rank in range(4)]
        snapshotters = world.snapshotters(states)
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        for each in world.clients:
            each.close()
        world.workers, world.world = 1, 2
        fresh = [random_state(rank, 2, seed=9) for rank in range(2)]
        restored = recover(world, world.snapshotters(fresh, layout="other"), 2)
        assert [r.step for r in restored] == [1, 1]
        whole = torch.cat([state["w"].local for state in states])
        assert torch.equal(torch.cat([state["w"].local for state in fresh]), whole)
        for name in ("b", "small", "step"):
            assert all(torch.equal(state[name].local, states[0][name].local) for state in fresh)


def test_agent_snapshot_of_another_model_overwrites_nothing(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as world:
        snapshotters = world.snapshotters([random_state(0, 1)])
        recover(world, snapshotters, 1)
        take(snapshotters, 1)
        world.clients[0].close()
        other = random_state(0, 1, seed=9, rows=32)
        before = {name: tensor.local.clone() for name, tensor in other.items()}
        with pytest.raises(ForeignSnapshot, match="another model"):
            world.snapshotters([other])[0].restore(2)
        assert all(torch.equal(other[name].local, value) for name, value in before.items())


def wait_for(ready: Any, deadline: float = 120.0) -> None:
    end = time.monotonic() + deadline
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
