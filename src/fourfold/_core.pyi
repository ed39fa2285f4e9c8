"""
The arithmetic of fourfold. Private: the public face is the Python package.
"""

from collections.abc import Sequence
from typing import Annotated, Final

import numpy
from numpy.typing import NDArray

def linear_kernels() -> list:
    """Every row of the table of linear kernels."""

def attend_kernels() -> list:
    """Every row of the table of attention kernels."""

def isa_of_kernel(kernel: str) -> str:
    """The instruction set of a row of either table."""

def choose_linear(isa: str, format: str, m: int) -> str:
    """The row that M tokens in a format take on an ISA."""

def choose_attend(isa: str, kv: str, m: int, row_class: str) -> str:
    """
    The row that a step of M tokens takes over pages of a format on an ISA.
    """

def linear(
    kernel: str,
    isa: str,
    panels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    y: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
) -> None: ...
def attend(
    kernel: str,
    q: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    keys: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    first: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    n_positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    chunk: int,
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
) -> None: ...
def rms_norm(
    isa: str,
    x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    w: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    eps: float,
    y: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...
def rope(
    isa: str,
    x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    cosines: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    sines: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
) -> None: ...
def gate_mul(
    isa: str,
    gate: str,
    a: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    b: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    y: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...
def add_parts(
    isa: str,
    base: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    parts: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    y: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...
def widen(
    isa: str,
    type: int,
    words: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order="C", device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...
def narrow(
    isa: str,
    type: int,
    numbers: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    out: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order="C", device="cpu")],
) -> None: ...

class Node:
    @property
    def id(self) -> int: ...
    @property
    def cpus(self) -> list[int]: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def available_bytes(self) -> int: ...
    @property
    def distances(self) -> list[int]: ...
    @property
    def memory_allowed(self) -> bool: ...

class Cache:
    @property
    def level(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sharers(self) -> list[list[int]]: ...

class CgroupLimits:
    @property
    def cpu_quota(self) -> float | None: ...
    @property
    def cpus(self) -> list[int] | None: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def remaining_bytes(self) -> int | None: ...

class Machine:
    @property
    def model(self) -> str: ...
    @property
    def has_avx2(self) -> bool: ...
    @property
    def has_avx512_vnni(self) -> bool: ...
    @property
    def has_avx512(self) -> bool: ...
    @property
    def has_amx(self) -> bool: ...
    @property
    def amx_is_present(self) -> bool: ...
    @property
    def nodes(self) -> list[Node]: ...
    @property
    def online_cpus(self) -> list[int]: ...
    @property
    def offline_cpus(self) -> list[int]: ...
    @property
    def cores(self) -> list[list[int]]: ...
    @property
    def n_sockets(self) -> int: ...
    @property
    def caches(self) -> list[Cache]: ...
    @property
    def huge_pages(self) -> str: ...
    @property
    def allowed_cpus(self) -> list[int]: ...
    @property
    def cgroup(self) -> CgroupLimits: ...
    @property
    def total_memory_bytes(self) -> int: ...
    @property
    def available_memory_bytes(self) -> int: ...
    def usable_cpus(self) -> list[list[int]]: ...
    def n_threads(self) -> int: ...
    def available_bytes(self) -> int: ...
    def isas(self) -> list[str]: ...
    def choose_isa(self) -> str: ...

def read_machine(root: str = "/") -> Machine: ...
def view(array: Annotated[NDArray, dict(device="cpu", writable=False)]) -> object:
    """
    Anything that speaks DLPack, in CPU memory, as a numpy array of the same bytes; bfloat16 as uint16.
    """

def lend_openmp(parallel: int, thread_num: int, num_threads: int) -> None:
    """
    Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that `openmp=True` uses.
    """

def lend_tensors(tensor: object, parameter: object) -> bool:
    """
    The types that `linear_of_tensors` takes. False, and nothing changed, where the first has no table that we know.
    """

def linear_of_tensors(
    x: object,
    weight: object | None,
    scales: object | None,
    bias: object | None,
    format: str,
    n: int,
    k: int,
    threads: int,
    openmp: bool,
) -> object:
    """
    y = x Wᵀ + bias, a new tensor; None where a tensor is not as it should be: type, shape, place, contiguous.
    """

def matmul(
    format: str,
    n: int,
    k: int,
    panels: int,
    scales: int,
    x: int,
    x_type: int,
    rows: int,
    x_stride: int,
    bias: int,
    bias_type: int,
    y: int,
    y_type: int,
    threads: int,
    openmp: bool,
) -> None:
    """
    y = x Wᵀ + bias on arrays given by address. Types: 0 float32, 1 float16, 2 bfloat16; address 0 for none.
    """

def unpack_rows(
    format: str, n: int, k: int, panels: int, scales: int, begin: int, end: int, out: int, threads: int, openmp: bool
) -> None:
    """
    Rows [begin, end) as float32 (end - begin, k), on arrays given by address.
    """

def call_late(threads: int, late: int, seconds: float) -> list[list[bool]]:
    """
    For tests: of each part of a call to which thread `late` comes late, whether the caller took it, each time.
    """

def take_shares(count: int, most: int, threads: int, slow: int, seconds: float) -> list[list[tuple[int, int]]]:
    """
    For tests: the (begin, end) of `count` units that each thread takes in turn; `slow` sleeps after each.
    """

def pack(
    rows: Annotated[NDArray, dict(shape=(None, None), order="C", device="cpu", writable=False)],
    format: str,
    panels_out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    scales_out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")] | None,
    threads: int = 1,
    isa: str | None = None,
) -> tuple:
    """
    Packs (N, K) float32, float16, or bfloat16 as uint16, into uint8 (P, panel bytes) and float32 (P,).
    Returns the sums of (weight - stored value)^2 and of weight^2. Raises ValueError on NaN or infinity.
    """

def place(
    codes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    block_scales: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    format: str,
    panels_out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    scales_out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
    zeros: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order="C", device="cpu", writable=False)]
    | None = None,
) -> tuple:
    """
    Places codes uint8 (N, K) and their blocks' scales float32 (N, K / 64), of uint4 their zero points int8
    (N, K / 64) too, into uint8 (P, panel bytes) and float32 (P,).
    Returns the sums of (value - stored value)^2 and of value^2. Raises ValueError for a code that the format
    does not have and for a scale that is not finite.
    """

def unpack(
    panels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    format: str,
    out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
) -> None:
    """The inverse of pack: writes float32 (N, K)."""

def measure_read_bandwidth(cpus: Sequence[int], bytes: int = 2000000000, repeats: int = 5) -> dict: ...
def measure_copy_bandwidth(cpus: Sequence[int], bytes: int = 2000000000, repeats: int = 5) -> dict: ...
def measure_handover(from_cpu: int, to_cpu: int, bytes: int, rounds: int = 2000) -> dict: ...
def measure_peak(cpus: Sequence[int], kind: str, repeats: int = 5) -> dict: ...
def peak_kinds() -> list[str]: ...

class StallError(RuntimeError):
    pass

class Team:
    def __init__(
        self, ranks: Sequence[tuple[int, Sequence[int]]], timeout_seconds: float = 60.0, may_spill: bool = False
    ) -> None:
        """
        ranks: (node, CPUs) of each; node -1 for any. may_spill: memory may come from other nodes too.
        """

    @property
    def n_ranks(self) -> int: ...
    def stall_next(self, rank: int, thread: int, seconds: float) -> None:
        """For tests."""

class ReadFile:
    def __init__(self, path: str) -> None:
        """A file of weights. Raises StallError where it cannot be opened."""

    @property
    def bytes_read(self) -> int:
        """So far, by all threads."""

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """
        Device, number, bytes and time of change (ns), as it was opened: another file has another.
        """

    def read_runs(
        self,
        offset: int,
        stride: int,
        to: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
    ) -> None:
        """
        The rows of `to`, whose begins lie `stride` bytes apart in the file. Raises StallError where it changed.
        """

    def stop(self) -> None:
        """Reads end in a StallError, as soon as the disk lets go of them."""

class Weight:
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    def load(
        self,
        team: Team,
        panels: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)]
        | None,
        scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> None: ...
    def read(self, team: Team, file: ReadFile, panels: int | None, scales: int | None) -> None:
        """
        From a ReadFile: where the whole matrix's panels and scales begin in it.
        """

def make_weight(
    format: str,
    n: int,
    k: int,
    plans: Sequence[tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]],
    team: Team,
    file_offset: int | None = None,
) -> Weight:
    """
    plans: for each rank its (output ranges, input ranges). file_offset: where its panels stay in a file.
    """

def slice_bytes(format: str, outputs: Sequence[tuple[int, int]], inputs: Sequence[tuple[int, int]]) -> int: ...

class Program:
    def add_buffer(self, width: Sequence[int], of_outputs: bool) -> int: ...
    def add_weight(self, weight: Weight) -> int: ...
    def read_from(self, path: str, patience_seconds: float) -> None: ...
    def add_rotary(
        self,
        cosines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        sines: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    ) -> int:
        """Tables (context, rotated dimensions / 2); their number, for add_cache."""

    def add_embed(self, weight: int, scale: float, dst: int) -> None: ...
    def add_norm(
        self,
        src: int,
        w: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]],
        eps: float,
        dst: int,
    ) -> None: ...
    def add_normed(
        self,
        base: int,
        src: int,
        w: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]],
        eps: float,
        dst: int,
    ) -> None: ...
    def add_linear(
        self,
        src: int,
        parts: Sequence[
            tuple[
                int,
                int,
                Sequence[
                    Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
                ],
            ]
        ],
        *,
        norm: Sequence[
            Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        ] = [],
        eps: float = 0.0,
        up: int = -1,
        gate: str = "silu",
        base: int = -1,
        sum: int = -1,
        sum_bias: Sequence[
            Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        ] = [],
        is_for_next: bool = False,
    ) -> None:
        """
        parts: (weight, destination, bias of each rank or nothing). norm: of each rank, weights that the input
        is normed with. sum: where base + outputs + sum_bias goes. is_for_next: the outputs are gate and up of
        the next op's input, and of nothing else.
        """

    def add_reduce(
        self,
        partial: int,
        base: int,
        bias: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]],
        dst: int,
    ) -> None: ...
    def add_cache(
        self,
        layer: int,
        q: int,
        k: int,
        v: int,
        *,
        rotary: int,
        q_norm: Sequence[
            Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        ] = [],
        k_norm: Sequence[
            Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        ] = [],
        eps: float = 0.0,
    ) -> None:
        """
        q_norm, k_norm: of each rank, weights (head_dim) that every head is normed with.
        """

    def add_attend(
        self,
        layer: int,
        q: int,
        kv_of_head: Sequence[Sequence[int]],
        dst: int,
        *,
        scale: float,
        window: int | None = None,
    ) -> None:
        """
        window: positions that a query sees, its own the last; None: all before it.
        """

    def add_gated(self, src: int, up: int, dst: int, gate: str = "silu") -> None: ...
    def add_with_previous(self, src: int, dst: int) -> None: ...
    def add_select(self, src: int, dst: int) -> None: ...
    def finish(self) -> None: ...
    def step(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        sequences: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        pages: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        output_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
        *,
        tokens_class: str = "best",
        outputs_class: str = "best",
    ) -> None:
        """
        sequences: (slot, first position, first row, rows) of each; pages: their page tables, padded.
        Classes: of the kernels that multiply the tokens' and the output rows: best, few or many.
        """

    def record(self, wanted: bool) -> None: ...
    def marks(self, rank: int, thread: int) -> bytes:
        """Of the last recorded step: (int64 ns, int32 op, int32 phase) each."""

    @property
    def kv_bytes(self) -> int: ...
    @property
    def disk_bytes_read(self) -> int: ...
    def memory_map(self) -> list[tuple[str, int, int, int]]:
        """(kind, rank, address, bytes) of everything that the ranks hold."""

    @property
    def op_names(self) -> list[str]: ...
    def kernels(self, m: int, row_class: str = "best") -> dict[str, str]: ...

    KEPT_ROWS: Final[int] = ...
    """(arg: object, /) -> int"""

    LOGITS: Final[int] = ...
    """(arg: object, /) -> int"""

    NONE: Final[int] = ...
    """(arg: object, /) -> int"""

def make_program(
    team: Team,
    *,
    max_tokens: int,
    n_slots: int,
    context: int,
    n_pages: int,
    head_dim: int,
    kv: str,
    isa: str,
    kernel: str = "",
    attend: str = "",
) -> Program: ...
def measure_disk(path: str, offset: int, bytes: int, seconds: float) -> float: ...

PAGE: int = 64

def kv_page_bytes(kv: str, head_dim: int) -> int:
    """Bytes of PAGE positions of one KV head."""

def packed_bytes(format: str, m: int, k: int) -> int:
    """
    Bytes of m rows of k inputs as the kernels of a format want them, at most.
    """

def scratch_bytes(widest_inputs: int, context: int, head_dim: int) -> int:
    """Bytes of scratch a thread."""

def attend_chunk(context: int) -> int:
    """Positions that one thread attends to at a time."""

SPLIT_ITEMS: int = 2

def attend_shared_bytes(threads: int, context: int, head_dim: int) -> int:
    """Bytes of a rank's partial attention."""

PHASES: list = ["work", "pack", "wait", "end"]

RING_BYTES: int = 268435456

MAX_RANKS: int = 64

def nodes_of_pages(addresses: Sequence[int]) -> list[int] | None:
    """
    The node of the page at each, negative where none is there yet; None where the system is mute.
    """

def memory_is_bound() -> bool:
    """Whether every binding of memory to a node was granted."""

def find_tensorflow(library: str) -> None:
    """
    Finds TensorFlow's C API in a library that is loaded. Raises RuntimeError, naming what it lacks.
    """

def last_tensorflow_weight() -> int:
    """The address of the weight that FourfoldLinear last computed with."""

def find_tensorflow_eager(library: str) -> bool:
    """
    Finds what DirectProduct needs in the library of TensorFlow's Python; False where something is missing.
    """

class DirectProduct:
    """
    FourfoldLinear of one weight on eager tensors, past TensorFlow's dispatcher.
    """

    def __init__(
        self,
        context: object,
        weight: object,
        bias: object | None,
        bias_type: int,
        watched: object | None,
        type: int,
        input_axes: Sequence[int],
        output_axes: Sequence[int],
        x_axes: int,
        threads: int,
    ) -> None:
        """
        `context`: the capsule of TensorFlow's; `weight`, `bias`: handles of variables; `watched`: the bias'
        variable where it can be trained; types as TensorFlow numbers them; `x_axes` 0 for any; `threads` 0 for all.
        """

    def __call__(self, x: object) -> object:
        """
        y, a new eager tensor. None where the op is to compute it: a gradient is recorded, execution is
        asynchronous, x is not as it should be.
        """
