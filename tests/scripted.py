"""A model that says what it is told to, and a tokenizer of bytes: the engine's face without its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence as Ids
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.chat_template import ChatTemplate
from fourfold.config import ModelConfig
from fourfold.engine import Feed
from fourfold.kvcache import PagePool, Sequence
from fourfold.llm import LLM
from fourfold.tokenizer import Tokenizer
from fourfold.vocabulary import Vocabulary

EOS, BOS, SEP = 256, 257, 258
N_IDS, VOCAB = 259, 260  # the rest is padding of the vocabulary
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


class ByteBackend:
    """Every byte an id, in front of them <bos>; the texts <eos> and <sep> are ids of their own."""

    vocab_size = N_IDS
    byte_ids: frozenset[int] = frozenset()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        for part in re.split("(<eos>|<sep>)", text):
            special = self.id_of(part)
            ids += part.encode() if special is None else [special]
        return ids

    def decode(self, ids: Ids[int], skip_special: bool) -> str:
        special = {EOS: b"<eos>", BOS: b"<bos>", SEP: b"<sep>"}
        texts = (b"" if skip_special and i in special else special.get(i, bytes([i % 256])) for i in ids)
        return b"".join(texts).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return {"<eos>": EOS, "<bos>": BOS, "<sep>": SEP}.get(token)

    def vocabulary(self) -> Vocabulary:
        return Vocabulary((*(bytes([i]) for i in range(256)), b"<eos>", b"<bos>", b"<sep>"), frozenset({EOS, BOS, SEP}))


class ScriptedEngine:
    """After any prompt the likeliest ids are those of `script`, then whatever the step's own seed makes likeliest."""

    def __init__(
        self,
        script: Ids[int],
        *,
        context: int = 1000,
        sharpness: float = 50.0,
        n_ids: int = N_IDS,
        vocab: int = VOCAB,
    ) -> None:
        self.script, self.context, self.sharpness, self.n_ids = list(script), context, sharpness, n_ids
        self.config = ModelConfig(
            model_type="llama",
            vocab_size=vocab,
            dim=64,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            head_dim=64,
            hidden_dim=64,
            norm_eps=1e-5,
            rope_theta=1e4,
            max_context=context,
            tie_embeddings=True,
        )
        self.pool = PagePool(2 * -(-context // 64), 2, 64)
        self.fed: list[list[int]] = []  # what each sequence was fed, call by call, of all sequences
        self.closed = False
        self._prompts: dict[Sequence, int] = {}  # ids of each

    @property
    def live(self) -> set[Sequence]:
        """Sequences under way."""
        return self.pool._live

    def new_sequence(self) -> Sequence:
        return self.pool.new_sequence()

    def step(self, feeds: Ids[Feed], *, tokens: str = "few", outputs: str = "few") -> NDArray[np.float32]:
        logits = [np.empty((0, self.config.vocab_size), np.float32)]
        for feed in feeds:
            rows = self._rows(feed.sequence, feed.ids)
            logits.append(rows[len(rows) - feed.n_logits :])
            if feed.n_logits == 0:  # the prompt goes on
                del self._prompts[feed.sequence]
        return np.concatenate(logits)

    def rewind(self, sequence: Sequence, length: int) -> None:
        sequence.length = length

    def extend(self, sequence: Sequence, ids: Ids[int]) -> NDArray[np.float32]:
        return self._rows(sequence, ids)[-1]

    def _rows(self, sequence: Sequence, ids: Ids[int]) -> NDArray[np.float32]:
        self.fed.append(list(ids))
        self.pool.reserve(sequence, sequence.length + len(ids))
        prompt = self._prompts.setdefault(sequence, sequence.length + len(ids))
        rows = [self._row(sequence.length + i - prompt + 1) for i in range(len(ids))]
        sequence.length += len(ids)
        return np.stack(rows)

    def _row(self, n_sampled: int) -> NDArray[np.float32]:
        logits = np.random.default_rng(abs(n_sampled) + 1).normal(size=self.config.vocab_size).astype(np.float32)
        logits[self.n_ids :] = 1e6  # padding: never to be sampled
        if 0 <= n_sampled < len(self.script):
            logits[self.script[n_sampled]] += self.sharpness
        return logits

    def logits(self, ids: Ids[int]) -> NDArray[np.float32]:
        sequence = self.new_sequence()
        rows = [self.extend(sequence, [i]) for i in ids]
        self.free(sequence)
        return np.stack(rows)

    def free(self, sequence: Sequence) -> None:
        self.pool.free(sequence)

    def bytes_per_token(self, position: int = 0) -> int:
        return 1000 + position

    def check_integrity(self) -> None:
        self.pool.check_integrity()

    def close(self) -> None:
        self.closed = True

    def describe(self) -> dict[str, Any]:
        return {"format": "nf4", "isa": "scalar", "ranks": 1, "threads": 2, "bytes_per_token": 1000}


class FixedEngine(ScriptedEngine):
    """The same distribution at every position."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        super().__init__([], context=100)
        self.row = logits

    def logits(self, ids: Ids[int]) -> NDArray[np.float32]:
        return np.tile(self.row, (len(ids), 1))


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(ByteBackend(), bos_id=BOS, eos_ids=(EOS,))


def scripted_llm(answer: str, *, template: str | None = TEMPLATE, **options: Any) -> tuple[LLM, ScriptedEngine]:
    """A model that answers this text; "<eos>" in it ends it."""
    engine = ScriptedEngine(ByteBackend().encode(answer, False), **options)
    chosen = None if template is None else ChatTemplate(template)
    return LLM._from_parts(engine, byte_tokenizer(), chosen), engine  # type: ignore[arg-type]


def fixed_llm(logits: NDArray[np.float32]) -> LLM:
    """A model that thinks the same at every position."""
    return LLM._from_parts(FixedEngine(logits), byte_tokenizer(), None)  # type: ignore[arg-type]
