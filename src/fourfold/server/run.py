"""From options to a server that runs until it is told to end, or fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from time import monotonic

import uvicorn
from fastapi import FastAPI

from fourfold.errors import RuntimeFailure, UserError
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.server.metrics import SAMPLE_SECONDS
from fourfold.server.notify import READY, STOPPING, notify
from fourfold.server.service import Service
from fourfold.server.worker import JobFailed

ENDING_SECONDS = 5.0  # that connections may take to close once their requests have ended
FORCED_END_SECONDS = 15.0  # after its model has failed: threads of a broken team might never end
WARM_TOKENS = 4

_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"{host} port {port} cannot be listened at ({error.strerror or error}); name another") from None
    return listener


def run(service: Service, app: FastAPI, listener: socket.socket, drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT, then end what is under way; a second signal ends the process at once.

    Raises RuntimeFailure where the model fails.
    """
    running = Running(service, app, drain_seconds, forced_end_seconds=FORCED_END_SECONDS)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.end)
        await running.serve(listener)

    asyncio.run(serve())
    if service.worker.failure is not None:
        raise RuntimeFailure(service.worker.failure)


class _Server(uvicorn.Server):
    """Signals are `Running`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A server in one event loop, from its warm-up to its end."""

    def __init__(
        self, service: Service, app: FastAPI, drain_seconds: float, forced_end_seconds: float | None = None
    ) -> None:
        """`forced_end_seconds`: after a failure of the model the process does not live longer, whatever hangs."""
        self._service, self._drain_seconds, self._forced_end = service, drain_seconds, forced_end_seconds
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(ENDING_SECONDS),
        )
        self._server = _Server(config)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Returns when the server has ended."""
        worker = self._service.worker
        worker.start(self._on_failure)
        self._start(self._warm_up())
        self._start(self._sample())
        try:
            await self._server.serve([listener])
        finally:
            for task in self._tasks:
                task.cancel()
            self._service.texts.shutdown(wait=False, cancel_futures=True)
            if worker.failure is None:
                await worker.close()

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine without a result
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warm_up(self) -> None:
        """Everything that is slow the first time, before anybody waits for it."""
        service = self._service
        await service.in_thread(lambda: service.grammars)
        prompt = tuple(i % service.tokenizer.vocab_size for i in range(min(64, service.context - WARM_TOKENS)))
        params = SamplingParams(max_tokens=WARM_TOKENS, ignore_eos=True)
        job = await service.worker.submit([Request(prompt, params)])
        try:
            async for _ in job.updates():
                pass
        finally:
            job.close()
        service.is_ready = True
        notify(READY)
        _log.info("ready")

    async def _sample(self) -> None:
        while True:
            self._service.metrics.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    @property
    def is_listening(self) -> bool:
        """Whether requests are answered, if only with a 503."""
        return bool(self._server.started)

    def end(self) -> None:
        """Take no more requests and finish those under way; the second time, end the process at once."""
        if self._service.is_draining:
            _log.warning("ended at once")
            logging.shutdown()
            os._exit(1)
        self._service.is_draining = True
        notify(STOPPING)
        _log.info("ending: %d requests are under way", self._service.n_requests)
        self._start(self._drain())

    async def _drain(self) -> None:
        deadline = monotonic() + self._drain_seconds
        while self._service.n_requests and monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._service.n_requests:
            _log.warning("%d requests did not end in time", self._service.n_requests)
            self._service.worker.fail_all(JobFailed("the server has ended", "ended"))
        self._server.should_exit = True

    def _on_failure(self, sentence: str) -> None:
        """Every request has been told; once their replies are out, the process ends."""
        if self._forced_end is not None:
            watchdog = threading.Timer(self._forced_end, os._exit, (1,))
            watchdog.daemon = True
            watchdog.start()
        self._drain_seconds = ENDING_SECONDS
        self._start(self._drain())
