"""What calibration asks of images: what batch norms see, what classes come out, what stimuli still excite.

Batch norms should see their running statistics over all the calibration images together (Yin et al. 2020,
DeepInversion). A classifier should be at least half sure of each image and take the images for all its
classes: features that speak for single classes are silent otherwise. It is not asked to be surer, since the
outputs of a network that is sure of everything depend on nothing any more, and no removal order can be
measured on them. A calibration image that started as the stimulus of a filter should still excite it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.calibration import norm_moments
from prune_viz.calibration.images import Owner
from prune_viz.calibration.norm_moments import is_plain_norm, moments, normalise
from prune_viz.network.copies import attached
from prune_viz.network.outputs import class_probabilities
from prune_viz.network.tracing import norms_behind
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.nested_tensors import tensors_of

SURE = 0.5  # probability of its likeliest class at which a calibration image is let be
ACTIVATION_KEPT = 0.5  # of what a stimulus's own filter gave at the start, at which it is let be
CLASSES = 0.002  # weight of the classes' terms, in nats, beside the norms'
OWN = 0.02  # weight of what stimuli are short of, as a share
_SILENT = 1e-6  # norm of a map


def settings() -> list[object]:
    """What the losses depend on beside their arguments, for the key of calibration images."""
    return [SURE, ACTIVATION_KEPT, CLASSES, OWN, _SILENT, norm_moments.settings()]


@dataclass(frozen=True)
class Seen:
    """What some calibration images gave.

    Attributes
    ----------
    count : int
        How many they are, B.
    norms : list of Tensor, each shape (2, channels)
        Mean and mean square of what each batch norm was fed, in deviations from its running mean.
    classes : Tensor or None, shape (B, classes + 1)
        Probability of each class, and how far the logarithm of the largest one is below that of `SURE`; None
        where the network returns no class scores.
    own : Tensor or None, shape (B, 2)
        Norm of what each image's own filter gave behind its batch norm: of what is above zero, and of what
        is below. None where the calibration images are no stimuli, or cannot be separated at their layers.
    """

    count: int
    norms: list[Tensor]
    classes: Tensor | None
    own: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor held, in a fixed order."""
        return [*self.norms, *(one for one in (self.classes, self.own) if one is not None)]

    def leaves(self) -> Seen:
        """The same as something to be differentiated by."""
        classes = None if self.classes is None else self.classes.detach().requires_grad_()
        own = None if self.own is None else self.own.detach().requires_grad_()
        return Seen(self.count, [one.detach().requires_grad_() for one in self.norms], classes, own)

    def means(self) -> Means:
        """Means over the calibration images."""
        classes = None if self.classes is None else self.classes.mean(dim=0)
        return Means(self.norms, classes)


def join(parts: Sequence[Seen]) -> Seen:
    """What all calibration images gave, from what some gave after others."""
    count = sum(part.count for part in parts)
    shares = [part.count / count for part in parts]
    classes = [part.classes for part in parts if part.classes is not None]
    own = [part.own for part in parts if part.own is not None]
    return Seen(
        count,
        [_mean(norms, shares) for norms in zip(*(part.norms for part in parts), strict=True)],
        torch.cat(classes) if len(classes) == len(parts) else None,
        torch.cat(own) if len(own) == len(parts) else None,
    )


@dataclass(frozen=True)
class Means:
    """What some calibration images gave, a mean over them.

    Attributes
    ----------
    norms : list of Tensor, each shape (2, channels)
        As in `Seen`.
    classes : Tensor or None, shape (classes + 1,)
        As in `Seen`.
    """

    norms: list[Tensor]
    classes: Tensor | None

    def detach(self) -> Means:
        """The same without gradients."""
        classes = None if self.classes is None else self.classes.detach()
        return Means([moments.detach() for moments in self.norms], classes)


class Watched:
    """A network whose batch norms and outputs are watched while calibration images run through it.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded.
    kind : OutputKind
        What the network returns; only scores of classes are used.
    """

    def __init__(self, model: nn.Module, kind: OutputKind) -> None:
        self._model = model
        self._modules: Mapping[str, Any] = dict(model.named_modules())
        self._kind = kind
        behind = norms_behind(model)
        served = Counter(behind.values())
        # A norm that serves several convolutions does not show whose map it holds.
        self._behind = {conv: norm for conv, norm in behind.items() if served[norm] == 1}
        self._seen: list[Tensor] = []
        self._handles: list[Any] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Self:
        for module in self._modules.values():
            if not isinstance(module, _BatchNorm) or module.running_mean is None:
                continue
            if is_plain_norm(module):
                module.forward = partial(self._normalise, module)  # type: ignore[method-assign]
                self._replaced.append(module)
            else:
                self._handles.append(module.register_forward_pre_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward

    def _note(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._seen.append(moments(module, arguments[0]))

    def _normalise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        outputs, seen = normalise(module, inputs)
        self._seen.append(seen)
        return outputs

    def see(self, images: Tensor, owners: Sequence[Owner] = ()) -> Seen:
        """Run calibration images through the network.

        Parameters
        ----------
        images : Tensor, shape (B, C, *size)
            Calibration images.
        owners : sequence of (str, int), optional
            Whose stimulus each calibration image was.
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

        hooks = (
            self._modules[self._behind.get(layer, layer)].register_forward_hook(keep(layer))
            for layer in {layer for layer, _ in owners}
        )
        with attached(hooks):
            outputs = tensors_of(self._model(images))
        shares = class_probabilities(outputs, self._kind, len(images))
        classes = None if shares is None else _classes(shares)
        own = None
        if owners and len(maps) == len(owners):
            own = torch.stack([_sides(maps[row]) for row in range(len(owners))])
        return Seen(len(images), self._seen, classes, own)


def _classes(shares: Tensor) -> Tensor:
    """`Seen.classes` from the probabilities, shape (B, classes), that each calibration image is given."""
    surest = shares.amax(dim=1, keepdim=True).clamp_min(1e-12).log()
    return torch.cat([shares, (math.log(SURE) - surest).clamp_min(0)], dim=1)


def _sides(own: Tensor) -> Tensor:
    """Norm of what is above zero and of what is below, kept from a gradient that is not finite at zero."""
    squares = torch.stack([own.clamp_min(0).square().sum(), own.clamp_max(0).square().sum()])
    return squares.clamp_min(1e-24).sqrt()


def pool(known: Sequence[Means], shares: Sequence[float]) -> Means:
    """What all calibration images gave together, from what parts of them gave; shares add to 1."""
    norms = [_mean(parts, shares) for parts in zip(*(seen.norms for seen in known), strict=True)]
    classes = [seen.classes for seen in known if seen.classes is not None]
    return Means(norms, _mean(classes, shares) if len(classes) == len(known) else None)


def _mean(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(dim=0)


def norms_error(pooled: Means) -> Tensor:
    """Squared errors of means and deviations, a mean over each norm's channels and over norms."""
    errors = []
    for mean, square in pooled.norms:
        deviation = (square - mean.square()).clamp_min(1e-6).sqrt()
        errors.append((mean.square() + (deviation - 1).square()).mean())
    return torch.stack(errors).mean()


def norms_distance(model: nn.Module, images: Tensor, rows: int) -> float | None:
    """How far what batch norms see of images is from their running statistics.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded.
    images : Tensor, shape (N, C, *size)
        Of any device.
    rows : int
        Images at a time.

    Returns
    -------
    float or None
        As `norms_error`; None where no batch norm has running statistics.
    """
    device = next(model.parameters()).device
    with Watched(model, OutputKind()) as watched, torch.no_grad():
        batches = torch.split(images, rows)
        parts = [(len(part), watched.see(part.float().to(device)).means()) for part in batches]
    known = [means for _, means in parts]
    if not known or not known[0].norms:
        return None
    return float(norms_error(pool(known, [count / len(images) for count, _ in parts])))


def classes_error(pooled: Means) -> Tensor:
    """How unsure the network is of images, and how few its classes, in nats; zero without class scores."""
    if pooled.classes is None:
        return pooled.norms[0].new_zeros(())
    shares, short = pooled.classes[:-1], pooled.classes[-1]
    evenness = -(shares * shares.clamp_min(1e-12).log()).sum()
    return short + math.log(len(shares)) - evenness


def own_shares(own: Tensor, asked: Tensor) -> Tensor:
    """The response of own filters as a share of that at the start, shape (B,); 1 if that was nothing.

    Parameters
    ----------
    own, asked : Tensor, shape (B, 2)
        From `Seen`, now and at the start; the side that gave more at the start counts.
    """
    most, side = asked.max(dim=1)
    kept = own.gather(1, side[:, None])[:, 0]
    return torch.where(most > _SILENT, kept / most.clamp_min(_SILENT), 1.0)


def total_error(pooled: Means, own: Tensor | None, asked: Tensor | None) -> Tensor:
    """What is made small, the parts weighed; `own` and `asked` are those of the images that move."""
    error = norms_error(pooled) + CLASSES * classes_error(pooled)
    if own is not None and asked is not None:
        error = error + OWN * (1 - own_shares(own, asked) / ACTIVATION_KEPT).clamp_min(0).mean()
    return error
