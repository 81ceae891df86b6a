"""From a SPEC to an untrained model, and what it takes: shape and normalisation."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune_viz.loading.torchvision_models import torchvision_models
from prune_viz.network.layer_kinds import is_convolution
from prune_viz.utils.errors import UserError
from prune_viz.utils.user_code import current_directory_importable, split_spec

LARGEST_INPUT = 2**26  # numbers that a file may say an input has


def default_input_shape(model: nn.Module, arch: str | None = None) -> tuple[int, ...]:
    """Shape of one input, without the batch, where nobody said it.

    The first of these that applies: the model's own ``input_shape`` attribute, a tuple of positive
    integers, or ``image_size``, one, as vision transformers have it; for a ``torchvision:NAME`` or
    ``timm:NAME`` what its published weights take; 224 by 224. Channels are those of the first registered
    convolution.

    Raises
    ------
    UserError
        If the model has no convolution, a first one that is not two-dimensional, or names an input larger
        than `LARGEST_INPUT`.
    """
    own = getattr(model, "input_shape", None)
    if isinstance(own, tuple) and own and all(isinstance(size, int) and size > 0 for size in own):
        return _sane(own)
    first = next((m for m in model.modules() if is_convolution(m)), None)
    if first is None:
        raise UserError("the model has no convolution, so it has no filters to analyse")
    if len(first.kernel_size) != 2:
        raise UserError(
            "the model does not take pictures: say what it takes with --input-shape, sizes by commas"
        )
    side = getattr(model, "image_size", None)
    if isinstance(side, int) and side > 0:
        return _sane((first.in_channels, side, side))
    return (first.in_channels, *(_published_inputs(arch).size or (224, 224)))


def _sane(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > LARGEST_INPUT:
        raise UserError(f"the model names inputs of shape {shape}, too large to be ones: give --input-shape")
    return shape


def default_normalisation(
    arch: str | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation with which an architecture's published weights take pixels, if any are.

    Parameters
    ----------
    arch : str or None
        Its SPEC.
    channels : int
        Channels of the input; None is given where the published weights take others.
    """
    found = _published_inputs(arch)
    if found.mean is None or found.std is None or {len(found.mean), len(found.std)} != {channels}:
        return None
    return found.mean, found.std


def resolve_architecture(spec: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an untrained model from its SPEC.

    Parameters
    ----------
    spec : str
        ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``, where the factory may be
        dotted, as in ``efficientnet_lite_pytorch:EfficientNet.from_name``. Modules are also looked for
        in the current directory.
    kwargs : mapping, optional
        Keyword arguments for the factory. None may ask for pretrained weights: they come from the file.

    Raises
    ------
    UserError
        If there is no such architecture, or building it fails.
    """
    kwargs = dict(kwargs or {})
    home, name = split_spec(spec)
    downloads = [key for key in kwargs if key.startswith(("weights", "pretrained"))]
    if home in ("torchvision", "timm") and downloads:
        raise UserError(f"--arch-kwargs: leave out {downloads[0]}; the weights come from the model file")
    with current_directory_importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if home == "torchvision":
            factory, defaults = _torchvision_factory(name)
        elif home == "timm":
            factory, defaults = _timm_factory(name)
        else:
            factory, defaults = _imported_factory(home, name), {}
        try:
            model = factory(**{**defaults, **kwargs})
        except Exception as error:
            raise UserError(f"--arch {spec} could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--arch {spec} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _torchvision_factory(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    models = torchvision_models()

    try:
        builder = models.get_model_builder(name)
    except ValueError:
        raise UserError(f"torchvision has no model {name}{_near(name, models.list_models())}") from None
    defaults: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        defaults["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        # As published: their inputs are normalised as all others', and again inside.
        defaults.update(init_weights=False, transform_input=True)
    return builder, defaults


@dataclass(frozen=True)
class _Inputs:
    """What an architecture's published weights take; None where that is not known."""

    size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _published_inputs(arch: str | None) -> _Inputs:
    home, _, name = (arch or "").partition(":")
    if home == "torchvision":
        models = torchvision_models()

        try:
            transforms = models.get_model_weights(name).DEFAULT.transforms()
        except (ValueError, AttributeError):
            return _Inputs()
        crop = _numbers(transforms, "crop_size")
        size = None if crop is None else crop * 2 if len(crop) == 1 else crop
        return _Inputs(size, _numbers(transforms, "mean"), _numbers(transforms, "std"))
    if home == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None:
            return _Inputs(tuple(config.input_size[1:]), tuple(config.mean), tuple(config.std))
    return _Inputs()


def _numbers(transforms: object, name: str) -> tuple[Any, ...] | None:
    found = getattr(transforms, name, None)
    return tuple(found) if isinstance(found, Sequence) else None


def _timm_factory(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    try:
        import timm
    except ImportError:
        raise UserError(f"--arch timm:{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}{_near(name, timm.list_models())}")
    return timm.create_model, {"model_name": name, "pretrained": False}


def _imported_factory(module_name: str, path: str) -> Callable[..., Any]:
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        hint = f"; write {module_name.removesuffix('.py')}:{path}" if module_name.endswith(".py") else ""
        raise UserError(f"--arch: module {module_name} could not be imported ({problem}){hint}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"--arch: {module_name} has no {path}{_near(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"--arch: {module_name}:{path} cannot be called")
    return found  # type: ignore[no-any-return]


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
