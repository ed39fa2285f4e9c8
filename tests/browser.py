"""Headless Chromium for tests of the page, and the words to say what a person does in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM, DRIVER = "chromium", "chromedriver"
SECONDS = 8.0  # that anything may take to be seen


def missing() -> str | None:
    """What keeps a browser from being started here, in words; None where nothing does."""
    for program in (CHROMIUM, DRIVER):
        if not shutil.which(program):
            return f"{program} is not installed: `make browser` installs it"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: it is among the dev dependencies"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver of Debian's Chromium; nothing is downloaded, and nothing but tests' servers is asked."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which(CHROMIUM) or CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",  # needs namespaces that containers do not give; the pages are our own
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--lang=en-US",
        "--window-size=1200,800",
        "--force-device-scale-factor=1",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(executable_path=shutil.which(DRIVER)))
    driver.set_script_timeout(110)  # on a machine that stands still; below what selenium gives its own connection
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at `url`, as a person meets it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        self.open()

    def open(self) -> None:
        """Also again: what a reload does. Returns once the page answers keys."""
        self.driver.get(self.url)
        self.wait(lambda: self.script("return document.activeElement?.id") == "draft")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """What `condition` gives, once it gives something true; AssertionError where it does not.

        A machine that stands still meanwhile is not held against the page: a look counts as 0.25 s at most.
        """
        waited = 0.0
        while True:
            began = time.monotonic()
            if value := condition():
                return value
            assert waited < seconds, f"waited {seconds} s in vain; the page says: {self.text('body')!r}"
            time.sleep(0.01)
            waited += min(0.25, time.monotonic() - began)

    def text(self, selector: str) -> str:
        """As it is seen, of the last element that the selector finds; empty where none is shown."""
        code = (
            "const e = [...document.querySelectorAll(arguments[0])].at(-1);"
            "return e?.getClientRects().length ? e.innerText : ''"
        )
        return str(self.script(code, selector)).strip()

    def find(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)[-1]

    def button(self, words: str) -> Any:
        """The last button that is seen with these words, or with them as its label."""
        code = (
            "return [...document.querySelectorAll('button')].filter(b => b.offsetParent &&"
            " [b.innerText.trim(), b.ariaLabel].includes(arguments[0])).at(-1)"
        )
        return self.wait(lambda: self.script(code, words))

    def keys(self, *keys: str) -> None:
        """Types them, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def ask(self, text: str) -> None:
        self.find("#draft").send_keys(text, "\n")

    @property
    def answer(self) -> str:
        """The last answer's text."""
        return self.text('[data-role="assistant"] > .body')

    @property
    def focus(self) -> str:
        """Id of what has the focus, or its words."""
        code = "const e = document.activeElement; return e.id || e.name || e.innerText.trim() || e.tagName"
        return str(self.script(code))

    @property
    def is_done(self) -> bool:
        return bool(self.script("return document.getElementById('send').dataset.mode === 'send'"))

    def ask_and_wait(self, text: str) -> str:
        n_before = self.script("return document.querySelectorAll('.message').length")
        self.ask(text)
        self.wait(lambda: self.script("return document.querySelectorAll('.message').length") == n_before + 2)
        self.wait(lambda: self.is_done)
        return self.answer

    def emulate(self, command: str, **parameters: Any) -> None:
        """A command of Chromium's debugging protocol."""
        self.driver.execute_cdp_cmd(command, parameters)

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`, as the system would."""
        self.emulate("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def complaints(self) -> list[str]:
        """What the console holds against the page's own code: violated policy, uncaught errors. Empties the console."""
        messages = [str(entry["message"]) for entry in self.driver.get_log("browser")]
        return [m for m in messages if "Failed to load resource" not in m and "net::ERR" not in m]
