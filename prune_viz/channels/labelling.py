"""Labels of channels, carried through a forward pass beside its values.

Every index of every axis of every parameter has a label, and every activation a tensor of labels of its own
shape. Each operation does to the labels what it does to channels (`prune_viz.channels.operations`); those
that can only be removed together are united. So control flow, views, hooks and subclasses of layers need no
rules of their own: the pass is a real one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from prune_viz.channels.calls import FINEST, Call, Ways
from prune_viz.channels.label_sets import LabelSets, blank, compact, shrunk
from prune_viz.channels.operations import FREE, RULES, elementwise, move, reshape, unknown
from prune_viz.channels.parameter_axes import WRITTEN, AmbiguousError, ParameterAxes, ParameterView
from prune_viz.network.copies import as_it_was, attached
from prune_viz.network.dispatch import DispatchMode
from prune_viz.network.layer_kinds import reads_channels
from prune_viz.utils.errors import brief
from prune_viz.utils.nested_tensors import tensors_of

SECONDS = 120.0  # for following the channels of a network
LABELS = 2**28  # in all tensors of labels that are alive at once, 8 bytes each, expanded ones not counted
_CHECKED = 64  # operations from one count of them to the next


class UntraceableError(Exception):
    """The channels of a network cannot be followed; the message says why."""


@dataclass(frozen=True)
class Labelled:
    """What was found of a network's channels.

    Attributes
    ----------
    sets : LabelSets
        Which go together, and which cannot be removed.
    axes : ParameterAxes
        Where they lie in parameters and buffers.
    operations : list of list of str
        The operations of each pass, in order.
    called : dict of str to nn.Module
        The convolutions and linear layers that ran, in order.
    """

    sets: LabelSets
    axes: ParameterAxes
    called: dict[str, Any]
    operations: list[list[str]]

    @property
    def drops(self) -> bool:
        """Whether the network drops values at random though it does not train."""
        return not {"bernoulli", "native_dropout"}.isdisjoint(self.operations[0])

    @property
    def differs_in_training(self) -> bool:
        """Whether the network also runs as in training, and does something else then."""
        return len(self.operations) > 1 and self.operations[0] != self.operations[1]


def label(model: nn.Module, inputs: Tensor, ways: Ways = FINEST) -> Labelled:
    """Follow the channels of a network through a forward pass, and one more as in training.

    Parameters
    ----------
    model : nn.Module
        A plain copy in eval mode and single precision, on the CPU; left as it was.
    inputs : Tensor, shape (B, C, *size)
        An input that it runs on.
    ways : Ways
        How filters are grouped where there are two ways.

    Raises
    ------
    UntraceableError
        If the network does not run, or this takes longer than `SECONDS` or more than `LABELS`.
    """
    sets = LabelSets()
    axes = ParameterAxes(model, sets)
    operations = []
    called: dict[str, Any] = {}
    names = {id(module): name for name, module in model.named_modules() if reads_channels(module)}

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        called.setdefault(names[id(module)], module)

    layers = [module for module in model.modules() if reads_channels(module)]
    deadline = time.monotonic() + SECONDS
    for training in (False, True):
        mode = _Labelling(sets, axes, ways, deadline)
        mode.put(inputs, blank(inputs.shape))
        try:
            hooks = (layer.register_forward_hook(hook) for layer in layers)
            with attached(hooks), steadied(model, training), mode:
                returned = tensors_of(model(inputs))
        except UntraceableError:
            raise
        except Exception as error:  # whatever an untrusted forward pass raises
            if training:  # many need targets then
                continue
            raise UntraceableError(brief(error)) from error
        for output in returned:
            sets.refuse(mode.labels(output), "its filters are the network's output")
        operations.append(mode.operations)
    return Labelled(sets, axes, called, operations)


@contextmanager
def steadied(model: nn.Module, training: bool = False, seed: int = 0) -> Iterator[None]:
    """Let a model run without gradients, by plain kernels, and always the same; then leave it as it was.

    Parameters
    ----------
    model : nn.Module
        The network.
    training : bool
        Whether its modules are set to train; not norms, which would measure what they see, nor what
        drops values at random.
    seed : int
        Of all else that it draws.
    """
    modules = list(model.modules())
    before = [module.training for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in modules:
        module.training = training and not (hasattr(module, "running_mean") or _drops(module))
    try:
        with (
            warnings.catch_warnings(),
            as_it_was(model),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            sdpa_kernel(SDPBackend.MATH),
            _WithoutDropout(),
        ):
            torch.manual_seed(seed)
            warnings.simplefilter("ignore")  # the network's own, heard when the user calls it
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in zip(modules, before, strict=True):
            module.training = was


def _drops(module: nn.Module) -> bool:
    """Whether a module drops values at random in training."""
    kind = type(module).__name__.lower()
    return "drop" in kind or "stochastic" in kind


class _WithoutDropout(DispatchMode):
    """Drops nothing, whatever drops values at random."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what an operation does, unless it drops values."""
        name = func._schema.name
        if name == "aten::bernoulli_" and func._overloadname == "float":
            kept = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].fill_(kept)  # by which it is divided then
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **kwargs)


class _Labelling(DispatchMode):
    """Carries labels beside the values of a forward pass."""

    def __init__(self, sets: LabelSets, axes: ParameterAxes, ways: Ways, deadline: float) -> None:
        super().__init__()
        self._sets, self._axes, self._ways = sets, axes, ways
        self._deadline = deadline
        self._labels: Any = WeakIdKeyDictionary()
        self._puts = 0
        self.operations: list[str] = []

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of an activation; 0 where it carries none."""
        found: Tensor | None = self._labels.get(tensor)
        return blank(tensor.shape) if found is None else found

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what an operation does, and the same to labels."""
        made = func(*args, **kwargs)
        if time.monotonic() > self._deadline:
            raise UntraceableError("following its channels takes too long")
        name = func._schema.name.rpartition("::")[2]
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        self.operations.append(name)
        tensors = tensors_of([*args, *kwargs.values()])
        carrying = [one for one in tensors if one in self._labels]
        shown = [one for one in tensors if self._axes.view(one) is not None]
        if name in FREE or not (carrying or shown):
            return made
        outputs = tensors_of(made)
        call = Call(name, func, args, kwargs, outputs, self._sets, self._axes, self.labels, self._ways)
        if not carrying and self._note_views(call, shown):
            return made
        labels = RULES.get(name, unknown)(call)
        for output, own in zip(outputs, [labels] if isinstance(labels, Tensor) else labels, strict=True):
            self.put(output, own, in_place)
        if outputs and not any(output.numel() for output in outputs):
            self._refuse_all(call, carrying, shown)
        return made

    def _refuse_all(self, call: Call, carrying: list[Tensor], shown: list[Tensor]) -> None:
        """Refuse what goes into an operation and what its weights write: nothing shows what becomes of it."""
        call.refuse([self.labels(one) for one in carrying], _NOTHING)
        numbers = {self._axes.number(one) for one in shown}
        for (number, axis), roles in self._axes.roles.items():
            if number in numbers and WRITTEN in roles:
                self._sets.refuse(self._axes.labels[number, axis], _NOTHING)

    def put(self, output: Tensor, labels: Tensor, in_place: bool = False) -> None:
        """Note the labels of an activation."""
        if in_place and output.numel() * output.element_size() < output.untyped_storage().nbytes():
            before = self.labels(output)
            if not torch.equal(before, labels):  # the whole of it still has its old labels
                self._sets.refuse(before, _PART)
                self._sets.refuse(labels, _PART)
        labels = compact(labels)
        self._labels[output] = labels
        self._puts += 1
        if _numbers(labels) > LABELS or (self._puts % _CHECKED == 0 and self._alive() > LABELS):
            raise UntraceableError("following its channels takes too much memory")

    def _alive(self) -> int:
        return sum(_numbers(labels) for labels in list(self._labels.values()))

    def _note_views(self, call: Call, shown: list[Tensor]) -> bool:
        """Note what an operation makes of parameters alone; False if it takes a rule."""
        views = [view for view in map(self._axes.view, shown) if view is not None]
        rule = RULES.get(call.name)
        try:
            if call.name in _SAME_VALUES:
                self._axes.note_view(call.made[0], views[0])
            elif rule in _MOVING and len(views) == 1:
                self._note_moved(call, shown[0], views[0])
            elif rule is elementwise:
                self._axes.combine(views, call.made[0])
            else:
                return rule not in _WEIGHING  # a sum of a parameter and the like are constants
        except AmbiguousError:
            pass  # then it is no parameter any more, and what it meets is refused
        return True

    def _note_moved(self, call: Call, tensor: Tensor, view: ParameterView) -> None:
        """Note what moving the values of a parameter shows of it."""
        moved = []
        for place in view.places:
            arguments, named = tree_map(
                lambda one, place=place: place if one is tensor else one, (call.args, call.kwargs)
            )
            if RULES[call.name] is reshape:
                moved.append([place.reshape(call.made[0].shape)])
            else:
                moved.append(tensors_of(call.function(*arguments, **named)))
        for number, output in enumerate(call.made):
            places = tuple(parts[number] for parts in moved)
            self._axes.note_view(output, ParameterView(view.number, places, view.computed))


def _numbers(labels: Tensor) -> int:
    """How many labels a tensor holds, those that are only expanded counted once."""
    return shrunk([labels])[0].numel()


_MOVING = {rule for name, rule in RULES.items() if rule in (move, reshape) or name in ("split", "slice")}
_WEIGHING = {RULES["convolution"], RULES["mm"]}
_SAME_VALUES = {"clone", "alias", "detach", "contiguous", "_to_copy", "to", "lift_fresh"}
_NOTHING = "nothing is found on the input that it is traced on, such as no box, so what reads it is not known"
_PART = "it is written into a part of another map"
