"""What drafting saves: the same texts with and without it, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
# Answers that repeat their question, as a capable model would give them. They are prescribed, id by id, since a small
# model gets lost: what is measured is the time of a text, not who thought of it.
REPEATS = {
    "code editing": (
        f"Rewrite this Python file with `largest` renamed to `most`.\n```python\n{CODE}```",
        f"```python\n{CODE.replace('def largest', 'def most')}```",
    ),
    "extraction": (
        f"Copy the records of all members.\n{RECORDS}",
        "\n".join(line for line in RECORDS.splitlines() if line.endswith("yes")),
    ),
}
# Answers that do not, sampled, so that a small model does not fall into repeating itself.
PLAIN = {
    "story": "Tell me a story about a lighthouse keeper who finds a letter in a bottle.",
    "advice": "How do I plan a vegetable garden for a small family?",
}


class Prescribed:
    """A `Grammar` that allows one text alone."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._ids, self._at, self._allowed = ids, 0, np.zeros(vocab_size, np.bool_)

    def mask(self) -> NDArray[np.bool_]:
        """The next id."""
        self._allowed[:] = False
        self._allowed[self._ids[self._at]] = True
        return self._allowed

    def accept(self, token_id: int) -> None:
        """It was sampled."""
        self._at += 1


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
        rows = [_compare(llm, name, ask, answer, tokens, repeats) for name, (ask, answer) in REPEATS.items()]
        rows += [_compare(llm, name, ask, None, tokens, repeats) for name, ask in PLAIN.items()]
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
        "notes": [
            "Ratio: tokens/s with drafts over tokens/s without, of the same text; decoding alone.",
            "Code editing and extraction follow a prescribed answer; the others are sampled at temperature 0.8.",
        ],
    }


def _compare(llm: LLM, name: str, ask: str, answer: str | None, tokens: int, repeats: int) -> dict[str, Any]:
    if llm.chat_template is None:
        raise UserError("this benchmark asks questions, and the model has no chat template: choose another model")
    rendered = llm.chat_template.render([{"role": "user", "content": ask}])
    prompt = tuple(llm.tokenizer.encode(rendered, add_special_tokens=False))
    ids = llm.tokenizer.encode(answer, add_special_tokens=False)[:tokens] if answer else []
    rates: dict[bool, list[float]] = {False: [], True: []}
    drafted = accepted = 0
    for seed in range(repeats):
        params = SamplingParams(max_tokens=len(ids) or tokens, temperature=0.0 if ids else 0.8, seed=seed)
        texts = []
        for speculates in (False, True):
            loop = llm.new_loop(speculates=speculates)
            g = _run(loop, Request(prompt, params, Prescribed(ids, llm.tokenizer.vocab_size) if ids else None))
            rates[speculates].append((g.completion_tokens - 1) / g.decode_seconds)
            texts.append(g.ids)
            stats = loop.stats()
            drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
        if texts[0] != texts[1]:
            raise RuntimeFailure(f"drafts changed the text of {name!r}: no figures of a wrong result")
    ratios = [with_drafts / without for without, with_drafts in zip(rates[False], rates[True], strict=True)]
    return {
        "text": name,
        "prescribed": answer is not None,
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
