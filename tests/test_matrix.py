"""Arrays in, arrays out: fourfold.quantize and fourfold.linear are the packer and the kernels, and refuse by name."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import fourfold
import fourfold._core as _core
from fourfold import matrix
from fourfold.config import FORMATS
from fourfold.errors import UserError
from fourfold.format import TILE_N, unpack

ISAS = _core.read_machine().isas()
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
ROWS = (1, 3, 31, 33, 100)
SHAPES = ((16, 64), (5, 7), (100, 200), (1000, 576))  # (N, K)


def numbers(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(list(shape)).standard_normal(shape, dtype=np.float32).astype(dtype)


def by_kernel(x: NDArray[Any], w: fourfold.QuantizedMatrix) -> NDArray[np.float32]:
    """x (M, K) times W by the row of the table that is to be chosen; each row is tested in test_kernels."""
    row = next(
        row
        for row in _core.linear_kernels()
        if row["format"] == w.format and row["isa"] in ISAS and row["m_min"] <= len(x) <= row["m_max"]
    )
    y = np.empty((len(x), len(w.panels) * TILE_N), np.float32)
    _core.linear(row["name"], ISAS[-1], w.panels, w.scales, x.astype(np.float32), y)
    return y[:, : w.shape[0]]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_kernel_and_a_cast(fmt: str, dtype: Any, shape: tuple[int, int]) -> None:
    w, bias = fourfold.quantize(numbers(*shape), fmt), numbers(shape[0], dtype=dtype)
    for m in ROWS:
        x = numbers(m, shape[1], dtype=dtype)
        for plus, expected in ((None, by_kernel(x, w)), (bias, by_kernel(x, w) + bias.astype(np.float32))):
            for threads in (1, 2, 5):
                y = fourfold.linear(x, w, plus, threads=threads)
                assert y.dtype == dtype
                np.testing.assert_array_equal(y, expected.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_more_rows_than_are_packed_at_once(dtype: Any) -> None:
    w, x = fourfold.quantize(numbers(40, 70)), numbers(2 * 1024 + 5, 70, dtype=dtype)
    np.testing.assert_array_equal(fourfold.linear(x, w, threads=3), by_kernel(x, w).astype(dtype))


def test_rows_may_have_any_axes_and_strides() -> None:
    w, x = fourfold.quantize(numbers(40, 64)), numbers(4, 3, 128)
    expected = fourfold.linear(np.ascontiguousarray(x[..., :64]).reshape(12, 64), w).reshape(4, 3, 40)
    np.testing.assert_array_equal(fourfold.linear(x[..., :64], w), expected)  # rows apart
    np.testing.assert_array_equal(fourfold.linear(x[::-1, :, :64], w), expected[::-1])
    odd = np.asfortranarray(x[:, 0, :64])
    np.testing.assert_array_equal(fourfold.linear(odd, w), expected[:, 0])
    assert fourfold.linear(x[0, 0, :64], w).shape == (40,)
    assert fourfold.linear(np.empty((0, 64), np.float32), w).shape == (0, 40)
    unaligned = np.frombuffer(b"\0" + x[0, 0, :64].tobytes(), np.uint8)[1:].view(np.float32)
    np.testing.assert_array_equal(fourfold.linear(unaligned, w), expected[0, 0])


def test_rows_come_from_any_number_of_threads() -> None:
    """None, as of a machine that shows no usable CPU, is one; and there are no more than rows."""
    w = fourfold.quantize(numbers(40, 100))
    for threads in (0, 1, 3, 1000):
        rows, (n, k), scales = np.full((40, 100), 7, np.float32), w.shape, w.scales
        assert scales is not None
        addresses = (w.panels.ctypes.data, scales.ctypes.data, 0, n, rows.ctypes.data)
        _core.unpack_rows(w.format, n, k, *addresses, threads, False)
        np.testing.assert_array_equal(rows, w.dequantize())


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_is_the_packer(fmt: Any) -> None:
    for dtype in (*DTYPES, np.float64):
        weights = numbers(50, 100).astype(dtype)
        w = fourfold.quantize(weights, fmt)
        np.testing.assert_array_equal(w.dequantize(), unpack(w.panels, w.scales, fmt, (50, 100)))
        again = fourfold.quantize(weights.astype(np.float32), fmt, threads=1)
        np.testing.assert_array_equal(w.panels, again.panels)
    assert w.nbytes == w.panels.nbytes + (0 if w.scales is None else w.scales.nbytes)
    assert repr(w).startswith(f"QuantizedMatrix({fmt}, (50, 100), ")


def test_large_weights_lie_in_huge_pages_of_this_process_alone() -> None:
    w = fourfold.quantize(np.ones((4096, 4096), np.float32))
    assert w.panels.ctypes.data % (2 << 20) == 0
    assert fourfold.linear(np.ones(4096, np.float32), w)[0] == pytest.approx(4096, rel=1e-3)


class Foreign:
    """Another library's array: all that it speaks is DLPack."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class Typed(Foreign):
    """One that says its type, too."""

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(array)
        self.dtype = str(array.dtype)


def test_other_arrays_are_read_where_they_lie() -> None:
    weights, x = numbers(40, 64), numbers(3, 64)
    assert matrix.as_array(Foreign(x)).ctypes.data == x.ctypes.data
    transposed = matrix.as_array(Foreign(x.T))
    assert (transposed.shape, transposed.strides) == ((64, 3), x.T.strides)
    w = fourfold.quantize(Foreign(weights))
    np.testing.assert_array_equal(w.panels, fourfold.quantize(weights).panels)
    np.testing.assert_array_equal(fourfold.linear(Foreign(x), w), fourfold.linear(x, w))
    np.testing.assert_array_equal(fourfold.linear(x.tolist(), w), fourfold.linear(x, w))
    np.testing.assert_array_equal(fourfold.linear(x.astype(np.float64), w), fourfold.linear(x, w))


def test_callers_take_turns() -> None:
    w, x = fourfold.quantize(numbers(500, 600)), numbers(2, 600)
    expected = fourfold.linear(x, w)
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda i: fourfold.linear(x, w, threads=1 + i % 5), range(200)):
            np.testing.assert_array_equal(y, expected)


FORK = """
import os, sys
import numpy as np
import fourfold
w, x = fourfold.quantize(np.ones((4000, 640), np.float32)), np.ones(640, np.float32)
before = fourfold.linear(x, w, threads=4)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0 if (fourfold.linear(x, w, threads=4) == before).all() else 3)
"""


def test_a_forked_child_multiplies_too() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


NO_MEMORY = """
import resource
import numpy as np
import fourfold
weights = np.ones((128, 1 << 19), np.float32)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (150 << 20),) * 2)  # which eight threads' columns exceed
try:
    fourfold.quantize(weights, threads=8)
except MemoryError:
    print("MemoryError")
"""


def test_a_lack_of_memory_is_an_error_in_any_number_of_threads() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "MemoryError\n", "")


WRONG_ISA = """
import os
import numpy as np
import fourfold
from fourfold.errors import UnsupportedError
weights = np.ones((16, 64), np.float32)
calls = [lambda: fourfold.quantize(weights), lambda: fourfold.linear(weights, w), lambda: w.dequantize()]
w = fourfold.QuantizedMatrix("bf16", (16, 64), np.zeros((1, 2048), np.uint8), None)
for call in calls:
    try:
        call()
    except UnsupportedError as error:
        print(error)
os.environ.pop("FOURFOLD_ISA")
for call in calls:
    call()
"""


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    """And not taken for a matter of the weights."""
    environment = os.environ | {"FOURFOLD_ISA": "sse9"}
    command = [sys.executable, "-c", WRONG_ISA]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("FOURFOLD_ISA=sse9 is no instruction set: choose one of") for line in lines)


class RefusesAdvice(mmap.mmap):
    def madvise(self, *advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_kernel_without_huge_pages_quantizes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = numbers(2048, 4096)
    expected = fourfold.quantize(weights)
    monkeypatch.setattr(mmap, "mmap", RefusesAdvice)
    np.testing.assert_array_equal(fourfold.quantize(weights).panels, expected.panels)


W = fourfold.quantize(numbers(40, 64))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fourfold.quantize(numbers(4, 5, 6)), r"two axes .* this array is \(4, 5, 6\)"),
        (lambda: fourfold.quantize(np.empty((0, 64), np.float32)), "neither empty"),
        (lambda: fourfold.quantize(np.ones((4, 4), np.int64)), "not int64"),
        (lambda: fourfold.quantize(numbers(4, 4), "nf5"), "there is no format 'nf5'; choose one of nf4"),
        (lambda: fourfold.quantize(Typed(np.ones((4, 4), np.uint16))), "not uint16; convert them first"),
        (lambda: fourfold.quantize(np.ones((4, 4), ml_dtypes.float8_e4m3fn)), "not float8_e4m3fn; .* by the scales"),
        (
            lambda: fourfold.quantize(np.ones((4, 4), ">f4")),
            r"byte order, not as >f4; use array\.astype",
        ),
        (lambda: fourfold.quantize(None), "NoneType is no array of numbers"),
        (lambda: fourfold.quantize([[1.0, 2.0], [3.0]]), "list is no array of numbers: .*inhomogeneous"),
        (lambda: fourfold.quantize(numbers(4, 4), threads=-1), "threads must be a whole number from 1 to 4096, not -1"),
        (lambda: fourfold.quantize(numbers(4, 4), threads=0), "threads must be .*, not 0"),
        (lambda: fourfold.linear(numbers(3, 64), W, threads=0), "threads must be .*, not 0"),
        (lambda: fourfold.linear(numbers(3, 64), W, threads=1.5), r"threads must be .*, not 1\.5"),
        (lambda: fourfold.quantize(np.full((4, 4), np.nan, np.float32)), "finite numbers: row 0 holds NaN"),
        (lambda: fourfold.linear(numbers(3, 63), W), r"last axis of x must be the matrix's 64 inputs; x is \(3, 63\)"),
        (lambda: fourfold.linear(np.float32(1), W), "last axis of x"),
        (lambda: fourfold.linear(numbers(3, 64), numbers(40, 64)), "what fourfold.quantize made, not by ndarray"),
        (lambda: fourfold.linear(numbers(3, 64), W, numbers(39)), r"each of the 40 outputs; it is \(39,\)"),
        (lambda: fourfold.linear(Foreign(np.ones((3, 64), np.int32)), W), "not int32"),
        (lambda: fourfold.QuantizedMatrix("nf4", (40, 65), W.panels, W.scales), "panels of a 40 × 65 matrix in nf4"),
        (lambda: fourfold.QuantizedMatrix("nf4", (40, 64), W.panels[:, ::-1], W.scales), "contiguous uint8 array"),
        (lambda: fourfold.QuantizedMatrix("nf4", (40, 64), W.panels, None), "nf4 needs panel scales"),
        (lambda: fourfold.QuantizedMatrix("nf4", (40, 64), W.panels, W.scales[:2]), r"float32 array \(3,\)"),
    ],
)
def test_what_is_wrong_is_said(call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "amx"])
@pytest.mark.parametrize(("number_type", "dtype"), [(1, np.float16), (2, ml_dtypes.bfloat16)])
def test_casts_are_those_of_numpy(isa: str, number_type: int, dtype: Any) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(len(words), np.float32)
    _core.widen(isa, number_type, words, wide)
    np.testing.assert_array_equal(wide, words.view(dtype).astype(np.float32))
    _core.widen(isa, number_type, words[:13], wide[:13])  # no whole vector

    ordered = np.sort(wide[np.isfinite(wide)]).astype(np.float64)
    halfway = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, -np.nan, 65504, 65519.996, 65520, 3.4e38, -0.0, 1e-45], np.float32)
    beside = [np.nextafter(halfway, np.float32(direction)) for direction in (-np.inf, np.inf)]
    for given in (wide, halfway, *beside, random, special):
        narrow = np.empty(len(given), np.uint16)
        _core.narrow(isa, number_type, given, narrow)
        with np.errstate(all="ignore"):
            expected = given.astype(dtype)
        is_nan = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(narrow[~is_nan], expected.view(np.uint16)[~is_nan])
        assert np.isnan(narrow.view(dtype)[is_nan].astype(np.float32)).all()
