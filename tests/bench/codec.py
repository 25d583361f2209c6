"""Speed of the agent's codec against ISA-L in a bare ctypes loop and against memcpy, as JSON on standard output.

    python -P tests/bench/codec.py [--chunk-mib 64] [--rounds 18]

What an agent runs is timed: every thread has a stripe of its own. `accumulate` adds k data chunks, bucket by bucket as
they arrive, to the one parity chunk that the agent holds of the stripe; `decode` brings back lost chunks. Every round
times, in turn, our codec, the bare loop on the same buffers with pointers and tables made beforehand, and a memcpy of
the data chunks; ratios are medians of those of the rounds. `vs_bare` is speed over the bare loop's (1 is parity),
`vs_memcpy` speed over memcpy's on as many threads. GB/s count the data that go in: k chunks of each thread.
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keepwarm.ft.arrays import Bytes
from keepwarm.ft.codec import isal
from keepwarm.ft.codec.galois import generator_matrix, invert, matmul
from keepwarm.ft.codec.reed_solomon import Codec
from tests.support.coding import encoded

BUCKET = 8 << 20
CODES = ((2, 1), (4, 1), (4, 2), (6, 2), (8, 2), (13, 3))
ALIGNMENT = 4096

Call = Callable[[], object]


def buffers(count: int, size: int) -> list[Bytes]:
    """Page-aligned, faulted in, filled with noise: what the slots of an agent look like."""
    random = np.random.default_rng(count)
    made = []
    for _ in range(count):
        memory = random.integers(0, 256, size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        made.append(memory[start : start + size])
    return made


def on_threads(pool: ThreadPoolExecutor, calls: list[Call]) -> Call:
    """All calls at once, the first on this thread."""

    def run() -> None:
        others = [pool.submit(call) for call in calls[1:]]
        calls[0]()
        for other in others:
            other.result()

    return run


class Bare:
    """ISA-L with everything but the call itself made beforehand."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(isal.bundled_library()))
        self.keep: list[object] = []

    def pointers(self, regions: list[Bytes], start: int = 0) -> ctypes.c_void_p:
        array = (ctypes.c_void_p * len(regions))(*[region.ctypes.data + start for region in regions])
        self.keep.append(array)
        return ctypes.c_void_p(ctypes.addressof(array))

    def tables(self, rows: Bytes) -> ctypes.c_void_p:
        rows = np.ascontiguousarray(rows)
        tables = np.zeros(32 * rows.size, np.uint8)
        self.library.ec_init_tables(
            rows.shape[1], rows.shape[0], ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(tables.ctypes.data)
        )
        self.keep.append(tables)
        return ctypes.c_void_p(tables.ctypes.data)

    def multiply(self, rows: Bytes, inputs: list[Bytes], outputs: list[Bytes]) -> Call:
        kernel, arguments = self.library.ec_encode_data, (inputs[0].size, len(inputs), len(outputs), self.tables(rows))
        sources, targets = self.pointers(inputs), self.pointers(outputs)
        return lambda: kernel(*arguments, sources, targets)

    def accumulate(self, row: Bytes, data: list[Bytes], parity: Bytes) -> Call:
        kernel, tables = self.library.ec_encode_data_update, self.tables(row[None, :])
        calls = [
            (len(bucket), row.size, 1, column, tables, ctypes.c_void_p(bucket.ctypes.data), self.pointers([parity], at))
            for at, column, bucket in pieces(data)
        ]

        def run() -> None:
            for arguments in calls:
                kernel(*arguments)

        return run


def pieces(data: list[Bytes]) -> list[tuple[int, int, Bytes]]:
    """(offset, column, bytes) of every bucket, in the order in which the senders' buckets come to a receiver."""
    size = data[0].size
    return [(at, column, chunk[at : at + BUCKET]) for at in range(0, size, BUCKET) for column, chunk in enumerate(data)]


def copies(inputs: list[Bytes], outputs: list[Bytes]) -> Call:
    def run() -> None:
        for source, target in zip(inputs, outputs, strict=True):
            ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size)

    return run


def timings(contenders: dict[str, Call], rounds: int, least: float = 0.004) -> dict[str, list[float]]:
    """Seconds per call in every round, after an untimed one that leaves the caches as the contender's own.

    Rounds interleave in all orders, so that drift of the machine strikes all alike.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, round(least / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    orders = itertools.cycle(itertools.permutations(contenders))
    for order in itertools.islice(orders, rounds):
        for name in order:
            contenders[name]()
            started = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name]()
            times[name].append((time.perf_counter() - started) / repeats[name])
    return times


def ratio(one: list[float], other: list[float]) -> float:
    """How many times faster the other is: the median over rounds, as the machine drifts from round to round."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


class Stripe:
    """One stripe of the code (k, m) and the calls of one thread on it."""

    def __init__(self, k: int, m: int, size: int, kernel: str = "isal") -> None:
        self.codec, self.bare = Codec(k, m, kernel=kernel), Bare()
        self.rows = generator_matrix(k, m)
        self.data, self.spare, self.scratch = buffers(k, size), buffers(m, size), buffers(k, size)
        self.chunks = self.data + encoded(self.codec, self.data)

    def accumulate(self) -> dict[str, Call]:
        row, parity, parts = self.codec.row(self.codec.m - 1), self.spare[0], pieces(self.data)

        def ours() -> None:
            for at, column, bucket in parts:
                row.accumulate(parity[at : at + len(bucket)], column, bucket)

        return {
            "ours": ours,
            "bare": self.bare.accumulate(self.rows[-1], self.data, parity),
            "memcpy": copies(self.data, self.scratch),
        }

    def decode(self, lost: int) -> dict[str, Call]:
        survivors = list(range(lost, self.codec.k + lost))
        present, missing = {i: self.chunks[i] for i in survivors}, {i: self.spare[i] for i in range(lost)}
        decoder = matmul(self.rows[:lost], invert(self.rows[survivors]))
        self.codec.decode(present, missing)
        assert all(map(np.array_equal, missing.values(), self.data))
        return {
            "ours": functools.partial(self.codec.decode, present, missing),
            "bare": self.bare.multiply(decoder, [self.chunks[i] for i in survivors], self.spare[:lost]),
            "memcpy": copies(self.data, self.scratch),
        }


def cases(k: int, m: int, size: int, threads: int, pool: ThreadPoolExecutor) -> Iterator[tuple[str, dict[str, Call]]]:
    """Per operation, our calls, the bare calls and the memcpys, each on all threads at once."""
    stripes = [Stripe(k, m, size) for _ in range(threads)]

    def together(calls: list[dict[str, Call]]) -> dict[str, Call]:
        return {name: on_threads(pool, [each[name] for each in calls]) for name in calls[0]}

    yield "accumulate", together([stripe.accumulate() for stripe in stripes])
    for lost in range(1, m + 1):
        yield f"decode {lost} lost", together([stripe.decode(lost) for stripe in stripes])


def measure(size: int, rounds: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for threads in sorted({1, min(2, len(os.sched_getaffinity(0)))}):
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            for k, m in CODES:
                for operation, contenders in cases(k, m, size, threads, pool):
                    found = timings(contenders, rounds)
                    speeds = {
                        name: threads * k * size / statistics.median(seconds) / 1e9 for name, seconds in found.items()
                    }
                    results.append(
                        {
                            "code": [k, m],
                            "threads": threads,
                            "operation": operation,
                            "vs_bare": ratio(found["bare"], found["ours"]),
                            "vs_memcpy": ratio(found["memcpy"], found["ours"]),
                            **{f"{name}_gb_s": round(speed, 2) for name, speed in speeds.items()},
                        }
                    )
    return results


def fallback(size: int, rounds: int) -> list[dict[str, object]]:
    """How many times slower the NumPy kernel is: the cost that its warning names."""
    results: list[dict[str, object]] = []
    for k, m in CODES:
        contenders = {kernel: Stripe(k, m, size, kernel).accumulate()["ours"] for kernel in ("isal", "numpy")}
        found = timings(contenders, rounds)
        results.append({"code": [k, m], "times_slower": round(ratio(found["numpy"], found["isal"]), 1)})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-mib", type=int, default=64, help="size of one chunk; default %(default)s")
    parser.add_argument("--rounds", type=int, default=18, help="timings of each contender; default %(default)s")
    options = parser.parse_args()
    size = options.chunk_mib << 20
    results = measure(size, options.rounds)
    report = {
        "isal": isal.load().version,
        "chunk_bytes": size,
        "rounds": options.rounds,
        "least_vs_bare": min(float(str(result["vs_bare"])) for result in results),
        "results": results,
        "numpy_fallback": fallback(1 << 20, 3),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
