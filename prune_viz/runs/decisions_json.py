"""What `decisions.json` and the files beside masks hold, as plain typed data, checked as it is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.output_kind import OutputKind
from prune_viz.runs.run_json import FORMAT, Amount, Count, Index
from prune_viz.runs.verdicts import Verdict

MOST_IN_ALL = 2**24  # filters of a network
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Merge:
    """How the feature map of a removed filter is reconstructed from kept ones.

    Attributes
    ----------
    layer : str
        A convolution that writes the coupled channel; the filters below are its own.
    filter : int
        The removed filter.
    representatives : tuple of int
        Kept filters.
    coefficients : tuple of float
        Their weights.
    constant : float
        What is added.
    """

    layer: str
    filter: Index
    representatives: tuple[Index, ...]
    coefficients: tuple[float, ...]
    constant: float

    def __post_init__(self) -> None:
        if len(self.representatives) != len(self.coefficients):
            raise ValueError("a merge has as many coefficients as representatives")


@dataclass(frozen=True)
class PredictionRecord:
    """Predicted damage as it is stored: None where it was not predicted."""

    damage: float | None
    unit: Unit


def prediction_record(predicted: Damage | None) -> PredictionRecord | None:
    """Predicted damage as files hold it."""
    return None if predicted is None else PredictionRecord(predicted.value, predicted.unit)


def _damage_of(record: PredictionRecord | None) -> Damage | None:
    return None if record is None or record.damage is None else Damage(record.damage, record.unit)


PassageRecord = tuple[str, Index, tuple[tuple[str, Index], ...]]  # of `groups.NormChannel`


@dataclass(frozen=True, kw_only=True)
class BesideMasks:
    """What lies beside masks in `NAME.merges.json` or in a run's `decisions.json`.

    Attributes
    ----------
    model_sha256, weights_sha256 : str or None
        The model that the masks were made for (`prune_viz.runs.fingerprint.Origin`).
    merges : tuple of Merge
        How removed filters are reconstructed.
    predicted : PredictionRecord or None
        What the masks are predicted to cost.
    passages : tuple
        Norm, channel, and the filters that write it, of each `prune_viz.channels.groups.NormChannel`.
    output : OutputKind or None
        What the network returns.
    measured : PredictionRecord or None
        What the masks were measured to cost, on images that no fit saw.
    measured_on : str
        What that was measured on, for people.
    rough : str
        Why predictions are rough, and what would help; empty where they are not.
    unfounded : bool or None
        Whether they can be wrong either way (`is_unfounded`); None in older files.
    """

    model_sha256: str | None
    merges: tuple[Merge, ...]
    weights_sha256: str | None = None
    predicted: PredictionRecord | None = None
    passages: tuple[PassageRecord, ...] = ()
    output: OutputKind | None = None
    measured: PredictionRecord | None = None
    measured_on: str = ""
    rough: str = ""
    unfounded: bool | None = None

    @property
    def is_unfounded(self) -> bool:
        """Whether predictions can be wrong either way, so that merging must be clearly better to be used.

        In older files whatever is rough is.
        """
        return bool(self.rough) if self.unfounded is None else self.unfounded

    @property
    def prediction(self) -> Damage | None:
        """Damage of removing and merging all that the masks remove, summed over groups, where it is known."""
        return _damage_of(self.predicted)

    @property
    def measurement(self) -> Damage | None:
        """The measured change of the output, where there is one."""
        return _damage_of(self.measured)


@dataclass(frozen=True)
class ProducerRecord:
    """A layer that writes channels of a coupling group: filter ``filters[k]`` writes ``channels[k]``."""

    layer: str
    filters: tuple[Index, ...]
    channels: tuple[Index, ...]

    def __post_init__(self) -> None:
        if len(self.filters) != len(self.channels) or len(set(self.filters)) != len(self.filters):
            raise ValueError("a producer has each of its filters at one channel")


@dataclass(frozen=True)
class NormRecord:
    """A norm on the way to the consumers: its channel ``indices[k]`` holds the group's ``channels[k]``."""

    module: str
    indices: tuple[Index, ...]
    channels: tuple[Index, ...]

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.channels):
            raise ValueError("a norm has as many indices as channels")


@dataclass(frozen=True)
class ConsumerRecord:
    """A module that reads a coupling group, and the share of its inputs that are the group's."""

    module: str
    share: Share


_OLDER_NAMES = {  # under which files have them
    "consumers": "readers",
    "producers": "writers",
    "consumers_damage": "readers_damage",
}


class GroupRecord(Struct, frozen=True, rename=_OLDER_NAMES):
    """A coupling group as `decisions.json` holds it (`prune_viz.channels.groups.CouplingGroup`)."""

    id: Index
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    producers: tuple[ProducerRecord, ...]
    channels: Count
    removable: bool
    note: str
    norms: tuple[NormRecord, ...] = ()
    reads: tuple[ConsumerRecord, ...] = ()
    consumers_damage: float | None = None

    def __post_init__(self) -> None:
        places = [*(one.channels for one in self.producers), *(one.channels for one in self.norms)]
        if any(channel >= self.channels for channels in places for channel in channels):
            raise ValueError(f"group {self.id} has {self.channels} channels, and names one beyond them")
        if self.channels > sum(len(producer.filters) for producer in self.producers):
            raise ValueError(f"group {self.id} has more channels than filters that write them")


@dataclass(frozen=True)
class VerdictRecord:
    """A flagged filter with its evidence (`prune_viz.redundancy.judge.ChannelVerdict`)."""

    layer: str
    filter: Index
    verdict: Verdict
    representatives: tuple[Index, ...] = ()
    kind: str = ""
    coefficients: tuple[float, ...] = ()
    constant: float | None = None
    score: float | None = None
    damage: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.verdict.flagged:
            raise ValueError(
                f"a filter with the verdict {self.verdict} is listed among those that are flagged"
            )


@dataclass(frozen=True)
class RemovalOrder:
    """Channels of a group, the least missed first, and the damage of having removed each and all before."""

    group: Index
    channels: tuple[Index, ...]
    damage: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.damage) or len(set(self.channels)) != len(self.channels):
            raise ValueError("a removal order names each channel once, with its damage")


class Allocation(StrEnum):
    """How what a budget asks beyond the verdicts is shared among groups; the value is what files hold."""

    DAMAGE = "damage"
    """By predicted damage for what is saved, over the whole network."""
    EVEN = "even"
    """The same share of every group."""


@dataclass(frozen=True)
class MeasuredBudget:
    """A budget that was tried when the run ended.

    Attributes
    ----------
    allocation : Allocation
        How it was shared.
    saved : float
        Share of the multiply-accumulates.
    filters : int
        How many filters went.
    predicted : float
        Sum of the groups' predicted damage.
    seen : float
        Change of the output on the images of the fits, in the run's unit of damage.
    measured : float
        The same on images that no fit saw.
    """

    allocation: Allocation
    saved: Share
    filters: Amount
    predicted: float
    seen: float
    measured: float

    @property
    def cost(self) -> float:
        """What it is taken to cost: the larger of what was measured on the two sets of images."""
        return max(self.seen, self.measured)


@dataclass(frozen=True, kw_only=True)
class Decisions(BesideMasks):
    """What `decisions.json` holds.

    Attributes
    ----------
    format : int
        Of the file.
    filters : dict of str to int
        How many filters each layer of the network has.
    macs : dict of str to int
        Multiply-accumulates of each module.
    groups : tuple of GroupRecord
        The network's coupling groups.
    verdicts : tuple of VerdictRecord
        The flagged filters.
    removal_order : tuple of RemovalOrder
        A group each.
    tolerance : float
        What a verdict of redundant may cost.
    damage_unit : Unit
        Of every damage here but the groups' `readers_damage`.
    budgets : tuple of MeasuredBudget
        Budgets that were tried; empty where the output's change could not be measured.
    """

    format: int = FORMAT
    filters: dict[str, Count]
    macs: dict[str, Amount]
    groups: tuple[GroupRecord, ...]
    verdicts: tuple[VerdictRecord, ...]
    removal_order: tuple[RemovalOrder, ...]
    tolerance: float | None = None
    damage_unit: Unit = Unit.CONSUMERS
    budgets: tuple[MeasuredBudget, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < sum(self.filters.values()) <= MOST_IN_ALL:
            raise ValueError("filters: none, or more than any network has")
        groups = {group.id: group for group in self.groups}
        if len(groups) != len(self.groups):
            raise ValueError("groups: an id stands there twice")
        for group in self.groups:
            for producer in group.producers:
                if any(number >= self.filters.get(producer.layer, 0) for number in producer.filters):
                    raise ValueError(f"groups: group {group.id} names a filter that its layer does not have")
        for verdict in self.verdicts:
            if verdict.filter >= self.filters.get(verdict.layer, 0):
                raise ValueError("verdicts: one is on a filter that its layer does not have")
        ordered = [order.group for order in self.removal_order]
        if len(set(ordered)) != len(ordered) or not set(ordered) <= groups.keys():
            raise ValueError("removal_order: a group is unknown, or stands there twice")
        for order in self.removal_order:
            if any(channel >= groups[order.group].channels for channel in order.channels):
                raise ValueError(f"removal_order: group {order.group} has no such channel")
            if order.channels and len(order.channels) >= groups[order.group].channels:
                raise ValueError(f"removal_order: nothing of group {order.group} would be left")

    @property
    def ranked(self) -> set[int]:
        """Ids of the groups that have a removal order."""
        return {order.group for order in self.removal_order if order.channels}


def decisions_schema() -> dict[str, Any]:
    """The JSON Schema of `decisions.json`, from the types with which it is read."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Decisions)}
