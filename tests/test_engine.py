"""The engine as a guarded thing: what it refuses before it loads, what it says it needs, and threads that share it."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_source
import fourfold._core as _core
import fourfold.engine
import reference
import tiny
from fourfold.checkpoint import Source, open_source
from fourfold.config import KV_FORMATS
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.errors import ResourceError, UnsupportedError, UserError
from fourfold.machine import Machine, RankPlan, read_machine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six query heads on two key/value heads of 32, in nf4: cut in three, the key/value heads are held twice."""
    folder = tmp_path_factory.mktemp("engine")
    config = tiny.CONFIG | {"hidden_size": 192, "num_attention_heads": 6}
    with open_source(tiny.write_huggingface(folder / "source", config, tiny.tensors(config))) as opened:
        convert(opened, folder / "nf4", "nf4")
    return folder / "nf4"


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_long_texts_have_the_same_bits_whoever_takes_which_chunk(tmp_path: Path, kv: str) -> None:
    """Chunks of 256 positions: one thread takes them all, two share them."""
    config = tiny.CONFIG | {"max_position_embeddings": 2048}
    with open_source(tiny.write_huggingface(tmp_path / "source", config, tiny.tensors(config))) as opened:
        convert(opened, tmp_path / "nf4", "nf4")
    ids = np.random.default_rng(0).integers(0, 300, 700).tolist()
    answers = []
    for threads in (1, 2):
        engine = Engine(tmp_path / "nf4", ranks=1, threads=threads, kv=kv)
        sequence = engine.new_sequence()
        answers.append([engine.extend(sequence, ids), *(engine.extend(sequence, [i]) for i in (5, 6))])
        engine.close()
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pages_of_several_runs_do_not_touch_each_other(tmp_path: Path, ranks: int) -> None:
    """Float32 pages of heads of 256 dimensions lie in runs of four, the last of them shorter; two texts take turns."""
    config = tiny.CONFIG | {"head_dim": 256, "max_position_embeddings": 600}
    tensors = tiny.tensors(config)
    with open_source(tiny.write_huggingface(tmp_path / "source", config, tensors)) as opened:
        convert(opened, tmp_path / "f32", "f32")
    ids = np.random.default_rng(0).integers(0, 300, (2, 600)).tolist()
    engine = Engine(tmp_path / "f32", ranks=ranks, kv="f32")
    expected = [reference.forward(engine.config, tensors, text) for text in ids]
    sequences = [engine.new_sequence(), engine.new_sequence()]
    for size in (70, 200, 1, 150, 179):
        for text, sequence, logits in zip(ids, sequences, expected, strict=True):
            last = engine.extend(sequence, text[sequence.length : sequence.length + size])
            wanted = logits[sequence.length - 1]
            assert np.abs(last - wanted).max() <= 1e-4 * np.abs(wanted).max()
    engine.close()


# ---- ranks and kernels


@pytest.mark.parametrize("ranks", [4, 65, 2**31 - 1])
def test_too_many_ranks_are_refused_before_the_machine_is_cut(
    directory: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fourfold.engine, "plan_ranks", lambda *_: pytest.fail("the machine was cut"))
    with pytest.raises(UnsupportedError, match=f"{ranks} ranks are more than this model .* use --ranks 3 or fewer"):
        Engine(directory, ranks=ranks)


@pytest.mark.parametrize("ranks", [0, -1])
def test_no_ranks_are_refused(directory: Path, ranks: int) -> None:
    with pytest.raises(ResourceError, match="at least one rank"):
        Engine(directory, ranks=ranks)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ({"attend": "attend_fast"}, "there is no kernel 'attend_fast'; the table has attend_bf16_amx, "),
        ({"attend": "attend_int8_scalar"}, "attend_int8_scalar reads int8, and this model's KV pages are bf16"),
        ({"attend": "attend_bf16_avx2"}, "attend_bf16_avx2 needs avx2, and .* goes up to scalar"),
        ({"kernel": "linear_fast"}, "there is no kernel 'linear_fast'; the table has linear_nf4"),
        ({"kernel": "linear_int4_f32_scalar"}, "linear_int4_f32_scalar reads int4, and this model's weights are nf4"),
        ({"kernel": "linear_nf4_f32_avx2"}, "linear_nf4_f32_avx2 needs avx2, and .* goes up to scalar"),
    ],
)
def test_a_kernel_that_would_not_run_is_refused(
    directory: Path, forced: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_ISA", "scalar")
    monkeypatch.setattr(_core, "Team", lambda *_: pytest.fail("threads were started"))
    with pytest.raises(UserError, match=message):
        Engine(directory, **forced)


# ---- memory


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_the_kv_cache_is_counted_as_it_is_laid_out(directory: Path, kv: str, ranks: int) -> None:
    engine = Engine(directory, ranks=ranks, kv=kv, context=100)
    held = {1: 2, 2: 3, 3: 4}[ranks]  # of three ranks the first needs head 0, the second both, the third head 1
    assert engine._footprint.kv(100) == 2 * 2 * held * _core.kv_page_bytes(kv, 32)  # two pages, two layers
    assert fourfold.engine.MAX_SEQUENCES * engine._footprint.kv(100) == engine._program.kv_bytes
    bytes_each = {"bf16": 64 * 2, "int8": 64 + 2 * 4, "f32": 64 * 4}[kv]  # a key and a value of 32, and two scales
    assert engine.describe()["kv_bytes_per_token"] == 2 * held * bytes_each


@pytest.mark.parametrize("head_dim", [2, 16, 40, 80, 128])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_a_page_of_any_head_is_counted_as_it_is_laid_out(tmp_path: Path, kv: str, head_dim: int) -> None:
    config = dataclasses.replace(fake_source.CONFIG, head_dim=head_dim)
    tensors = fake_source.tensors(config=config)
    convert(Source(tmp_path, config, tensors, {}, "0", []), tmp_path / "model", "nf4")
    engine = Engine(tmp_path / "model", ranks=1, kv=kv, context=64)
    n_pages = fourfold.engine.MAX_SEQUENCES * config.n_layers * config.n_kv_heads
    assert engine._program.kv_bytes == n_pages * _core.kv_page_bytes(kv, head_dim)


def on(monkeypatch: pytest.MonkeyPatch, change: Callable[[Machine], Machine]) -> None:
    """Another machine, on which no thread is ever started."""
    machine = change(read_machine())
    monkeypatch.setattr(fourfold.engine, "read_machine", lambda: machine)
    monkeypatch.setattr(_core, "Team", lambda *_: pytest.fail("threads were started"))


def test_a_steps_activations_count(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(directory, ranks=1, threads=1)
    need = engine._footprint
    # x, norm, q, k, v, attended, gate, up, product, two partial sums ... share buffers; the packed form is one more.
    assert need.work[0] > 512 * 4 * (192 + 192 + 2 * 64 + 2 * 96 + 2 * 192)
    assert need.rope == 128 * 32 * 4
    enough = need.total(128)
    on(monkeypatch, lambda machine: dataclasses.replace(machine, available_bytes=enough - 1))
    with pytest.raises(ResourceError, match=r"the model needs 0\.0\d GB \(.* for one text of 128 positions\) and 0\.0"):
        Engine(directory, ranks=1, threads=1)


def test_each_node_has_its_share_to_hold(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_nodes(machine: Machine) -> Machine:
        first = dataclasses.replace(machine.nodes[0], id=0, available_bytes=10**9)
        return dataclasses.replace(machine, nodes=[first, dataclasses.replace(first, id=3, available_bytes=10**6)])

    cpu = read_machine().allowed_cpus[0]
    on(monkeypatch, two_nodes)
    monkeypatch.setattr(fourfold.engine, "plan_ranks", lambda *_: [RankPlan(0, [cpu]), RankPlan(3, [cpu])])
    with pytest.raises(ResourceError, match=r"needs 0\.\d\d GB on NUMA node 3 .*, where 0\.00 GB are free"):
        Engine(directory, ranks=2)


def test_a_limit_on_address_space_is_said_with_its_number(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[1]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, unlimited))  # less than is mapped already
    monkeypatch.setattr(_core, "Team", lambda *_: pytest.fail("threads were started"))
    with pytest.raises(ResourceError, match=r"takes 0\.\d\d GB of address space, of which `ulimit -v` leaves 0\.00 GB"):
        Engine(directory)


# ---- threads


class OneAtATime:
    """A program that notices a step which begins while another is under way."""

    def __init__(self, program: Any) -> None:
        self._program, self._under_way = program, 0

    def step(self, *arguments: Any, **classes: Any) -> None:
        self._under_way += 1
        time.sleep(0.0002)  # where the other threads may run
        assert self._under_way == 1
        self._program.step(*arguments, **classes)
        self._under_way -= 1


def test_threads_that_share_an_engine_get_what_each_would_alone(directory: Path) -> None:
    engine = Engine(directory, ranks=2)
    engine._program = OneAtATime(engine._program)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 300, n).tolist() for n in (100, 70)]

    def whole(text: list[int]) -> NDArray[np.float32]:
        return engine.logits(text)

    def in_steps(text: list[int]) -> NDArray[np.float32]:
        sequence = engine.new_sequence()
        out = np.stack([engine.extend(sequence, [i]) for i in text])
        engine.free(sequence)
        return out

    calls: list[tuple[Any, list[int]]] = [(how, text) for text in texts for how in (whole, in_steps)]
    alone = [how(text) for how, text in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda call: call[0](call[1]), calls))
            for ours, theirs in zip(together, alone, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    engine.check_integrity()
