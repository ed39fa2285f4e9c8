"""AWQ's int4 weights in AutoAWQ's `gemm` form: weight = scale · (code - zero point).

A matrix (N, K) in groups of G inputs is `qweight` int32 (K, N/8) and `qzeros` int32 (K/G, N/8), 8 outputs a word, and
`scales` float (K/G, N). A word holds its outputs, lowest first, in the order 0, 2, 4, 6, 1, 3, 5, 7. Where `zero_point`
is false, as GPTQModel may write it, weights are symmetric, and every zero point that is stored is 8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.coded import CodedTensor, Parts
from fourfold.checkpoint.fields import Fields
from fourfold.checkpoint.integers import SCALE_TYPES, IntegerTensor, nibbles, whole_group
from fourfold.checkpoint.source import FileTensor
from fourfold.errors import CheckpointError, UnsupportedError

PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of each output of a word
SYMMETRIC_ZERO = 8
_HARMLESS = """
    modules_to_not_convert backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config sym desc_act
    damp_percent true_sequential act_group_aware batch_size cache_block_outputs meta dataset tokenizer
    model_seqlen max_input_length block_name_to_quantize module_name_preceding_first_block
    modules_in_block_to_quantize pad_token_id lm_head"""


def read(f: Fields, parts: Parts) -> dict[str, CodedTensor]:
    """The coded matrices, by name. Raises UnsupportedError, naming the option, for other bits and other packings."""
    f.only("bits", 4)
    f.only("w_bit", 4)
    is_symmetric = not f.flag("zero_point", True)
    f.only("pack_dtype", "int32")
    f.only("method", "awq")
    f.only("dynamic", {})
    for key in ("version", "format", "checkpoint_format"):
        f.only(key, "gemm", "GEMM")
    key = "q_group_size" if "q_group_size" in f else "group_size"
    group = None if f.equals(key, -1) else f.size(key)
    f.finish(_HARMLESS.split())
    return {f"{module}.weight": _matrix(module, group, is_symmetric, parts) for module in parts.modules(".qweight")}


def _matrix(module: str, group: int | None, is_symmetric: bool, parts: Parts) -> CodedTensor:
    words = parts.take(f"{module}.qweight", ("int32",))
    if len(words.shape) != 2 or min(words.shape) < 1:
        raise CheckpointError(
            f"{parts.where}: {module}.qweight has the shape {words.shape}, which is no packed matrix's"
        )
    k, n = words.shape[0], 8 * words.shape[1]
    group = whole_group(group, k, module, parts)
    scales = parts.take(f"{module}.scales", SCALE_TYPES, (k // group, n))
    zero_words = parts.take(f"{module}.qzeros", ("int32",), (k // group, n // 8))

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(_outputs(words, start, stop).T)

    def zeros(start: int, stop: int) -> NDArray[np.int8]:
        found = _outputs(zero_words, start, stop).T.view(np.int8)
        if is_symmetric and (found != SYMMETRIC_ZERO).any():
            raise UnsupportedError(
                f"{parts.where}: {module}.qzeros holds other zero points than {SYMMETRIC_ZERO}, and zero_point is"
                " false; use a checkpoint whose config says zero_point true if they are meant"
            )
        return found

    def scale_rows(start: int, stop: int) -> NDArray[np.float32]:
        return scales.columns(start, stop).T.astype(np.float32)

    return IntegerTensor("AWQ int4", (n, k), group, codes, zeros, scale_rows)


def _outputs(words: FileTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """The codes of outputs [start, stop) in words (rows, N/8): (rows, stop - start)."""
    first, last = start // 8, -(-stop // 8)
    some = words.columns(first, last)
    codes = nibbles(some).reshape(*some.shape, 8)[..., PLACE].reshape(len(some), 8 * (last - first))
    return codes[:, start - 8 * first : stop - 8 * first]
