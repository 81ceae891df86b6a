"""Masks in the forms that other tools take: torch.nn.utils.prune, NNI, Torch-Pruning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune_viz.network.packed_attention import place_of
from prune_viz.pruning.apply import mask_tensor, masked_tensors, prune_tensor
from prune_viz.pruning.masks import check_masks


def prune_with_torch(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Mask filters with `torch.nn.utils.prune`, whose masks training loops such as Lightning's understand.

    The same parameters as with `apply_masks` are masked: what is masked has ``NAME_orig`` and
    ``NAME_mask`` in the state dict, and is zero at every forward pass. Parameters stay the same objects.
    `make_permanent` ends it.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks : mapping of str to bool Tensor
        True = keep.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    UserError
        If the masks are for another model.
    """
    for module, name, mask in masked_tensors(model, masks):
        if isinstance(getattr(module, name), nn.Parameter):
            prune_tensor(module, name, mask)
        else:  # a buffer, or a parameter with a parametrisation already
            mask_tensor(module, name, mask)
    return model


def to_nni(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Masks as NNI's `ModelSpeedup` takes them.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    masks : mapping of str to bool Tensor
        True = keep.

    Returns
    -------
    dict of str to dict of str to float Tensor
        Layer -> ``weight`` and, where there is one, ``bias`` (of torch's own attention ``in_proj_weight`` and
        ``in_proj_bias``) -> a mask of the parameter's own shape,
        1 = keep. Layers that lose nothing are left out.

    Raises
    ------
    UserError
        If the masks are for another model.
    """
    check_masks(model, masks)
    found: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules())
    layers = {place_of(modules, name)[0] for name in masks}
    names = {module: name for name, module in modules.items() if module in layers}
    for module, tensor, mask in masked_tensors(model, masks):
        if module in names:
            whole = mask.expand_as(getattr(module, tensor))
            found.setdefault(names[module], {})[tensor] = whole.to(torch.float32).clone()
    return found


def to_indices(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The filters that masks remove, by layer, as Torch-Pruning takes them.

    ``DependencyGraph.get_pruning_group(layer, tp.prune_conv_out_channels, indices)`` removes those of one
    layer and all that is tied to them, so pass it one layer of each coupling group.

    Parameters
    ----------
    masks : mapping of str to bool Tensor
        True = keep.

    Returns
    -------
    dict of str to list of int
        Layers that lose something.
    """
    return {name: (~mask).nonzero().ravel().tolist() for name, mask in masks.items() if not mask.all()}
