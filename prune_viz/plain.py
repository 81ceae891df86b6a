"""Networks without anything laid over their parameters: masks, weight norm, torch's own pruning."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize, prune

from prune_viz.errors import UserError, brief


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, with everything laid over its parameters (`bake_parameters`) in them.

    Raises
    ------
    UserError
        If the model cannot be copied, as with the older hooks of weight and spectral norm.
    """
    for module in model.modules():
        for name in pruned_by_torch(module):
            # Made anew at each call; the last call's product, with its history, could not be copied.
            setattr(module, name, getattr(module, name).detach())
    try:
        twin = copy.deepcopy(model).eval()
    except RuntimeError as error:
        text = brief(error)
        raise UserError(
            f"the model cannot be copied ({text}); remove hooks such as weight_norm first"
        ) from None
    bake_parameters(twin)
    return twin


def bake_parameters(model: nn.Module) -> None:
    """Turn what is laid over parameters of `model` (masks, weight norm) into plain values.

    That is every parametrisation, and the masks of `torch.nn.utils.prune`.
    """
    for module in list(model.modules()):
        for name in pruned_by_torch(module):
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        if not parametrize.is_parametrized(module):
            continue
        # Deep copies share the class that parametrising made, and would lose the tensor with this one.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def parametrised(model: nn.Module) -> list[str]:
    """Names of the tensors over which `torch.nn.utils.parametrize` laid something, such as weight norm."""
    return [
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name in module.parametrizations
    ]


def pruned_by_torch(module: nn.Module) -> set[str]:
    """Names of the parameters that `torch.nn.utils.prune` has put masks over."""
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)}
