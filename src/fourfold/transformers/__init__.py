"""fourfold's kernels inside Transformers: a quantization method for any of its models.

    from transformers import AutoModelForCausalLM
    from fourfold.transformers import FourfoldConfig
    model = AutoModelForCausalLM.from_pretrained(DIR, quantization_config=FourfoldConfig())
    model.save_pretrained(OUT)      # AutoModelForCausalLM.from_pretrained(OUT) reads it back

Importing this module registers the method, and must be done before a saved model is read: Transformers looks nowhere
for plug-ins. Without it `from_pretrained` says that it does not know the method `fourfold`, and then raises, for the
weights have not the shapes that it expects.
"""

from __future__ import annotations

try:
    import accelerate as _accelerate  # noqa: F401
    import torch as _torch
    import transformers as _transformers
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "torch", "transformers"):
        raise
    from fourfold.errors import MissingExtra

    raise MissingExtra(
        f"fourfold.transformers needs {error.name}; install it with `pip install 'fourfold[transformers]'`"
    ) from None

OLDEST = {_torch: "2.13", _transformers: "5.23"}  # that the tests have seen; older Transformers pass quantizers less


def _check_versions() -> None:
    from packaging.version import Version

    from fourfold.errors import MissingExtra

    for package, oldest in OLDEST.items():
        if Version(package.__version__).release < Version(oldest).release:
            raise MissingExtra(
                f"fourfold.transformers needs {package.__name__} {oldest} or newer, and {package.__version__} is "
                "installed; `pip install -U 'fourfold[transformers]'` brings it"
            )


_check_versions()

from fourfold.transformers.config import FourfoldConfig  # noqa: E402
from fourfold.transformers.quantizer import FourfoldQuantizer  # noqa: E402

__all__ = ["FourfoldConfig", "FourfoldQuantizer"]
