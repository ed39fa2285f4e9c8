"""The page at the server itself, whose model is scripted: what both sides take for granted of each other."""

from __future__ import annotations

from typing import Any

from browser import Page
from serving import MODEL, served

KEY = "0123456789abcdef"
SLOW = 0.02  # seconds a step


def test_chatting_stopping_and_draining(driver: Any) -> None:
    with served("A *long* answer. " * 20 + "<eos>") as server:
        page = Page(driver, server.address + "/")
        page.wait(lambda: page.text("#model") == MODEL)
        assert page.ask_and_wait("Hello?").startswith("A long answer. A long")
        assert page.text(".status").startswith("341 tokens · ")  # its end is one

        server.engine.seconds = SLOW
        page.ask("And more?")
        page.wait(lambda: "1 running" in page.text("#meter"))
        assert "of memory bandwidth" in page.text("#meter")
        page.button("Stop").click()
        page.wait(lambda: page.is_done)
        server.until_empty()

        page.button("Retry").click()
        page.wait(lambda: not page.is_done and "A long" in page.answer)
        server.call(server.running.end)
        server.until(lambda: server.service.is_draining)
        server.engine.seconds = 0.0
        page.wait(lambda: page.is_done)
        assert page.answer.count("A long answer.") == 20  # what had begun was finished
        server.thread.join(100)
        page.ask_and_wait("Still there?")
        assert page.text(".failure .why") == "The server cannot be reached; the conversation is kept."
        assert page.complaints() == []


def test_keys_and_refusals(driver: Any) -> None:
    with served(keys=(KEY,), context=200) as server:
        page = Page(driver, server.address + "/")  # the page itself needs no key
        page.ask_and_wait("Hello?")
        assert page.text(".failure .why") == "The server wants a valid API key."
        page.button("Enter the API key").click()
        page.find("[name=key]").send_keys(KEY, "\n")
        page.wait(lambda: page.text("#model") == MODEL)
        page.button("Retry").click()
        page.wait(lambda: page.answer == "Paris.")
        page.ask_and_wait("long " * 60)
        assert page.text(".failure .why").startswith("The server refused the request: messages has ")
        assert page.complaints() == []
