"""What the browser needs to know of a run: its filters, what goes together, what that saves and costs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from prune_viz.report.pages import LayerRow
from prune_viz.report.wording import label
from prune_viz.runs.decisions_json import Decisions
from prune_viz.runs.verdicts import Verdict


def run_data(
    rows: Sequence[LayerRow], decisions: Decisions, filters: pd.DataFrame, run: str
) -> dict[str, Any]:
    """Gather what every page of the report knows of the run, as plain data.

    Parameters
    ----------
    rows : sequence of LayerRow
        All layers, in the order of their pages.
    decisions : Decisions
        The run's.
    filters : DataFrame
        `filters.csv`.
    run : str
        The run's identity (`prune_viz.pruning.review.identity`); empty where it cannot be reviewed yet.

    Returns
    -------
    dict
        ``layers``: ``name``, how that is ``shown``, ``page``, ``group`` (None for none), ``channels`` (of the
        filters; None where the numbers are the same), ``verdicts`` (a letter a filter) and
        ``damage`` (`packed` float32); ``groups``: ``id, channels, removable, layers, reads``; ``macs`` of
        each module; ``run``; ``predicted``, the damage of all that is flagged, None where unknown;
        ``unit``, how damage is written; ``verdicts``: by letter, the name and whether it is flagged;
        ``filters``, how many.
    """
    places = {
        producer.layer: (group.id, dict(zip(producer.filters, producer.channels, strict=True)))
        for group in decisions.groups
        for producer in group.producers
    }
    tables = {str(name): table.sort_values("filter") for name, table in filters.groupby("layer")}
    listed = []
    for row in rows:
        table = tables[row.record.name]
        group, placed = places.get(row.record.name, (None, {}))
        numbers = table["filter"].tolist()
        channels = [placed.get(number, number) for number in numbers]
        listed.append(
            {
                "name": row.record.name,
                "shown": label(row.record.name),
                "page": row.page,
                "group": group,
                "channels": None if channels == numbers else channels,
                "verdicts": "".join(Verdict(verdict).look.letter for verdict in table["verdict"]),
                "damage": packed(np.nan_to_num(table["damage"].to_numpy(np.float32))),
            }
        )
    return {
        "run": run,
        "predicted": None if decisions.predicted is None else decisions.predicted.damage,
        "unit": {name: getattr(decisions.damage_unit, name) for name in ("symbol", "scale", "least", "of")},
        "verdicts": {verdict.look.letter: [verdict, verdict.flagged] for verdict in Verdict},
        "filters": sum(decisions.filters.values()),
        "macs": decisions.macs,
        "layers": listed,
        "groups": [
            {
                "id": group.id,
                "channels": group.channels,
                "removable": group.removable and group.id in decisions.ranked,
                "layers": group.layers,
                "reads": {consumer.module: consumer.share for consumer in group.reads},
            }
            for group in decisions.groups
        ],
    }


def packed(numbers: np.ndarray) -> str:
    """Numbers as the base64 of their bytes, little-endian, for a typed array in the browser."""
    return base64.b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode("ascii")
