"""llama.cpp, built for this machine, through llama-cpp-python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orders import pin, serve

THREADS = pin(sys.argv[1])

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from talk import Talk  # noqa: E402


class Whole:
    """A GGUF file."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        n_context = subject["context"]
        self._llama = llama_cpp.Llama(
            subject["gguf"], n_ctx=n_context, n_batch=n_context, n_ubatch=n_context, n_threads=THREADS,
            n_threads_batch=THREADS, verbose=False,
        )  # fmt: skip
        self.n_bytes, self.version = subject["gguf_bytes"], llama_cpp.__version__
        self.path = f"GGUF {subject['gguf_type']}, built by this machine's gcc"

    def begin(self, ids: Sequence[int]) -> int:
        self._llama.reset()
        return self._feed(ids)

    def go_on(self, id: int) -> int:
        return self._feed([id])

    def _feed(self, ids: Sequence[int]) -> int:
        self._llama.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())


def load(subject: Mapping[str, Any]) -> Talk:
    return Talk(Whole(subject), subject)


serve(load)
