"""Whether a network treats every input of a batch as it does alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prune_viz.network.hooks import MapFunction

_SAMPLED = 2**16  # values of each input's maps that are compared, about


def layers_alike_in_batches(read: Callable[[Tensor], Mapping[str, Tensor]], pair: Tensor) -> set[str]:
    """Layers whose maps have values, and are the same in a batch of two as alone.

    Parameters
    ----------
    read : callable
        From inputs, shape (B, C, *canvas), to a sample of each layer's maps (`sample_of_maps`), by the
        layer's name.
    pair : Tensor, shape (2, C, *canvas)
        Inputs.

    Returns
    -------
    set of str
        Empty where the network does not run on such inputs.
    """
    try:
        with torch.no_grad():
            together, *alone = [dict(read(rows)) for rows in (pair, pair[:1], pair[1:])]
    except Exception:  # whatever an untrusted forward pass raises
        return set()
    return {
        name
        for name, maps in together.items()
        if maps.numel() and _are_alike(maps, torch.cat([rows[name] for rows in alone]))
    }


def sample_of_maps(maps: Tensor) -> Tensor:
    """Values of each input's maps at even distances, shape (B, at most `_SAMPLED` or a little more)."""
    if not maps.is_floating_point():
        raise TypeError("its maps are not real numbers")
    flat = maps.flatten(1)
    return flat[:, :: max(1, flat.shape[1] // _SAMPLED)].clone()


def takes_batches(maps: MapFunction, example: Tensor) -> bool:
    """Whether each row of a batch, shape (2, C, *canvas), gives the same output as alone."""
    try:
        with torch.no_grad():
            together = maps(example)[1]
            if len(together) != len(example):
                return False
            alone = torch.cat([maps(example[row : row + 1])[1] for row in range(len(example))])
    except Exception:  # whatever an untrusted forward pass raises
        return False
    return _are_alike(together, alone)


def _are_alike(together: Tensor, alone: Tensor) -> bool:
    """Whether the maps of a batch are those of its inputs alone, up to rounding."""
    if not bool(alone.isfinite().all()):
        return True  # nothing to compare
    scale = float(alone.abs().max())
    return together.shape == alone.shape and torch.allclose(together, alone, rtol=1e-2, atol=1e-3 * scale)


def are_doubled(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether a network's outputs for two inputs have twice the rows of those for one."""
    return len(two) == 2 * len(one) or any(
        _is_doubled(less.shape, more.shape) for less, more in zip(one, two, strict=False)
    )


def _is_doubled(one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether a shape is another's but for one axis, the first or one of length 1, that is twice as long."""
    if len(one) != len(two):
        return False
    differing = [axis for axis, (less, more) in enumerate(zip(one, two, strict=True)) if less != more]
    if len(differing) != 1:
        return False
    (axis,) = differing
    return two[axis] == 2 * one[axis] and (axis == 0 or one[axis] == 1)
