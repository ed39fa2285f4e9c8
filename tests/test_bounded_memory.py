"""A conversion takes the same memory whatever the model: pieces of the source, and of what they become."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

from fourfold.checkpoint.hf_config import model_config
from fourfold.models import weight_specs

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 1024,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
MEASURE = """
import sys
from pathlib import Path
from fourfold.checkpoint import open_source
from fourfold.conversion import convert

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
with open_source(sys.argv[1]) as source:
    convert(source, sys.argv[2], sys.argv[3])
print(peak() - before)
"""


def write_sparse(path: Path, n_layers: int) -> int:
    """A bfloat16 checkpoint of zeros, which take no disk; returns the bytes of its weights."""
    path.mkdir()
    config = CONFIG | {"num_hidden_layers": n_layers}
    (path / "config.json").write_text(json.dumps(config))
    shapes = {
        name: shape
        for spec in weight_specs(model_config(config))
        for name, shape in spec.rows.source_shapes().items()
    }  # fmt: skip
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return at


def peak_growth(source: Path) -> int:
    """Bytes by which a process's largest resident set grows while it converts."""
    arguments = [sys.executable, "-c", MEASURE, str(source), str(source.parent / f"{source.name}-nf4"), "nf4"]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=300).stdout)


def test_a_model_twice_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    n_bytes = {n_layers: write_sparse(tmp_path / f"source-{n_layers}", n_layers) for n_layers in (8, 16)}
    assert n_bytes[16] > 5e8
    small, large = (peak_growth(tmp_path / f"source-{n_layers}") for n_layers in (8, 16))
    assert large < 1.2 * small
    assert large < 75e6
