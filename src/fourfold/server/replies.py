"""Replies outside of routes, and server-sent events that end when the client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fourfold.server.errors import ApiError, failed
from fourfold.server.worker import Job, JobFailed

# For the OpenAPI document, beside the JSON: the same answer as events, each an object of OpenAI's behind "data: ".
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


async def send_error(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """An error as a whole response; the connection ends with it, since a body may be half read."""
    headers = {**(error.headers or {}), "Connection": "close"}
    await JSONResponse(error.body(), error.status_code, headers=headers)(scope, receive, send)


@asynccontextmanager
async def closing_with_client(job: Job, receive: Receive) -> AsyncIterator[None]:
    """The job is closed at the end of the block, or as soon as the client hangs up."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        job.close()


def as_json(value: BaseModel) -> str:
    """OpenAI's JSON: fields that were not set stay out."""
    return value.model_dump_json(exclude_unset=True)


class JsonReply(Response):
    """One of OpenAI's objects."""

    media_type = "application/json"

    def __init__(self, value: BaseModel) -> None:
        super().__init__(as_json(value))


class EventStream(Response):
    """A job's events as they come, then [DONE]; an error in their midst is the last event, without [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[BaseModel], job: Job) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # of nginx, which would collect events
        self._events, self._job = events, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: str, more: bool = True) -> None:
            body = f"data: {data}\n\n".encode() if data else b""
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async with closing_with_client(self._job, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await write(as_json(event))
                if self._job.is_finished:
                    await write("[DONE]")
            except JobFailed as error:
                await write(json.dumps(failed(error).body(), ensure_ascii=False))
            await write("", more=False)
