"""Random campaigns against a cluster: the same seed gives the same history."""

import random
from collections.abc import Callable

from tests.support.ft.cluster import Broken, Cluster

WEIGHTS = {
    "offer": 30, "write": 30, "deliver": 60, "drain": 6, "work": 25, "duplicate": 8, "drop": 3, "damage": 10,
    "reconnect": 6, "crash": 2, "rot": 1, "kill_worker": 1, "cancel": 1, "recover": 2, "round": 2, "scrub": 1,
    "durable": 2, "rebuild": 6,
}  # fmt: skip


def campaign(seed: int, make: Callable[[], Cluster], moves: int = 120) -> Cluster:
    """Make `moves` random moves, heal, and ask for one last recovery and new commits. Raises `Broken`."""
    rng, cluster = random.Random(seed), make()
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    try:
        for name in rng.choices(names, weights, k=moves):
            move(cluster, name, rng)
        cluster.recover(())
        heal(cluster)
    except Broken as broken:
        raise Broken(f"seed {seed}: {broken}\n" + "\n".join(cluster.history)) from broken
    return cluster


def heal(cluster: Cluster) -> None:
    """Without faults every round is committed by all."""
    cluster.drain()
    for _ in range(5):
        if not cluster.wanted:
            break
        cluster.recover(())
        cluster.drain()
    for _ in range(3):
        before = cluster.committed
        cluster.round()
    if cluster.committed - before != cluster.topology.slots:
        raise Broken("no snapshot is committed although nothing fails any more")


def move(cluster: Cluster, name: str, rng: random.Random) -> None:
    slots = cluster.topology.slots
    slot, worker, place = rng.randrange(slots), rng.randrange(2), rng.randrange(1 << 16)
    match name:
        case "offer":
            cluster.offer(slot, worker, wait=rng.random() < 0.8)
        case "write" | "cancel":
            cluster.write(slot, worker, cancel=name == "cancel")
        case "deliver":
            cluster.deliver(place if rng.random() < 0.5 else 0)
        case "duplicate":
            cluster.deliver(place, keep=True)
        case "damage":
            buckets = [i for i, packet in enumerate(cluster.packets) if packet.payload]
            if buckets:
                cluster.deliver(buckets[place % len(buckets) // 2], damage=True)
        case "drop":
            cluster.drop_packet(place)
        case "work":
            cluster.work(slot, place)
        case "drain":
            cluster.drain()
        case "round":
            cluster.round()
        case "reconnect":
            cluster.reconnect(slot, rng.randrange(slots))
        case "crash":
            cluster.crash(slot)
        case "rot":
            cluster.rot(slot, place, rng.randrange(1 << 16))
        case "scrub":
            cluster.scrub(slot)
        case "kill_worker":
            cluster.kill_worker(slot, worker)
        case "durable":
            cluster.durable(slot)
        case "rebuild":
            cluster.rebuild(place)
        case "recover":
            away = tuple(s for s in range(slots) if rng.random() < 0.1)
            cluster.recover(away)
