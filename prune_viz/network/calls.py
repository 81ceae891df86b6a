"""A model is called once, on noise: which convolutions run, and whether that leaves its weights alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from prune_viz.network.copies import as_it_was, attached, have_same_parameters, plain_copy
from prune_viz.network.dispatch import DispatchMode
from prune_viz.network.layer_kinds import is_convolution, layers_of
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.memory import Budget, in_words
from prune_viz.utils.nested_tensors import tensors_of


@dataclass(frozen=True)
class CalledCopy:
    """A plain copy of a model, and what happened when the model was called.

    Attributes
    ----------
    model : nn.Module
        In single precision.
    calls : dict of str to int
        How often each layer of filters that runs is called, in the order of their first calls.
    overflowing : list of str
        Layers that gave values that are not finite.
    shares : bool
        Whether the copy shares the model's weights: where a call leaves them as they are.
    """

    model: nn.Module
    calls: dict[str, int]
    overflowing: list[str]
    shares: bool


def called_copy(model: nn.Module, input_shape: tuple[int, ...], linear: Collection[str] = ()) -> CalledCopy:
    """Copy a model, and call it once.

    Parameters
    ----------
    model : nn.Module
        The network.
    input_shape : tuple of int
        (C, *size).
    linear : collection of str
        Linear layers that count beside the convolutions.

    Raises
    ------
    UserError
        If the model has no convolutions, or does not run on an input of that shape.
    """
    _check_maps(model, input_shape)
    called = plain_copy(model).float()
    calls, overflowing = _count_calls(called, input_shape, linear)
    sharing = plain_copy(model, share=True).float()
    shares = have_same_parameters(called, sharing)
    return CalledCopy(sharing if shares else called, calls, overflowing, shares)


def _check_maps(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Refuse a pass in which some tensor would not fit memory: an untrusted network may ask for any size."""
    largest, most = largest_tensor(model, input_shape), Budget.of(torch.device("cpu")).limit
    if 2 * largest > most:  # what is made, and what it is made of
        raise UserError(
            f"on an input of shape {_comma(input_shape)} the model makes a tensor of {in_words(largest)}, "
            f"too much for the {in_words(most)} that may be taken; give a smaller --input-shape"
        )


def largest_tensor(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes of the largest tensor that a call of a model makes, found without memory for it.

    0 where that cannot be found: the model is called on the meta device, which not every model allows.
    """
    sizes = _Sizes()
    try:
        twin = plain_copy(model, share=True).float().to("meta")
        with torch.no_grad(), sizes:
            twin(torch.zeros(1, *input_shape, device="meta"))
    except Exception:  # whatever an untrusted network raises there
        return 0
    return sizes.largest


class _Sizes(DispatchMode):
    """Notes the largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what an operation does, and note how large what it made is."""
        made = func(*args, **kwargs)
        self.largest = max([self.largest, *(one.numel() * one.element_size() for one in tensors_of(made))])
        return made


def _count_calls(
    model: nn.Module, input_shape: tuple[int, ...], linear: Collection[str]
) -> tuple[dict[str, int], list[str]]:
    """Run the model once on noise: how often each layer is called, in order, and which overflow."""
    layers = layers_of(model, linear)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no convolutions, and no hidden units that can be removed: there are "
            "no filters to analyse"
        )
    unset = next((name for name, tensor in model.state_dict().items() if nn.parameter.is_lazy(tensor)), None)
    if unset is not None:
        raise UserError(
            f"{unset} has no values yet: run the model once, or load weights, before its analysis"
        )
    axes = next((len(layer.kernel_size) for layer in layers.values() if is_convolution(layer)), None)
    if not 2 <= len(input_shape) <= 4:
        raise UserError(
            f"input shape {_comma(input_shape)} does not fit: give the channels and one to three sizes"
        )
    calls: dict[str, int] = {}
    overflowing: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(output)):
                overflowing.append(name)

        return hook

    hooks = (module.register_forward_hook(note(name)) for name, module in layers.items())
    try:
        with attached(hooks), torch.no_grad(), as_it_was(model):
            model(ordinary_input(input_shape).to(blank_input(model, input_shape).device))
    except Exception as error:  # whatever an untrusted forward pass raises, the input shape is what we chose
        fits = axes is None or len(input_shape) == axes + 1
        hint = "" if fits else f", its first convolution works on {axes} spatial axes"
        advice = f"{hint}; give the right --input-shape, channels first"
        raise does_not_run(input_shape, error, advice) from None
    if not calls:
        raise UserError(f"{type(model).__name__} calls none of its convolutions when it runs")
    return calls, overflowing


def run_and_size_norms(model: nn.Module, inputs: Tensor) -> Any:
    """Run a network made smaller; norms without parameters then state the channels that they are given."""

    def hook(norm: Any, arguments: tuple[Any, ...]) -> None:
        norm.num_features = arguments[0].shape[1]

    norms = (one for one in model.modules() if isinstance(one, (_BatchNorm, _InstanceNorm)))
    with attached(one.register_forward_pre_hook(hook) for one in norms if one.weight is None):
        return model(inputs)


def does_not_run(input_shape: Sequence[int], error: Exception, advice: str = "") -> UserError:
    """The error to raise where a model fails on an input of a shape, (C, *size)."""
    return UserError(
        f"the model does not run on an input of shape {_comma(input_shape)} ({brief(error)}){advice}"
    )


def blank_input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """One input of zeros, shape (1, *input_shape), on the device and of the type of the model's weights."""
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return torch.zeros(1, *input_shape, device=reference.device, dtype=reference.dtype)


def ordinary_input(input_shape: Sequence[int], rows: int = 1) -> Tensor:
    """Noise, shape (rows, *input_shape), the same each time."""
    return torch.randn(rows, *input_shape, generator=torch.Generator().manual_seed(0))


def _comma(shape: Sequence[int]) -> str:
    return ",".join(str(size) for size in shape)
