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
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.calibration.images import Owner
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
_CACHED = 1 << 18  # values of a map that are summed at a time
_FLOOR = 1e-3  # of a layer's mean variance; what a channel's variance counts as at least


def settings() -> list[object]:
    """What the losses depend on beside their arguments, for the key of calibration images."""
    return [SURE, ACTIVATION_KEPT, CLASSES, OWN, _SILENT, _FLOOR]


@dataclass(frozen=True)
class Seen:
    """What some calibration images gave, each for itself.

    Attributes
    ----------
    norms : list of Tensor, each shape (B, 2, channels)
        Mean and mean square of what each batch norm was fed, in deviations from its running mean.
    classes : Tensor or None, shape (B, classes + 1)
        Probability of each class, and how far the logarithm of the largest one is below that of `SURE`; None
        where the network returns no class scores.
    own : Tensor or None, shape (B, 2)
        Norm of what each image's own filter gave behind its batch norm: of what is above zero, and of what
        is below. None where the calibration images are no stimuli, or cannot be separated at their layers.
    """

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
        return Seen([moments.detach().requires_grad_() for moments in self.norms], classes, own)

    def means(self) -> Means:
        """Means over the calibration images."""
        classes = None if self.classes is None else self.classes.mean(dim=0)
        return Means([moments.mean(dim=0) for moments in self.norms], classes)


def join(parts: Sequence[Seen]) -> Seen:
    """What all calibration images gave, from what some gave after others."""
    classes = [part.classes for part in parts if part.classes is not None]
    own = [part.own for part in parts if part.own is not None]
    return Seen(
        [torch.cat(norms) for norms in zip(*(part.norms for part in parts), strict=True)],
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
        self._seen.append(_Moments.apply(arguments[0], module.running_mean, deviation))

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
        return Seen(self._seen, classes, own)


class _Moments(torch.autograd.Function):
    """Mean and mean square over positions, in deviations from a mean; no map as large as the input is kept.

    Shapes (B, channels, *size), (channels,) and (channels,) to (B, 2, channels).
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Sum so many rows at a time that they stay in the processor's cache."""
        axes = tuple(range(2, inputs.ndim))
        shape = (1, -1, *(1,) * len(axes))
        positions = math.prod(inputs.shape[2:])
        found = []
        for rows in torch.split(inputs.detach(), max(1, _CACHED // max(1, inputs[0].numel()))):
            off = rows - mean.view(shape)
            first = off.sum(dim=axes) if axes else off.clone()
            off.mul_(off)
            found.append(torch.stack([first, off.sum(dim=axes) if axes else off], dim=1))
        ctx.save_for_backward(inputs, mean, deviation)
        scale = torch.stack([deviation, deviation.square()]) * positions
        return torch.cat(found) / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient by the input alone."""
        inputs, mean, deviation = ctx.saved_tensors
        positions = math.prod(inputs.shape[2:])
        shape = (len(inputs), -1, *(1,) * (inputs.ndim - 2))
        slope = 2 * gradient[:, 1] / (deviation.square() * positions)
        level = gradient[:, 0] / (deviation * positions) - slope * mean
        return torch.addcmul(level.view(shape), inputs, slope.view(shape)), None, None


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

    def mean(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(dim=0)

    norms = [mean(parts) for parts in zip(*(seen.norms for seen in known), strict=True)]
    classes = [seen.classes for seen in known if seen.classes is not None]
    return Means(norms, mean(classes) if len(classes) == len(known) else None)


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
