"""What a module has been given beside its weights, kept when ours takes its place."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from fourfold.errors import UserError

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
WEIGHT_MAKERS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def make_weight(module: nn.Module) -> None:
    """Brings a weight (or bias) up to date that pre-hooks compute before each call: weight_norm, spectral_norm, prune.

    Raises UserError where the module's `forward` is not its class's: what it does cannot be known.
    """
    if "forward" in vars(module):
        raise UserError(
            "its forward was replaced (by a hook of accelerate's, or a patch): take that off first, or leave it out"
        )
    for hook in module._forward_pre_hooks.values():
        if _makes_a_weight(hook):
            hook(module, ())


def same_bias(module: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    """The module's own, or what a pre-hook has computed."""
    bias: Tensor | None = module.bias
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)


def keep_hooks(module: nn.Module, made: nn.Module) -> None:
    """`made` runs the hooks of `module`, but for those that compute its weight (`make_weight`).

    The two share them, so that the handle that a hook was registered with still removes it; with a hook that computes
    the weight among them, `made` has its own list.
    """
    weights = {key for key, hook in module._forward_pre_hooks.items() if _makes_a_weight(hook)}
    for name in HOOKS:
        hooks = getattr(module, name)
        kept = hooks if weights.isdisjoint(hooks) else OrderedDict((k, h) for k, h in hooks.items() if k not in weights)
        setattr(made, name, kept)
    made._is_full_backward_hook = module._is_full_backward_hook


def _makes_a_weight(hook: object) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__ in WEIGHT_MAKERS
