"""Coupling groups verified by experiment: what the labels say of a network is tried on it.

Three experiments are run, each on all groups at once, and on halves of them where it fails, until those are
found that are at fault. One channel of each is disturbed where it is written: nothing but the same channel
at its consumers may move. All channels are silenced: they must arrive silent. And some are removed, in
several choices: every layer must compute what it computes with them silenced, up to rounding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from prune_viz.channels.experiments import CHOICES, Bench
from prune_viz.channels.groups import CouplingGroup

SECONDS = 120.0  # for all experiments on a network
_MANY = 4  # groups of layers with the same names but for numbers

Experiment = Callable[[Sequence[CouplingGroup]], str]
Suspects = Callable[[Sequence[CouplingGroup]], Sequence[CouplingGroup]]


def verified(
    model: nn.Module, groups: Sequence[CouplingGroup], inputs: Tensor, trains: bool = False
) -> list[CouplingGroup]:
    """Give groups as they are, or as not removable with what an experiment said against them.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, plain; left unchanged.
    groups : sequence of CouplingGroup
        As the labels have them.
    inputs : Tensor, shape (B, C, *size)
        Noise that the model runs on.
    trains : bool
        Whether the network does something else in training, which then is tried too.
    """
    if not any(group.removable for group in groups):
        return list(groups)
    deadline = time.monotonic() + SECONDS
    bench = Bench(model, inputs)
    bench.pass_through(groups)
    why = bench.unsteady()
    if why:
        return [replace(group, removable=False, note=group.note or why) for group in groups]
    notes = {group.number: why for group in groups if (why := bench.cannot_watch(group))}
    removals = [partial(bench.remove, choose=choose) for choose in CHOICES]
    experiments: list[Any] = [bench.jolt, bench.silence, *removals]
    passes = [(one, training) for training in ([False, True] if trains else [False]) for one in experiments]
    for experiment, training in passes:
        rest = [group for group in groups if group.removable and group.number not in notes]
        notes |= _failing_kinds(rest, partial(experiment, training=training), bench.suspects, deadline)
    return [
        replace(group, removable=False, note=notes[group.number])
        if group.removable and group.number in notes
        else group
        for group in groups
    ]


def _failing_kinds(
    groups: Sequence[CouplingGroup], experiment: Experiment, suspects: Suspects, deadline: float
) -> dict[int, str]:
    """Why groups fail an experiment, by their numbers; those that are suspected are tried first.

    Blocks of a network repeat. So where the first and the last group of `_MANY` fail whose layers have the
    same names, numbers aside, those between are taken to fail too, and are kept.
    """
    kinds = {group.number: re.sub(r"\d+", "#", " ".join(group.layers)) for group in groups}
    found: dict[int, str] = {}
    rest = list(groups)
    while rest and time.monotonic() < deadline:
        if not experiment(rest):
            return found
        suspected, before = suspects(rest), len(found)
        for kind in dict.fromkeys(kinds[group.number] for group in suspected):
            alike = [group for group in rest if kinds[group.number] == kind]
            why = experiment(alike[:1]) if len(alike) >= _MANY else ""
            if why and experiment(alike[-1:]):
                found |= {group.number: why for group in alike}
        suspected = [group for group in suspected if group.number not in found]
        found |= _failing(suspected, experiment, deadline)
        rest = [group for group in rest if group.number not in found]
        if len(found) == before:  # none of those suspected was at fault
            break
    return found | _failing(rest, experiment, deadline)


def _failing(groups: Sequence[CouplingGroup], experiment: Experiment, deadline: float) -> dict[int, str]:
    """Why groups fail an experiment, by their numbers; found by halving those that fail together."""
    if not groups:
        return {}
    if time.monotonic() > deadline:
        return {group.number: "there was no time left to verify that it can be removed" for group in groups}
    why = experiment(groups)
    if not why:
        return {}
    if len(groups) == 1:
        return {groups[0].number: why}
    half = len(groups) // 2
    found = _failing(groups[:half], experiment, deadline) | _failing(groups[half:], experiment, deadline)
    rest = [group for group in groups if group.number not in found]
    if not found:  # each half is fine, and both together are not
        return {group.number: why for group in groups[:half]}
    return found | (_failing(rest, experiment, deadline) if len(rest) < len(groups) else {})
