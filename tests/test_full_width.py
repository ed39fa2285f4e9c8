"""One layer of Yuan 2.0-102B at its full width, against float64 sums over the same dequantized weights.

Takes 0.7 GB of disk, 2 GB of memory and some minutes of numpy, so `make test` leaves it out: `pytest -m full_width`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import fourfold._core as _core
import reference
from fourfold import format as tiles
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory, lay_out, open_directory
from fourfold.config import ModelConfig
from fourfold.engine import Engine
from fourfold.machine import choose_isa
from fourfold.models import weight_specs

pytestmark = pytest.mark.full_width
F64 = NDArray[np.float64]
CONFIG = ModelConfig(
    model_type="yuan", vocab_size=256, dim=8192, n_layers=1, n_heads=64, n_kv_heads=64, head_dim=128, hidden_dim=32768,
    norm_eps=1e-6, rope_theta=1e4, max_context=64, tie_embeddings=True,
)  # fmt: skip
EPS = 2.0**-24  # of float32, to nearest
IDS = [3, 141, 59, 26, 200]
TRIALS = 6  # of what rounding may do
CHUNK = 32  # panels dequantized at a time


def write_model(folder: Path) -> Path:
    """Random codes under random scales: weights of mean square 1 / K, or of 1 in the embedding."""
    specs = weight_specs(CONFIG)
    shapes = {spec.name: spec.shape for spec in specs}
    tensors = lay_out(specs, {spec.name: "nf4" for spec in specs if spec.is_matrix})
    header = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.n_bytes]} for t in tensors
    }
    weights = {spec.name: {"format": "nf4", "shape": spec.shape} for spec in specs if spec.is_matrix}
    config = {"fourfold": 1, "format": "nf4", "model": CONFIG.to_dict(), "weights": weights}
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(102)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.dtype == "U8":
                n, k = shapes[tensor.name]
                groups = rng.integers(0, 256, (tiles.n_panels(n), k // 256, 4 * (16 + 512)), dtype=np.uint8)
                groups[..., :64] = (
                    rng.integers(0x30, 0x40, groups[..., :64].shape) | groups[..., :64] & 0x80
                )  # 0.5 to 1.9
                file.write(groups)
            elif tensor.name.endswith(".scale"):
                n, k = shapes[tensor.name.removesuffix(".scale")]
                size = 1.0 if n == CONFIG.vocab_size else k**-0.5
                file.write(rng.uniform(size, 2 * size, tensor.shape).astype(np.float32))
            elif tensor.name.endswith("norm"):
                file.write(rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32))
            else:
                file.write(rng.uniform(-0.5, 0.5, tensor.shape).astype(np.float32))
    return folder


@dataclass
class Statement:
    """The layer in float64. Activations (1 + TRIALS, T, width): exact, and as the kernel's errors might bend them.

    After each linear the trials get what the kernel's row allows at most (csrc/kernels/kernels.h), with random signs;
    the rest of the walk shows what becomes of that.
    """

    stored: FourfoldDirectory
    kernel: dict[str, Any]
    rng: np.random.Generator

    def panels(self, name: str) -> Iterator[tuple[int, int]]:
        n = tiles.n_panels(self.stored.weights[name].shape[0])
        yield from ((a, min(a + CHUNK, n)) for a in range(0, n, CHUNK))

    def rows(self, name: str, a: int, b: int) -> tuple[F64, F64]:
        """Weights of panels [a, b) and the scales of their blocks, (16 · (b - a), K) and (16 · (b - a), K / 64)."""
        w = self.stored.weights[name]
        k, width = w.shape[1], w.data_bytes // tiles.n_panels(w.shape[0])
        raw = np.fromfile(self.stored.weights_path, np.uint8, (b - a) * width, offset=w.data_offset + a * width)
        assert w.scale_offset is not None
        scales = np.fromfile(self.stored.weights_path, np.float32, b - a, offset=w.scale_offset + 4 * a)
        values = tiles.unpack(raw.reshape(b - a, width), scales, "nf4", (16 * (b - a), k)).astype(np.float64)
        bytes_ = raw.reshape(b - a, k // 256, -1)[..., :64].reshape(b - a, k // 64, 16).transpose(0, 2, 1)
        blocks = np.abs(bytes_.copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)) * scales[:, None, None]
        return values, blocks.reshape(16 * (b - a), -1)

    def linear(self, name: str, x: F64) -> F64:
        """x (1 + TRIALS, T, K) -> (1 + TRIALS, T, N), the trials with an error of the kernel's own."""
        k, size = x.shape[-1], np.abs(x[0])
        blocks = size.reshape(len(size), k // 64, 64)
        largest = np.repeat(blocks.max(axis=2), 64, axis=1)
        units = self.kernel

        def chunk(bounds: tuple[int, int]) -> tuple[F64, F64]:
            w, scales = self.rows(name, *bounds)
            y, w = (x.reshape(-1, k) @ w.T).reshape(*x.shape[:2], -1), np.abs(w)
            product = size @ w.T
            error = (units["weight_rel"] + units["x_rel"]) * product + units["x_abs"] * (largest @ w.T)
            error += units["weight_abs"] * (blocks.sum(axis=2) @ scales.T)
            return y, error + EPS * (64 + k // 64 + 16) * product  # sums of a tile's inputs, then of tiles

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            parts = list(pool.map(chunk, self.panels(name)))
        y, error = (np.concatenate([part[i] for part in parts], axis=-1) for i in (0, 1))
        y[1:] += error * self.rng.choice((-1.0, 1.0), y[1:].shape)
        return y

    def each(self, f: Callable[..., F64], *x: F64) -> F64:
        """A function of (T, ...) on the exact activations and on each trial."""
        return np.stack([f(*one) for one in zip(*x, strict=True)])

    def logits(self, ids: list[int]) -> F64:
        c, v = CONFIG, {name: vector.astype(np.float64) for name, vector in self.stored.vectors.items()}
        cos, sin = reference.rotary_tables(c, len(ids), "f32")

        def norm(x: F64, name: str) -> F64:
            return reference.rms_norm(x, v[name], c.norm_eps)

        def with_previous(x: F64) -> F64:
            return np.concatenate([np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1), x], axis=-1)

        def attend(q: F64, k: F64, value: F64) -> F64:
            q, k, value = (y.reshape(len(ids), c.n_heads, c.head_dim) for y in (q, k, value))
            return reference.attention(reference.rotate(q, cos, sin), reference.rotate(k, cos, sin), value)

        embedding = self.rows("embed", 0, c.vocab_size // 16)[0]
        x = np.repeat(embedding[None, ids], 1 + TRIALS, axis=0)
        u = norm(x, "layers.0.attention_norm")
        c1 = self.linear("layers.0.conv1", with_previous(u)) + v["layers.0.conv1_bias"]
        c2 = self.linear("layers.0.conv2", with_previous(c1)) + v["layers.0.conv2_bias"]
        f = norm(u + c2, "layers.0.filter_norm")
        q, k, value = (self.linear(f"layers.0.{name}", y) for name, y in (("q", f), ("k", f), ("v", u)))
        x = x + self.linear("layers.0.o", self.each(attend, q, k, value))
        h = norm(x, "layers.0.mlp_norm")
        hidden = reference.silu(self.linear("layers.0.up", h)) * self.linear("layers.0.gate", h)
        x = x + self.linear("layers.0.down", hidden)
        return self.linear("embed", norm(x, "norm"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_model(tmp_path_factory.mktemp("full-width"))
    yield folder
    (folder / "model.safetensors").unlink()


def test_one_layer_at_full_width_is_what_its_weights_say(model: Path) -> None:
    """For 1 and 4 ranks, in memory and from disk, all at once and token by token.

    By the float32 kernel, whose errors are so small that at this width their bound still tells one tile from another;
    the kernel that is chosen by itself is then held to a hundredth of the logits' spread.
    """
    name = f"linear_nf4_f32_{'avx512' if choose_isa() == 'amx' else choose_isa()}"
    row = next(row for row in _core.linear_kernels() if row["name"] == name)
    out = Statement(open_directory(model), row, np.random.default_rng(0)).logits(IDS)
    exact, trials = out[0], out[1:]
    allowed = 2 * np.abs(trials - exact).max(axis=(0, 2), keepdims=True)[0]  # of each token; twice what was met
    assert allowed.max() < 0.1 * exact.std(), "so much error would hide a tile in the wrong place"
    engine = Engine(model, ranks=1, kv="f32")
    miss = engine.logits(IDS) - exact
    print(f"{engine.kernels(len(IDS))['nf4']}: {miss.std() / exact.std():.5f} of the logits' spread")
    assert miss.std() < 0.01 * exact.std()
    engine.close()
    for ranks in (1, 4):
        for weights in ("memory", "disk"):
            engine = Engine(model, ranks=ranks, kv="f32", weights=weights, kernel=name)  # type: ignore[arg-type]
            sequence = engine.new_sequence()
            for got in (engine.logits(IDS), np.stack([engine.extend(sequence, [i]) for i in IDS])):
                miss = np.abs(got - exact)
                print(f"{ranks} ranks, {weights}: {(miss / allowed).max():.3f} of what is allowed")
                assert (miss <= allowed).all()
            engine.close()
