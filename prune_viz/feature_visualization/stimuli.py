"""The input that excites a filter most, under a prior: its stimulus.

For each filter the L2 norm of its feature map is maximised over the inputs that a prior finds equally likely
(`priors`), by `search` and `optimiser`. Every search begins with a draft: few steps from noise on a small
canvas, where they cost little.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_viz.feature_visualization.priors import check_name
from prune_viz.feature_visualization.rendering import plot_pictures
from prune_viz.feature_visualization.search import Search
from prune_viz.loading.state_dicts import check_finite
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics, describe_inputs
from prune_viz.network.precision import AUTO
from prune_viz.network.tall_kernels import turned
from prune_viz.utils.devices import WHOLE, one_thread_each, pick_device, workers_on
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import check_sizes
from prune_viz.utils.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 176
DRAFT_STEPS = 4  # of the drafts, with which every search begins
_POOL_VALUES = 2**26  # of the inputs searched for together: 256 MiB, held as points and as images


@dataclass(frozen=True)
class Stimuli:
    """Stimuli of some filters of a layer.

    Attributes
    ----------
    layer : str
        The layer's name.
    filters : list of int
        Which filters, in the order of the rows below.
    images : Tensor, shape (F, C, *canvas)
        The inputs found, in the model's own (normalised) input units, on the CPU.
    activations : Tensor, shape (F,)
        L2 norm of each filter's feature map on its own stimulus; 0 for a silent filter.
    steps : Tensor of int, shape (F,)
        How many steps led to each stimulus, vain starts not counted.
    diverged : list of int
        Filters whose optimisation met values that are not finite. Their stimulus is the best finite one
        found; where there is none it is zero and the activation NaN.
    statistics : InputStatistics or None
        What was known of the model's inputs; with it pictures have their true colours.
    """

    layer: str
    filters: list[int]
    images: Tensor
    activations: Tensor
    steps: Tensor
    diverged: list[int] = field(default_factory=list)
    statistics: InputStatistics | None = None

    derailed = property(lambda self: self.diverged)  # the older name

    def plot(self, columns: int = 8) -> Figure:
        """Draw the stimuli as a matplotlib figure, `columns` to a row, each stretched around grey."""
        return plot_pictures(self.images.numpy(), list(map(str, self.filters)), columns, self.statistics)


def maximize(
    model: nn.Module,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    input_shape: Sequence[int],
    prior: str = "natural",
    steps: int = STEPS,
    canvas: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = AUTO,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    images: Tensor | None = None,
) -> Stimuli:
    """Find the inputs that excite filters of a layer most.

    Parameters
    ----------
    model : nn.Module
        The network; used in eval mode and left unchanged.
    layer : str
        Name of a convolution, or of a linear layer whose hidden units are looked into.
    filters : sequence of int, optional
        Which filters; all of the layer's by default.
    input_shape : sequence of int
        Shape of one input of the model, channels first: ``(3, 224, 224)``.
    prior : {"natural", "spectrogram", "none"}
        Bound the input by the covariance of natural inputs, by that of spectrograms (C, frequencies, times),
        or by its L2 norm alone.
    steps : int
        Most steps an optimisation may take, at least 1; nearly all take fewer.
    canvas : int, optional
        Size of the stimuli along each axis; from the receptive field by default.
    seed : int
        Seed of the starting noise and the jitter. A filter's stimulus depends on the model, the
        options, the seed, the layer and the filter alone: on CPUs of a kind to the bit, in batches of
        `WHOLE` or more, however many threads there are.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    precision : {"auto", "float32", "bfloat16"}
        Precision of the gradients that the search follows. By default it is bfloat16 where the processor
        has instructions for it. Small layers, those whose maps would come out otherwise, and networks that
        cannot be traced are searched for at float32 in any case. What stimuli reach is measured at float32.
    mean, std : float or sequence of float, optional
        The model's normalisation, a number a channel: input = (pixel - mean) / std, pixels in [0, 1].
    images : Tensor, shape (N, C, *size), optional
        Pixels of example inputs, uint8 or floats in [0, 1]; what is natural is measured on them, and so
        are mean and std unless given.

    Returns
    -------
    Stimuli

    Raises
    ------
    UserError
        If the weights are not finite, the layer or a filter does not exist, an option is out of range or
        the input shape does not fit.
    """
    check_finite(model)
    check_sizes(input_shape, canvas)
    statistics = describe_inputs(input_shape[0], mean, std, images)
    network = FilterNetwork(
        turned(model), input_shape, canvas, pick_device(device), linear=[layer], precision=precision
    )
    wanted = list(range(network.layer(layer).filters)) if filters is None else list(filters)
    workers = workers_on(network.device)
    share = max(1, WHOLE * math.ceil(len(wanted) / (WHOLE * workers)))

    stop = threading.Event()

    def search(begin: int) -> Stimuli:
        torch.set_num_threads(1)
        return find_stimuli(
            network, layer, wanted[begin : begin + share], prior=prior, steps=steps, seed=seed,
            statistics=statistics, stop=stop,
        )  # fmt: skip

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            return _joined(list(pool.map(search, range(0, max(len(wanted), 1), share))))
        finally:
            stop.set()  # for Ctrl-C


def find_stimuli(
    network: FilterNetwork,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    prior: str = "natural",
    steps: int = STEPS,
    seed: int = 0,
    statistics: InputStatistics | None = None,
    fed: Tensor | None = None,
    drafts: Tensor | None = None,
    batch: int | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> Stimuli:
    """Find stimuli in a prepared network; parameters not named here are those of `maximize`.

    A search begins with a draft: few steps from noise, on a small canvas.

    Parameters
    ----------
    statistics : InputStatistics, optional
        What is known of the model's inputs.
    fed : Tensor, shape (F, C, *canvas), optional
        For a depthwise layer, stimuli of the filters that feed `filters`, found with the same options;
        found here if not given. They are rounded to half precision, as a run keeps them.
    drafts : Tensor, shape (F, C, *draft canvas), optional
        The stimuli that ``network.draft`` gives `filters` with the same options and `DRAFT_STEPS`, rounded
        alike; found here if not given.
    batch : int, optional
        Most filters at a time, where memory is short.
    stop : threading.Event, optional
        Once set, the next step raises `StoppedError`.
    progress : Progress, optional
        Advanced by each filter that is done.
    """
    found = network.layer(layer)
    wanted = list(range(found.filters)) if filters is None else [int(number) for number in filters]
    for number in wanted:
        if not 0 <= number < found.filters:
            raise UserError(f"{layer} has filters 0 to {found.filters - 1}, so there is no filter {number}")
    if not wanted:
        raise UserError("no filters were asked for; leave them out for all of the layer's")
    check_options(prior, steps)
    producer = network.producer(layer)
    if producer is not None and fed is None:
        fed = find_stimuli(
            network, producer, wanted, prior=prior, steps=steps, seed=seed, statistics=statistics,
            batch=batch, stop=stop,
        ).images  # fmt: skip
    if drafts is None and not network.is_draft:
        drafts = find_stimuli(
            network.draft, layer, wanted, prior=prior, steps=DRAFT_STEPS, seed=seed, statistics=statistics,
            batch=batch, stop=stop,
        ).images  # fmt: skip
    progress = progress or Progress()
    pool = max(1, _POOL_VALUES // (network.input_shape[0] * math.prod(found.canvas)))
    parts = []
    for start in range(0, len(wanted), pool):
        part = slice(start, start + pool)
        search = Search(network, found, wanted[part], prior, statistics, seed, batch, stop)
        given = [one[part] for one in (fed, drafts) if one is not None]
        search.run(steps, given, progress)
        parts.append(
            Stimuli(
                layer, search.filters, search.images, search.activations, search.steps, search.diverged,
                statistics,
            )
        )  # fmt: skip
    return _joined(parts)


def _joined(parts: Sequence[Stimuli]) -> Stimuli:
    """Stimuli of several sets of filters of a layer, one after the other."""
    return Stimuli(
        parts[0].layer,
        [number for part in parts for number in part.filters],
        torch.cat([part.images for part in parts]),
        torch.cat([part.activations for part in parts]),
        torch.cat([part.steps for part in parts]),
        [number for part in parts for number in part.diverged],
        parts[0].statistics,
    )


def check_options(prior: str, steps: int) -> None:
    """Raise `UserError` if the prior is unknown or there is no step to take."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    check_name(prior)
