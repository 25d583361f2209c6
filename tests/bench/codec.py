"""Speed of the codec against ISA-L in a bare ctypes loop and against memcpy, as JSON on standard output.

    python -P tests/bench/codec.py [--chunk-mib 64] [--rounds 18]

Every case times, in turn and in every round, our codec, the bare loop on the same buffers with pointers and tables made
beforehand, and a memcpy of the data chunks; ratios are medians of those of the rounds. `vs_bare` is speed over the bare
loop's (1 is parity), `vs_memcpy` speed over memcpy's on as many threads. GB/s count the data that go in: k chunks.
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

from ft import isal
from ft.erasure import Codec
from ft.galois import Bytes, generator_matrix, invert, matmul

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


def ranges(size: int, threads: int) -> list[tuple[int, int]]:
    step = -(-size // threads // 64) * 64
    return [(start, min(start + step, size)) for start in range(0, size, step)]


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

    def pointers(self, regions: list[Bytes], start: int) -> ctypes.c_void_p:
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

    def multiply(self, rows: Bytes, inputs: list[Bytes], outputs: list[Bytes], start: int, stop: int) -> Call:
        kernel, arguments = self.library.ec_encode_data, (stop - start, len(inputs), len(outputs), self.tables(rows))
        sources, targets = self.pointers(inputs, start), self.pointers(outputs, start)
        return lambda: kernel(*arguments, sources, targets)

    def update(self, rows: Bytes, index: int, chunk: Bytes, outputs: list[Bytes], start: int, stop: int) -> Call:
        kernel = self.library.ec_encode_data_update
        arguments = (stop - start, rows.shape[1], len(outputs), index, self.tables(rows))
        source, targets = ctypes.c_void_p(chunk.ctypes.data + start), self.pointers(outputs, start)
        return lambda: kernel(*arguments, source, targets)


def copies(inputs: list[Bytes], outputs: list[Bytes], start: int, stop: int) -> Call:
    def run() -> None:
        for source, target in zip(inputs, outputs, strict=True):
            ctypes.memmove(target.ctypes.data + start, source.ctypes.data + start, stop - start)

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


def cases(k: int, m: int, size: int, threads: int, pool: ThreadPoolExecutor) -> Iterator[tuple[str, dict[str, Call]]]:
    """Per operation, our call, the bare call and the memcpy, over the same chunks."""
    codec, bare = Codec(k, m, kernel="isal", threads=threads), Bare()
    data, parity, spare, scratch = (buffers(count, size) for count in (k, m, m, k))
    rows, parts = generator_matrix(k, m), ranges(size, threads)
    codec.encode(data, parity)
    memcpy = on_threads(pool, [copies(data, scratch, *part) for part in parts])

    def update() -> None:
        for index, chunk in enumerate(data):
            codec.update(spare, index, chunk)

    bare_updates = [
        on_threads(pool, [bare.update(rows[k:], index, chunk, spare, *part) for part in parts])
        for index, chunk in enumerate(data)
    ]

    def bare_update() -> None:
        for call in bare_updates:
            call()

    def bare_multiply(matrix: Bytes, inputs: list[Bytes]) -> Call:
        outputs = spare[: len(matrix)]
        return on_threads(pool, [bare.multiply(matrix, inputs, outputs, *part) for part in parts])

    yield (
        "encode",
        {"ours": lambda: codec.encode(data, spare), "bare": bare_multiply(rows[k:], data), "memcpy": memcpy},
    )
    yield "update", {"ours": update, "bare": bare_update, "memcpy": memcpy}
    chunks = data + parity
    for lost in range(1, m + 1):
        survivors = list(range(lost, k + lost))
        present, missing = {i: chunks[i] for i in survivors}, {i: spare[i] for i in range(lost)}
        decoder = matmul(rows[:lost], invert(rows[survivors]))
        yield (
            f"decode {lost} lost",
            {
                "ours": functools.partial(codec.decode, present, missing),
                "bare": bare_multiply(decoder, [chunks[i] for i in survivors]),
                "memcpy": memcpy,
            },
        )
        codec.decode(present, missing)
        assert all(map(np.array_equal, missing.values(), data))


def measure(size: int, rounds: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for threads in sorted({1, min(2, len(os.sched_getaffinity(0)))}):
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            for k, m in CODES:
                for operation, contenders in cases(k, m, size, threads, pool):
                    found = timings(contenders, rounds)
                    speeds = {name: k * size / statistics.median(seconds) / 1e9 for name, seconds in found.items()}
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
        chunks = buffers(k, size), buffers(m, size)
        contenders: dict[str, Call] = {
            "isal": functools.partial(Codec(k, m, kernel="isal", threads=1).encode, *chunks),
            "numpy": functools.partial(Codec(k, m, kernel="numpy", threads=1).encode, *chunks),
        }
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
