"""What the page is made of: no build step, nothing from elsewhere, two whole languages, and all of it in the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "src" / "fourfold" / "server" / "static"
FILES = sorted(STATIC.iterdir())
MAX_LINES = 450  # as test_house.py has it for the rest


def _strings(language: str) -> dict[str, str]:
    table = re.search(rf"const {language} = {{(.*?)\n}};", (STATIC / "strings.js").read_text(encoding="utf-8"), re.S)
    assert table
    return dict(re.findall(r'^  (\w+): "(.*)",$', table[1], re.M))


def test_both_languages_say_the_same_things() -> None:
    english, chinese = _strings("en"), _strings("zh")
    assert len(english) > 50
    assert list(english) == list(chinese)
    for key, sentence in english.items():
        assert set(re.findall(r"{\w+}", sentence)) == set(re.findall(r"{\w+}", chinese[key])), key
        assert chinese[key].strip(), key


def test_every_string_is_used_and_every_used_one_is_there() -> None:
    """Keys stand as words in the scripts, as values of data-i18n in the page, or are made of `error` and a kind."""
    scripts = "".join(
        path.read_text(encoding="utf-8") for path in FILES if path.suffix == ".js" and path.stem != "strings"
    )
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    in_page = set(re.findall(r'data-i18n[a-z-]*="(\w+)"', page))
    kinds = set(re.findall(r'"([A-Z]\w+)"', scripts))
    in_scripts = set(re.findall(r'"([a-z]\w+)"', scripts)) | {
        f"error{kind}{end}" for kind in kinds for end in ("", "For")
    }
    keys = set(_strings("en"))
    assert in_page <= keys
    assert keys <= in_page | in_scripts
    assert set(re.findall(r'\bsay\("(\w+)"', scripts)) | set(re.findall(r'\bbutton\("(\w+)"', scripts)) <= keys


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_needs_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert len(text.splitlines()) <= MAX_LINES
    for address in re.findall(r"""(?:src|href|import|from|url\()\W{0,3}["'(]?((?:https?:)?//[^"')\s]+)""", text):
        raise AssertionError(f"{path.name} loads {address}")
    if path.suffix == ".html":  # the policy lets no script or style stand in the page itself
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", text)
    if path.suffix == ".js":
        for danger in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert danger not in text, f"{path.name}: text becomes nodes by text nodes alone"


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 100_000


def test_the_wheel_holds_the_page(tmp_path: Path) -> None:
    """A wheel without its native part, which takes minutes: the same rules choose the files."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-build-isolation", "--no-deps", "-q"]
    options = ["-C", "wheel.cmake=false", "-C", f"build-dir={tmp_path / 'build'}", "-w", str(tmp_path)]
    subprocess.run([*command, *options, "--disable-pip-version-check"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        for path in FILES:
            assert wheel.read(f"fourfold/server/static/{path.name}") == path.read_bytes()
