"""The Chinese pages are kept in step with the English ones: the same sections, commands, links and figures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/serving.md")


def _both(page: str) -> tuple[str, str]:
    english = ROOT / page
    return english.read_text(encoding="utf-8"), english.with_suffix(".zh.md").read_text(encoding="utf-8")


def _blocks(text: str) -> list[str]:
    """What stands between fences, without its comments."""
    return [re.sub(r" +# .*", "", block) for block in re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)]


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _rows(text: str) -> list[list[str]]:
    """The figures of each row of each table."""
    return [sorted(re.findall(r"\d[\d.,]*\d|\d", line)) for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", PAGES)
def test_the_two_say_the_same(page: str) -> None:
    english, chinese = _both(page)
    assert _blocks(chinese) == _blocks(english), "commands differ"
    english, chinese = _prose(english), _prose(chinese)
    code = [Counter(" ".join(c.split()) for c in re.findall(r"`([^`]+)`", text)) for text in (chinese, english)]
    assert code[0] == code[1], "what stands in `code` differs"
    links = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in (chinese, english)]
    assert [link.replace(".zh.md", ".md") for link in links[0]] == [link.replace(".zh.md", ".md") for link in links[1]]
    levels = [re.findall(r"^#+", text, re.MULTILINE) for text in (chinese, english)]
    assert levels[0] == levels[1], "sections differ"
    for ours, theirs in zip(_rows(chinese), _rows(english), strict=True):
        assert ours == theirs, "a table's figures differ"


@pytest.mark.parametrize("page", [name for page in PAGES for name in (page, page.replace(".md", ".zh.md"))])
def test_what_is_linked_to_is_there(page: str) -> None:
    file = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / link).exists(), f"{page} links to {link}"
