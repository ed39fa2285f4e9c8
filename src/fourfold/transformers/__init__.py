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
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "torch", "transformers"):
        raise
    from fourfold.errors import MissingExtra

    raise MissingExtra(
        f"fourfold.transformers needs {error.name}; install it with `pip install 'fourfold[transformers]'`"
    ) from None

from fourfold.transformers.config import FourfoldConfig
from fourfold.transformers.quantizer import FourfoldQuantizer

__all__ = ["FourfoldConfig", "FourfoldQuantizer"]
