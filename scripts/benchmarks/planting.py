"""Plants what `planted_truth.py` describes in trained networks, and says where it stands."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from planted_truth import COPIES, DEAD, NOISES, SCALES, Plant, Site, Truth
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.network.tracing import norms_behind

PARTS = ("weight", "bias", "running_mean", "running_var")
CAP, HEADROOM_STEPS, CANDIDATES = 6.0, 12, 24


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
