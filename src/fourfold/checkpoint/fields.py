"""Untrusted keys and values, read by type: what is wrong, unknown or unsupported is refused by its name."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from fourfold.config import LongRope, ModelConfig, RopeScaling
from fourfold.errors import CheckpointError, UnsupportedError

T = TypeVar("T")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80

MAX_SIZE = 2**31 - 1
MAX_REAL = 1e30
MAX_LAYERS = 10_000
MAX_ELEMENTS = 10**12  # no tensor has as many


def check_names(names: Iterable[str], where: str) -> None:
    """Names reach messages, and so terminals: raises CheckpointError for one that would not stay on its line there."""
    for name in names:
        if not name.isprintable():
            raise CheckpointError(f"{where} is damaged: it has a name that cannot be printed, {_short(name)}")


class Fields:
    """The keys of one configuration; a key whose value is null counts as absent.

    Every reader raises CheckpointError for a value of the wrong type or out of range, and for an absent key that has no
    default. `finish` refuses the keys that nothing asked for: they might change the result.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        check_names(values, where)
        self.where = where
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self._unread = set(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key is there, and null: for a key that has another meaning where it is absent."""
        return key in self._nulls

    def is_zero(self, key: str) -> bool:
        """Whether the key is absent or has the value 0, where that stands for none."""
        self._unread.discard(key)
        value = self._values.get(key, 0)
        return _is_int(value) and value == 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._take(key, default)
        if not _is_int(value) or not 1 <= value <= MAX_SIZE:
            raise self._wrong(key, value, f"an integer from 1 to {MAX_SIZE}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._take(key, default)
        if not (_is_int(value) or isinstance(value, float)) or not 0 < value < MAX_REAL:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._take(key, None)
        if not (_is_int(value) or isinstance(value, float)) or not -MAX_REAL < value < MAX_REAL:
            raise self._wrong(key, value, "a number")
        return float(value)

    def reals(self, key: str) -> tuple[float, ...]:
        """A list of positive, finite numbers."""
        value = self._take(key, None)
        numbers: list[Any] = value if isinstance(value, list) else [""]
        if not all((_is_int(x) or isinstance(x, float)) and 0 < x < MAX_REAL for x in numbers):
            raise self._wrong(key, value, "a list of positive numbers")
        return tuple(map(float, numbers))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Strings: one, several, or none where the key is absent."""
        value = self._take(key, [])
        value = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a string or a list of them")
        return value

    def many(self, key: str, kind: type[T]) -> list[T]:
        """A list of values of one type."""
        value = self._take(key, None)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._wrong(key, value, f"a list of {kind.__name__}")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, several, or none where the key is absent."""
        value = self._take(key, [])
        value = value if isinstance(value, list) else [value]
        if not all(_is_int(item) and 0 <= item <= MAX_SIZE for item in value):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(value)

    def fields(self, key: str) -> Fields:
        """The fields inside this one; none where the key is absent."""
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.where}, {key},")

    def equals(self, key: str, value: Any) -> bool:
        """Whether the key is there with just this value, which may be one that its reader does not take."""
        return key in self and type(self._values[key]) is type(value) and bool(self._take(key, None) == value)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse the key unless it is absent or has one of these values."""
        if key in self and self._take(key, None) not in allowed:
            raise UnsupportedError(
                f"{self.where} sets {key} to {_short(self._values[key])}, which fourfold does not support;"
                f" it can honour only {' or '.join(map(_short, allowed))}"
            )

    def refuse(self, keys: Iterable[str], because: str) -> None:
        """Refuse these keys, whatever their values."""
        for key in sorted(set(keys) & set(self._values)):
            raise UnsupportedError(f"{self.where} sets {key}: {because}")

    def ignore(self, *keys: str) -> None:
        """These keys are harmless here."""
        self._unread -= set(keys)

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Raises UnsupportedError for the first key that was never read and is not known to be harmless."""
        self.refuse(self._unread - set(harmless), "fourfold does not know this key, and it may change the result")

    def _take(self, key: str, default: Any) -> Any:
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.where} does not say {key}")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where} sets {key} to {_short(value)}; it must be {expected}")


def check(config: ModelConfig, where: str) -> ModelConfig:
    """The same configuration. Raises CheckpointError where its numbers contradict each other or make no model."""
    for fault in _faults(config):
        raise CheckpointError(f"{where} describes no model that can run: {fault}")
    return config


def _faults(c: ModelConfig) -> Iterator[str]:
    """What is wrong, in the order in which it has to be right: each line may rely on those above it."""
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_context"):
        if not 1 <= getattr(c, name) <= MAX_SIZE:
            yield f"{name} is {_short(getattr(c, name))}, and must be from 1 to {MAX_SIZE}"
    reals = {name: getattr(c, name) for name in ("norm_eps", "rope_theta", "embed_scale")}
    reals |= {name: x for name in ("local_rope_theta", "attention_scale") if (x := getattr(c, name)) is not None}
    for name, value in vars(c.rope_scaling).items() if c.rope_scaling else ():
        reals |= {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
    for name, real in reals.items():
        if not 0 < real < MAX_REAL:
            yield f"{name} is {_short(real)}, and must be a positive number"
    if isinstance(c.rope_scaling, RopeScaling) and c.rope_scaling.high_freq_factor <= c.rope_scaling.low_freq_factor:
        yield "its rotary scaling has a high_freq_factor no larger than low_freq_factor"
    if c.sliding_window is not None and not 1 <= c.sliding_window <= MAX_SIZE:
        yield f"sliding_window is {_short(c.sliding_window)}, and must be from 1 to {MAX_SIZE}"
    if not 0 <= c.global_every <= MAX_SIZE:
        yield f"global_every is {_short(c.global_every)}, and must be from 0 to {MAX_SIZE}"
    elements = {
        "the embedding": c.vocab_size * c.dim,
        "a feed-forward matrix": c.hidden_dim * c.dim,
        "an attention matrix": c.n_heads * c.head_dim * c.dim,
    }
    for name, n in elements.items():
        if n >= MAX_ELEMENTS:
            yield f"{name} would have {n} elements, and fourfold reads fewer than 10^12"
    for i in (*c.eos_ids, *c.image_ids, *(() if c.bos_id is None else (c.bos_id,))):
        if not 0 <= i < c.vocab_size:
            yield f"token {_short(i)} lies outside the vocabulary of {c.vocab_size}"
    if list(c.global_layers) != sorted({i for i in c.global_layers if 0 <= i < c.n_layers}):
        yield f"global_layers must be in order, each once, and from 0 to {c.n_layers - 1}"
    if c.n_layers > MAX_LAYERS:
        yield f"{c.n_layers} layers are more than the {MAX_LAYERS} that fourfold reads"
    if c.n_heads % c.n_kv_heads:
        yield f"{c.n_heads} attention heads cannot share {c.n_kv_heads} key/value heads evenly"
    if c.head_dim % 2:
        yield f"rotary embedding needs an even head dimension, and it is {c.head_dim}"
    n_rotated = c.head_dim if c.rotary_dim is None else c.rotary_dim
    if not 2 <= n_rotated <= c.head_dim or n_rotated % 2:
        yield f"{_short(n_rotated)} of {c.head_dim} dimensions are to be rotated, which must be an even number of them"
    for factors in (c.rope_scaling.short, c.rope_scaling.long) if isinstance(c.rope_scaling, LongRope) else ():
        if len(factors) != n_rotated // 2:
            yield f"its rotary scaling has {len(factors)} factors for {n_rotated // 2} frequencies"
    if c.model_type == "yuan" and (c.n_kv_heads, c.n_heads * c.head_dim) != (c.n_heads, c.dim):
        yield f"Yuan's heads all have keys of their own and fill its width, and {c.n_heads} of {c.head_dim} do not here"
    if c.model_type == "yuan" and (c.qkv_bias or not c.tie_embeddings):
        yield "Yuan has no biases on q, k and v, and its head is the embedding"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
