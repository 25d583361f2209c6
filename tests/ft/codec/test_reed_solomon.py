"""The code against its definition: any k of n, both kernels to the byte, data added in any order."""

import importlib.metadata
import itertools
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.codec import galois, isal, reed_solomon
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.errors import CodecError, KernelUnavailable
from tests.support.coding import encoded

Chunk = npt.NDArray[np.uint8]

KERNELS = ("isal", "numpy")
# Around the kernels' vector widths, cache lines and the NumPy kernel's pieces.
SIZES = (0, 1, 15, 31, 63, 64, 65, 127, 129, 1000, 4096, 32768 + 7)

codes = st.integers(1, 32).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, 32 - k)))
sizes = st.one_of(st.sampled_from(SIZES), st.integers(0, 600))
seeds = st.integers(0, 2**32 - 1)


def random_chunks(count: int, size: int, seed: int, shift: int = 0) -> list[Chunk]:
    """Chunks that start `shift`, 2 `shift` ... bytes off their allocation."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, size + i * shift, np.uint8)[i * shift :] for i in range(count)]


def slow_product(a: int, b: int) -> int:
    """Polynomial product modulo 0x11d, bit by bit."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11D << (bit - 8)
    return product


def test_galois_tables_match_definition() -> None:
    expected = [[slow_product(a, b) for b in range(256)] for a in range(256)]
    assert np.array_equal(galois.PRODUCTS, expected)
    assert all(galois.PRODUCTS[a, galois.INVERSES[a]] == 1 for a in range(1, 256))


def test_galois_parity_rows_match_isal_cauchy_matrix_up_to_scale() -> None:
    library = isal.ctypes.CDLL(str(isal.bundled_library()))
    for k, m in ((2, 1), (4, 2), (13, 3), (16, 16)):
        whole = np.zeros((k + m, k), np.uint8)
        library.gf_gen_cauchy1_matrix(isal.ctypes.c_void_p(whole.ctypes.data), k + m, k)
        ours = galois.generator_matrix(k, m)
        assert np.array_equal(ours[:k], whole[:k])
        # Equal up to a factor per row and column: every 2 x 2 block has the same cross ratio.
        product, inverse = galois.PRODUCTS, galois.INVERSES
        ratio = product[ours[k:], inverse[whole[k:]]]
        assert np.array_equal(product[ratio, ratio[0, 0]], product[ratio[:, :1], ratio[:1, :]])


def test_galois_any_k_rows_invert() -> None:
    for k, m in ((1, 4), (4, 4), (3, 5), (6, 2)):
        rows = galois.generator_matrix(k, m)
        for chosen in itertools.combinations(range(k + m), k):
            square = rows[list(chosen)]
            assert np.array_equal(galois.matmul(galois.invert(square), square), np.eye(k))
    with pytest.raises(CodecError, match="singular"):
        galois.invert(np.ones((2, 2), np.uint8))


@pytest.mark.parametrize("kernel", KERNELS)
def test_codec_single_parity_is_xor_and_single_data_is_mirrored(kernel: str) -> None:
    data = random_chunks(5, 777, seed=1)
    (parity,) = encoded(Codec(5, 1, kernel=kernel), data)
    assert np.array_equal(parity, np.bitwise_xor.reduce(data))
    assert all(np.array_equal(copy, data[0]) for copy in encoded(Codec(1, 3, kernel=kernel), data[:1]))


@given(codes, sizes, seeds, st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_codec_kernels_agree_and_any_k_of_n_decode(
    code: tuple[int, int], size: int, seed: int, shift: int, draw: st.DataObject
) -> None:
    k, m = code
    data = random_chunks(k, size, seed, shift)
    parity = encoded(Codec(k, m, kernel="numpy"), data)
    fast = Codec(k, m, kernel="isal")
    assert all(map(np.array_equal, parity, encoded(fast, data)))

    chunks = data + parity
    lost = draw.draw(st.sets(st.integers(0, k + m - 1), max_size=m))
    for codec in (fast, Codec(k, m, kernel="numpy")):
        missing = {i: np.full(size, 0xEE, np.uint8) for i in lost}
        codec.decode({i: chunk for i, chunk in enumerate(chunks) if i not in lost}, missing)
        assert all(np.array_equal(missing[i], chunks[i]) for i in lost)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (3, 3), (6, 2)])
def test_codec_every_combination_of_losses_decodes(kernel: str, k: int, m: int) -> None:
    codec = Codec(k, m, kernel=kernel)
    data = random_chunks(k, 100, seed=k * 10 + m)
    chunks = data + encoded(codec, data)
    for count in range(m + 1):
        for lost in itertools.combinations(range(k + m), count):
            missing = {i: np.empty(100, np.uint8) for i in lost}
            codec.decode({i: chunk for i, chunk in enumerate(chunks) if i not in lost}, missing)
            assert all(np.array_equal(missing[i], chunks[i]) for i in lost), lost


@pytest.mark.parametrize("kernel", KERNELS)
@given(codes, sizes, seeds, st.data())
@settings(max_examples=50, deadline=None)
def test_codec_row_accumulated_in_any_order_equals_whole_chunks(
    kernel: str, code: tuple[int, int], size: int, seed: int, draw: st.DataObject
) -> None:
    k, m = code
    codec = Codec(k, m, kernel=kernel)
    data = random_chunks(k, size, seed)
    cuts = [0, *sorted(draw.draw(st.lists(st.integers(0, size), max_size=3))), size]
    ranges = [(i, slice(*cut)) for i in range(k) for cut in itertools.pairwise(cuts)]
    parity = [np.zeros(size, np.uint8) for _ in range(m)]
    for i, part in draw.draw(st.permutations(ranges)):
        for row in range(m):
            codec.row(row).accumulate(parity[row][part], i, data[i][part])
    assert all(map(np.array_equal, parity, encoded(codec, data)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_codec_sub_range_decodes_into_caller_buffers(kernel: str) -> None:
    codec = Codec(4, 2, kernel=kernel)
    data = random_chunks(4, 1000, seed=3)
    chunks = data + encoded(codec, data)
    target = bytearray(b"\xee" * 1000)
    part = slice(313, 691)
    present = {i: memoryview(chunks[i])[part].toreadonly() for i in (0, 2, 4, 5)}
    codec.decode(present, {1: memoryview(target)[part]})
    assert bytes(target[part]) == data[1][part].tobytes()
    assert set(target[:313] + target[691:]) == {0xEE}


@pytest.mark.parametrize("kernel", KERNELS)
def test_codec_is_shared_by_caller_threads(kernel: str) -> None:
    codec, reference = Codec(3, 2, kernel=kernel), Codec(3, 2, kernel="numpy")
    inputs = [random_chunks(3, 300_000, seed) for seed in range(8)]

    def coded_and_lost(data: list[Chunk]) -> tuple[list[Chunk], dict[int, Chunk]]:
        parity = encoded(codec, data)
        found = {0: np.empty(300_000, np.uint8), 2: np.empty(300_000, np.uint8)}
        codec.decode({1: data[1], 3: parity[0], 4: parity[1]}, found)
        return parity, found

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(coded_and_lost, inputs))
    for data, (parity, found) in zip(inputs, results, strict=True):
        assert all(map(np.array_equal, parity, encoded(reference, data)))
        assert all(np.array_equal(found[i], data[i]) for i in found)


def test_isal_lengths_over_limit_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "MAX_LENGTH", 256)
    codec = Codec(3, 2, kernel="isal")
    data = random_chunks(3, 1000, seed=5)
    parity = encoded(codec, data)
    assert all(map(np.array_equal, parity, encoded(Codec(3, 2, kernel="numpy"), data)))
    found = {0: np.empty(1000, np.uint8), 1: np.empty(1000, np.uint8)}
    codec.decode({2: data[2], 3: parity[0], 4: parity[1]}, found)
    assert all(np.array_equal(found[i], data[i]) for i in found)


def test_codec_every_buffer_type_is_used_without_copy(tmp_path: Path) -> None:
    codec = Codec(3, 2)
    blocks = random_chunks(3, 4096, seed=6)
    (tmp_path / "chunk").write_bytes(blocks[1].tobytes())
    with (tmp_path / "chunk").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        shared = mmap.mmap(-1, 4096)
        floats = np.zeros((32, 32), np.float32)
        for row, target in enumerate((shared, floats)):
            for column, source in enumerate((blocks[0].tobytes(), mapped, blocks[2].view(np.float64).reshape(8, 64))):
                codec.row(row).accumulate(target, column, source)
        expected = encoded(codec, blocks)
        assert shared[:] == expected[0].tobytes()
        assert floats.tobytes() == expected[1].tobytes()
        shared.close()


def test_codec_without_parity_decodes_nothing() -> None:
    Codec(4, 0).decode(dict(enumerate(random_chunks(4, 10, seed=7))), {})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Codec(0, 1), "k >= 1"),
        (lambda: Codec(4, -1), "m >= 0"),
        (lambda: Codec(30, 3), r"k \+ m is 33"),
        (lambda: Codec(2, 1).row(0).accumulate(bytearray(4), 0, bytes(5)), r"\[4, 5\] bytes"),
        (lambda: Codec(2, 1).row(0).accumulate(bytes(4), 0, bytes(4)), "parity chunk 2: the buffer is read-only"),
        (lambda: Codec(2, 1).row(0).accumulate(bytearray(4), 1, np.zeros(8, "u1")[::2]), "data chunk 1: not a contig"),
        (lambda: Codec(2, 1).row(0).accumulate(bytearray(2), 0, [1, 2]), "data chunk 0: not a contiguous"),
        (lambda: Codec(2, 1).row(0).accumulate(bytearray(4), 2, bytes(4)), "no data chunk 2"),
        (lambda: Codec(2, 1).row(0).accumulate(bytearray(4), -1, bytes(4)), "no data chunk -1"),
        (lambda: Codec(2, 1).decode({0: bytes(4), 1: bytes(5)}, {2: bytearray(4)}), r"\[4, 5\] bytes"),
        (lambda: Codec(2, 1).decode({0: bytes(4)}, {1: bytearray(4)}), "1 chunks are left, any 2"),
        (lambda: Codec(2, 1).decode({0: bytes(4), 1: bytes(4), 3: b""}, {}), "no chunk 3"),
        (lambda: Codec(2, 1).decode({0: bytes(4), 1: bytes(4)}, {1: bytearray(4)}), "as present and as missing"),
    ],
)
def test_codec_invalid_call_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        call()


def test_codec_overlapping_output_is_refused_and_untouched() -> None:
    memory = bytearray(range(100))
    view, codec = memoryview(memory), Codec(2, 1)
    for data, parity in ((view[:50], view[49:99]), (view[20:30], view[29:39]), (view[20:30], view[20:30])):
        with pytest.raises(CodecError, match="overlaps"):
            codec.row(0).accumulate(parity, 0, data)
        with pytest.raises(CodecError, match="overlaps"):
            codec.decode({0: data, 1: bytes(len(data))}, {2: parity})
    with pytest.raises(CodecError, match="overlaps"):
        Codec(1, 2).decode({0: view[:10]}, {1: view[20:30], 2: view[25:35]})
    assert memory == bytearray(range(100))
    codec.decode({0: view[0:10], 1: view[5:15]}, {2: view[15:25]})  # inputs may share bytes, neighbours may touch


@pytest.mark.parametrize("version", ["1.9.0", "2.29.1", "2.40.0", "3.0.0", "", "two"])
def test_isal_unknown_release_is_refused(version: str) -> None:
    with pytest.raises(KernelUnavailable, match=r"not in the series 2\.30 to 2\.39"):
        isal.check_version(version)


def test_isal_bundled_release_is_known() -> None:
    isal.check_version("2.30")
    assert isal.load().version.startswith("2.3")


def test_isal_foreign_library_is_refused(tmp_path: Path) -> None:
    foreign = next(Path(str(file.locate())) for file in importlib.metadata.files("pyeclib") if "libnull" in file.name)
    with pytest.raises(KernelUnavailable, match="isal_get_version_str"):
        isal.IsalKernel(foreign)
    (tmp_path / "libisal.so").write_bytes(b"not a library")
    with pytest.raises(KernelUnavailable, match=r"libisal\.so is not a usable ISA-L"):
        isal.IsalKernel(tmp_path / "libisal.so")


def test_codec_without_isal_falls_back_to_numpy_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError("pyeclib")

    monkeypatch.setattr(isal.metadata, "files", absent)
    isal.load.cache_clear()
    reed_solomon.load_kernel.cache_clear()
    reed_solomon._warn_of_fallback.cache_clear()
    try:
        with pytest.raises(KernelUnavailable, match="not installed"):
            Codec(2, 1, kernel="isal")
        with pytest.warns(RuntimeWarning, match="times slower than ISA-L: pyeclib") as caught:
            codecs = [Codec(2, 1), Codec(4, 2)]
        assert len(caught) == 1
        assert [codec.kernel.name for codec in codecs] == ["numpy", "numpy"]
    finally:
        isal.load.cache_clear()
        reed_solomon.load_kernel.cache_clear()
        reed_solomon._warn_of_fallback.cache_clear()
