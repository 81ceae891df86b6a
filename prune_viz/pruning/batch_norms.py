"""Batch norms of a merged network, set anew so that their outputs are as in the whole network.

Merging rebuilds what is removed only in part. What is missing adds up from layer to layer: maps grow weaker
and drift, and a batch norm goes on dividing by what its inputs were before. Setting the statistics of a
pruned network anew is common where there is data (Li et al. 2020, EagleEye); here synthetic images stand in
for it, and the aim is what the whole network computes on the same images, not what training fed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.network.copies import attached
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.utils.devices import is_out_of_memory

WORTH = 0.9  # of the output's change, on images kept out; more than that left, and it is not worth it
_ADDED = 1e-3  # of a layer's mean variance, to a channel's own, so that silence is not amplified

Statistics = tuple[Tensor, Tensor]  # mean and variance, each shape (channels,)


def recalibrate_norms(pruned: nn.Module, whole: nn.Module, images: Tensor, meter: OutputMeter) -> bool:
    """Set batch norms so that each has the mean and deviation on images that the whole network's has.

    Only where it helps on images that it was not fitted to. A norm that runs more than once, or has no
    running statistics, is left as it is. Where memory runs out, every other calibration image has to do.

    Parameters
    ----------
    pruned : nn.Module
        The network in eval mode, all its channels still there; the running statistics of its batch norms
        are changed in place.
    whole : nn.Module
        The same network before anything was merged, in eval mode.
    images : Tensor, shape (N, C, *size)
        Inputs near the training data, in the model's own units.
    meter : OutputMeter
        Measures the pruned network on other images.

    Returns
    -------
    bool
        Whether the norms were set: the change of the network's output fell below `WORTH` of what it was.
    """
    norms = _norms(pruned)
    as_merged = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    before = meter.change(pruned) if norms else 0.0
    while norms and len(images) >= 2:
        try:
            _fit(pruned, whole, images)
            if meter.change(pruned) < WORTH * before:
                return True
            break
        except Exception as error:  # whatever an untrusted forward pass raises on calibration images
            if not is_out_of_memory(error):
                break
            images = images[::2]
    for name, (mean, variance) in as_merged.items():
        norms[name].running_mean.copy_(mean)
        norms[name].running_var.copy_(variance)
    return False


def copy_statistics(of: nn.Module, to: nn.Module) -> None:
    """Give a network's batch norms the running statistics of another's of the same names."""
    norms = _norms(of)
    for name, norm in _norms(to).items():
        norm.running_mean.copy_(norms[name].running_mean)
        norm.running_var.copy_(norms[name].running_var)


def _fit(pruned: nn.Module, whole: nn.Module, images: Tensor) -> None:
    """Set every norm from the first to the last, in one forward pass of all calibration images at once."""
    origin, norms = _norms(whole), _norms(pruned)
    aims: dict[str, list[Statistics]] = {name: [] for name in origin}

    def note(name: str, inputs: Tensor) -> None:
        aims[name].append(_statistics(inputs))

    def adjust(name: str, inputs: Tensor) -> None:
        if len(aims[name]) == 1:
            _adjust(norms[name], origin[name], aims[name][0], _statistics(inputs))

    _run(whole, origin, images, note)
    _run(pruned, norms, images, adjust)


def _adjust(norm: Any, origin: Any, aim: Statistics, seen: Statistics) -> None:
    """Give a norm the statistics with which what it sees comes out as what the whole network's comes out.

    Scaling and shifting its inputs to the moments aimed at, ``a x + b``, and then dividing by the whole
    network's statistics is the same as dividing by these. No variance makes up for more than a norm's `eps`
    lets it; then the mean is right, the deviation too small.
    """
    added = _ADDED * aim[1].mean() + torch.finfo(aim[1].dtype).tiny
    most = ((origin.running_var + norm.eps) / norm.eps).sqrt()
    scale = torch.minimum(((aim[1] + added) / (seen[1] + added)).sqrt(), most)
    shift = aim[0] - scale * seen[0]
    norm.running_mean.copy_((origin.running_mean - shift) / scale)
    norm.running_var.copy_(((origin.running_var + norm.eps) / scale.square() - norm.eps).clamp_min(0))


def _norms(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _statistics(inputs: Tensor) -> Statistics:
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return inputs.mean(dim=axes), inputs.var(dim=axes, correction=0)


def _run(
    model: nn.Module, norms: Mapping[str, Any], images: Tensor, see: Callable[[str, Tensor], None]
) -> None:
    """Run calibration images through a network; `see` is called with each norm's name and input."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: see(name, arguments[0])

    device = next(model.parameters()).device
    hooks = (norm.register_forward_pre_hook(hook(name)) for name, norm in norms.items())
    with attached(hooks), torch.no_grad():
        model(images.to(device))
