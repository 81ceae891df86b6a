"""Seeing the network as a graph: batch norms folded, cut at a filter's feature map.

The model is traced with `torch.fx`; convolutions stay whole whatever their class. Where tracing fails
(control flow that depends on data), `prune_viz.network.filter_network` falls back on hooks.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from prune_viz.network.copies import as_it_was, free_copy
from prune_viz.network.layer_kinds import is_convolution, is_transposed, maps_of, reads_channels
from prune_viz.network.plain_convolutions import put_plain_convolutions
from prune_viz.utils.nested_tensors import tensors_of

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, torch.relu, torch.relu_,
    torch.sigmoid, torch.tanh,
}  # fmt: skip
_ACTIVATION_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}
# What torch calls them, in whatever form they come.
ACTIVATION_NAMES = {function.__name__ for function in _ACTIVATION_FUNCTIONS} | _ACTIVATION_METHODS
ACTIVATION_NAMES |= {"prelu", "rrelu", "softsign"}
_SAFE_NAME = re.compile(r"[\w .+/:,=@()<>-]*")


class _LayerTracer(fx.Tracer):
    """Keeps every convolution and linear layer whole, subclasses with their own padding included."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return reads_channels(module) or super().is_leaf_module(module, qualified_name)


@dataclass(frozen=True)
class Tap:
    """Where a layer's filters are read.

    Attributes
    ----------
    conv : str
        Name of the convolution, or linear layer.
    norm : str or None
        Name of the batch norm that directly follows it, if one does.
    call : fx.Node
        Node of the layer itself.
    before : fx.Node
        Node of the map before the activation (after the batch norm).
    after : fx.Node
        Node of the feature map: what the next layer reads. Equal to `before` if nothing follows.
    """

    conv: str
    norm: str | None
    call: fx.Node
    before: fx.Node
    after: fx.Node


def trace(model: nn.Module) -> fx.GraphModule | None:
    """Trace `model`; None where its forward pass cannot be traced.

    No other thread may run a network meanwhile, as `torch.fx` changes how all modules are called.
    """
    if not are_names_safe(model):
        return None
    try:
        with as_it_was(model):
            graph = _LayerTracer().trace(model)
        return fx.GraphModule(model, graph)
    except Exception:  # any code may run inside an untrusted forward pass, and raise anything
        return None


def are_names_safe(model: nn.Module) -> bool:
    """Whether the names in a model can stand in the source code that torch.fx writes and runs.

    It puts them between quotes, as they are. All are checked, also second names of the same thing.
    """
    return all(
        isinstance(name, str) and _SAFE_NAME.fullmatch(name)
        for module in model.modules()
        for name in (*module._modules, *module._parameters, *module._buffers)
    )


def find_taps(traced: fx.GraphModule) -> dict[str, Tap]:
    """Find where every layer's filters are read; one that is called several times, at its first call."""
    modules = dict(traced.named_modules())
    taps: dict[str, Tap] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or not reads_channels(modules[node.target]) or node.target in taps:
            continue
        norm, before = None, node
        follower = _only_user(before)
        if follower is not None and isinstance(modules.get(module_name(follower)), _BatchNorm):
            norm, before = str(follower.target), follower
            follower = _only_user(before)
        after = follower if follower is not None and _is_activation(follower, modules) else before
        taps[node.target] = Tap(node.target, norm, node, before, after)
    return taps


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def module_name(node: fx.Node) -> str:
    """Name of the module that a node calls; empty where it calls none."""
    return str(node.target) if node.op == "call_module" else ""


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[module_name(node)], ACTIVATIONS)
    if node.op == "call_function":
        return node.target in _ACTIVATION_FUNCTIONS
    return node.op == "call_method" and node.target in _ACTIVATION_METHODS


def fold_batch_norms(traced: fx.GraphModule, example: torch.Tensor, *, share: bool = False) -> fx.GraphModule:
    """Copy `traced` with every batch norm that follows a convolution folded into it.

    Only a convolution that is called once and read by its batch norm alone is folded; the copy computes
    the same function in eval mode up to rounding, about 1e-6 of a map's scale. Where it does not, as with
    a subclass that standardises its weights, an unfolded copy is given.

    Parameters
    ----------
    traced : fx.GraphModule
        The network.
    example : Tensor, shape (1, C, *size)
        An input, for comparing.
    share : bool
        Whether the copy shares what is not folded (`prune_viz.network.copies.free_copy`).
    """
    for uneven in (True, False):
        with suppress(Exception):  # an untrusted convolution may take its weights to be anything
            folded = _fold(traced, share, uneven)
            if _compute_the_same(folded, traced, example):
                return folded
    return free_copy(traced, share=share).eval()


def _compute_the_same(folded: fx.GraphModule, traced: fx.GraphModule, example: torch.Tensor) -> bool:
    example = example.to(next(traced.parameters()).device)
    with torch.no_grad():
        pairs = zip(tensors_of(folded(example)), tensors_of(traced(example)), strict=True)
        return all(
            torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
            for one, other in pairs
        )


def norms_behind(model: nn.Module) -> dict[str, str]:
    """Batch norm that directly follows each convolution: by tracing, else by order of registration."""
    traced = trace(model)
    if traced is not None:
        return {name: tap.norm for name, tap in find_taps(traced).items() if tap.norm is not None}
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return {
        name: after
        for (name, conv), (after, norm) in pairwise(leaves)
        if is_convolution(conv) and isinstance(norm, _BatchNorm) and norm.num_features == conv.out_channels
    }


def own_norms(model: nn.Module) -> dict[str, str]:
    """Batch norm behind each layer, where both are called once and the norm takes nothing else."""
    traced = trace(model)
    if traced is None:
        return {}
    calls = Counter(module_name(node) for node in traced.graph.nodes)
    return {
        name: tap.norm
        for name, tap in find_taps(traced).items()
        if tap.norm is not None and calls[name] == calls[tap.norm] == 1
    }


def _fold(traced: fx.GraphModule, share: bool, uneven: bool) -> fx.GraphModule:
    folded = free_copy(traced, share=share).eval()
    put_plain_convolutions(folded, uneven)
    modules = dict(folded.named_modules())
    calls = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    for node in list(folded.graph.nodes):
        conv = modules.get(module_name(node))
        norm_node = _only_user(node)
        norm = modules.get(module_name(norm_node)) if norm_node is not None else None
        if (
            norm_node is None
            or not is_convolution(conv)
            or not isinstance(norm, _BatchNorm)
            or norm.running_mean is None
            or norm.running_var is None
            or (is_transposed(conv) and conv.groups > 1)
            or calls.count(node.target) > 1
        ):
            continue
        fused = fuse_conv_bn_eval(conv, norm, transpose=is_transposed(conv))
        parent, _, attribute = str(node.target).rpartition(".")
        setattr(folded.get_submodule(parent), attribute, fused)
        norm_node.replace_all_uses_with(node)
        folded.graph.erase_node(norm_node)
    folded.recompile()
    return folded


def cut(traced: fx.GraphModule, tap: Tap) -> fx.GraphModule:
    """Build the part of `traced` that leads to a tap, returning the maps before and after its activation.

    The result shares the parameters of `traced`, runs nothing behind the tap, and never overwrites the
    map before the activation.
    """
    needed = ancestors(tap.after)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output((copies[tap.before], copies[tap.after]))
    part = fx.GraphModule(traced, graph)
    _forbid_inplace(part, copies[tap.after])
    return part


class MapReader(fx.Interpreter):
    """Runs a traced model, reading feature maps at some taps as they pass."""

    def __init__(
        self, traced: fx.GraphModule, taps: Sequence[Tap], reading: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(traced)
        self._convs = {tap.after: tap.conv for tap in taps}
        self._reading = reading
        self._read: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; a map is read at once, since a later node may overwrite it."""
        result = super().run_node(n)
        if n in self._convs:
            conv = self._convs[n]
            self._read[conv] = self._reading(maps_of(self.module.get_submodule(conv), result))
        return result

    def read(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is read of each convolution's maps, of inputs of shape (B, C, *size)."""
        self._read = {}
        self.run(inputs)
        return self._read


def upper_bound(traced: fx.GraphModule, tap: Tap) -> float:
    """Largest absolute value of the activation behind a convolution; infinite if it has no bound."""
    node = tap.after
    if node is tap.before:
        return math.inf
    far = torch.tensor([1e4, 1e6, -1e4, -1e6])
    arguments = [far if argument is tap.before else argument for argument in node.args]
    try:
        if node.op == "call_module":
            reached = copy.deepcopy(traced.get_submodule(str(node.target))).cpu()(*arguments, **node.kwargs)
        elif node.op == "call_method":
            reached = getattr(far, str(node.target))(*arguments[1:], **node.kwargs)
        else:
            reached = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
    except Exception:  # an activation that minds the shape, or has arguments computed elsewhere
        return math.inf
    above, further, below, lower = reached.abs().tolist()
    return max(above, below) if further <= 1.001 * above and lower <= 1.001 * below else math.inf


def has_convolution_before(traced: fx.GraphModule, call: fx.Node) -> bool:
    """Whether the output of any other layer reaches `call`."""
    modules = dict(traced.named_modules())
    names = [module_name(node) for node in ancestors(call) if node is not call]
    return any(reads_channels(modules.get(name)) for name in names)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _forbid_inplace(part: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        if getattr(module, "inplace", False):
            separate: Any = copy.copy(module)
            separate.inplace = False
            part.add_module("tapped_activation", separate)
            node.target = "tapped_activation"
    elif node.op == "call_method" and str(node.target).endswith("_"):
        node.target = str(node.target)[:-1]
    elif node.op == "call_function":
        if node.target in (F.relu_, torch.relu_):
            node.target = torch.relu
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    part.recompile()
