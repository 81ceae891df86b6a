"""Coupling groups as plain data: filters that go only together, where they lie, and who reads them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from prune_viz.network.layer_kinds import is_convolution


@dataclass(frozen=True)
class Places:
    """Where a group's channels lie in one module: ``channels[k]`` is at index ``indices[k]``.

    Attributes
    ----------
    module : str
        The module's dotted name.
    indices : ndarray of int, shape (K,)
        Filters of a producer, channels of a norm, or input channels (behind a flatten, features) of a
        consumer.
    channels : ndarray of int, shape (K,)
        Channel of the group that lies there; a channel may lie at several indices.
    """

    module: str
    indices: np.ndarray
    channels: np.ndarray

    def table(self, count: int) -> np.ndarray:
        """The indices of each of so many channels in rising order, shape (count, most of one channel).

        Rows of channels that lie at fewer indices end in -1. Where all lie at equally many, as behind a
        flatten, indices in one column belong together: they are the channels at one position.
        """
        order = np.lexsort((self.indices, self.channels))
        channels, indices = self.channels[order], self.indices[order]
        first = np.searchsorted(channels, channels)
        most = int(np.bincount(self.channels, minlength=count).max(initial=0)) if len(channels) else 0
        table = np.full((count, max(most, 1)), -1)
        table[channels, np.arange(len(channels)) - first] = indices
        return table


@dataclass(frozen=True)
class AxisPlaces:
    """Where a group's channels lie along one axis of a parameter: ``channels[k]`` is at ``indices[k]``.

    Attributes
    ----------
    tensor : str
        Dotted name of the parameter or buffer.
    axis : int
        Which axis.
    indices, channels : ndarray of int, shape (K,)
        As in `Places`.
    """

    tensor: str
    axis: int
    indices: np.ndarray
    channels: np.ndarray


@dataclass(frozen=True)
class NormChannel:
    """A channel of a norm, which is zero once all filters that feed it are removed.

    Attributes
    ----------
    norm : str
        The norm.
    channel : int
        Its channel.
    filters : tuple of (str, int)
        Layer and filter of all that feed it.
    """

    norm: str
    channel: int
    filters: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CouplingGroup:
    """Filters that can only be removed together.

    Attributes
    ----------
    number : int
        Index in the list of groups.
    channels : int
        How many channels there are to keep or remove.
    producers : list of Places
        Convolutions whose filters are tied to the channels, depthwise ones on the way included.
    consumers : list of Places
        Convolutions and linear layers that read the channels.
    removable : bool
        Whether the network can be made smaller by a channel of this group.
    note : str
        Why not, where `removable` is False.
    are_heads : bool
        Whether its channels are heads of attention.
    norms : list of Places
        Norms that the channels pass on their way to the consumers, those behind a concatenation included.
        A silent channel stays silent only where their scales and shifts are zero too.
    axes : list of AxisPlaces
        All that is cut where channels are removed.
    layers : list of str
        Names of the producers.
    """

    number: int
    channels: int
    producers: list[Places]
    consumers: list[Places]
    removable: bool = True
    note: str = ""
    are_heads: bool = False
    norms: list[Places] = field(default_factory=list)
    axes: list[AxisPlaces] = field(default_factory=list, repr=False)
    layers: list[str] = field(init=False)

    def written_by(self, producers: list[Places]) -> CouplingGroup:
        """The group with some of its producers alone, and the channels that these write."""
        written = sorted({channel for places in producers for channel in places.channels.tolist()})
        number_of = np.full(self.channels, -1)
        number_of[written] = np.arange(len(written))

        def part(places: Places) -> Places:
            own = number_of[places.channels] >= 0
            return replace(places, indices=places.indices[own], channels=number_of[places.channels[own]])

        return replace(
            self,
            channels=len(written),
            producers=[part(places) for places in producers],
            consumers=[part(places) for places in self.consumers],
            norms=[part(places) for places in self.norms],
            axes=[],
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", [places.module for places in self.producers])


def norm_channels(producers: Sequence[Places], norms: Sequence[Places], gone: Set[int]) -> list[NormChannel]:
    """The norms' channels that fall silent once some of a group's channels go.

    Parameters
    ----------
    producers, norms : sequence of Places
        The group's (`CouplingGroup`).
    gone : set of int
        Its channels that go.
    """
    filters: dict[int, list[tuple[str, int]]] = {}
    for places in producers:
        for index, channel in zip(places.indices.tolist(), places.channels.tolist(), strict=True):
            filters.setdefault(channel, []).append((places.module, index))
    return [
        NormChannel(places.module, index, tuple(filters[channel]))
        for places in norms
        for index, channel in zip(places.indices.tolist(), places.channels.tolist(), strict=True)
        if channel in gone
    ]


def hidden_layers(model: nn.Module, groups: Sequence[CouplingGroup]) -> list[str]:
    """Names of the linear layers whose hidden units stand in coupling groups."""
    modules = dict(model.named_modules())
    return [layer for group in groups for layer in group.layers if not is_convolution(modules.get(layer))]


def group_of_layer(groups: Sequence[CouplingGroup]) -> dict[str, CouplingGroup]:
    """The group in which each convolution is a producer."""
    return {layer: group for group in groups for layer in group.layers}
