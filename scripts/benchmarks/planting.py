"""Copies, mixes and dead filters planted in trained networks: a truth to hold an analysis against.

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
images; and consumers' means are put back where they were on those images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.network.tracing import norms_behind

SCALES = (2.0, 0.5)
NOISES = (0.05, 0.1, 0.25)
COPIES, DEAD = ("exact", "scaled", "rewired"), ("silent", "constant", "unread")
PARTS = ("weight", "bias", "running_mean", "running_var")
CAP, HEADROOM_STEPS, CANDIDATES = 6.0, 12, 24


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


class LinearStream(nn.Sequential):
    """Inverted bottlenecks without depthwise convolutions: a residual stream that no activation follows.

    Parameters
    ----------
    width : int
        Channels of the stream.
    inner : int
        Channels between expansion and projection.
    """

    def __init__(self, width: int, inner: int, classes: int = 10) -> None:
        stem = [nn.Conv2d(1, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
        project = [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        head = [nn.Conv2d(width, 2 * inner, 1, bias=False), nn.BatchNorm2d(2 * inner), nn.ReLU()]
        super().__init__(
            *stem, *project, nn.AvgPool2d(2), Bottleneck(width, inner), Bottleneck(width, inner), *head,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * inner, classes),
        )  # fmt: skip


class Bottleneck(nn.Module):
    """A 3x3 expansion with a ReLU and a 1x1 projection without one, beside a shortcut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes (B, width, height, width) to the same."""
        inner: Tensor = self.project(F.relu(self.bn1(self.expand(maps))))
        return maps + self.bn2(inner)


@torch.no_grad()
def plant(
    model: nn.Module, sites: Sequence[Site], images: Tensor, seed: int, each: int = 1
) -> tuple[nn.Module, list[Truth]]:
    """Plant every kind that a site can hold.

    Parameters
    ----------
    model : nn.Module
        A trained network; copied, not changed.
    sites : sequence of Site
        Where; a later one may read an earlier one.
    images : Tensor
        What statistics are measured on.
    seed : int
        Of all that is drawn.
    each : int
        How many of each kind of copy, noise and mix; halved until the site has originals for all.

    Returns
    -------
    nn.Module
        The wider network, in eval mode.
    list of Truth
        One a site.
    """
    model = copy.deepcopy(model).eval()
    random = torch.Generator().manual_seed(seed)
    truths: list[Truth] = []
    for site in sites:
        truths.append(_Planter(model, site, images, random).plant(each, truths))
    return model, truths


class _Planter:
    """Plants at one site of a model, in place."""

    def __init__(self, model: nn.Module, site: Site, images: Tensor, random: torch.Generator) -> None:
        self.model, self.site, self.images, self.random = model, site, images, random
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.own = int(self.modules[site.layer].out_channels)

    def plant(self, each: int, before: Sequence[Truth]) -> Truth:
        site, modules = self.site, self.modules
        means = self._consumer_means()
        reads_copies = any(site.layer in truth.site.consumers for truth in before)
        if site.activation == "relu" and len(site.producers) == 1 and modules[site.layer].kernel_size[0] == 3:
            _widen_kernel(modules[site.layer])
        plants = self._choose(each, reads_copies)
        drawn = torch.randint(self.own, (len(plants),), generator=self.random).tolist()
        rows = [found.sources[0] if found.sources else row for found, row in zip(plants, drawn, strict=True)]
        self._gather(torch.tensor([*range(self.own), *rows]))
        for found in plants:
            self._write(found, before)
        for truth in before:  # what is unread stays so
            unread = [p.channel for p in truth.plants if p.kind == "unread"]
            for conv, _ in site.producers:
                if conv in truth.site.consumers:
                    modules[conv].weight[:, unread] = 0.0
        self._set_statistics([found for found in plants if found.kind not in COPIES])
        for found in plants:
            if found.kind in ("silent", "constant"):
                self._deaden(found)
        for found in plants:
            self._read(found)
        self._restore(means)
        order = torch.randperm(self.own + len(plants), generator=self.random)
        self._gather(order)
        place = order.argsort().tolist()
        moved = [
            replace(p, channel=place[p.channel], sources=tuple(place[source] for source in p.sources))
            for p in plants
        ]
        return Truth(site, self.own, tuple(moved))

    # What is planted

    def _choose(self, each: int, reads_copies: bool) -> list[Plant]:
        """Kinds and originals, all originals different."""
        active, energy, peak = self._activity()
        live = [int(i) for i in energy.argsort(descending=True) if energy[i] > 0][: max(2, self.own * 3 // 4)]
        linear = not self.site.activation
        while each > 1 and 12 * each > len(live):
            each //= 2
        plan: list[tuple[str, float, int]] = []  # kind, amount, sources
        for _ in range(each):
            if not linear:
                plan.append(("negated", 1.0, 1))
            plan += [("scaled", scale, 1) for scale in SCALES]
            plan.append(("exact", 1.0, 1))
            if reads_copies:
                plan.append(("rewired", 1.0, 1))
            plan += [("noisy", noise, 1) for noise in NOISES]
            if linear:
                plan += [("mix", 1.0, 2), ("mix", 1.0, 3)]
            elif self.modules[self.site.layer].kernel_size[0] == 5 and not self.site.inner:
                plan += [("shifted", 1.0, 1), ("blend", 1.0, 2)]
        peaks = self._stimulated_peaks(peak, live) if self.site.activation == "relu6" else peak
        plants: list[Plant] = []
        free = list(live)
        for kind, amount, count in plan:
            fit = free
            if kind == "negated":  # alive on both sides
                fit = [i for i in free if 0.2 < active[i] < 0.8] or free
                fit = fit[: max(4, len(fit) // 2)]
            elif kind == "scaled" and self.site.activation == "relu6":
                fit = [i for i in free if peaks.get(i, CAP) * max(1.0, amount) < CAP]
            if len(fit) < count:
                continue
            picks = [fit[i] for i in torch.randperm(len(fit), generator=self.random)[:count].tolist()]
            free = [i for i in free if i not in picks]
            weights = torch.empty(count).uniform_(0.5, 1.5, generator=self.random)
            if kind == "mix":
                weights *= torch.randint(2, (count,), generator=self.random) * 2 - 1
            number = self.own + len(plants)
            shares = tuple(weights.tolist()) if count > 1 else ()
            plants.append(Plant(kind, number, tuple(picks), amount, shares))
        kinds = [kind for kind in DEAD if kind != "constant" or self._unpadded()]
        return plants + [Plant(kind, self.own + len(plants) + i) for i, kind in enumerate(kinds)]

    def _write(self, found: Plant, before: Sequence[Truth]) -> None:
        """Weights and batch norms of a planted channel; its rows are its first source's so far."""
        site, new = self.site, found.channel
        convs = [self.modules[conv] for conv, _ in site.chain]
        norms = [self.modules[norm] for _, norm in site.chain]
        if found.kind == "scaled":
            for norm in norms[-len(site.inner) :] if site.inner else norms:
                norm.weight[new] *= found.amount
                norm.bias[new] *= found.amount
        elif found.kind == "rewired":
            (truth,) = (truth for truth in before if site.layer in truth.site.consumers)
            for pair in (p for p in truth.plants if p.kind in COPIES):
                moved = convs[0].weight[new, pair.sources[0]].clone()
                moved *= float(torch.empty(()).uniform_(-1, 1, generator=self.random))
                convs[0].weight[new, pair.sources[0]] -= moved
                convs[0].weight[new, pair.channel] += moved / pair.amount
        elif found.kind == "noisy":
            for conv in convs:
                noise = torch.randn(conv.weight[new].shape, generator=self.random)
                conv.weight[new] += found.amount * conv.weight[new].std() * noise
        elif found.kind == "negated":
            for conv, _ in site.producers:
                self.modules[conv].weight[new] *= -1
        elif found.kind == "shifted":
            convs[0].weight[new] = torch.roll(convs[0].weight[new], 1, dims=-1)
        elif found.kind in ("mix", "blend"):
            for conv, norm in zip(convs, norms, strict=True):
                sources = list(found.sources)
                gain = norm.weight[sources] / (norm.running_var[sources] + norm.eps).sqrt()
                share = torch.tensor(found.weights)
                conv.weight[new] = torch.einsum("s,s...->...", share * gain, conv.weight[sources])
                norm.running_mean[new] = share * gain @ norm.running_mean[sources]
                norm.running_var[new], norm.weight[new] = 1.0 - norm.eps, 1.0
                norm.bias[new] = share @ norm.bias[sources]
        elif found.kind in DEAD:  # weights like those of others, in another order
            for conv, norm in zip(convs, norms, strict=True):
                flat = conv.weight[new].flatten()
                flat = flat[torch.randperm(len(flat), generator=self.random)]
                conv.weight[new] = flat.view(conv.weight[new].shape)
                norm.weight[new], norm.bias[new] = norm.weight.median(), norm.bias.median()
            if found.kind == "silent" and self._reads_rectified():
                convs[-1].weight[new] = -convs[-1].weight[new].abs()

    def _set_statistics(self, plants: Sequence[Plant]) -> None:
        """Batch-norm statistics as training would have left them."""
        for conv, norm in self.site.chain:
            with self._seen(conv) as seen:
                self.model(self.images)
            maps = seen[0][1].transpose(0, 1).flatten(1)
            mean, var, eps = maps.mean(dim=1), maps.var(dim=1), self.modules[norm].eps
            stored = self.modules[norm]
            for found in plants:
                new = found.channel
                if found.kind in ("mix", "blend"):
                    # Its own statistics, and a gain and bias that give the same map with them.
                    stored.bias[new] += mean[new] - stored.running_mean[new]
                    stored.running_mean[new], stored.running_var[new] = mean[new], var[new]
                    stored.weight[new] = (var[new] + eps).sqrt()
                elif found.sources:
                    old = found.sources[0]
                    sign = -1 if found.kind == "negated" and (conv, norm) in self.site.producers else 1
                    stored.running_mean[new] = sign * stored.running_mean[old] + mean[new] - sign * mean[old]
                    stored.running_var[new] = stored.running_var[old] * var[new] / var[old].clamp_min(1e-12)
                else:
                    stored.running_mean[new], stored.running_var[new] = mean[new], var[new]

    def _deaden(self, found: Plant) -> None:
        """Batch norm's part of a silent or constant channel."""
        new = found.channel
        norms = [self.modules[norm] for _, norm in (self.site.inner or self.site.producers)]
        for norm in norms:
            norm.weight[new], norm.bias[new] = 0.0, 0.0
        if found.kind == "constant":
            norms[0].bias[new] = 0.5
        elif self._reads_rectified():  # what it reads is never negative, what it gives never positive
            (norm,) = norms
            deviation = (norm.running_var[new] + norm.eps).sqrt()
            norm.weight[new] = norm.weight.median().abs()
            norm.bias[new] = norm.weight[new] * norm.running_mean[new] / deviation - 0.1
        elif self.site.activation:
            norms[0].bias[new] = -0.1

    def _read(self, found: Plant) -> None:
        """Weights that read a planted channel, and what is left for those it was made of."""
        new, sources = found.channel, found.sources
        for consumer in self.site.consumers:
            weight = self.modules[consumer].weight
            if found.kind in DEAD:
                order = torch.randperm(len(weight), generator=self.random)
                weight[:, new] = 0.0 if found.kind == "unread" else weight[order, new].clone()
            elif found.kind == "negated":
                weight[:, new] = -weight[:, sources[0]] / 2
            elif found.weights:
                first, *rest = found.weights
                weight[:, new] = weight[:, sources[0]] / (2 * first)
                weight[:, sources[0]] /= 2
                for source, share in zip(sources[1:], rest, strict=True):
                    weight[:, source] -= share * weight[:, new]
            else:
                scale = found.amount if found.kind == "scaled" else 1.0
                weight[:, sources[0]] /= 2
                weight[:, new] = weight[:, sources[0]] / scale

    # How it is done

    def _gather(self, index: Tensor) -> None:
        """Put channel ``index[k]`` of what is there at k, wherever the site's channels lie."""
        for conv, norm in self.site.chain:
            module, behind = self.modules[conv], self.modules[norm]
            module.weight = nn.Parameter(module.weight.data[index].clone())
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.data[index].clone())
            module.out_channels = behind.num_features = len(index)
            if (conv, norm) in self.site.inner:
                module.in_channels = module.groups = len(index)
            for part in PARTS:
                getattr(behind, part).data = getattr(behind, part).data[index].clone()
        for consumer in self.site.consumers:
            module = self.modules[consumer]
            module.weight = nn.Parameter(module.weight.data[:, index].clone())
            setattr(module, "in_channels" if isinstance(module, nn.Conv2d) else "in_features", len(index))
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _unpadded(self) -> bool:
        return all(
            getattr(self.modules[consumer], "kernel_size", (1,))[0] == 1 for consumer in self.site.consumers
        )

    def _reads_rectified(self) -> bool:
        """Whether the last convolution reads maps that are never negative, on images at least."""
        if len(self.site.producers) > 1 or not self.site.activation:
            return False
        with self._seen(self.site.chain[-1][0]) as seen:
            self.model(self.images[:8])
        return bool(seen[0][0].min() >= 0)

    def _activity(self) -> tuple[Tensor, Tensor, Tensor]:
        """Share of positions where each channel fires, energy its consumers get of it, and its peak."""
        with self._seen(self.site.consumers[0]) as seen, self._seen(self.site.chain[-1][1]) as behind:
            self.model(self.images)
        maps = seen[0][0].transpose(0, 1).flatten(1)
        weights = sum(
            self.modules[consumer].weight.transpose(0, 1).flatten(1).square().sum(dim=1)
            for consumer in self.site.consumers
        )
        peak = behind[0][1].transpose(0, 1).flatten(1).amax(dim=1)
        return (maps > 0).float().mean(dim=1), maps.var(dim=1) * weights, peak

    def _stimulated_peaks(self, peak: Tensor, live: Sequence[int]) -> dict[int, float]:
        """Largest value before the cap, over images and the channel's own stimulus, of a few channels."""
        calm = sorted((i for i in live if peak[i] > 0), key=lambda i: float(peak[i]))[:CANDIDATES]
        conv, norm = self.site.chain[-1]
        shape = tuple(self.images.shape[1:])
        with torch.enable_grad():
            found = pv.maximize(self.model, conv, filters=calm, input_shape=shape, steps=HEADROOM_STEPS)
        with self._seen(norm) as seen:
            self.model(found.images)
        reached = seen[0][1].flatten(2).amax(dim=2)[range(len(calm)), calm]
        return {i: max(float(peak[i]), float(top)) for i, top in zip(calm, reached, strict=True)}

    def _consumer_means(self) -> dict[str, Tensor]:
        with _all_seen([self._seen(consumer) for consumer in self.site.consumers]) as seen:
            self.model(self.images)
        return {
            consumer: _mean_of(calls[0][1]) for consumer, calls in zip(self.site.consumers, seen, strict=True)
        }

    def _restore(self, means: dict[str, Tensor]) -> None:
        """Put the means of the consumers' outputs back where they were, in their bias or norm."""
        behind = norms_behind(self.model)
        for consumer in self.site.consumers:  # in order: a later one may read what an earlier one gives
            shift = self._consumer_means()[consumer] - means[consumer]
            module = self.modules[consumer]
            if module.bias is not None:
                module.bias.data -= shift
            else:
                self.modules[behind[consumer]].running_mean += shift

    @contextmanager
    def _seen(self, name: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What a module reads and gives while the model runs."""
        calls: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((arguments[0], output))

        handle = self.modules[name].register_forward_hook(hook)
        try:
            yield calls
        finally:
            handle.remove()


@contextmanager
def _all_seen(watches: Sequence[Any]) -> Iterator[list[Any]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield [stack.enter_context(watch) for watch in watches]


def _mean_of(output: Tensor) -> Tensor:
    return output.transpose(0, 1).flatten(1).mean(dim=1)


def _widen_kernel(conv: Any) -> None:
    """Make a 3x3 kernel 5x5 with zeros around it, so that it can be moved without a loss."""
    conv.weight = nn.Parameter(F.pad(conv.weight.data, (1, 1, 1, 1)), requires_grad=False)
    conv.kernel_size = (5, 5)
    conv.padding = (2, 2)
