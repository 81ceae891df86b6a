"""What the report shows, as plain data: the page of the network and the page of a layer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prune_viz.report import wording
from prune_viz.report.finding import Counts, certainty, count_tied, finding, so_far
from prune_viz.runs.damage import Unit
from prune_viz.runs.decisions_json import Decisions
from prune_viz.runs.run_json import LayerRecord, ModelRecord, Provenance, StageRecord
from prune_viz.runs.verdicts import FLAGGED, Verdict
from prune_viz.utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_DEPTHS = 8  # layers in the picture of stimuli by depth
_ACROSS = 8  # stimuli a layer in it


@dataclass(frozen=True)
class Saving:
    """A cost of the network before and after the flagged filters are removed."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class LayerRow:
    """A layer in the network's table.

    Attributes
    ----------
    record : LayerRecord
        What `run.json` says of it.
    place : int
        Which of the pages of layers it is, from 0; it keeps its filters' names on pages apart from others'.
    page : str
        File name of its page in ``report/layers/``, safe in a URL.
    counts : Counts
        Its verdicts.
    """

    record: LayerRecord
    place: int
    page: str
    counts: Counts


@dataclass(frozen=True)
class DepthTile:
    """A stimulus in the picture of stimuli by depth; `tile` is its place in the sheet."""

    tile: int
    filter: int


@dataclass(frozen=True)
class DepthRow:
    """One layer of the picture of stimuli by depth.

    Attributes
    ----------
    row : LayerRow
        The layer.
    band : str
        What the eye should expect from here on down; empty unless a band begins.
    tiles : list of DepthTile
        Its chosen stimuli.
    """

    row: LayerRow
    band: str
    tiles: list[DepthTile]


@dataclass(frozen=True)
class Stage:
    """A stage of the run; `share` is its part of the whole time, 0 to 1."""

    name: str
    seconds: float
    peak_mib: float | None
    share: float


@dataclass(frozen=True)
class NetworkPage:
    """Everything that ``index.html`` shows; `to_come` is what an unfinished run has still to find."""

    title: str
    subtitle: list[str]
    finding: str
    certainty: str
    to_come: str
    counts: Counts
    savings: list[Saving]
    notes: list[str]
    rows: list[LayerRow]
    depths: list[DepthRow]
    usage: list[tuple[str, list[str]]]
    provenance: list[tuple[str, str]]
    stages: list[Stage]
    damage_unit: Unit


def layer_rows(records: Sequence[LayerRecord], filters: pd.DataFrame) -> list[LayerRow]:
    """Join the layers with the verdicts of their filters, in order of depth.

    Raises
    ------
    UserError
        If a layer's filters are not in the table.
    """
    rows = []
    tables = dict(tuple(filters.groupby("layer", sort=False)))
    for place, record in enumerate(records):
        table = tables.get(record.name)
        if table is None or sorted(table["filter"]) != list(range(record.filters)):
            name = wording.label(record.name)
            raise UserError(f"filters.csv and run.json disagree on layer {name}; run analyze again")
        found = table["verdict"].value_counts()
        counts = Counts({verdict: int(found.get(verdict, 0)) for verdict in Verdict})
        if counts.filters != record.filters:
            raise UserError(f"filters.csv holds a verdict other than {', '.join(Verdict)}; run analyze again")
        rows.append(LayerRow(record, place, f"{record.slug}.html", counts))
    return rows


def network_page(
    run: Path,
    provenance: Provenance,
    decisions: Decisions,
    rows: Sequence[LayerRow],
    filters: pd.DataFrame,
) -> NetworkPage:
    """Gather what the page of the network shows.

    Parameters
    ----------
    run : Path
        The run directory, as the commands on the page should name it.
    provenance : Provenance
        The run's.
    decisions : Decisions
        The run's.
    rows : sequence of LayerRow
        From `layer_rows`.
    filters : DataFrame
        `filters.csv`.
    """
    model, summary = provenance.model, provenance.summary
    counts = Counts({verdict: sum(row.counts[verdict] for row in rows) for verdict in Verdict})
    savings = [Saving("Filters", counts.filters, counts.filters - counts.flagged)]
    for key, name in (("parameters", "Parameters"), ("macs", "Multiply-accumulates")):
        before, after = getattr(summary, key, None), getattr(summary, f"{key}_after", None)
        if before is not None and after is not None:
            savings.append(Saving(name, before, after))
    return NetworkPage(
        title=model.class_name,
        subtitle=[
            Path(model.path).name if model.path else "analysed from Python",
            wording.plural(len(rows), "layer"),
            wording.plural(counts.filters, "filter"),
            f"input {wording.size(model.input_shape)}",
        ],
        finding=so_far(counts) if provenance.to_come else finding(counts, count_tied(filters)),
        certainty=certainty(filters, decisions.prediction, decisions.measurement, decisions.rough),
        counts=counts,
        to_come=wording.enumeration(provenance.to_come),
        savings=[] if provenance.to_come else savings,
        notes=list(provenance.notes),
        rows=list(rows),
        depths=depth_rows(rows, filters),
        usage=usage(model.path, run, model),
        provenance=provenance_table(provenance),
        stages=stages(provenance.stages),
        damage_unit=provenance.damage_unit,
    )


def depth_rows(rows: Sequence[LayerRow], filters: pd.DataFrame) -> list[DepthRow]:
    """Choose the layers and stimuli that show how features change with depth.

    Up to eight layers, evenly spread from first to last; of each, up to eight kept filters of different
    clusters, the most active first.
    """
    count = min(_DEPTHS, len(rows))
    chosen = [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]
    bands = {0: "Early layers, where lines and colours are usual"}
    if count >= 3:
        bands |= {
            round(count / 3): "Middle layers, where textures are usual",
            round(2 * count / 3): "Deep layers, where parts of things are usual",
        }
    depths = []
    tile = 0
    for index, row in enumerate(chosen):
        numbers = _telling_filters(filters[filters["layer"] == row.record.name])
        tiles = [DepthTile(tile + i, number) for i, number in enumerate(numbers)]
        tile += _ACROSS
        depths.append(DepthRow(row, bands.get(index, ""), tiles))
    return depths


def _telling_filters(table: pd.DataFrame) -> list[int]:
    kept = table[~table["verdict"].isin(FLAGGED)]
    ranked = (kept if len(kept) else table).sort_values("activation", ascending=False, kind="stable")
    repeated = ranked.duplicated("cluster") & (ranked["cluster"] >= 0)
    ranked = ranked.assign(repeated=repeated).sort_values("repeated", kind="stable")
    return [int(number) for number in ranked["filter"].head(_ACROSS)]


def usage(model_path: str | None, run: Path, model: ModelRecord) -> list[tuple[str, list[str]]]:
    """Give the lines that put the run's masks to use, each group under its heading."""
    masks = str(run / "masks.pt")
    shape = ", ".join(map(str, model.input_shape))
    arch, options = "", ""
    if model.arch:
        arch = f", arch={model.arch!r}"
        options = f" --arch {shlex.quote(model.arch)}"
        if model.arch_kwargs:
            arch += f", arch_kwargs={model.arch_kwargs!r}"
            options += f" --arch-kwargs {shlex.quote(json.dumps(model.arch_kwargs))}"
    if model.key:
        arch += f", key={model.key!r}"
        options += f" --key {shlex.quote(model.key)}"
    if model.trust_pickle:
        arch += ", trust_pickle=True"
        options += " --trust-pickle"
    said = model.inputs_said or ("--input-shape", ",".join(map(str, model.input_shape)))
    options += " " + shlex.join(said)
    removal = [
        "import torch",
        f"example = torch.zeros(1, {shape})",
        'smaller = pv.remove_filters(model, masks, example, compensate="merge")',
    ]
    smaller = (
        f"prune-viz apply {shlex.quote(model_path or '')} {shlex.quote(masks)}{options} "
        "--out smaller.pt --mode remove --compensate merge"
    )
    command = "On the command line: a smaller network, the lost contributions merged into what stays"
    load = [f"model = pv.load_model({model_path!r}{arch})"] if model_path else []
    return [
        *([(command, [smaller])] if model_path else []),
        (
            "On the command line: masks for another budget, such as a share of the multiply-accumulates",
            [f"prune-viz masks {shlex.quote(str(run))} --macs 0.3 --out masks.pt"],
        ),
        (
            "In Python: hold the flagged filters at zero while you fine-tune",
            [
                "import prune_viz as pv",
                *load,
                f"masks = pv.load_masks({masks!r})",
                "pv.apply_masks(model, masks)  # zero now, and after every optimiser step",
            ],
        ),
        *([] if model.held_inputs else [("In Python: take them out", removal)]),
    ]


def provenance_table(provenance: Provenance) -> list[tuple[str, str]]:
    """List where the report comes from, label and value."""
    model = provenance.model
    arch = model.arch or "as saved in the file"
    if model.arch_kwargs:
        arch += " " + json.dumps(model.arch_kwargs)
    options = ", ".join(f"{name} {_option(value)}" for name, value in provenance.options.items())
    table = [
        ("Model file", model.path or "none, analysed from Python"),
        ("SHA-256", model.sha256),
        ("Architecture", arch),
        ("Loaded with pickle trusted", "yes" if model.trust_pickle else "no"),
        ("Options", options or "defaults"),
        ("Seed", str(provenance.seed)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("Device", f"{provenance.device}, {wording.plural(provenance.threads, 'thread')}"),
        ("Started", wording.moment(provenance.started)),
    ]
    if provenance.finished:  # analyze writes the report as its last stage, before it has finished
        table.append(("Finished", wording.moment(provenance.finished)))
    return table


def _option(value: object) -> str:
    if value is None or value == []:
        return "automatic"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def stages(entries: Sequence[StageRecord]) -> list[Stage]:
    """List the run's stages with their part of its time."""
    total = sum(entry.seconds for entry in entries) or 1.0
    return [Stage(entry.name, entry.seconds, entry.peak_mib, entry.seconds / total) for entry in entries]
