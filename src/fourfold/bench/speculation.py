"""What drafting saves: the same texts with and without it, turn by turn."""

from __future__ import annotations

from typing import Any

from fourfold.bench.limits import check_counts, spread
from fourfold.errors import RuntimeFailure, UserError
from fourfold.generation import Generation
from fourfold.llm import LLM
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.steploop import StepLoop

CODE = '''def total(orders):
    """Sum of all paid orders."""
    result = 0
    for order in orders:
        if order.is_paid:
            result = result + order.amount
    return result


def average(orders):
    """Mean amount of all paid orders."""
    paid = [order for order in orders if order.is_paid]
    if not paid:
        return 0
    return total(paid) / len(paid)


def largest(orders):
    """The paid order with the largest amount."""
    paid = [order for order in orders if order.is_paid]
    return max(paid, key=lambda order: order.amount)
'''
RECORDS = "\n".join(
    f"{i}. name: {name}; city: {city}; born: {year}; member: {member}"
    for i, (name, city, year, member) in enumerate(
        [
            ("Ada Berg", "Oslo", 1971, "yes"),
            ("Ben Cho", "Seoul", 1983, "no"),
            ("Carla Diaz", "Lima", 1990, "yes"),
            ("Dmitri Egorov", "Perm", 1966, "yes"),
            ("Emma Frank", "Bonn", 1979, "no"),
            ("Farid Ghani", "Herat", 1988, "yes"),
        ],
        1,
    )
)
# Texts by what is known of them beforehand: the answer repeats the question, or it does not (sampled, so that a small
# model does not fall into repeating itself).
REPEATS = {
    "code editing": f"Rewrite this Python file with `largest` renamed to `most`.\n```python\n{CODE}```",
    "extraction": f"Copy all records, line by line, exactly as they are:\n{RECORDS}",
}
PLAIN = {
    "story": "Tell me a story about a lighthouse keeper who finds a letter in a bottle.",
    "advice": "How do I plan a vegetable garden for a small family?",
}


def speculate(
    *,
    model: str = "smollm2",
    format: str | None = None,
    threads: int | None = None,
    ranks: int | None = None,
    draft: str | None = None,
    tokens: int = 200,
    repeats: int = 5,
) -> dict[str, Any]:
    """Tokens/s of each text with drafts over tokens/s without; drafts by look-up, or by the model `draft`.

    Raises RuntimeFailure where drafts changed a text.
    """
    check_counts(tokens=tokens, repeats=repeats, ranks=ranks, threads=threads)
    with LLM(model, format=format, threads=threads, ranks=ranks, draft=draft) as llm:
        rows = [_compare(llm, name, ask, greedy, tokens, repeats) for name, ask, greedy in _texts()]
        facts = llm.describe()
    return {
        "bench": "speculate",
        "model": model,
        "draft": draft or "look-up",
        **{name: facts[name] for name in ("format", "kv", "isa", "ranks", "threads")},
        "tokens": tokens,
        "repeats": repeats,
        "rows": rows,
        "limits": {},
        "notes": ["Ratio: tokens/s with drafts over tokens/s without, of the same text; decoding alone."],
    }


def _texts() -> list[tuple[str, str, bool]]:
    return [(n, t, True) for n, t in REPEATS.items()] + [(n, t, False) for n, t in PLAIN.items()]


def _compare(llm: LLM, name: str, ask: str, greedy: bool, tokens: int, repeats: int) -> dict[str, Any]:
    if llm.chat_template is None:
        raise UserError("this benchmark asks questions, and the model has no chat template: choose another model")
    prompt = tuple(
        llm.tokenizer.encode(llm.chat_template.render([{"role": "user", "content": ask}]), add_special_tokens=False)
    )
    rates: dict[bool, list[float]] = {False: [], True: []}
    drafted = accepted = 0
    for seed in range(repeats):
        params = SamplingParams(max_tokens=tokens, temperature=0.0 if greedy else 0.8, seed=seed, ignore_eos=True)
        texts = []
        for speculates in (False, True):
            loop = llm.new_loop(speculates=speculates)
            g = _run(loop, Request(prompt, params))
            rates[speculates].append((g.completion_tokens - 1) / g.decode_seconds)
            texts.append(g.ids)
            stats = loop.stats()
            drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
        if texts[0] != texts[1]:
            raise RuntimeFailure(f"drafts changed the text of {name!r}: no figures of a wrong result")
    ratios = [with_drafts / without for without, with_drafts in zip(rates[False], rates[True], strict=True)]
    return {
        "text": name,
        "repeats_itself": greedy,
        "tokens_per_s": spread(rates[True]),
        "tokens_per_s_without": spread(rates[False]),
        "ratio": spread(ratios),
        "drafted": drafted,
        "accepted": accepted,
    }


def _run(loop: StepLoop, request: Request) -> Generation:
    generation = loop.add(request)
    while not loop.is_idle:
        loop.step()
    return generation
