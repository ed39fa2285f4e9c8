"""So many clients at a time, each sending one request after another and reading its stream to the end, or leaving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

from load.traffic import Ask


@dataclass
class Record:
    """What one client saw of one request; seconds since it was sent."""

    prompt_tokens: int
    first: float | None = None  # the first token
    last: float = 0.0
    tokens: int = 0  # of a client that left, the events that it read
    left: bool = False  # hung up
    error: str | None = None


async def drive(url: str, model: str, asks: Sequence[Ask], n_clients: int) -> tuple[list[Record], float]:
    """Records of all requests in the order of sending, and the seconds that all took."""
    queue: Iterator[Ask] = iter(asks)
    records: list[Record] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def client() -> None:
            for ask in queue:
                await asyncio.sleep(ask.think_seconds)
                record = Record(len(ask.prompt))
                records.append(record)
                await _request(session, url, model, ask, record)

        began = perf_counter()
        await asyncio.gather(*(client() for _ in range(n_clients)))
        return records, perf_counter() - began


async def _request(session: aiohttp.ClientSession, url: str, model: str, ask: Ask, record: Record) -> None:
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.n_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = perf_counter()
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text())[:200]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _note(record, json.loads(line[6:]), perf_counter() - sent)
                if record.error or (ask.leaves_after is not None and record.tokens > ask.leaves_after):
                    record.left = not record.error
                    response.close()
                    return
    except aiohttp.ClientError as error:
        record.error = f"{type(error).__name__}: {error}"


def _note(record: Record, event: dict[str, Any], seconds: float) -> None:
    """An event of the stream came: a step's text, at the end how many tokens there were, or what went wrong."""
    if "error" in event:
        record.error = event["error"]["message"]
    elif event["choices"]:
        record.first = seconds if record.first is None else record.first
        record.last = seconds
        record.tokens += 1
    else:
        record.tokens = event["usage"]["completion_tokens"]
