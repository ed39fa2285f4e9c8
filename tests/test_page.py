"""The page at `/` as people use it, in headless Chromium: chat, keys, languages, themes, reloads, hostile answers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from browser import Page
from fake_chat_server import FakeChat

ESCAPE, ENTER, TAB, SHIFT = "\ue00c", "\ue007", "\ue004", "\ue008"
HOSTILE = """<script>document.title = 'taken'</script>
<img src=x onerror="document.title = 'taken'">
[a](javascript:document.title='taken') [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) [d](//evil.example)
![pixel](http://evil.example/p.png) <a href="javascript:alert(1)">e</a> `<b>` **<i>x</i>**

| <iframe src=x> | b |
|---|---|
| <svg onload=alert(1)> | [f](vbscript:x) |

```html"><img src=x onerror=alert(1)>
</code></pre><script>document.title = 'taken'</script>
```
"""


def test_an_answer_is_seen_while_it_comes(page: Page, chat: FakeChat) -> None:
    more = threading.Event()
    chat.answers = [["One, ", "**two**", more, ", three."]]
    chat.stats |= {"tokens_per_second": 38.24, "bandwidth_share": 0.71, "running": 1}
    page.ask("Count.")
    page.wait(lambda: page.answer == "One, two")
    assert page.script("return document.querySelector('[data-role=assistant] strong').innerText") == "two"
    assert not page.is_done
    more.set()
    page.wait(lambda: page.is_done)
    assert page.answer == "One, two, three."
    assert page.text(".status").startswith("3 tokens · ")
    assert "tokens/s · first after" in page.text(".status")
    page.wait(lambda: page.text("#meter").split("\n")[-1] == "1 running, 0 waiting")
    assert "38.2 tokens/s" in page.text("#meter")
    assert "71\u00a0% of memory bandwidth" in page.text("#meter")
    _, body = chat.requests[0]
    assert body == {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_what_came_and_hangs_up(page: Page, chat: FakeChat, how: str) -> None:
    chat.answers = [["The beginning", threading.Event()], ["All of it."]]
    page.ask("Go on for ever.")
    page.wait(lambda: page.answer == "The beginning")
    if how == "button":
        page.button("Stop").click()
    else:
        page.keys(ESCAPE)
    page.wait(lambda: page.is_done)
    assert chat.hung_up.wait(60)
    assert page.answer == "The beginning"
    assert page.text(".status").startswith("Stopped · ≈ 1")
    page.button("Retry").click()
    page.wait(lambda: page.answer == "All of it.")
    assert chat.requests[1][1]["messages"] == chat.requests[0][1]["messages"]


def test_settings_are_sent_and_kept(page: Page, chat: FakeChat) -> None:
    page.button("Settings").click()
    page.keys("Be brief.")
    values = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "0", "key": "secret"}
    for name, value in values.items():
        page.find(f"[name={name}]").send_keys(value)
    page.keys(ESCAPE)
    page.wait(lambda: page.focus == "draft")
    page.ask_and_wait("Hello?")
    page.open()
    page.ask_and_wait("Again?")
    for headers, body in chat.requests:
        assert headers["Authorization"] == "Bearer secret"
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert {name: body[name] for name in values if name != "key"} == {
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 64,
            "seed": 0,
        }
    assert page.script("return Object.keys(localStorage).length") == 0  # the key least of all


def test_a_value_out_of_range_does_not_leave_the_sheet(page: Page) -> None:
    page.button("Settings").click()
    page.find("[name=temperature]").send_keys("3")
    page.button("Done").click()
    assert page.script("return document.getElementById('settings').open")
    assert page.focus == "temperature"


def test_one_of_several_models_is_chosen(page: Page, chat: FakeChat) -> None:
    chat.models = ["small", "large"]
    page.open()
    page.wait(lambda: page.text("#model") == "small")
    page.button("Settings").click()
    page.find("[name=model]").send_keys("large")
    page.button("Done").click()
    page.wait(lambda: page.text("#model") == "large")
    page.ask_and_wait("Which one?")
    assert chat.requests[0][1]["model"] == "large"


def test_all_of_it_by_keyboard(page: Page, chat: FakeChat) -> None:
    assert page.focus == "draft"
    page.find("#draft").send_keys("One line", SHIFT + ENTER)  # held
    page.keys("another")
    assert chat.requests == []
    page.keys(ENTER)
    page.wait(lambda: page.is_done and page.answer == "Hello.")
    assert chat.requests[0][1]["messages"][0]["content"] == "One line\nanother"
    page.keys(TAB)  # past the last: a send button with nothing to send is passed over
    assert page.script("return document.activeElement === document.body")
    seen = []
    for _ in range(9):
        page.keys(TAB)
        seen.append(page.focus)
        outline = page.script(
            "const e = document.activeElement; const on = s => s.outlineStyle !== 'none' || s.boxShadow !== 'none';"
            "return on(getComputedStyle(e)) || on(getComputedStyle(e.parentElement))"
        )
        assert outline, f"the focus on {seen[-1]} is not seen"
    assert seen == ["new-chat", "open-settings", "theme", "language", "scroll", "Edit", "Copy", "Copy", "Retry"]
    page.keys(TAB)
    assert page.focus == "draft"


def test_enter_that_ends_a_composition_sends_nothing(page: Page, chat: FakeChat) -> None:
    page.emulate("Input.imeSetComposition", text="nihao", selectionStart=5, selectionEnd=5)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    page.emulate("Input.dispatchKeyEvent", type="keyDown", **enter)
    page.emulate("Input.dispatchKeyEvent", type="rawKeyDown", **(enter | {"windowsVirtualKeyCode": 229}))
    page.emulate("Input.insertText", text="你好")
    assert page.script("return document.getElementById('draft').value") == "你好"
    assert chat.requests == []
    page.keys(ENTER)
    page.wait(lambda: page.is_done and page.answer == "Hello.")
    assert chat.requests[0][1]["messages"][-1]["content"] == "你好"


def test_two_languages(page: Page, chat: FakeChat) -> None:
    chat.answers = [["```py\nx = 1\n```\n"]]
    page.ask_and_wait("Hello?")
    page.button("中文").click()
    assert page.text(".code-head button") == "复制"
    assert page.find(".code-head button").get_attribute("aria-label") == "复制代码"
    assert page.script("return document.documentElement.lang") == "zh-CN"
    assert page.find("#draft").get_attribute("placeholder") == "输入消息"
    assert "个词元" in page.text(".status")
    assert page.button("重试").is_displayed()
    page.open()
    assert page.button("English").is_displayed()  # remembered
    page.button("English").click()
    assert page.text(".acts button") == "Retry"


def test_the_browsers_language_is_taken(page: Page) -> None:
    page.emulate("Network.setUserAgentOverride", userAgent="tests", acceptLanguage="zh-CN,zh")
    try:
        page.open()
        assert page.text("#empty h2") == "有什么可以帮您？"
    finally:
        page.emulate("Network.setUserAgentOverride", userAgent="", acceptLanguage="en-US")


def test_light_and_dark(page: Page) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    page.open()
    light = page.script(paper)
    page.prefer("dark")
    page.wait(lambda: page.script(paper) != light)  # follows the system
    dark = page.script(paper)
    page.button("Light or dark").click()
    assert page.script(paper) == light
    page.open()
    assert page.script(paper) == light  # remembered
    page.button("Light or dark").click()
    assert page.script(paper) == dark
    assert page.script("return localStorage.length") == 0  # as the system has it: followed again


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast(page: Page, theme: str) -> None:
    page.prefer(theme)
    page.open()
    names = ["paper", "raised", "tint", "ink", "muted", "accent", "on-accent", "danger", "danger-tint", "edge"]
    code = "return arguments[0].map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n))"
    color = {name: _luminance(value.strip()) for name, value in zip(names, page.script(code, names), strict=True)}
    pairs = [(front, back) for front in ("ink", "muted", "accent", "danger") for back in ("paper", "raised")]
    pairs += [("ink", "tint"), ("muted", "tint"), ("on-accent", "accent"), ("danger", "danger-tint")]
    for front, back in pairs:
        assert _contrast(color[front], color[back]) >= 4.5, f"{front} on {back}"  # WCAG 2.2, 1.4.3
    assert _contrast(color["edge"], color["paper"]) >= 3  # 1.4.11


def _luminance(value: str) -> float:
    """Relative luminance as WCAG defines it, of #rrggbb."""
    parts = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_what_was_typed_survives_a_reload(page: Page, chat: FakeChat) -> None:
    page.ask_and_wait("First question")
    page.keys("half a thou")
    page.open()
    assert page.find("#draft").get_attribute("value") == "half a thou"
    assert page.answer == "Hello."
    page.button("Edit").click()
    page.keys(" and more")
    page.open()
    assert page.find(".edit").get_attribute("value") == "First question and more"
    page.find(".edit").send_keys(ENTER)
    page.wait(lambda: page.is_done and len(chat.requests) == 2)
    assert chat.requests[1][1]["messages"] == [{"role": "user", "content": "First question and more"}]
    assert page.find("#draft").get_attribute("value") == "half a thou"


def test_a_new_chat_can_be_taken_back(page: Page, chat: FakeChat) -> None:
    chat.answers = [["Begun", threading.Event()]]
    page.ask("Question")
    page.wait(lambda: page.answer == "Begun")
    page.button("New chat").click()
    page.wait(lambda: page.is_done)
    assert page.text("#empty h2") == "What can I help with?"
    page.open()
    page.button("Back to the previous chat").click()
    assert page.answer == "Begun"
    assert page.text('[data-role="user"] > .body') == "Question"


def test_hostile_answers_are_text(page: Page, chat: FakeChat) -> None:
    chat.answers = [[HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]]
    answer = page.ask_and_wait("Attack me.")
    assert "<script>document.title = 'taken'</script>" in answer
    assert all(text in answer for text in ("<img src=x onerror", "[a](javascript:", "<iframe src=x>"))
    body = "document.querySelector('[data-role=assistant] > .body')"
    assert (
        page.script(f"return {body}.querySelectorAll('script, img, iframe, svg, b, i, [onerror], [onload]').length")
        == 0
    )
    assert page.script(f"return [...{body}.querySelectorAll('a')].map(a => a.href)") == ["http://evil.example/p.png"]
    assert page.script("return document.title") != "taken"
    page.open()  # and from storage
    assert page.answer == answer


MARKS = ("[", "*", "`a", "**a _b ", "> ", "- ", "|", "![](", "h", " #", "\\")


def test_marks_without_end_do_not_hang_it(page: Page, chat: FakeChat) -> None:
    chat.answers = [["\n\n".join(mark * 8000 for mark in MARKS) + "\n\nThe end."]]
    assert page.ask_and_wait("Attack me.").endswith("The end.")


def test_a_long_answer_is_drawn_as_it_grows_not_anew(page: Page, chat: FakeChat) -> None:
    go_on = threading.Event()
    paragraphs = [f"Paragraph {n} of *many*, with some twenty tokens of which none says much.\n\n" for n in range(500)]
    code = ["```c\n", *(f"int line_{n} = {n};\n" for n in range(500)), "```\n"]
    chat.answers = [["The first.\n\nThe second.\n\n", go_on, *paragraphs, *code]]
    page.ask("Write a book.")
    page.wait(lambda: "second" in page.answer)
    page.script(
        "const body = document.querySelector('[data-role=assistant] > .body');"
        "window.first = body.firstChild; window.added = 0;"
        "new MutationObserver(list => list.forEach(m => added += m.addedNodes.length)).observe(body, {childList: true})"
    )
    go_on.set()
    page.wait(lambda: page.is_done, seconds=20)
    assert page.script("return first === document.querySelector('[data-role=assistant] > .body').firstChild")
    assert page.answer.count("Paragraph") == 500
    assert page.text(".code pre").count("\n") == 499
    assert page.script("return added") < 2500  # a few for each block; drawn anew it would be some hundred thousand


def test_narrow_and_wide_nothing_but_code_scrolls_sideways(page: Page, chat: FakeChat) -> None:
    table = "| a | b |\n|-|-|\n| " + "y " * 300 + "| 1 |\n"
    chat.answers = [["```\n" + "long " * 200 + "\n```\n\n" + "x" * 500 + "\n\n" + table]]
    page.ask_and_wait("w" * 300)
    scrolls = "return [...document.querySelectorAll(arguments[0])].some(e => e.scrollWidth > e.clientWidth)"
    for width in (320, 1200):
        size = {"width": width, "height": 640, "deviceScaleFactor": 1, "mobile": width < 400}
        page.emulate("Emulation.setDeviceMetricsOverride", **size)
        assert not page.script(scrolls, "body, #scroll, #messages, .body, .composer")
        assert page.script(scrolls, "pre")


def test_copying(page: Page, chat: FakeChat) -> None:
    chat.answers = [["```py\nx = 1\ny = 2\n```\n\nThat is *all*."]]
    page.emulate("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.ask_and_wait("Code?")

    def pasted() -> str:
        return str(page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))

    page.button("Copy the code").click()
    page.wait(lambda: page.text(".code-head button") == "Copied")
    assert pasted() == "x = 1\ny = 2"
    page.button("Copy").click()
    page.wait(lambda: page.text(".acts button").startswith("Copied") or pasted() == chat.answers[0][0])
    assert pasted() == chat.answers[0][0]


def test_a_screenshot_shows_something(page: Page, chat: FakeChat, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    chat.answers = [["Some **text** and\n\n```py\nx = 1\n```\n"]]
    page.ask_and_wait("你好, draw something")
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        file = tmp_path / f"{scheme}.png"
        assert page.driver.save_screenshot(str(file))
        grey = imread(file)[..., :3].mean(axis=2)
        background = np.median(grey)
        assert (background > 0.9) if scheme == "light" else (background < 0.2)
        assert 0.005 < (abs(grey - background) > 0.4).mean() < 0.2  # text, and not a page full of it
