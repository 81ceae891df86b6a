"""The table of filters, `filters.csv`: its columns, and reading it whoever wrote it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prune_viz.runs.verdicts import Verdict
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.files import written_aside
from prune_viz.utils.json_files import read_text

if TYPE_CHECKING:
    import pandas as pd

FILTER_COLUMNS = [
    "layer", "filter", "verdict", "representative", "score", "cluster", "x", "y", "activation", "damage",
    "reason", "network_x", "network_y",
]  # fmt: skip
_ADDED = ("network_x", "network_y")  # which runs of earlier versions lack
_FIGURES = ("score", "x", "y", "network_x", "network_y", "activation", "damage")
_WHOLE = ("filter", "cluster")
_WORDS = ("layer", "verdict", "representative", "reason")
_LONGEST_HEADER = 4096  # bytes; pandas takes minutes over a hundred thousand columns


def write_filters(table: pd.DataFrame, path: Path) -> None:
    """Write a table of filters, columns `FILTER_COLUMNS` in that order."""
    with written_aside(path) as aside:
        table[FILTER_COLUMNS].to_csv(aside, index=False, lineterminator="\n")


def read_filters(path: Path) -> pd.DataFrame:
    """Read a table of filters; `representative` is a string, empty where there is none.

    Raises
    ------
    UserError
        If the file is missing or damaged.
    """
    import pandas as pd

    content = read_text(path)
    header = content[:_LONGEST_HEADER].partition(b"\n")[0].decode("utf-8", "replace").strip().split(",")
    missing = [name for name in FILTER_COLUMNS if name not in header and name not in _ADDED]
    if missing or len(set(header)) != len(header):
        what = f"it has no column {missing[0]}" if missing else "it has a column twice"
        raise UserError(f"{path} is damaged: {what}; run analyze again")
    kinds = dict.fromkeys(_FIGURES, np.float64) | dict.fromkeys(_WHOLE, np.int64) | dict.fromkeys(_WORDS, str)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numbers that do not fit a column are damage
            table = pd.read_csv(
                io.BytesIO(content),
                dtype=kinds,
                usecols=[name for name in FILTER_COLUMNS if name in header],
                keep_default_na=False,
                lineterminator="\n",  # a carriage return may stand in a layer's name
                na_values={name: [""] for name in _FIGURES},
            )
    except (ValueError, OverflowError, Warning) as error:
        raise UserError(f"{path} is damaged ({brief(error)}); run analyze again") from None
    if not table["representative"].str.fullmatch(r"([0-9]{1,7}(;[0-9]{1,7})*)?").all():
        raise UserError(f"{path} is damaged: representatives are numbers; run analyze again")
    unknown = sorted(set(table["verdict"]) - set(Verdict))
    if unknown:
        raise UserError(
            f"{path} holds a verdict other than {', '.join(Verdict)}: {unknown[0][:40]!r}; run analyze again"
        )
    return table
