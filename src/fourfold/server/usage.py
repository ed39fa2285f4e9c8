"""How many tokens a request took."""

from __future__ import annotations

from fourfold.server.responses import PromptTokensDetails, Usage
from fourfold.server.worker import Job


def usage_of(job: Job, answers_each: int) -> Usage:
    """Of a job whose texts are `answers_each` to a prompt, one behind the other. A prompt counts once."""
    firsts = job.generations[::answers_each]
    prompt = sum(g.prompt_tokens for g in firsts)
    completion = sum(g.completion_tokens for g in job.generations)
    cached = PromptTokensDetails(cached_tokens=sum(g.cached_tokens for g in firsts))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=cached,
    )
