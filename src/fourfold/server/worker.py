"""The thread that owns the step loop: requests go in and out between its steps, updates come back once a step.

Everything but `_run` and what it calls belongs to the event loop's thread. The two share the queue of orders, and each
step's results, which cross by one `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

from fourfold.errors import FourfoldError, RuntimeFailure
from fourfold.request import ErrorKind, Request, Update

_log = logging.getLogger(__name__)


class Steps(Protocol):
    """What a worker needs of `steploop.StepLoop`."""

    def add(self, request: Request) -> Any: ...
    def cancel(self, generation: Any) -> None: ...
    def step(self) -> list[Update]: ...
    @property
    def is_idle(self) -> bool: ...
    def stats(self) -> Any: ...
    def check_integrity(self) -> None: ...


class Observer(Protocol):
    """Who is told how long tokens took; `metrics.Metrics`."""

    def first_token(self, seconds: float) -> None: ...
    def next_tokens(self, count: int, seconds: float) -> None: ...


class JobFailed(Exception):
    """The step loop ended, or could not go on with a text. The message is for the client."""

    def __init__(self, message: str, kind: ErrorKind | Literal["ended"] = "failure") -> None:
        """`kind`: why; "ended" where the server was told to."""
        super().__init__(message)
        self.kind = kind


class Job:
    """The texts of one HTTP request, under way. Whoever has one closes it."""

    def __init__(self, requests: Sequence[Request], worker: Worker) -> None:
        self.requests = tuple(requests)
        self.generations: tuple[Any, ...] = ()  # the step loop's, in the order of `requests`
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # by the step loop, or refused
        self._worker = worker
        self._inbox: asyncio.Queue[tuple[int, Update] | JobFailed | None] = asyncio.Queue()
        self._left = len(self.requests)
        self._closed = False
        self._last = [perf_counter()] * len(self.requests)  # when each text's last token came
        self._begun = [False] * len(self.requests)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(which text, what one step did for it), until all have finished or the job was closed.

        Raises JobFailed where a text ends in an error.
        """
        while self._left and (item := await self._inbox.get()) is not None:
            if isinstance(item, JobFailed):
                raise item
            index, update = item
            if update.finish == "error":
                raise JobFailed(update.error or "the text could not be continued", update.error_kind or "failure")
            self._left -= update.finish is not None
            yield index, update

    @property
    def is_finished(self) -> bool:
        """Whether the last update of every text was read."""
        return not self._left

    def close(self) -> None:
        """Free what unfinished texts hold, after the step under way; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._inbox.put_nowait(None)
            self._worker.forget(self)

    def deliver(self, index: int, update: Update) -> None:
        """From the worker."""
        observer = self._worker.observer
        if update.ids and observer is not None:
            now = perf_counter()
            seconds, self._last[index] = now - self._last[index], now
            if self._begun[index]:
                observer.next_tokens(len(update.ids), seconds)
            else:
                observer.first_token(seconds)
            self._begun[index] = True
        self._inbox.put_nowait((index, update))

    def fail(self, failure: JobFailed) -> None:
        """From the worker: nothing more will come."""
        if not self.taken.done():
            self.taken.set_exception(failure)
        self._inbox.put_nowait(failure)


@dataclass(frozen=True)
class _Order:
    """Take a job's texts, or drop them."""

    job: Job
    drop: bool


_Answer = tuple[Job, Exception | None]  # why a job cannot be taken; None where it was


class Worker:
    """Runs a step loop in a thread from `start` to `close`, or until it fails."""

    def __init__(self, steps: Steps) -> None:
        self.observer: Observer | None = None
        self.stats = steps.stats()  # of the last step
        self.failure: str | None = None
        self.jobs: set[Job] = set()  # under way
        self._steps = steps
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._where: dict[Any, tuple[Job, int]] = {}  # of each generation; the thread's own
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._on_failure: Callable[[str], None]

    def start(self, on_failure: Callable[[str], None]) -> None:
        """From the event loop's thread, in which `on_failure` is called, once, where the step loop cannot go on."""
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Job:
        """All of the requests, or none, taken by the step loop.

        Raises JobFailed where the worker has failed, and what `StepLoop.add` raises: UserError, QueueFull.
        """
        if self.failure is not None:
            raise JobFailed(self.failure)
        job = Job(requests, self)
        self.jobs.add(job)
        self._orders.put(_Order(job, drop=False))
        try:
            await job.taken
        except BaseException:  # refused, or the client has gone while it waited
            job.close()
            raise
        return job

    def forget(self, job: Job) -> None:
        """From a job that is closed."""
        self.jobs.discard(job)
        if not job.is_finished:
            self._orders.put(_Order(job, drop=True))

    async def close(self) -> None:
        """End after the step under way; what still runs is lost. A step loop that lost track of anything has failed."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        self.fail_all(JobFailed("the server has ended", "ended"))

    def _run(self) -> None:
        try:
            while (answers := self._obey()) is not None:
                updates = [(*self._where[u.generation], u) for u in self._steps.step() if u.generation in self._where]
                for _, _, update in updates:
                    if update.finish is not None:
                        self._where.pop(update.generation, None)
                self.stats = self._steps.stats()
                if answers or updates:
                    self._loop.call_soon_threadsafe(self._deliver, answers, updates)
            self._leave()
        except BaseException as error:
            expected = isinstance(error, FourfoldError)
            sentence = str(error) if expected else f"{type(error).__name__}: {error}"
            _log.critical("the step loop ended: %s", sentence, exc_info=None if expected else error)
            self._loop.call_soon_threadsafe(self._fail, f"the model has stopped: {sentence}")

    def _obey(self) -> list[_Answer] | None:
        """Follow the orders that wait, and wait for one where nothing else is to be done; None at the end."""
        answers: list[_Answer] = []
        while True:
            try:
                order = self._orders.get(block=self._steps.is_idle and not answers)
            except queue.Empty:
                return answers
            if order is None:
                return None
            if order.drop:
                for generation in order.job.generations:
                    self._steps.cancel(generation)
                    self._where.pop(generation, None)
                self.stats = self._steps.stats()  # there may be no step to follow
            else:
                answers.append((order.job, self._take(order.job)))

    def _leave(self) -> None:
        """Drop what still runs. Raises RuntimeFailure where anything was lost on the way here."""
        for generation in self._where:
            self._steps.cancel(generation)
        self._where.clear()
        self.stats = self._steps.stats()
        try:
            self._steps.check_integrity()
            assert not self.stats.pages_held, f"{self.stats.pages_held} KV pages are still held"
        except AssertionError as error:
            raise RuntimeFailure(f"pages, slots or requests were lost: {error}") from error

    def _take(self, job: Job) -> Exception | None:
        added: list[Any] = []
        try:
            for request in job.requests:
                added.append(self._steps.add(request))
        except FourfoldError as error:
            for generation in added:
                self._steps.cancel(generation)
            return error
        job.generations = tuple(added)
        self._where |= {generation: (job, i) for i, generation in enumerate(added)}
        return None

    def _deliver(self, answers: list[_Answer], updates: list[tuple[Job, int, Update]]) -> None:
        for job, error in answers:
            if job.taken.done():  # its client has gone
                continue
            if error is None:
                job.taken.set_result(None)
            else:
                job.taken.set_exception(error)
        for job, index, update in updates:
            job.deliver(index, update)

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        self.fail_all(JobFailed(sentence))
        self._on_failure(sentence)

    def fail_all(self, failure: JobFailed) -> None:
        """End every job with an error."""
        for job in self.jobs:
            job.fail(failure)
