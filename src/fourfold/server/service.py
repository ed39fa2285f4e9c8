"""What the routes share: the model's text side, the worker in front of its step loop, and the server's state."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, ParamSpec, TypeVar

from fastapi import Request as HttpRequest

from fourfold.chat_template import ChatTemplate
from fourfold.engine import Engine
from fourfold.errors import QueueFull, UserError
from fourfold.grammar import Grammars
from fourfold.request import Request
from fourfold.scheduler import PrefixCache
from fourfold.server.errors import ApiError, bad_request, too_busy, unavailable
from fourfold.server.limits import Limits
from fourfold.server.metrics import Metrics
from fourfold.server.worker import Job, JobFailed, Worker
from fourfold.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")
TEXT_THREADS = 4  # that render templates, tokenize and compile grammars beside the event loop


@dataclass(frozen=True)
class Closed:
    """Why no requests are taken."""

    status: Literal["starting", "draining", "failed"]
    reason: str  # as a sentence


@dataclass
class Service:
    """One model as the routes see it."""

    name: str  # by which clients ask for it
    engine: Engine  # which steps in the worker's thread; here only facts about it are read
    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits
    metrics: Metrics
    worker: Worker
    prefix_cache: PrefixCache = "all"  # the step loop's
    is_ready: bool = False  # warmed up
    is_draining: bool = False  # no new requests
    n_requests: int = 0  # to the model, under way
    created: int = field(default_factory=lambda: int(time.time()))
    texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "texts"))

    @property
    def context(self) -> int:
        """Positions of a text: prompt and answer together."""
        return self.engine.context

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.engine.config.vocab_size

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the engine says of itself."""
        return self.engine.describe()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever changes the bits of answers: version, model, template, kernels, options."""
        import fourfold

        names = ("identity", "kv", "rope_angles", "isa", "ranks", "kernels_decode", "kernels_prefill")
        what = {name: self.facts.get(name) for name in names}
        template = self.template.source if self.template else None
        options = [fourfold.__version__, self.context, self.prefix_cache, template]
        text = json.dumps([options, what], sort_keys=True, default=str)
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def grammars(self) -> Grammars:
        """Takes a second where it is first asked for: warm-up does."""
        return Grammars(self.tokenizer, self.vocab_size)

    @cached_property
    def longest_text(self) -> int:
        """Characters that the context could hold, if all were the longest token."""
        return self.context * max(map(len, self.tokenizer.vocabulary.tokens))

    @property
    def closed(self) -> Closed | None:
        """Why no requests are taken; None where they are."""
        if self.worker.failure is not None:
            return Closed("failed", self.worker.failure)
        if self.is_draining:
            return Closed("draining", "the server is ending")
        return None if self.is_ready else Closed("starting", "the model is warming up")

    def check_model(self, name: str) -> None:
        """Raises a 404 for a model that is not this one."""
        if name != self.name:
            shown = name.encode(errors="backslashreplace").decode()[:200]
            raise ApiError(
                404, f"there is no model {shown!r} here; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work on texts, beside the event loop. A UserError becomes a 400."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.texts, lambda: function(*args, **kwargs))
        except UserError as error:
            raise bad_request(str(error)) from None

    async def submit(self, requests: Sequence[Request]) -> Job:
        """To the step loop. Raises a 400 for what can never run, 429 where the queue is full, 503 at the end."""
        try:
            return await self.worker.submit(requests)
        except QueueFull as error:
            raise too_busy(str(error)) from None
        except UserError as error:
            raise bad_request(str(error)) from None
        except JobFailed as error:
            raise unavailable(str(error)) from None

    def encode(self, text: str, what: str, **options: bool) -> tuple[int, ...]:
        """Ids of a text. Raises a 400 for one that is too long by far, which would take seconds to cut into tokens."""
        if len(text) > self.longest_text:
            raise bad_request(
                f"{what} has {len(text)} characters, and this model's context of {self.context} tokens holds "
                f"{self.longest_text} at most; shorten it",
                what,
                "context_length_exceeded",
            )
        return tuple(self.tokenizer.encode(text, **options))

    def room(self, prompt: Sequence[int], what: str) -> int:
        """Tokens that the context has room for behind a prompt. Raises a 400 where it is empty or too long."""
        if not prompt:
            raise bad_request(f"{what} is empty; send at least one token", what)
        if len(prompt) > self.context:
            raise bad_request(
                f"{what} has {len(prompt)} tokens, and this model's context is {self.context}; shorten it",
                what,
                "context_length_exceeded",
            )
        return self.context - len(prompt) + 1  # the last token takes no position


def service_of(http: HttpRequest) -> Service:
    """The service of the application that a request came to."""
    service: Service = http.app.state.service
    return service


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
