"""Verdicts: which filters repeat others or do nothing, with the numbers that show it.

A channel is redundant when a few kept channels rebuild it. What backward elimination (`elimination`)
proposes is confirmed sparsely and on images that the fit did not see: each proposed channel must be rebuilt
from at most `MAX_REPRESENTATIVES` kept ones, and all of them together must cost the consumers less than the
tolerance, a share of their output's variance. What removal does to the network's own output is measured by
`rank`, where its sensitivity is known, on calibration images. There a redundant channel must,
taken alone, cost the consumers and the output at most half of the tolerance too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prune_viz.calibration.images import HELD_OUT
from prune_viz.channels.groups import CouplingGroup
from prune_viz.redundancy.channel_verdicts import (
    ChannelVerdict,
    GroupVerdicts,
    dead_channel,
    keep_channel,
    keep_whole_group,
)
from prune_viz.redundancy.dead import are_all_silent, dead_kinds
from prune_viz.redundancy.elimination import MERGE_RIDGE, RIDGE, eliminate, invert, rebuild
from prune_viz.redundancy.gram_matrices import GramMatrices
from prune_viz.redundancy.sign_pairs import last_of_their_sign
from prune_viz.runs.damage import Unit
from prune_viz.runs.verdicts import Verdict

TOLERANCE = 1e-3
_MARGIN = 2.0  # photographs lost up to 1.5 times what was allowed on calibration images
MIN_SCORE = 0.97  # share of a channel's variance, held out, that others rebuild where it is redundant


def judge(
    group: CouplingGroup, gram_matrices: Sequence[GramMatrices], tolerance: float = TOLERANCE
) -> GroupVerdicts:
    """Judge every channel of a group.

    Parameters
    ----------
    group : CouplingGroup
        The group; one that is not removable is kept whole.
    gram_matrices : sequence of GramMatrices
        One a consumer.
    tolerance : float
        Damage allowed to all flagged channels of the group together, 0 to 1.

    Returns
    -------
    GroupVerdicts
    """
    consumers = [consumer for consumer in gram_matrices if consumer.output_variance > 0]
    if not group.removable or not gram_matrices:
        return keep_whole_group(group)
    if not consumers:
        # Nothing that reads it varies: no wonder where it is silent, and else there is nothing to judge by.
        silent = are_all_silent(gram_matrices)
        return _all_dead(group.number, group.channels, "silent") if silent else keep_whole_group(group)
    fit, held_out, weight_gram = combine(consumers)
    order, order_damage = eliminate(fit, weight_gram)
    proposed = [channel for channel, damage in zip(order, order_damage, strict=True) if damage <= tolerance]
    dead = dead_kinds(consumers)
    rebuilt = _confirm(proposed, dead, fit, held_out, consumers, tolerance)
    kept = [channel for channel in range(group.channels) if channel not in rebuilt]
    score = _score_kept(kept, fit, held_out, RIDGE)
    damage = np.diag(weight_gram) * np.diag(fit)[:-1]
    channels = []
    for channel in range(group.channels):
        if channel in rebuilt:
            weights = rebuilt[channel]
            named = np.flatnonzero(weights[:-1])
            strength = np.abs(weights[named]) * np.sqrt(np.diag(fit)[named])
            named = named[np.argsort(-strength)]
            kind = "" if len(named) else dead[channel] or "constant"
            channels.append(
                ChannelVerdict(
                    channel,
                    Verdict.DEAD if kind else Verdict.REDUNDANT,
                    kind,
                    [int(index) for index in named],
                    [float(weights[index]) for index in named],
                    float(weights[-1]),
                    1.0 if kind else _score(channel, weights, held_out),
                    _damage({channel: weights}, consumers),
                )
            )
        else:
            channels.append(keep_channel(channel, float(score[channel]), float(damage[channel])))
    return GroupVerdicts(group.number, channels, order, order_damage, _damage(rebuilt, consumers))


def _all_dead(number: int, channels: int, kind: str) -> GroupVerdicts:
    """Verdicts for a group of which no channel does anything; `keep_each_layer` keeps one."""
    found = [dead_channel(channel, kind) for channel in range(channels)]
    order = list(range(channels - 1))
    return GroupVerdicts(number, found, order, [0.0] * len(order), 0.0)


def combine(consumers: Sequence[GramMatrices]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one set of Gram matrices for all consumers, weighted by what each makes of the channels.

    Returns
    -------
    fit, held_out : ndarray, shape (n + 1, n + 1)
        Second moments of the n channels and a constant.
    weight_gram : ndarray, shape (n, n)
        What the consumers make of the channels, in units of damage.
    """
    weight_gram = np.zeros(consumers[0].weight_gram.shape)
    weights = np.zeros(len(consumers))
    for index, consumer in enumerate(consumers):
        weight_gram += consumer.weight_gram / consumer.unit
        weights[index] = np.trace(consumer.weight_gram) / consumer.unit
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(consumers), 1 / len(consumers))
    fit, held_out = np.zeros(consumers[0].fit.shape), np.zeros(consumers[0].fit.shape)
    for weight, consumer in zip(weights, consumers, strict=True):
        fit += weight * consumer.fit
        held_out += weight * consumer.held_out
    return fit, held_out, weight_gram


def order_channels(
    fit: np.ndarray, held_out: np.ndarray, weight_gram: np.ndarray, first: Sequence[int] = ()
) -> tuple[list[int], list[float], np.ndarray]:
    """Order a group's channels by what removing them costs.

    Parameters
    ----------
    fit, held_out, weight_gram : ndarray
        From `combine`.
    first : sequence of int
        Channels that go before all others, in this order.

    Returns
    -------
    order : list of int
        Channels, the least missed first after `first`; the last to stay is left out.
    damage : list of float
        Predicted damage of having removed that channel and all before it.
    pooled : ndarray, shape (channels + 1, channels + 1)
        Second moments of the channels and a constant, over all calibration images and consumers.
    """
    pooled = (1 - HELD_OUT) * fit + HELD_OUT * held_out
    return *eliminate(pooled, weight_gram, MERGE_RIDGE, first), pooled


def rank(
    verdicts: GroupVerdicts,
    gram_matrices: Sequence[GramMatrices],
    weighed: Sequence[GramMatrices],
    ablations: np.ndarray | None,
    unit: Unit,
    signs: np.ndarray | None = None,
) -> tuple[GroupVerdicts, np.ndarray]:
    """Order a judged group's channels, and measure each one's damage, on calibration images.

    Parameters
    ----------
    verdicts : GroupVerdicts
        What was found in the group.
    gram_matrices : sequence of GramMatrices
        One a consumer.
    weighed : sequence of GramMatrices
        The same, outputs counting by what the network's own output makes of them, where that is known
        (`prune_viz.redundancy.gram_matrices.weigh_outputs`).
    ablations : ndarray or None, shape (channels,)
        What silencing each channel costs the network's output, where that is known.
    unit : Unit
        Of the damage by the weighed ones.
    signs : ndarray of int, shape (channels, channels), optional
        Which channels have the same weights, and which opposite ones
        (`prune_viz.redundancy.sign_pairs.weight_signs`).

    Returns
    -------
    GroupVerdicts
        With the order and its damage, every channel's damage, and the scores of kept ones measured anew.
        What is flagged stands first in the order: dead channels, and then redundant ones by their damage.
        A redundant channel that costs the consumers or the network's output more than half of `TOLERANCE`
        is kept after all, and so is the last of a sign where both occur.
        Where nothing that reads the group varies, on these images or those of the verdicts, the order is
        empty and the damage unknown.
    ndarray, shape (channels + 1, channels + 1)
        From `order_channels`.
    """
    if all(one.kind == "silent" for one in verdicts.channels):
        return replace(verdicts, unit=unit), np.array(gram_matrices[0].fit)
    plain = [consumer for consumer in gram_matrices if consumer.output_variance > 0]
    consumers = [consumer for consumer in weighed if consumer.output_variance > 0]
    if not consumers or np.isnan(verdicts.channels[0].damage):
        unknown = [replace(one, score=np.nan, damage=np.nan) for one in verdicts.channels]
        unranked = replace(verdicts, channels=unknown, order=[], order_damage=[], unit=unit)
        return unranked, np.array(gram_matrices[0].fit)
    fit, held_out, weight_gram = combine(consumers)
    costs, flagged = {}, []
    for one in verdicts.channels:
        if not one.verdict.flagged:
            continue
        rebuilt = {one.channel: one.weights(len(fit))}
        costs[one.channel] = _damage(rebuilt, consumers)
        highest = max(costs[one.channel], _damage(rebuilt, plain))
        if one.verdict is Verdict.DEAD or highest <= TOLERANCE / _MARGIN:
            flagged.append(one.channel)
    if signs is not None:
        staying = last_of_their_sign(
            signs, [c for c in flagged if verdicts.channels[c].verdict is not Verdict.DEAD]
        )
        flagged = [channel for channel in flagged if channel not in staying]
    unreached = set() if ablations is None else _unreached(ablations, weight_gram)
    flagged = [channel for channel in flagged if channel not in unreached]
    first = [
        *sorted(unreached),
        *sorted(flagged, key=lambda one: (verdicts.channels[one].verdict is not Verdict.DEAD, costs[one])),
    ]
    first = first[: len(fit) - 2]  # one stays
    order, order_damage, pooled = order_channels(fit, held_out, weight_gram, first)
    kept = sorted(set(range(len(pooled) - 1)) - set(flagged) - unreached)
    score = _score_kept(kept, fit, held_out, MERGE_RIDGE)
    damage = np.diag(weight_gram) * np.diag(pooled)[:-1] if ablations is None else ablations
    channels = []
    for one in verdicts.channels:
        if one.channel in unreached:
            channels.append(dead_channel(one.channel, "unreached"))
        elif one.channel in flagged:
            channels.append(replace(one, damage=costs[one.channel]))
        else:
            channels.append(keep_channel(one.channel, float(score[one.channel]), float(damage[one.channel])))
    ranked = replace(verdicts, channels=channels, order=order, order_damage=order_damage, unit=unit)
    return ranked, pooled


def _unreached(ablations: np.ndarray, weight_gram: np.ndarray) -> set[int]:
    """Channels that are read, but by nothing that the output depends on, however little."""
    return set(np.flatnonzero((ablations == 0) & (np.diag(weight_gram) == 0)).tolist())


def note_silent(verdicts: GroupVerdicts, silent: np.ndarray) -> GroupVerdicts:
    """Note the channels that stay zero on the user's own images, bool, shape (channels,)."""
    return replace(
        verdicts,
        channels=[replace(one, fires=not silent[one.channel]) for one in verdicts.channels],
    )


def _confirm(
    proposed: Sequence[int],
    dead: Sequence[str],
    fit: np.ndarray,
    held_out: np.ndarray,
    consumers: Sequence[GramMatrices],
    tolerance: float,
) -> dict[int, np.ndarray]:
    """Which proposed channels hold up: channel -> weights over channels and constant that rebuild it.

    Of two copies elimination may propose both, the second rebuilt from many others. So those that no few
    of the others rebuild come back, and are tried once more with all that came back at hand.
    """
    kept = np.ones(len(fit) - 1, dtype=bool)
    kept[list(proposed)] = False
    rebuilt: dict[int, np.ndarray] = {}
    alone: dict[int, float] = {}

    def attempt(channel: int) -> bool:
        if dead[channel]:
            # A dead channel needs no representative, unless padding makes a constant visible at the border.
            weights = np.zeros(len(fit))
            weights[-1] = 0.0 if dead[channel] == "unread" else fit[channel, -1]
            loss = _damage({channel: weights}, consumers)
            if loss <= tolerance:
                rebuilt[channel], alone[channel] = weights, loss
                return True
        weights = rebuild(channel, np.flatnonzero(kept), fit)
        loss = _damage({channel: weights}, consumers)
        if loss <= tolerance and _score(channel, weights, held_out) >= MIN_SCORE:
            rebuilt[channel], alone[channel] = weights, loss
            return True
        return False

    back = [channel for channel in proposed if not attempt(channel)]
    kept[back] = True
    serving: set[int] = set()
    for channel in back:
        if channel in serving:
            continue
        kept[channel] = False
        if attempt(channel):
            serving.update(np.flatnonzero(rebuilt[channel][:-1]).tolist())
        else:
            kept[channel] = True
    while rebuilt and _damage(rebuilt, consumers) > tolerance:
        del rebuilt[max(rebuilt, key=lambda channel: alone[channel])]
    return rebuilt


def _residuals(rebuilt: dict[int, np.ndarray], size: int) -> np.ndarray:
    """Rows (removed, n + 1): what is lost of each removed channel, as weights over channels."""
    rows = np.zeros((len(rebuilt), size))
    for row, (channel, weights) in enumerate(rebuilt.items()):
        rows[row] = -weights
        rows[row, channel] += 1.0
    return rows


def _damage(rebuilt: dict[int, np.ndarray], consumers: Sequence[GramMatrices]) -> float:
    """What removing and merging channels costs the consumers, in units of their damage.

    Each consumer is weighed alone. The worse of the fit and held-out Gram matrices counts, and the worse of
    what is lost being independent from tap to tap or the same at all of them.
    """
    if not rebuilt:
        return 0.0
    removed = list(rebuilt)
    rows = _residuals(rebuilt, len(consumers[0].fit))
    named = np.flatnonzero(rows.any(axis=0))  # of a channel and its representatives, few
    rows = rows[:, named]
    total = 0.0
    for consumer in consumers:
        losses = [rows @ half[np.ix_(named, named)] @ rows.T for half in (consumer.fit, consumer.held_out)]
        weight_grams = [
            matrix[np.ix_(removed, removed)] for matrix in (consumer.weight_gram, consumer.smooth_weight_gram)
        ]
        worst = max(float((weight_gram * lost).sum()) for weight_gram in weight_grams for lost in losses)
        total += max(0.0, worst) / consumer.unit
    return total


def _score(channel: int, weights: np.ndarray, gram: np.ndarray) -> float:
    """Share of a channel's variance that the weights rebuild, by the Gram matrices given, 0 to 1."""
    variance = gram[channel, channel] - gram[channel, -1] ** 2
    row = _residuals({channel: weights}, len(gram))[0]
    named = np.flatnonzero(row)  # few
    lost = float(row[named] @ gram[np.ix_(named, named)] @ row[named])
    return 1.0 if variance <= 1e-30 else float(np.clip(1 - lost / variance, 0, 1))


def _score_kept(kept: Sequence[int], fit: np.ndarray, held_out: np.ndarray, ridge: float) -> np.ndarray:
    """Share of each kept channel's variance that all other kept ones rebuild, held out; NaN elsewhere."""
    score = np.full(len(fit) - 1, np.nan)
    if not held_out.any():
        return score
    basis = [*kept, len(fit) - 1]
    inverse = invert(fit[np.ix_(basis, basis)], ridge)
    diagonal = np.maximum(np.diag(inverse), 1e-300)
    rows = inverse / diagonal[:, None]  # each row: one channel minus its regression on the others
    lost = ((rows @ held_out[np.ix_(basis, basis)]) * rows).sum(axis=1)[:-1].clip(min=0)
    variance = (np.diag(held_out)[kept] - held_out[kept, -1] ** 2).clip(min=1e-30)
    score[kept] = np.clip(1 - lost / variance, 0, 1)
    return score
