"""What goes wrong with one text, and what its client is told of whose fault that is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.generation import Generation
from fourfold.scheduler import Limits as StepLimits
from fourfold.scheduler import Scheduler
from serving import messages, served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no such form"), 400), (RuntimeFailure("no number"), 500), (KeyError("oh"), 500)]
)
def test_a_text_that_fails_says_whose_fault_it_is(
    error: Exception, status: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    with served() as server:
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "sample", fails)
            reply = server.chat(stream=stream)
        body = json.loads(reply.text.split("\n\n")[-2].removeprefix("data: ")) if stream else reply.json()
        assert (reply.status_code, str(error) in body["error"]["message"]) == (200 if stream else status, True)
        assert body["error"]["type"] == ("server_error" if status == 500 else "invalid_request_error")
        assert server.chat().status_code == 200
        server.until_empty()


@pytest.mark.parametrize("cause", ["waited", "memory"])
def test_a_text_without_room_is_told_to_come_again(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_no_room(*_: Any) -> None:
        raise ResourceError("memory has no room for another page")

    with served(steps=StepLimits(max_running=2, max_wait_seconds=0.2)) as server:
        with monkeypatch.context() as patch:
            if cause == "waited":
                patch.setattr(Scheduler, "_admit", lambda _: None)
            else:
                patch.setattr(Scheduler, "_with_pages", has_no_room)
            reply = server.chat()
        status, sentence, _ = messages(reply)
        assert (status, reply.headers["retry-after"]) == (503, "1")
        assert ("no room was found for the request in 0.2 s" if cause == "waited" else "memory has no room") in sentence
        assert server.chat().status_code == 200
        server.until_empty()


@pytest.mark.parametrize("loses", ["slot", "page"])
def test_a_server_that_lost_something_says_so_at_its_end(loses: str) -> None:
    with served() as server:
        assert server.chat().status_code == 200
        pool = server.engine.pool
        if loses == "slot":
            pool._free_slots.pop()
        else:
            pool.reserve(pool.new_sequence(), 1)
        server.call(server.running.end)
        server.thread.join(100)
        says = "slots were lost" if loses == "slot" else "1 KV pages are still held"
        assert (server.service.worker.failure or "").startswith(
            f"the model has stopped: pages, slots or requests were lost: {says}"
        )
