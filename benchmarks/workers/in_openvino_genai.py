"""OpenVINO GenAI: a whole model, read from a GGUF file. It generates by itself, and its own clock says how fast."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from orders import pin, serve

THREADS = pin(sys.argv[1])

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai  # noqa: E402
from talk import CONTEXT, check_answer, first_prompt, prompts  # noqa: E402


class Pipeline:
    """A pipeline whose every request starts from nothing."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.LLMPipeline(subject["gguf"], "CPU", **options)
        self._prompts, self._n_bytes = prompts(subject["vocab_size"]), subject["gguf_bytes"]
        check_answer(subject, self._generate(first_prompt(subject), 2).tokens[0][0])

    def facts(self) -> dict[str, Any]:
        """Bytes are those of the file: what it is packed to in memory is not told."""
        version = openvino_genai.__version__.split("-")[0]
        return {"bytes": self._n_bytes, "path": "LLMPipeline of a GGUF file", "version": version}

    def turn(self, load: Mapping[str, Any]) -> float:
        """Seconds to the first token of load["prompt"], or a token of load["decode"] after the first."""
        if "prompt" in load:
            return float(self._generate(self._prompts(load["prompt"]), 1).perf_metrics.get_ttft().mean) / 1e3
        return float(self._generate(self._prompts(CONTEXT), load["decode"] + 1).perf_metrics.get_tpot().mean) / 1e3

    def _generate(self, ids: list[int], n_tokens: int) -> Any:
        tensor = ov.Tensor(np.array([ids], np.int64))
        out = self._pipeline.generate(tensor, max_new_tokens=n_tokens, ignore_eos=True, do_sample=False)
        if len(out.tokens[0]) != n_tokens:
            raise RuntimeError(f"{n_tokens} tokens were asked for and {len(out.tokens[0])} came")
        return out


serve(Pipeline)
