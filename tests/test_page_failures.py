"""The page when the server goes away, is full, ends, or refuses: one sentence, a way on, and nothing lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from browser import Page
from fake_chat_server import Cut, End, FakeChat, Refusal

UNREACHABLE = "The server cannot be reached; the conversation is kept."
LOST = "The connection was lost in the middle of the answer."


def failure(page: Page) -> str:
    return page.text(".failure .why")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Refusal(400, "this prompt is too long"), "The server refused the request: this prompt is too long"),
        (Refusal(429), "The server is full at the moment."),
        (Refusal(503), "The server is starting or shutting down; try again in a moment."),
        (Refusal(500, "a rank died"), "The server failed: a rank died"),
        (["Some", Refusal(500, "a rank died")], "The server failed: a rank died"),
        (["Some", 0.2, Cut], LOST),
        (["Some", End], LOST),
        ([Cut], LOST),
    ],
    ids=["refused", "busy", "draining", "failed", "failed later", "cut", "ended early", "cut at once"],
)
def test_a_failure_is_one_sentence_and_can_be_retried(page: Page, chat: FakeChat, answer: Any, sentence: str) -> None:
    chat.answers = [answer, ["At last."]]
    came = page.ask_and_wait("Please?")
    assert failure(page) == sentence
    assert came == ("Some" if isinstance(answer, list) and answer[0] == "Some" else "")
    assert page.find(".failure").get_attribute("role") == "alert"
    page.button("Retry").click()
    page.wait(lambda: page.answer == "At last.")
    assert failure(page) == ""
    assert chat.requests[0][1]["messages"] == chat.requests[1][1]["messages"]
    assert page.focus == "draft"


def test_a_server_that_is_gone_and_comes_back(page: Page, chat: FakeChat) -> None:
    chat.stop()
    try:
        page.ask_and_wait("Anybody there?")
        assert failure(page) == UNREACHABLE
        page.wait(lambda: page.text("#meter") == "Server not reached")
    finally:
        chat.start()
    page.button("Retry").click()
    page.wait(lambda: page.answer == "Hello.")
    page.wait(lambda: page.text("#meter") == "Idle")


def test_a_server_that_goes_away_in_the_middle(page: Page, chat: FakeChat) -> None:
    chat.answers = [["Half of", 0.2, Cut], ["all of it"]]
    page.ask("Tell me.")
    page.wait(lambda: page.answer == "Half of")
    chat.stop()
    try:
        page.wait(lambda: failure(page) == LOST)
        page.keys("my next thought")
    finally:
        chat.start()
    page.open()
    assert failure(page) == LOST
    assert (page.answer, page.find("#draft").get_attribute("value")) == ("Half of", "my next thought")
    page.button("Retry").click()
    page.wait(lambda: page.answer == "all of it")


def test_a_reload_in_the_middle_keeps_what_came(page: Page, chat: FakeChat) -> None:
    chat.answers = [["Half of", threading.Event()]]
    page.ask("Tell me.")
    page.wait(lambda: page.answer == "Half of")
    page.open()
    assert page.answer == "Half of"
    assert failure(page) == "The answer was interrupted when the page was left."
    assert chat.hung_up.wait(60)


def test_seconds_that_a_full_server_names_are_counted(page: Page, chat: FakeChat) -> None:
    chat.answers = [Refusal(429, headers={"Retry-After": "2"}), Refusal(503, headers={"Retry-After": "40"}), ["Now."]]
    page.ask_and_wait("Me?")
    assert failure(page) == "The server is full; it asks to try again in 2\u00a0s."
    page.wait(lambda: failure(page) == "The server is full at the moment.")
    page.button("Retry").click()
    page.wait(lambda: failure(page) == "The server is starting or shutting down; it asks to try again in 40\u00a0s.")
    page.button("中文").click()
    assert "秒后重试" in failure(page)
    page.button("重试").click()
    page.wait(lambda: page.answer == "Now.")


@pytest.mark.parametrize("wrong", ["wrong", "密钥"])  # the second: what no header can carry
def test_a_key_is_asked_for(page: Page, chat: FakeChat, wrong: str) -> None:
    chat.key = "right"
    page.open()
    page.wait(lambda: page.text("#meter") == "")
    page.ask_and_wait("Let me in.")
    assert failure(page) == "The server wants a valid API key."
    for key in (wrong, "right"):
        page.button("Enter the API key").click()
        assert page.focus == "key"
        page.find("[name=key]").clear()
        page.find("[name=key]").send_keys(key, "\n")
        page.wait(lambda: page.focus == "draft")
        page.button("Retry").click()
        page.wait(lambda: page.is_done)
    page.wait(lambda: page.answer == "Hello.")
    page.wait(lambda: page.text("#model") == "smollm2-135m")


def test_a_conversation_that_the_browser_cannot_keep_goes_on(page: Page, chat: FakeChat) -> None:
    page.script("sessionStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 200))")
    chat.answers = [["word " * 100]]
    assert page.ask_and_wait("Long?").startswith("word word")
    assert page.text("#not-kept") == "The browser does not keep this conversation: it is lost when the page closes."


def test_what_storage_holds_is_not_trusted(page: Page) -> None:
    for value in ("[1, {}, null]", "{", '[{"role": "user"}]', '{"length": 3}', '"x"'):
        page.script("sessionStorage.setItem('fourfold.messages', arguments[0])", value)
        page.open()
        assert page.text("#empty h2") == "What can I help with?"
