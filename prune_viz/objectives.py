"""What calibration asks of probes: what batch norms see, what classes come out, what stimuli still excite.

Batch norms should see their running statistics over all the probes together (Yin et al. 2020,
DeepInversion). A classifier should be at least half sure of each probe and take the probes for all its
classes: features that speak for single classes are silent otherwise. It is not asked to be surer, since the
outputs of a network that is sure of everything depend on nothing any more, and no removal order can be
measured on them. A probe that started as the stimulus of a filter should still excite it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.outputs import class_probabilities, tensors_of
from prune_viz.probes import Owner
from prune_viz.tracing import norms_behind

SURE = 0.5  # probability of its likeliest class at which a probe is let be
HELD = 0.5  # of what a stimulus's own filter gave at the start, at which it is let be
CLASSES = 0.002  # weight of the classes' terms, in nats, beside the norms'
OWN = 0.02  # weight of what stimuli are short of, as a share
SETTINGS = (SURE, HELD, CLASSES, OWN)  # probes depend on them
_SILENT = 1e-6  # norm of a map
_FLOOR = 1e-3  # of a layer's mean variance; what a channel's variance counts as at least


@dataclass(frozen=True)
class Seen:
    """What some probes gave.

    Attributes
    ----------
    norms : list of Tensor, each shape (2, channels)
        Mean and mean square of what each batch norm was fed, in deviations from its running mean.
    classes : Tensor or None, shape (classes + 1,)
        Mean probability of each class, and how far the logarithm of a probe's largest one is below that of
        `SURE`, a mean over probes; None where the network gives no class scores.
    own : Tensor or None, shape (B, 2)
        Norm of what each probe's own filter gave behind its batch norm: of what is above zero, and of what
        is below. None where the probes are no stimuli, or cannot be told apart at their layers.
    """

    norms: list[Tensor]
    classes: Tensor | None
    own: Tensor | None = None

    def detach(self) -> Seen:
        """The same without gradients, and without what is told probe by probe."""
        classes = None if self.classes is None else self.classes.detach()
        return Seen([moments.detach() for moments in self.norms], classes)


class Watched:
    """A network whose batch norms and outputs are watched while probes run through it.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded.
    classes : bool
        Whether to look at class scores.
    """

    def __init__(self, model: nn.Module, classes: bool = True) -> None:
        self._model = model
        self._modules: Mapping[str, Any] = dict(model.named_modules())
        self._classes = classes
        behind = norms_behind(model)
        served = Counter(behind.values())
        # A norm that serves several convolutions does not tell whose map it gives.
        self._behind = {conv: norm for conv, norm in behind.items() if served[norm] == 1}
        self._seen: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._modules.values():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                self._handles.append(module.register_forward_pre_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: Any, arguments: tuple[Tensor, ...]) -> None:
        variance = module.running_var
        deviation = (variance.clamp_min(_FLOOR * float(variance.mean())) + module.eps).sqrt()
        shape = [1, -1] + [1] * (arguments[0].ndim - 2)
        normal = (arguments[0] - module.running_mean.view(shape)) / deviation.view(shape)
        axes = [axis for axis in range(normal.ndim) if axis != 1]
        self._seen.append(torch.stack([normal.mean(dim=axes), normal.square().mean(dim=axes)]))

    def see(self, images: Tensor, owners: Sequence[Owner] = ()) -> Seen:
        """Run probes through the network.

        Parameters
        ----------
        images : Tensor, shape (B, C, *size)
            Probes.
        owners : sequence of (str, int), optional
            Whose stimulus each probe was.
        """
        self._seen = []
        maps: dict[int, Tensor] = {}

        def keep(layer: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
                if len(output) == len(owners):
                    # Cloned, since an activation in place would overwrite them.
                    rows = [row for row, owner in enumerate(owners) if owner[0] == layer]
                    maps.update({row: output[row, owners[row][1]].clone() for row in rows})

            return hook

        handles = [
            self._modules[self._behind.get(layer, layer)].register_forward_hook(keep(layer))
            for layer in {layer for layer, _ in owners}
        ]
        try:
            outputs = tensors_of(self._model(images))
        finally:
            for handle in handles:
                handle.remove()
        shares = class_probabilities(outputs) if self._classes else None
        classes = None if shares is None else _classes(shares)
        own = None
        if owners and len(maps) == len(owners):
            own = torch.stack([_sides(maps[row]) for row in range(len(owners))])
        return Seen(self._seen, classes, own)


def _classes(shares: Tensor) -> Tensor:
    """`Seen.classes` of some probes, from the probabilities, shape (B, classes), that each is given."""
    surest = shares.amax(dim=1).clamp_min(1e-12).log()
    short = (math.log(SURE) - surest).clamp_min(0).mean()
    return torch.cat([shares.mean(dim=0), short[None]])


def _sides(own: Tensor) -> Tensor:
    """Norm of what is above zero and of what is below, kept from a gradient that is not finite at zero."""
    squares = torch.stack([own.clamp_min(0).square().sum(), own.clamp_max(0).square().sum()])
    return squares.clamp_min(1e-24).sqrt()


def pool(known: Sequence[Seen], shares: Sequence[float]) -> Seen:
    """What all probes gave together, from what parts of them gave; shares add to 1."""

    def mean(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(dim=0)

    norms = [mean(parts) for parts in zip(*(seen.norms for seen in known), strict=True)]
    classes = [seen.classes for seen in known if seen.classes is not None]
    return Seen(norms, mean(classes) if len(classes) == len(known) else None)


def norms_error(pooled: Seen) -> Tensor:
    """Squared errors of means and deviations, a mean over each norm's channels and over norms."""
    errors = []
    for mean, square in pooled.norms:
        deviation = (square - mean.square()).clamp_min(1e-6).sqrt()
        errors.append((mean.square() + (deviation - 1).square()).mean())
    return torch.stack(errors).mean()


def classes_error(pooled: Seen) -> Tensor:
    """How unsure the network is of probes, and how few its classes, in nats; zero without class scores."""
    if pooled.classes is None:
        return pooled.norms[0].new_zeros(())
    shares, short = pooled.classes[:-1], pooled.classes[-1]
    evenness = -(shares * shares.clamp_min(1e-12).log()).sum()
    return short + math.log(len(shares)) - evenness


def own_shares(own: Tensor, asked: Tensor) -> Tensor:
    """What own filters give as a share of what they gave at the start, shape (B,); 1 if that was nothing.

    Parameters
    ----------
    own, asked : Tensor, shape (B, 2)
        From `Seen`, now and at the start; the side that gave more at the start counts.
    """
    most, side = asked.max(dim=1)
    kept = own.gather(1, side[:, None])[:, 0]
    return torch.where(most > _SILENT, kept / most.clamp_min(_SILENT), 1.0)


def total_error(pooled: Seen, own: Tensor | None, asked: Tensor | None) -> Tensor:
    """What is made small, the parts weighed; `own` and `asked` are those of the probes that move."""
    error = norms_error(pooled) + CLASSES * classes_error(pooled)
    if own is not None and asked is not None:
        error = error + OWN * (1 - own_shares(own, asked) / HELD).clamp_min(0).mean()
    return error
