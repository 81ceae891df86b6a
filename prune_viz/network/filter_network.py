"""A network as its filters' maps: `FilterNetwork`."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.network import tracing
from prune_viz.network.batches import are_doubled, layers_alike_in_batches, sample_of_maps, takes_batches
from prune_viz.network.calls import blank_input, called_copy, ordinary_input
from prune_viz.network.channels_last import lay_channels_last, lay_weights_channels_last, takes_channels_last
from prune_viz.network.copies import as_it_was, free_copy
from prune_viz.network.hooks import HookedMaps, MapFunction, RowByRow, hookable
from prune_viz.network.layer_kinds import (
    convolutions_of,
    count_outputs,
    is_convolution,
    is_depthwise,
    layers_of,
    maps_of,
)
from prune_viz.network.layers import Layer, choose_canvas, describe, no_layer_message
from prune_viz.network.precision import FULL, HALF, at_half, pick_precision, suits_half, with_half_weights
from prune_viz.network.receptive_field import receptive_field
from prune_viz.runs.fingerprint import hash_structure
from prune_viz.utils.devices import WHOLE, may_pass, with_fewer
from prune_viz.utils.errors import LayerError, UserError, brief
from prune_viz.utils.nested_tensors import tensors_of


class FilterNetwork:
    """A model prepared for the analysis of its filters: traced, batch norms folded, parameters frozen.

    The model given is never changed. What is not folded shares its weights, unless a call writes into them:
    do not change them meanwhile.

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
    linear : collection of str
        Linear layers whose hidden units are filters too.
    draft : bool
        Whether canvases are those of drafts.
    precision : {"auto", "float32", "bfloat16"}
        Precision of the gradients that searches follow (`climbed_maps`).

    Attributes
    ----------
    layers : list of Layer
        Every convolution that runs, and those linear layers, in order of execution.
    linear : frozenset of str
        Names of the linear ones.
    skipped : list of str
        Names of convolutions that do not run when the model is called.
    shares : bool
        Whether copies may share the model's weights: a call leaves them as they are.
    channels_last : bool
        Whether the model computes the same with channels last in memory, which is faster; not where it views
        maps as they usually lie.
    repeated : dict of str to int
        Convolutions that run several times, and how often; their first outputs are analysed.
    overflowing : list of str
        Names of convolutions whose outputs on plain noise are not finite.
    is_draft : bool
        Whether its canvases are those of drafts.
    precision : {"float32", "bfloat16"}
        Precision of the gradients that searches follow.

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
        linear: Collection[str] = (),
        draft: bool = False,
        precision: str = FULL,
    ) -> None:
        self.input_shape = tuple(input_shape)
        self.is_draft = draft
        self.linear = frozenset(linear)
        self.device = torch.device(device)
        self.precision = pick_precision(precision, self.device)
        called = called_copy(model, self.input_shape, self.linear)
        model, calls = called.model, called.calls
        self.overflowing, self.shares = called.overflowing, called.shares
        layers = layers_of(model, self.linear)
        self.skipped = [name for name in convolutions_of(model) if name not in calls]
        self.repeated = {name: times for name, times in calls.items() if times > 1}
        example = ordinary_input(self.input_shape).to(blank_input(model, self.input_shape))
        self.channels_last = takes_channels_last(model, example, share=self.shares)
        self._row_by_row: set[str] = set()
        self._hooked: dict[str, HookedMaps] = {}
        self._suited: dict[tuple[str, tuple[int, ...]], bool] = {}
        self._alone = threading.RLock()

        traced = tracing.trace(model)
        self._graph: fx.GraphModule | None = None
        self._taps: dict[str, tracing.Tap] = {}
        self._halved: fx.GraphModule | None = None
        self._half_taps: dict[str, tracing.Tap] = {}
        self._model = model
        if traced is not None:
            example = ordinary_input(self.input_shape)
            folded = tracing.fold_batch_norms(traced, example, share=self.shares)
            self._graph = folded.to(self.device).requires_grad_(False)
            if self.channels_last:
                lay_weights_channels_last(self._graph)
            self._taps = tracing.find_taps(self._graph)
            if self.precision == HALF:
                self._halved = with_half_weights(self._graph, self.device)
                self._half_taps = tracing.find_taps(self._halved)
        self._canvas, self._modules = canvas, {name: layers[name] for name in calls}
        self.layers = self._find_layers()

    @cached_property
    def draft(self) -> FilterNetwork:
        """The same network with the canvases of drafts; itself if it has them already."""
        if self.is_draft:
            return self
        twin = copy.copy(self)
        twin.__dict__.pop("draft", None)
        twin.is_draft, twin._row_by_row, twin._hooked = True, set(self._row_by_row), dict(self._hooked)
        twin.layers = twin._find_layers()
        return twin

    def _find_layers(self) -> list[Layer]:
        fields = {name: self._receptive_field(name) for name in self._modules}
        sizes = {
            name: choose_canvas(self.input_shape[1:], field, self._canvas, self.is_draft)
            for name, field in fields.items()
        }
        # Most layers of most networks pass at once, those of one canvas together.
        fine: set[str] = set()
        for size in dict.fromkeys(sizes.values()):
            fine |= self._alike_in_batches([name for name in sizes if sizes[name] == size], size)
        return [
            Layer(
                name, describe(module), count_outputs(module), depth, fields[name],
                sizes[name] if name in fine else self._tried_canvas(name, sizes[name]),
            )
            for depth, (name, module) in enumerate(self._modules.items())
        ]  # fmt: skip

    def _receptive_field(self, name: str) -> tuple[int, ...] | None:
        if self._graph is None or name not in self._taps:
            return None
        return receptive_field(self._graph, self._taps[name].after, len(self.input_shape) - 1)

    def _alike_in_batches(self, names: Sequence[str], canvas: tuple[int, ...]) -> set[str]:
        """Those of some layers that run on a canvas, and whose maps are the same in a batch as alone."""
        tapped = [name for name in names if name in self._taps]
        if self._graph is None or not tapped:
            return set()
        reader = tracing.MapReader(self._graph, [self._taps[name] for name in tapped], sample_of_maps)
        pair = ordinary_input((self.input_shape[0], *canvas), 2).to(self.device)
        with as_it_was(self._model):
            return layers_alike_in_batches(lambda rows: reader.read(self._laid_out(rows)), pair)

    def _tried_canvas(self, name: str, size: tuple[int, ...]) -> tuple[int, ...]:
        """The canvas of a layer that is not plain; notes whether it takes inputs one at a time."""
        if not self._runs_on(name, size):
            if self._canvas is not None:
                said = f"--canvas {self._canvas} is too small for {name}, or not what the model takes"
                raise UserError(said)
            size = self.input_shape[1:]
            if not self._runs_on(name, size):
                self._row_by_row.add(name)
        pair = ordinary_input((self.input_shape[0], *size), 2).to(self.device)
        if not takes_batches(self._maps(name), self._laid_out(pair)):
            self._row_by_row.add(name)
        return size

    def _runs_on(self, name: str, canvas: tuple[int, ...]) -> bool:
        """Whether the network up to a layer works on a canvas; without padding a small one may not do."""
        try:
            with torch.no_grad():
                blank = torch.zeros(1, self.input_shape[0], *canvas, device=self.device)
                return self.maps(name)(blank)[1].numel() > 0
        except Exception:  # whatever an untrusted forward pass raises
            return False

    @property
    def structure(self) -> str:
        """Hex SHA-256 of what the network computes beside its weights, as far as it can be known."""
        return hash_structure(self._model, "" if self._graph is None else self._graph.code)

    def layer(self, name: str) -> Layer:
        """The layer of that name; raises `UserError`, with near names, if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UserError(no_layer_message(name, [layer.name for layer in self.layers]))

    def _laid_out(self, inputs: Tensor) -> Tensor:
        """Inputs as the network computes with them in memory."""
        return lay_channels_last(inputs) if self.channels_last else inputs.contiguous()

    def maps(self, name: str) -> MapFunction:
        """The network up to a layer's feature maps.

        Returns
        -------
        callable
            From inputs, shape (B, C, *canvas), to the layer's maps before and after its activation, both
            (B, F, *spatial); the same tensor where no activation follows. It raises `LayerError` where the
            model fails.
        """
        return self._guarded(name, self._maps(name))

    def climbed_maps(self, name: str) -> MapFunction:
        """The maps whose gradients a search follows: in bfloat16 where that is asked for and suits."""
        if self._halved is None or name not in self._half_taps or name in self._row_by_row:
            return self.maps(name)
        maps, part = self.maps(name), self._cut(self._halved, self._half_taps[name])
        mixed = at_half(self._guarded(name, part), self.device)
        key = name, self.layer(name).canvas
        if key not in self._suited:
            shape = self.input_shape[0], *key[1]

            def suits(rows: int) -> bool:
                return suits_half(part, maps, mixed, ordinary_input(shape, rows).to(self.device))

            self._suited[key] = with_fewer(suits, WHOLE, self.device)
        return mixed if self._suited[key] else maps

    def _guarded(self, name: str, plain: MapFunction) -> MapFunction:
        """Maps, input by input where need be, whose failures are `LayerError`."""
        module = self._model.get_submodule(name)

        def checked(inputs: Tensor) -> tuple[Tensor, Tensor]:
            before, after = _floating(*plain(inputs))
            maps = maps_of(module, after)
            return maps if before is after else maps_of(module, before), maps

        found = RowByRow(checked) if name in self._row_by_row else checked
        one_at_a_time = self._alone if self._has_own_code and not self.shares else nullcontext()

        def guarded(inputs: Tensor) -> tuple[Tensor, Tensor]:
            try:
                with one_at_a_time:
                    return found(self._laid_out(inputs))
            except Exception as error:  # whatever an untrusted forward pass raises
                if may_pass(error):
                    raise
                raise LayerError(f"{name}: the model fails on a stimulus ({brief(error)})") from error

        return guarded

    def _maps(self, name: str) -> MapFunction:
        if self._graph is not None and name in self._taps:
            return self._cut(self._graph, self._taps[name])
        return self._hooked.setdefault(name, HookedMaps(self._hookable, name, self._alone))

    def _cut(self, graph: fx.GraphModule, tap: tracing.Tap) -> fx.GraphModule:
        part = tracing.cut(graph, tap)
        # What modules of the user's own code keep of a call stays apart, so that threads may run at once.
        return free_copy(part, share=True) if self._has_own_code and self.shares else part

    @cached_property
    def _has_own_code(self) -> bool:
        """Whether modules in the graph are not torch's own: they may keep what they saw."""
        modules = () if self._graph is None else self._graph.modules()
        return not all(type(module).__module__.startswith("torch.") for module in modules)

    @cached_property
    def _hookable(self) -> nn.Module:
        return hookable(self._model, self.device, share=self.shares)

    def takes(self, size: Sequence[int]) -> bool:
        """Whether the whole network runs on inputs of a spatial size; a flatten ties it to one."""
        try:
            self._outputs_of_blank(1, size)
        except Exception:  # whatever an untrusted forward pass raises
            return False
        return True

    @cached_property
    def takes_batches(self) -> bool:
        """Whether the whole network's output for two inputs has twice the rows of that for one."""
        try:
            one, two = (self._outputs_of_blank(rows, self.input_shape[1:]) for rows in (1, 2))
        except Exception:  # whatever an untrusted forward pass raises
            return False
        return are_doubled(one, two)

    def _outputs_of_blank(self, rows: int, size: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return self.outputs(torch.zeros(rows, self.input_shape[0], *size))

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """The whole network's output, its batch norms folded where it could be traced."""
        whole = self._graph or self._model
        with as_it_was(self._model):
            return tensors_of(whole(self._laid_out(inputs.to(next(whole.parameters()).device))))

    def reader(
        self, names: Sequence[str], reading: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], dict[str, Tensor]] | None:
        """A function that reads the maps of several layers in one pass, or None if none can be read so.

        Parameters
        ----------
        names : sequence of str
            The layers.
        reading : callable
            From maps, shape (B, F, *map), to what is kept of them.
        """
        taps = [self._taps[name] for name in names if name in self._taps and name not in self._row_by_row]
        if self._graph is None or not taps or not self.takes_batches:
            return None
        found = tracing.MapReader(self._graph, taps, reading)
        return lambda inputs: found.read(self._laid_out(inputs))

    def is_first(self, name: str) -> bool:
        """Whether a layer's filters see the input through no other layer."""
        if self._graph is None or name not in self._taps:
            return next(layer.depth for layer in self.layers if layer.name == name) == 0
        return not tracing.has_convolution_before(self._graph, self._taps[name].call)

    def input_weights(self, name: str) -> Tensor | None:
        """Weights, (F, C, *kernel), of a layer known to read the input itself, all channels by every filter.

        None for others: those of a grouped or transposed convolution are laid out otherwise, and no pictures.
        """
        if self._graph is None or name not in self._taps:
            return None
        module: Any = self._model.get_submodule(name)
        reads_input = self._taps[name].call.all_input_nodes[0].op == "placeholder"
        plain = is_convolution(module) and module.groups == 1 and not module.transposed
        return module.weight.detach() if reads_input and plain else None

    def has_activation(self, name: str) -> bool:
        """Whether an activation follows a layer; taken to be so where that is unknown."""
        tap = self._taps.get(name)
        if tap is not None:
            return tap.after is not tap.before
        return name not in self._hooked or self._hooked[name].has_activation is not False

    def upper_bound(self, name: str) -> float:
        """Largest absolute value of a layer's maps, by its activation; infinite where none is known."""
        if self._graph is None or name not in self._taps:
            return math.inf
        return tracing.upper_bound(self._graph, self._taps[name])

    def producer(self, name: str) -> str | None:
        """The convolution whose feature maps a depthwise one reads filter by filter; None for others."""
        if self._graph is None or name not in self._taps:
            return None
        if not is_depthwise(self._graph.get_submodule(name)):
            return None
        read = self._taps[name].call.all_input_nodes[0]
        return next((tap.conv for tap in self._taps.values() if tap.after is read), None)


def _floating(before: Any, after: Any) -> tuple[Tensor, Tensor]:
    """The maps as they are, if they are tensors of real numbers."""
    if not isinstance(after, Tensor):
        raise TypeError(f"its output is no feature map but a {type(after).__name__}")
    if not after.is_floating_point():
        raise TypeError(f"its maps are {str(after.dtype).removeprefix('torch.')}, not real numbers")
    return before, after
