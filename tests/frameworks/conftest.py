"""What several files of these tests start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Directories of unquantized random models in float32, made when they are first asked for, without progress bars.

    The module's MODELS says of each kind which of Transformers' auto classes makes it, and the options of its config.
    """
    import torch
    import transformers

    root = tmp_path_factory.mktemp("models")

    def directory(kind: str) -> Path:
        if not (root / kind).exists():
            auto, options = request.module.MODELS[kind]
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **options)
            auto.from_config(config).save_pretrained(root / kind)
        return root / kind

    transformers.logging.disable_progress_bar()
    yield directory
    transformers.logging.enable_progress_bar()
