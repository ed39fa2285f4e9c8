"""fourfold: 100-billion-parameter language models on an ordinary multi-socket CPU server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourfold._cpu_check import check

if TYPE_CHECKING:
    from fourfold.llm import LLM, Completion
    from fourfold.matrix import QuantizedMatrix, linear, quantize
    from fourfold.sampling import SamplingParams

    __version__: str

__all__ = ["LLM", "Completion", "QuantizedMatrix", "SamplingParams", "__version__", "linear", "quantize"]

check()


def __getattr__(name: str) -> object:
    """Public names load on first use, so that `import fourfold` and `fourfold --help` are quick."""
    if name == "__version__":
        from importlib.metadata import version

        return version("fourfold")
    if name in ("LLM", "Completion"):
        from fourfold import llm

        return getattr(llm, name)
    if name in ("QuantizedMatrix", "linear", "quantize"):
        from fourfold import matrix

        return getattr(matrix, name)
    if name == "SamplingParams":
        from fourfold.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'fourfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
