"""The public class: text in, text out, over one loaded model."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourfold.chat_template import ChatTemplate, Message
from fourfold.checkpoint.fields import MAX_SIZE
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import KV_FORMATS
from fourfold.errors import CheckpointError, RuntimeFailure, UserError
from fourfold.generation import Generation
from fourfold.locate import fourfold_directory
from fourfold.progress import bar, note, warn
from fourfold.request import Request, Update, check_prompt
from fourfold.residency import WEIGHTS
from fourfold.sampling import SamplingParams
from fourfold.scheduler import MOST_RUNNING, Limits
from fourfold.speculate import PromptLookup, StepCost
from fourfold.tokenizer import NoTokenizer, Tokenizer

if TYPE_CHECKING:
    from fourfold.checkpoint import Source
    from fourfold.draft import DraftModel
    from fourfold.engine import Engine
    from fourfold.profile import Profile
    from fourfold.steploop import StepLoop

Prompt = str | Sequence[int]  # text, or ids that are taken as they are


@dataclass(frozen=True)
class Completion:
    """What a model said."""

    text: str
    token_ids: tuple[int, ...]  # every id that was sampled, the one that ends a text included
    finish_reason: Literal["stop", "length", "cancelled"]  # an end or stop string; max_tokens or context; not exhausted
    prompt_tokens: int
    prompt_seconds: float  # until the first id
    decode_seconds: float  # for the ids after it

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the ids after the first; None where there are none."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else None


class LLM:
    """One model, loaded. Close it, or use it in a `with` block, to give its memory back."""

    def __init__(
        self,
        model: str | Path,
        *,
        format: str | None = None,
        ranks: int | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv: str | None = None,
        rope_angles: str | None = None,
        weights: str | None = None,
        sequences: int | None = None,
        draft: str | Path | None = None,
    ) -> None:
        """Load a fourfold, Hugging Face or Megatron directory, a GGUF file or a bundled model (`smollm2`).

        A source that is not in a fourfold format yet is converted once and kept, with a progress bar on a terminal.

        - `format`: nf4 (default), int4, fp4, fp4_bnb, uint4, int8, bf16 or f32. A fourfold directory has its own; a
          quantized checkpoint's codes are kept if it is left out.
        - `ranks`: slices of the model, one to a NUMA node by default. `threads`: of all ranks together.
        - `context`: positions to make room for; by default the model's own, at most 8192.
        - `kv`: bf16 (default), int8 or f32 (default of the f32 format). `rope_angles`: f32 or bf16, as in training.
        - `weights`: in `memory`; on `disk`, read again for every token; `auto` (default): on disk what does not fit in
          memory, which a warning on stderr says.
        - `sequences`: texts under way at a time, 32 by default; more wait.
        - `draft`: a smaller model of the same tokenizer, which guesses ahead. It changes the speed, never a text.

        Raises UserError or one of its kinds for whatever cannot be done as asked.
        """
        options: dict[str, Any] = {"ranks": ranks, "threads": threads, "context": context, "weights": weights}
        _check_options(**options, kv=kv, rope_angles=rope_angles, sequences=sequences)
        options["weights"] = weights or "auto"
        engine, tokenizer, template = _load(model, format, sequences, kv=kv, rope_angles=rope_angles, **options)
        helper = None
        if draft is not None:
            from fourfold.draft import DraftModel

            try:
                small, small_tokenizer, _ = _load(draft, None, sequences, **options, beside=engine)
                helper = DraftModel.of(small, _or_ids(small, small_tokenizer), _or_ids(engine, tokenizer))
            except BaseException:
                engine.close()
                raise
        self._set_parts(engine, tokenizer, template, helper)

    @classmethod
    def _from_parts(cls, engine: Engine, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> LLM:
        llm = cls.__new__(cls)
        llm._set_parts(engine, tokenizer, template, None)
        return llm

    def _set_parts(
        self, engine: Engine, tokenizer: Tokenizer | None, template: ChatTemplate | None, helper: DraftModel | None
    ) -> None:
        self.engine, self._tokenizer, self.chat_template, self._helper = engine, tokenizer, template, helper
        self._step_cost = StepCost()  # what one loop learns of the engine's steps, the next one knows
        limits = Limits(
            max_running=min(engine.pool.n_slots, MOST_RUNNING), max_waiting=MAX_SIZE, max_wait_seconds=math.inf
        )
        self._desk = _Desk(self.new_loop(limits))

    def new_loop(self, limits: Limits | None = None, *, speculates: bool = True) -> StepLoop:
        """A step loop of one's own over the model: for many requests at a time, as the server makes it.

        `speculates`: with drafts, from the draft model where there is one, else from the texts themselves.
        """
        from fourfold.steploop import StepLoop, speculation

        drafts = speculation(self._helper or PromptLookup(), self._step_cost) if speculates else None
        return StepLoop(self.engine, _or_ids(self.engine, self._tokenizer), limits=limits, speculation=drafts)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError where its directory has none."""
        if self._tokenizer is None:
            raise UserError(
                "the model has no tokenizer, so it knows ids only: give ids in place of a text,"
                " or take one from elsewhere with `fourfold quantize SRC DST --tokenizer DIR`"
            )
        return self._tokenizer

    @property
    def context(self) -> int:
        """Positions there is room for: a prompt and its answer together."""
        return self.engine.context

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.engine.config.vocab_size

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue each prompt, as it stands: no chat template. Several go through the model together."""
        single = not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, str | bytes)
        single = single or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
        several = cast("Sequence[Prompt]", [prompts] if single else prompts)
        streams = [self.stream(prompt, params) for prompt in several]
        try:
            for stream in streams:
                stream.start()
            return [stream.finish() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continue one prompt, piece by piece. Without a tokenizer, ids are continued, and the pieces are ids too."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt, "a prompt that is not text")
        return self._stream(ids, params, after=ids)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, template: str | None = None
    ) -> Completion:
        """The answer to messages of a "role" (system, user, assistant) and a "content".

        `template` names one of fourfold's own (`yuan-n`, `yuan-newline`) to use in place of the model's.
        """
        return self.chat_stream(messages, params, template=template).finish()

    def chat_stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, template: str | None = None
    ) -> Stream:
        """`chat`, piece by piece."""
        chosen = ChatTemplate.built_in(template) if template is not None else self.chat_template
        if chosen is None:
            raise UserError(
                "the model has no chat template, and fourfold does not guess one; "
                "continue a plain text instead, with `fourfold run` or `LLM.generate`"
            )
        chosen.check_fits(self.tokenizer)
        ids = self.tokenizer.encode(chosen.render(messages), add_special_tokens=False)
        return self._stream(ids, params, after=())

    def logits(self, token_ids: ArrayLike, step: bool = False) -> NDArray[np.float32]:
        """Logits (T, vocab) of T ids, each after those before it: one prefill, or one step an id."""
        ids = _ids(token_ids, "token_ids")
        self._check_prompt(ids)
        if not step:
            return self.engine.logits(ids)
        sequence = self.engine.new_sequence()
        try:
            return np.stack([self.engine.extend(sequence, [i]) for i in ids])
        finally:
            self.engine.free(sequence)

    def profile(self) -> AbstractContextManager[Profile]:
        """A block whose steps are recorded, op by op and thread by thread: `Profile.summary`, `trace_file.write_trace`.

        Raises UserError within another profile.
        """
        return self.engine.profile()

    def describe(self) -> dict[str, Any]:
        """What runs and how: the engine's own account (format, ranks, threads, ISA, bytes)."""
        return self.engine.describe()

    def close(self) -> None:
        """Give threads and memory back; the object is of no use afterwards."""
        if self._helper is not None:
            self._helper.close()
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, ids: list[int], params: SamplingParams | None, after: Sequence[int]) -> Stream:
        self._check_prompt(ids)
        if not isinstance(params, SamplingParams | None):
            raise UserError(f"params must be SamplingParams, not {type(params).__name__}")
        return Stream(self._desk, Request(tuple(ids), params or SamplingParams(), after=tuple(after)))

    def _check_prompt(self, ids: Sequence[int]) -> None:
        check_prompt(ids, self.engine.config, self.context)


class _Desk:
    """One step loop that the streams of a model share, each taking steps for all while it waits for its own."""

    def __init__(self, loop: StepLoop) -> None:
        self._loop, self._lock = loop, RLock()  # again and again in one thread: a stream is freed where it is collected
        self._inbox: dict[Generation, deque[Update]] = {}

    def add(self, request: Request) -> Generation:
        with self._lock:
            generation = self._loop.add(request)
            self._inbox[generation] = deque()
            return generation

    def next(self, generation: Generation) -> Update:
        """What happened to it next. Raises RuntimeFailure where its text failed."""
        while True:
            with self._lock:
                if self._inbox[generation]:
                    update = self._inbox[generation].popleft()
                    if update.error is not None:
                        raise RuntimeFailure(update.error)
                    return update
                for update in self._loop.step():
                    self._inbox[update.generation].append(update)

    def leave(self, generation: Generation) -> None:
        with self._lock:
            self._loop.cancel(generation)
            self._inbox.pop(generation, None)


class Stream:
    """An iterator over the pieces of one text, each of whole characters; joined, they are `completion.text`."""

    def __init__(self, desk: _Desk, request: Request) -> None:
        self._desk, self._request = desk, request
        self._generation: Generation | None = None
        self._text = ""
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def start(self) -> None:
        """Take part in the steps from now on, not from the first piece that is asked for."""
        if self._generation is None:
            self._generation = self._desk.add(self._request)

    def close(self) -> None:
        """End the generation here."""
        self._pieces.close()
        if self._generation is not None:
            self._desk.leave(self._generation)

    def finish(self) -> Completion:
        """Read the rest, and the whole completion."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """What has come so far; `cancelled` until the last piece has."""
        g = self._generation
        reason = g.finish if g is not None and g.finish in ("stop", "length") else "cancelled"
        return Completion(
            text=self._text,
            token_ids=tuple(g.ids[g.prompt_tokens :]) if g else (),
            finish_reason=cast(Any, reason),
            prompt_tokens=len(self._request.prompt),
            prompt_seconds=g.prompt_seconds if g else 0.0,
            decode_seconds=g.decode_seconds if g else 0.0,
        )

    def _run(self) -> Generator[str, None, None]:
        self.start()
        assert self._generation is not None
        try:
            finish = None
            while finish is None:
                update = self._desk.next(self._generation)
                finish = update.finish
                self._text += update.text
                if update.text:
                    yield update.text
        finally:
            self._desk.leave(self._generation)


def _load(
    model: str | Path, format: str | None, sequences: int | None, **options: Any
) -> tuple[Engine, Tokenizer | None, ChatTemplate | None]:
    """A model in memory, converted before where it must be."""
    with bar(f"converting {model}") as report:
        directory = fourfold_directory(
            model, format, threads=options["threads"], report=report, notice=note, check=check_text
        )
    tokenizer, template = load_text(directory, open_directory(directory).config.vocab_size)

    from fourfold.engine import MAX_SEQUENCES, Engine

    with bar(f"loading {directory.name}") as report:
        engine = Engine(directory, sequences=sequences or MAX_SEQUENCES, report=report, **options)
    if engine.slowness:
        warn(engine.slowness)
    return engine, tokenizer, template


def _or_ids(engine: Engine, tokenizer: Tokenizer | None) -> Tokenizer | NoTokenizer:
    return tokenizer or NoTokenizer(engine.config.vocab_size, engine.config.eos_ids)


def load_text(directory: Path, vocab_size: int) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a model with that vocabulary. Raises CheckpointError for unfit ones."""
    tokenizer = Tokenizer.from_directory(directory) if Tokenizer.is_in(directory) else None
    if tokenizer is not None:
        tokenizer.check_fits(vocab_size)
    return tokenizer, ChatTemplate.from_directory(directory)


def check_text(source: Source) -> None:
    """Raises before a conversion what `load_text` would raise after it."""
    whose = {content.parent for content in source.tokenizer_files.values() if isinstance(content, Path)} or {
        source.path
    }
    with TemporaryDirectory() as directory:
        for name, content in source.tokenizer_files.items():
            Path(directory, name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        Path(directory, "config.json").write_text(json.dumps({"model": source.config.to_dict()}), encoding="utf-8")
        try:
            load_text(Path(directory), source.config.vocab_size)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(directory, str(whose.pop()))) from None


def _ids(values: ArrayLike, what: str) -> list[int]:
    try:
        ids = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise UserError(f"{what} must be one row of whole numbers") from None
    if ids.dtype == object and ids.ndim == 1 and all(isinstance(i, int) for i in ids):  # that no int64 holds
        raise UserError(f"{what} has an id of {max(map(abs, ids))}, which no model has")
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UserError(f"{what} must be one row of whole numbers, not {ids.dtype} of shape {ids.shape}")
    return [int(i) for i in ids]


def _check_options(**options: object) -> None:
    for name in ("ranks", "threads", "context", "sequences"):
        value = options[name]
        if value is not None and not (type(value) is int and 1 <= value <= MAX_SIZE):
            raise UserError(f"{name} must be a whole number from 1 to {MAX_SIZE}, not {value!r}")
    for name, choices in (("kv", KV_FORMATS), ("rope_angles", ("f32", "bf16")), ("weights", WEIGHTS)):
        if options[name] is not None and options[name] not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {options[name]!r}")
