"""Qwen3: Llama whose heads of q and of k are normed, each by itself, before they are rotated."""

from functools import partial

from fourfold.models import llama

weight_specs = partial(llama.weight_specs, head_norms=True)
describe = partial(llama.describe, head_norms=True)
