"""The same requests without a server, all there from the start: what the model can do at most."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from fourfold import LLM, SamplingParams
from fourfold.request import Request
from fourfold.scheduler import Limits
from load.traffic import Ask


def tokens_per_second(llm: LLM, asks: Sequence[Ask], n_running: int, *, speculates: bool) -> float:
    """Generated tokens a second over all requests, so many at a time."""
    loop = llm.new_loop(Limits(max_running=n_running, max_waiting=len(asks)), speculates=speculates)
    texts = [loop.add(Request(tuple(a.prompt), SamplingParams(max_tokens=a.n_tokens, ignore_eos=True))) for a in asks]
    began = perf_counter()
    while not loop.is_idle:
        loop.step()
    seconds = perf_counter() - began
    loop.check_integrity()
    llm.engine.pool.forget()
    return sum(text.completion_tokens for text in texts) / seconds
