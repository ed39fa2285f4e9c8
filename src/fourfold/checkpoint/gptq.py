"""GPTQ's int4 weights, as AutoGPTQ and GPTQModel store them: weight = scale · (code - zero point).

A matrix (N, K) in groups of G inputs is `qweight` int32 (K/8, N), 8 inputs a word; `scales` float (K/G, N); `qzeros`
int32 (K/G, N/8), 8 outputs a word; and `g_idx` int32 (K,), the group of each input. Words hold their first code lowest.
K/G is rounded up: GPTQModel lets the last group have fewer inputs.
Zero points are stored less one, except in `gptq_v2`. GPTQModel takes the ones from whole words and adds them to whole
words, so that a zero point of 0 is stored as 15 and borrows from its neighbour. Other programs write a 15 for 0 without
borrowing, over its neighbours even, and read it as 16 or as 0: one that GPTQModel has not written is refused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.coded import CodedTensor, Parts
from fourfold.checkpoint.fields import Fields
from fourfold.checkpoint.integers import SCALE_TYPES, IntegerTensor, input_order, n_groups, nibbles, zero_points
from fourfold.errors import CheckpointError, UnsupportedError

EIGHT_ONES = 0x11111111  # 1 as each zero point of a word
_HARMLESS = """
    sym damp_percent damp_auto_increment true_sequential act_group_aware mse lm_head dataset
    tokenizer model_name_or_path model_file_base_name model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id max_input_length cache_block_outputs
    modules_in_block_to_quantize use_exllama disable_exllama exllama_config use_cuda_fp16 backend
    modules_to_not_convert"""


def read(f: Fields, parts: Parts) -> dict[str, CodedTensor]:
    """The coded matrices, by name. Raises UnsupportedError, naming the option, for what is kept in no other form."""
    f.only("bits", 4)
    f.only("pack_dtype", "int32")
    f.only("is_marlin_format", False)
    for key in ("checkpoint_format", "format"):
        f.only(key, "gptq", "gptq_v2")
    f.only("method", "gptq")
    f.only("dynamic", {})
    is_less_one = "gptq_v2" not in (f.text("checkpoint_format", "gptq"), f.text("format", "gptq"))
    borrows = any(name.startswith("gptqmodel") for name in f.fields("meta").texts("quantizer"))
    group = None if f.equals("group_size", -1) else f.size("group_size")
    was_reordered, is_static = f.flag("desc_act", False), f.flag("static_groups", False)
    reorders = was_reordered and not is_static  # static groups keep the inputs' own order
    f.finish(_HARMLESS.split())
    return {
        f"{module}.weight": _matrix(module, group, is_less_one, borrows, reorders, parts)
        for module in parts.modules(".qweight")
    }


def _matrix(
    module: str, group: int | None, is_less_one: bool, borrows: bool, reorders: bool, parts: Parts
) -> CodedTensor:
    words = parts.take(f"{module}.qweight", ("int32",))
    if len(words.shape) != 2 or min(words.shape) < 1 or words.shape[1] % 8:
        raise CheckpointError(
            f"{parts.where}: {module}.qweight has the shape {words.shape}, which is no packed matrix's"
        )
    k, n = 8 * words.shape[0], words.shape[1]
    group = group or k
    groups = n_groups(group, k)
    scales = parts.take(f"{module}.scales", SCALE_TYPES, (groups, n))
    zero_words = parts.take(f"{module}.qzeros", ("int32",), (groups, n // 8))
    order = input_order(f"{module}.g_idx", k, group, "desc_act", reorders, "false", parts)

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        return nibbles(words.columns(start, stop).T)

    def zeros(start: int, stop: int) -> NDArray[np.int8]:
        stored = zero_words.columns(start // 8, -(-stop // 8)).view(np.uint32)
        if is_less_one and not borrows and (nibbles(stored) == 15).any():
            raise UnsupportedError(
                f"{parts.where}: {module}.qzeros holds a 15, which some programs take for the zero point 16 and some"
                " for 0; use a checkpoint saved as gptq_v2, where zero points are stored as they are"
            )
        return zero_points(stored + np.uint32(EIGHT_ONES if is_less_one else 0), start, stop)

    def scale_rows(start: int, stop: int) -> NDArray[np.float32]:
        return scales.columns(start, stop).T.astype(np.float32)

    return IntegerTensor("GPTQ int4", (n, k), group, codes, zeros, scale_rows, order)
