"""What is planted in trained networks: kinds of filters, sites that hold them, and the truth about each.

A channel is planted wherever its layer is written and read, batch norms included, and shares the reading
weights of what it repeats, so that the network computes what it did. Which kinds there are, and how true
each is:

- ``exact``, ``scaled``: the same weights, batch norm's gain and bias scaled by `SCALES`. Exact behind a ReLU
  and where no activation follows. Behind a ReLU6 only for maps that stay below 6 / scale; their originals
  are chosen to do so on images and on their own stimuli.
- ``rewired``: an exact copy that reads a copy in the layer before where its original reads that one's
  original. Its weights differ from the original's, its map does not.
- ``noisy``: weights moved by normal noise of 5, 10 or 25% of the original's standard deviation.
- ``mix``: ``a f1 + b f2`` or ``a f1 + b f2 + c f3``, only where no activation follows (projections, a linear
  residual stream), since ``relu(a y1 + b y2)`` is no mix of ``relu(y1)`` and ``relu(y2)``. Where a ReLU does
  follow, such a filter is planted as ``blend``: not linearly redundant, counted neither way.
- ``negated``: weights of the opposite sign, before an activation; not redundant. It is read with minus half
  of the original's weights, as one leaky unit would be.
- ``shifted``: the kernel moved by a column inside a wider one; the same feature elsewhere. Not redundant
  without moving its consumers' kernels too; counted neither way.
- ``silent``, ``constant``, ``unread``: dead. Constants only where consumers have no padding, which would make
  a constant visible at the border, so that it would not be dead.

Noisy, negated, shifted and blended ones change what the network computes by a little. Batch norms of what is
planted hold what training would have left there: the original's statistics, changed as they change on
images; and consumers' means are put back where they were on those images. (`planting.py` does all this.)
"""

from __future__ import annotations

from dataclasses import dataclass

SCALES = (2.0, 0.5)
NOISES = (0.05, 0.1, 0.25)
COPIES, DEAD = ("exact", "scaled", "rewired"), ("silent", "constant", "unread")


@dataclass(frozen=True)
class Site:
    """A place to plant in: channels written by convolutions, carried on, and read.

    Attributes
    ----------
    producers : tuple of (str, str)
        Convolutions and the batch norms behind them; several write a residual stream.
    consumers : tuple of str
        Convolutions and linear layers.
    inner : tuple of (str, str)
        Depthwise convolutions on the way, and their batch norms.
    activation : {"", "relu", "relu6"}
        What follows the batch norms.
    """

    producers: tuple[tuple[str, str], ...]
    consumers: tuple[str, ...]
    inner: tuple[tuple[str, str], ...] = ()
    activation: str = "relu"

    @property
    def layer(self) -> str:
        """The convolution that names the channels."""
        return self.producers[0][0]

    @property
    def chain(self) -> tuple[tuple[str, str], ...]:
        """All convolutions on the way and their batch norms."""
        return self.producers + self.inner


@dataclass(frozen=True)
class Plant:
    """A planted channel: its kind, where it stands, which ones it was made of, and how much of each.

    `amount` is a copy's scale or the share of noise; `weights` are a mix's.
    """

    kind: str
    channel: int
    sources: tuple[int, ...] = ()
    amount: float = 1.0
    weights: tuple[float, ...] = ()

    @property
    def set(self) -> frozenset[int]:
        """The channels of which one is one too many."""
        return frozenset((self.channel, *self.sources))


@dataclass(frozen=True)
class Truth:
    """What was planted at a site that had `channels` before."""

    site: Site
    channels: int
    plants: tuple[Plant, ...]
