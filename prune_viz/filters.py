"""Which filters a network has, and the network as its filters' maps: `FilterNetwork`."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prune_viz import tracing
from prune_viz.errors import UserError, brief
from prune_viz.hooks import HookedMaps, hookable
from prune_viz.plain import plain_copy

# A stimulus is at least this large and at most that, by number of spatial axes: pictures, signals, volumes.
SMALLEST_CANVAS = {1: 64, 2: 64, 3: 8}
LARGEST_CANVAS = {1: 4096, 2: 80, 3: 24}
_CANVAS_STEP = {1: 32, 2: 16, 3: 4}

MapFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A convolution and its filters.

    Attributes
    ----------
    name : str
        The module's dotted name.
    kind : str
        For people, ``"3x3 convolution, stride 2"``.
    filters : int
        Number of filters (output channels).
    depth : int
        Position in the order of execution, from 0.
    receptive_field : tuple of int or None
        Input pixels one position of the feature map sees, a spatial axis each; None if unknown.
    canvas : tuple of int
        Spatial size of the stimuli.
    """

    name: str
    kind: str
    filters: int
    depth: int
    receptive_field: tuple[int, ...] | None
    canvas: tuple[int, ...]


class FilterNetwork:
    """A model prepared for looking at its filters: traced, batch norms folded, parameters frozen.

    The model given is copied, never changed.

    Parameters
    ----------
    model : nn.Module
        The network; used in eval mode.
    input_shape : tuple of int
        Shape of one input, channels first, without the batch axis.
    canvas : int, optional
        Size of every stimulus along each axis, instead of one chosen from the receptive field.
    device : torch.device
        Where the work is done.

    Attributes
    ----------
    layers : list of Layer
        Every convolution that runs, in order of execution.
    skipped : list of str
        Names of convolutions that do not run when the model is called.
    overflowing : list of str
        Names of convolutions that give values that are not finite on plain noise.

    Raises
    ------
    UserError
        If the model has no convolutions, or does not run on an input of that shape.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        canvas: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.input_shape = tuple(input_shape)
        self.device = torch.device(device)
        model = plain_copy(model).float()
        convolutions = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}
        if not convolutions:
            raise UserError(f"{type(model).__name__} has no convolutions, so there are no filters to look at")
        order, self.overflowing = _execution_order(model, self.input_shape, convolutions)
        self.skipped = [name for name in convolutions if name not in order]

        traced = tracing.trace(model)
        self._graph: fx.GraphModule | None = None
        self._taps: dict[str, tracing.Tap] = {}
        self._model = model
        if traced is not None:
            folded = tracing.fold_batch_norms(traced, _ordinary_input(self.input_shape))
            self._graph = folded.to(self.device).requires_grad_(False)
            if len(self.input_shape) == 3:
                self._graph = self._graph.to(memory_format=torch.channels_last)
            self._taps = tracing.find_taps(self._graph)
        self.layers = [
            self._layer(depth, name, convolutions[name], canvas) for depth, name in enumerate(order)
        ]

    def _layer(self, depth: int, name: str, module: _ConvNd, canvas: int | None) -> Layer:
        field = None
        if self._graph is not None and name in self._taps:
            field = tracing.receptive_field(self._graph, self._taps[name].after, len(self.input_shape) - 1)
        size = choose_canvas(self.input_shape[1:], field, canvas)
        if not self._runs_on(name, size):
            if canvas is not None:
                raise UserError(f"--canvas {canvas} is too small for {name}, or not what the model takes")
            size = self.input_shape[1:]
        return Layer(name, describe(module), module.out_channels, depth, field, size)

    def _runs_on(self, name: str, canvas: tuple[int, ...]) -> bool:
        """Whether the network up to a layer works on a canvas; without padding a small one may not do."""
        try:
            with torch.no_grad():
                blank = torch.zeros(1, self.input_shape[0], *canvas, device=self.device)
                return self.maps(name)(blank)[1].numel() > 0
        except Exception:  # whatever a stranger's forward pass raises
            return False

    def layer(self, name: str) -> Layer:
        """The layer of that name; raises `UserError`, with near names, if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UserError(no_layer_message(name, [layer.name for layer in self.layers]))

    def maps(self, name: str) -> MapFunction:
        """The network up to a layer's feature maps.

        Returns
        -------
        callable
            From inputs, shape (B, C, *canvas), to the layer's maps before and after its activation, both
            (B, F, *spatial); the same tensor where no activation follows.
        """
        if self._graph is not None and name in self._taps:
            part = tracing.cut(self._graph, self._taps[name])
            return part
        return HookedMaps(self._hookable, name)

    @cached_property
    def _hookable(self) -> nn.Module:
        return hookable(self._model, self.device)

    def takes(self, size: Sequence[int]) -> bool:
        """Whether the whole network runs on inputs of a spatial size; a flatten, say, ties it to one."""
        try:
            with torch.no_grad():
                whole = self._graph or self._model
                device = next(whole.parameters()).device
                whole(torch.zeros(1, self.input_shape[0], *size, device=device))
        except Exception:  # whatever a stranger's forward pass raises
            return False
        return True

    def norms(self, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """How strongly filters of several layers respond to the same inputs.

        Parameters
        ----------
        names : sequence of str
            The layers.
        batches : sequence of Tensor, each shape (B, C, *size)
            Inputs of a size that the network `takes`.

        Returns
        -------
        dict of str to Tensor, shape (all inputs, F)
            L2 norms of the feature maps.
        """
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        untapped = [name for name in names if self._graph is None or name not in self._taps]
        with torch.no_grad():
            if self._graph is not None:
                reader = tracing.NormReader(self._graph, [self._taps[n] for n in names if n in self._taps])
                for batch in batches:
                    for name, norms in reader.norms(batch.float().to(self.device)).items():
                        rows[name].append(norms.cpu())
            for name in untapped:
                maps = self.maps(name)
                for batch in batches:
                    after = maps(batch.float().to(self.device))[1]
                    rows[name].append(torch.linalg.vector_norm(after.flatten(2), dim=2).cpu())
        return {name: torch.cat(found) for name, found in rows.items()}

    def is_first(self, name: str) -> bool:
        """Whether a layer's filters see the input through no other convolution."""
        if self._graph is None or name not in self._taps:
            return next(layer.depth for layer in self.layers if layer.name == name) == 0
        return not tracing.has_convolution_before(self._graph, self._taps[name].call)

    def has_activation(self, name: str) -> bool:
        """Whether an activation follows a layer; taken to be so where that is unknown."""
        tap = self._taps.get(name)
        return tap is None or tap.after is not tap.before

    def upper_bound(self, name: str) -> float:
        """Largest absolute value of a layer's maps, by its activation; infinite where none is known."""
        if self._graph is None or name not in self._taps:
            return math.inf
        return tracing.upper_bound(self._graph, self._taps[name])

    def feeder(self, name: str) -> str | None:
        """The convolution whose feature maps a depthwise one reads filter by filter; None for others."""
        if self._graph is None or name not in self._taps:
            return None
        if not is_depthwise(self._graph.get_submodule(name)):
            return None
        read = self._taps[name].call.all_input_nodes[0]
        return next((tap.conv for tap in self._taps.values() if tap.after is read), None)


def _execution_order(
    model: nn.Module, input_shape: tuple[int, ...], convolutions: dict[str, _ConvNd]
) -> tuple[list[str], list[str]]:
    """Run the model once on noise; list the convolutions as called, each once, and those that overflow."""
    first = next(iter(convolutions.values()))
    axes = first.weight.ndim - 2
    if len(input_shape) != axes + 1:
        raise UserError(
            f"input shape {_comma(input_shape)} does not fit: the first convolution works on {axes} spatial "
            f"axes, so give {axes + 1} numbers, channels first"
        )
    order: list[str] = []
    overflowing: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if name not in order:
                order.append(name)
            if not bool(torch.isfinite(output).all()):
                overflowing.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in convolutions.items()]
    try:
        with torch.no_grad():
            model(_ordinary_input(input_shape).to(blank_input(model, input_shape).device))
    except Exception as error:  # whatever a stranger's forward pass raises, the input shape is what we chose
        text = brief(error)
        raise UserError(
            f"the model does not run on an input of shape {_comma(input_shape)} ({text}); give the right "
            "--input-shape C,H,W"
        ) from None
    finally:
        for handle in hooks:
            handle.remove()
    if not order:
        raise UserError(f"{type(model).__name__} calls none of its convolutions when it runs")
    return order, overflowing


def blank_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """One input of zeros, shape (1, *input_shape), on the device and of the type of the model's weights."""
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return torch.zeros(1, *input_shape, device=reference.device, dtype=reference.dtype)


def _ordinary_input(input_shape: Sequence[int]) -> Tensor:
    return torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))


def choose_canvas(
    input_size: Sequence[int], field: Sequence[int] | None, canvas: int | None = None
) -> tuple[int, ...]:
    """Choose a layer's canvas: twice its receptive field, within bounds, never beyond the model's input.

    Parameters
    ----------
    input_size : sequence of int
        Spatial size of the model's input.
    field : sequence of int or None
        The receptive field; None counts as unbounded.
    canvas : int, optional
        A size wished for instead; the input still bounds it.

    Returns
    -------
    tuple of int
        A size an axis.
    """
    axes = len(input_size)
    if canvas is not None:
        return tuple(min(size, canvas) for size in input_size)
    smallest, largest, step = SMALLEST_CANVAS[axes], LARGEST_CANVAS[axes], _CANVAS_STEP[axes]
    seen = field if field is not None else (largest,) * axes
    wished = [math.ceil(2 * extent / step) * step for extent in seen]
    return tuple(
        min(size, max(smallest, min(largest, wish))) for size, wish in zip(input_size, wished, strict=True)
    )


def describe(module: _ConvNd) -> str:
    """Name a convolution for people, ``"5x5 depthwise convolution, stride 2"``."""
    size = "x".join(str(extent) for extent in module.kernel_size)
    words = [size]
    if is_depthwise(module):
        words.append("depthwise")
    elif module.groups > 1:
        words.append(f"grouped ({module.groups})")
    words.append("transposed convolution" if isinstance(module, _ConvTransposeNd) else "convolution")
    text = " ".join(words)
    if max(module.stride) > 1:
        text += f", stride {max(module.stride)}"
    if max(module.dilation) > 1:
        text += f", dilation {max(module.dilation)}"
    return text


def is_depthwise(module: nn.Module) -> bool:
    """Whether each filter of a convolution reads exactly one channel, its own."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def select_layers(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Layers whose name matches any of the shell patterns; all of them if there is no pattern.

    Raises
    ------
    UserError
        If a pattern matches no layer; the message lists near names.
    """
    if not patterns:
        return list(layers)
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(no_layer_message(pattern, names))
    return [
        layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)
    ]


def no_layer_message(wanted: str, names: Sequence[str]) -> str:
    """Say that no layer matches, and which names are near."""
    import difflib

    bare = wanted.replace("*", "")
    near = difflib.get_close_matches(bare, names, n=4, cutoff=0.3)
    near += [name for name in names if bare and bare in name and name not in near][:4]
    listed = ", ".join((near or list(names))[:6])
    return f"no convolution matches {wanted!r}; there are {len(names)}, for instance: {listed}"


def _comma(shape: Sequence[int]) -> str:
    return ",".join(str(size) for size in shape)
