"""A model of transformers loaded from a directory by one of its quantization methods, or by none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orders import Subject, pin, serve

THREADS = pin(sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from talk import Talk  # noqa: E402

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def _fourfold(**options: Any) -> Any:
    from fourfold.transformers import FourfoldConfig

    return FourfoldConfig(**options)


def _bitsandbytes() -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


METHODS: Mapping[str, Callable[[], Any]] = {
    "fourfold": _fourfold,
    "fourfold-head-kept": lambda: _fourfold(head=None),
    "fourfold-head-nf4": lambda: _fourfold(modules_to_not_convert=[]),
    "bitsandbytes": _bitsandbytes,
    "none": lambda: None,
}
VERSIONS = {"fourfold": "fourfold", "bitsandbytes": "bitsandbytes", "none": "torch"}


class Loaded:
    """A model in bfloat16, the linears as the method has them."""

    def __init__(self, method: str, directory: str) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=METHODS[method](), dtype=torch.bfloat16
        )
        self._cache: Any = None
        self._feed([0])  # bitsandbytes packs its weights anew at their first product
        self._cache = None
        self.n_bytes = stored_bytes(self._model)
        self.path, self.version = f"transformers {transformers.__version__}", _version(method)

    def begin(self, ids: Sequence[int]) -> int:
        self._cache = None
        return self._feed(ids)

    def go_on(self, id: int) -> int:
        return self._feed([id])

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float()

    def _feed(self, ids: Sequence[int]) -> int:
        out = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Compared(Talk):
    """A talk that knows how far the model is from the unquantized one, and what its loading took."""

    def __init__(self, model: Loaded, subject: Mapping[str, Any]) -> None:
        super().__init__(model, subject)
        self._more: dict[str, Any] = {"peak_bytes": peak_bytes()}
        if "reference" in subject:
            self._more["kl"] = divergence(model, Path(subject["reference"]))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **self._more}


def divergence(model: Loaded, reference: Path) -> list[float]:
    """KL divergence from what `write_reference` wrote to the model: of each window, nats a token."""
    windows, found = np.load(reference / "ids.npy").tolist(), np.load(reference / "logits.npy", mmap_mode="r")
    of_windows = []
    for ids, logits in zip(windows, found, strict=True):
        wanted = torch.from_numpy(np.array(logits)).log_softmax(-1)
        of_windows.append(float((wanted.exp() * (wanted - model.logits(ids).log_softmax(-1))).sum(-1).mean()))
    return of_windows


def write_reference(directory: str, folder: Path, windows: Sequence[Sequence[int]], shape: tuple[int, int]) -> None:
    """ids.npy (windows, T), and the unquantized model's logits.npy float32 (windows, T, vocab), computed in float32.

    Where no windows are given the model writes `shape` of them itself, sampling.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor(windows) if windows else sampled(model, *shape)
    np.save(folder / "ids.npy", ids.numpy())
    shape_of_logits = (*ids.shape, model.config.vocab_size)
    logits = np.lib.format.open_memmap(folder / "logits.npy", mode="w+", dtype=np.float32, shape=shape_of_logits)
    for row, to in zip(ids, logits, strict=True):
        to[:] = model(row[None], use_cache=False).logits[0].numpy()
    logits.flush()


def sampled(model: Any, n_texts: int, n_tokens: int) -> torch.Tensor:
    """Texts (n_texts, n_tokens) of the model's own, all of them after its beginning of a text."""
    torch.manual_seed(0)
    first = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    begin = torch.full((n_texts, 1), first)
    texts: torch.Tensor = model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, min_length=n_tokens, max_length=n_tokens
    )
    return texts


def stored_bytes(model: torch.nn.Module) -> int:
    """Of all tensors, scales that bitsandbytes keeps beside its weights included."""
    n_bytes = int(sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]))
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        nested = getattr(state, "state2", None)
        n_bytes += sum(part.absmax.nbytes for part in (state, nested) if part is not None)
    return n_bytes


def peak_bytes() -> int:
    """Of memory that this process ever had, of its own and of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def _version(method: str) -> str:
    from importlib.metadata import version

    return version(VERSIONS[method.split("-")[0]])


def load(subject: Mapping[str, Any]) -> Subject:
    if "write" in subject:
        write_reference(subject["directory"], Path(subject["write"]), subject["windows"], subject["shape"])
        return Nothing()
    return Compared(Loaded(sys.argv[2], subject["directory"]), subject)


class Nothing:
    """Of a worker that has written a file."""

    def facts(self) -> dict[str, Any]:
        return {}

    def turn(self, load: Mapping[str, Any]) -> float:
        raise RuntimeError("there is no model to talk to")


serve(load)
