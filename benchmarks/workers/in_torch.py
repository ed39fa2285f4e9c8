"""PyTorch, alone or with bitsandbytes: one 4-bit linear layer, or a whole Llama of transformers made of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orders import Subject, pin, serve

THREADS = pin(sys.argv[1])

import torch  # noqa: E402
from matrices import Floats, Rotation, copies_for, whole  # noqa: E402
from talk import Talk  # noqa: E402
from torch_linears import QUANTIZERS, stored_bytes  # noqa: E402

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
FORMAT = sys.argv[2]
PATHS = {"nf4": "Linear4bit, blocks of 64", "int4": "_weight_int4pack_mm_for_cpu, groups of 64"}


def version() -> str:
    """Of what computes."""
    if FORMAT == "int4":
        return str(torch.__version__)
    import bitsandbytes

    return str(bitsandbytes.__version__)


class Layers:
    """Copies of one linear layer."""

    def __init__(self, k: int, n: int, rotating_bytes: int) -> None:
        first = QUANTIZERS[FORMAT](torch.from_numpy(whole(k, n)))
        self.n_bytes, self.path, self.version = stored_bytes(first), PATHS[FORMAT], version()
        self.n_copies = copies_for(rotating_bytes, self.n_bytes)
        self._layers = [first, *(copy.deepcopy(first) for _ in range(1, self.n_copies))]

    def activations(self, x: Floats) -> Any:
        return torch.from_numpy(x).to(torch.bfloat16)

    def multiply(self, copy: int, x: Any) -> Any:
        return self._layers[copy](x)

    def floats(self, y: Any) -> Floats:
        plain: Floats = y.float().numpy()
        return plain


class Whole:
    """A Llama of transformers, eager, every linear layer and the head in four bits."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        import torch_llama  # transformers takes seconds to import

        self._model = torch_llama.llama(subject, QUANTIZERS[FORMAT])
        self.n_bytes = sum(stored_bytes(layer) for layer in torch_llama.linears(self._model))
        self.path, self.version = f"transformers {torch_llama.VERSION}, {PATHS[FORMAT]}", version()
        self._cache: Any = None

    def begin(self, ids: Sequence[int]) -> int:
        self._cache = None
        return self._feed(ids)

    def go_on(self, id: int) -> int:
        return self._feed([id])

    def _feed(self, ids: Sequence[int]) -> int:
        out = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


def load(subject: Mapping[str, Any]) -> Subject:
    if "k" in subject:
        return Rotation(Layers(subject["k"], subject["n"], subject["rotating_bytes"]), subject)
    return Talk(Whole(subject), subject)


serve(load)
