"""The server over a scripted engine, in a thread of the test: everything is real but the arithmetic."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from fourfold.chat_template import ChatTemplate
from fourfold.scheduler import Limits as StepLimits
from fourfold.server.app import make_app
from fourfold.server.auth import Keys
from fourfold.server.limits import Limits
from fourfold.server.metrics import Metrics
from fourfold.server.run import Running, bind
from fourfold.server.service import Service
from fourfold.server.worker import Worker
from fourfold.steploop import StepLoop
from scripted import TEMPLATE, ByteBackend, ScriptedEngine, byte_tokenizer

MODEL = "scripted"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class SlowEngine(ScriptedEngine):
    """One whose steps can be slowed down, or made to fail."""

    seconds = 0.0
    failure: Exception | None = None

    def step(self, feeds: Any, **kinds: str) -> NDArray[np.float32]:
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        return super().step(feeds, **kinds)


@dataclass
class Served:
    """A server under test."""

    service: Service
    engine: SlowEngine
    loop: StepLoop
    running: Running
    address: str
    http: httpx.Client
    call: Callable[[Callable[[], object]], None]  # something in the event loop's thread
    thread: threading.Thread

    def chat(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={**ASK, **fields})

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": MODEL, "prompt": "abc", **fields})

    def until(self, condition: Callable[[], bool], seconds: float = 100.0) -> None:
        """Waits for it. Raises AssertionError where it does not come true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.005)

    def until_empty(self) -> None:
        """Waits until nothing is under way, and nothing was lost."""
        self.until(lambda: not self.service.worker.jobs and self.loop.is_idle and not self.engine.live)
        self.loop.check_integrity()


@contextmanager
def served(
    answer: str = "Paris.<eos>",
    *,
    template: str | None = TEMPLATE,
    keys: tuple[str, ...] = (),
    drain_seconds: float = 5.0,
    steps: StepLimits | None = None,
    context: int = 1000,
    wait: bool = True,
    origins: tuple[str, ...] = (),
    hosts: frozenset[str] | None = None,
    root_path: str = "",
    **limits: Any,
) -> Iterator[Served]:
    """A server whose model answers this text, with an end at "<eos>"; `wait`: until it is ready."""
    engine = SlowEngine(ByteBackend().encode(answer, False), context=context)
    tokenizer = byte_tokenizer()
    steploop = StepLoop(engine, tokenizer, limits=steps or StepLimits(max_running=2))  # type: ignore[arg-type]
    worker = Worker(steploop)
    metrics = worker.observer = Metrics(lambda: worker.stats, read_gb_s=1.0)
    service = Service(
        name=MODEL,
        engine=engine,  # type: ignore[arg-type]
        tokenizer=tokenizer,
        template=None if template is None else ChatTemplate(template),
        limits=Limits(**limits),
        metrics=metrics,
        worker=worker,
    )
    app = make_app(service, Keys(list(keys)), root_path=root_path, origins=origins, hosts=hosts)
    listener = bind("127.0.0.1", 0)
    events = asyncio.new_event_loop()
    running = Running(lambda: (service, app), service.limits, drain_seconds)
    thread = threading.Thread(target=lambda: events.run_until_complete(running.serve(listener)))
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=address, timeout=100) as client:
        server = Served(
            service, engine, steploop, running, address, client, lambda f: void(events.call_soon_threadsafe(f)), thread
        )
        try:
            server.until(lambda: running.is_listening)
            if wait:
                server.until(lambda: service.is_ready)
            yield server
        finally:
            engine.seconds = 0.0
            if not service.is_draining:
                events.call_soon_threadsafe(running.end)
            thread.join(100)
            assert not thread.is_alive(), "the server did not end"
            listener.close()
            events.close()


def void(_: object) -> None:
    """Nothing."""


def messages(error: httpx.Response) -> tuple[int, str, str | None]:
    """Status, message and field of a refusal, whose body is checked to be OpenAI's."""
    body = error.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return error.status_code, body["error"]["message"], body["error"]["param"]
