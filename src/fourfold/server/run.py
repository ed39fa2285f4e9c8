"""From options to a server that runs until it is told to end, or fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import NoReturn, TypeVar, cast

import uvicorn
from starlette.types import ASGIApp

from fourfold.errors import RuntimeFailure, UserError
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.server.connections import SWEEP_SECONDS, connection_class, sweep
from fourfold.server.front import Front
from fourfold.server.limits import Limits
from fourfold.server.metrics import SAMPLE_SECONDS
from fourfold.server.notify import READY, STOPPING, notify
from fourfold.server.service import Service
from fourfold.server.worker import JobFailed

ENDING_SECONDS = 5.0  # that connections may take to close once their requests have ended
FORCED_END_SECONDS = 15.0  # after its model has failed: threads of a broken team might never end
WARM_TOKENS = 4

T = TypeVar("T")
Load = Callable[[], tuple[Service, ASGIApp]]

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


def run(load: Load, listener: socket.socket, limits: Limits, drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT, then end what is under way; a second signal ends the process at once.

    Such a signal while the model loads ends the process, with status 0. Raises what `load` raises, and RuntimeFailure
    where the model fails.
    """
    running = Running(load, limits, drain_seconds, forced_end_seconds=FORCED_END_SECONDS)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.end)
        await running.serve(listener)

    asyncio.run(serve())
    if running.is_loading:  # in a thread that nothing stops
        _end_process(0)
    if running.error is not None:
        raise running.error


class _Server(uvicorn.Server):
    """Signals are `Running`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A server in one event loop: it answers at once, loads its model beside that, and ends when it is told to."""

    def __init__(
        self, load: Load, limits: Limits, drain_seconds: float, forced_end_seconds: float | None = None
    ) -> None:
        """`load` runs in a thread of its own.

        `forced_end_seconds`: after a failure of the model the process does not live longer, whatever hangs.
        """
        self.error: Exception | None = None  # for which it ended
        self.is_loading = True
        self._load, self._drain_seconds, self._forced_end = load, drain_seconds, forced_end_seconds
        self._front = Front()
        self._service: Service | None = None  # once the model is loaded
        self._is_ending = False
        config = uvicorn.Config(
            self._front,
            http=connection_class(limits),
            ws="none",
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
        self._start(self._begin())
        self._start(self._sweep())
        try:
            await self._server.serve([listener])
        finally:
            for task in self._tasks:
                task.cancel()
            if self._service is not None:
                await self._close(self._service)

    async def _close(self, service: Service) -> None:
        service.texts.shutdown(wait=False, cancel_futures=True)
        if service.worker.failure is None:
            await service.worker.close()
        if service.worker.failure is not None:  # that nothing was lost is looked at last
            self.error = RuntimeFailure(service.worker.failure)

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine without a result
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self) -> None:
        """Until the model is ready. A failure ends the server."""
        try:
            service, app = await _in_thread_of_its_own(self._load)
            self.is_loading = False
            if self._is_ending:
                return
            self._service, self._front.app = service, app
            service.worker.start(self._on_failure)
            self._start(self._sample(service))
            await self._warm_up(service)
        except Exception as error:
            self.is_loading = False
            if self._service is None or self._service.worker.failure is None:  # else `_on_failure` has seen to it
                self.error, self._server.should_exit = error, True

    async def _warm_up(self, service: Service) -> None:
        """Everything that is slow the first time, before anybody waits for it."""
        await service.in_thread(lambda: service.grammars)
        n_prompt = max(1, min(64, service.context - WARM_TOKENS))
        prompt = tuple(i % service.tokenizer.vocab_size for i in range(n_prompt))
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

    async def _sample(self, service: Service) -> None:
        while True:
            service.metrics.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _sweep(self) -> None:
        while True:
            sweep(self._server.server_state.connections)
            await asyncio.sleep(SWEEP_SECONDS)

    @property
    def is_listening(self) -> bool:
        """Whether requests are answered, if only with a 503."""
        return bool(self._server.started)

    def end(self) -> None:
        """Take no more requests and finish those under way; the second time, end the process at once."""
        if self._is_ending:
            _log.warning("ended at once")
            _end_process(1)
        self._is_ending = True
        notify(STOPPING)
        if self._service is None:
            _log.info("ending: no model is loaded yet")
            self._server.should_exit = True
            return
        self._service.is_draining = True
        _log.info("ending: %d requests are under way", self._service.n_requests)
        self._start(self._drain(self._service))

    async def _drain(self, service: Service) -> None:
        deadline = monotonic() + self._drain_seconds
        while service.n_requests and monotonic() < deadline:
            await asyncio.sleep(0.02)
        if service.n_requests:
            _log.warning("%d requests did not end in time", service.n_requests)
            service.worker.fail_all(JobFailed("the server has ended", "ended"))
        self._server.should_exit = True

    def _on_failure(self, sentence: str) -> None:
        """Every request has been told; once their replies are out, the process ends."""
        if self._forced_end is not None:
            watchdog = threading.Timer(self._forced_end, os._exit, (1,))
            watchdog.daemon = True
            watchdog.start()
        self._drain_seconds = ENDING_SECONDS
        if self._service is not None:
            self._start(self._drain(self._service))


async def _in_thread_of_its_own(work: Callable[[], T]) -> T:
    """Its result, or what it raises. Nobody waits for the thread at the process' end."""
    events = asyncio.get_running_loop()
    future: asyncio.Future[T] = events.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if future.done():  # the server has ended
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def do() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            events.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=do, name="loading", daemon=True).start()
    return await future


def _end_process(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)
