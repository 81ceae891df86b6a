"""What the browser needs to know of a run for a review: what goes together, what that saves and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd


def review_data(
    pages: Mapping[str, str], decisions: Mapping[str, Any], filters: pd.DataFrame, run: str
) -> dict[str, Any]:
    """Gather what a review counts with, as plain data.

    Parameters
    ----------
    pages : mapping of str to str
        The file name of each layer's page, in the order of the pages.
    decisions : mapping
        `decisions.json`.
    filters : DataFrame
        `filters.csv`.
    run : str
        The run's identity (`prune_viz.review.identity`).

    Returns
    -------
    dict
        ``layers``: ``name, page, group`` (None for none), ``channels`` (that of each
        filter), ``damage`` (of each) and ``flagged`` (numbers); ``groups``: ``id, channels, removable, note,
        layers, reads``; ``macs`` of each module; ``run``, ``unit`` of the damage and ``filters``, how many.
    """
    ranked = {entry["group"] for entry in decisions["removal_order"] if entry["channels"]}
    places = {
        writer["layer"]: (group["id"], dict(zip(writer["filters"], writer["channels"], strict=True)))
        for group in decisions["groups"]
        for writer in group["writers"]
    }
    tables = {str(name): table.sort_values("filter") for name, table in filters.groupby("layer")}
    listed = []
    for name, page in pages.items():
        table = tables[name]
        group, channels = places.get(name, (None, {}))
        listed.append(
            {
                "name": name,
                "page": page,
                "group": group,
                "channels": [channels.get(number, number) for number in table["filter"].tolist()],
                "damage": [_short(damage) for damage in table["damage"].tolist()],
                "flagged": table.loc[table["verdict"] != "keep", "filter"].tolist(),
            }
        )
    return {
        "run": run,
        "unit": decisions.get("damage_unit", "readers"),
        "filters": sum(decisions["filters"].values()),
        "macs": decisions["macs"],
        "layers": listed,
        "groups": [
            {
                "id": group["id"],
                "channels": group["channels"],
                "removable": bool(group["removable"]) and group["id"] in ranked,
                "layers": group["layers"],
                "reads": {reader["module"]: reader["share"] for reader in group["reads"]},
            }
            for group in decisions["groups"]
        ],
    }


def _short(damage: float) -> float:
    """A damage to three figures; 0 where it is unknown."""
    return float(f"{damage:.3g}") if math.isfinite(damage) else 0.0
