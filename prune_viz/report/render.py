"""Writing the report: templates filled in, style sheets, sprite sheets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from prune_viz.feature_visualization.rendering import GREY, colour_axes, draw_pictures
from prune_viz.feature_visualization.top_patches import TopPatches, read_top_patches
from prune_viz.network.inputs import InputStatistics, stored_statistics
from prune_viz.pruning.review import identity
from prune_viz.report import CONTENT_SECURITY_POLICY, map_drawing, sprites, wording
from prune_viz.report.coherence import LayerCoherence, draw_coherence, layer_coherence
from prune_viz.report.damage_histogram import draw_histogram
from prune_viz.report.layer_pages import LayerPage, Map, layer_page
from prune_viz.report.pages import NetworkPage, layer_rows, network_page
from prune_viz.report.panel_data import panel_data
from prune_viz.report.run_data import run_data
from prune_viz.report.savings import budgets, default_budget, draw_curve, measured_budgets
from prune_viz.report.verdict_styles import verdict_styles
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import LayerTensors, RunDirectory
from prune_viz.runs.run_json import LayerRecord
from prune_viz.runs.verdicts import FLAGGED, Verdict
from prune_viz.utils.files import MARK
from prune_viz.utils.progress import Progress

_STRIP_COLUMNS = 8
_STRIP_SIDE = 96
_WEIGHTS_SIDE = 96
_PHOTO_QUALITY = 82
_MAP_WIDTH = 1120  # CSS pixels, on a wide screen

# In the order in which they run: each builds on those before.
SCRIPTS = (
    "pages", "decisions", "selection", "preview", "lasso", "report", "review", "layer_map", "network_map",
    "panel",
)  # fmt: skip


@dataclass
class _Strip:
    """A sheet of chosen stimuli of several layers, filled as the layers are read."""

    places: dict[str, list[tuple[int, int]]]
    tiles: list[np.ndarray]
    layout: sprites.Grid
    statistics: InputStatistics | None

    def add(self, record: LayerRecord, images: np.ndarray) -> None:
        """Draw the chosen stimuli of a layer, whose stimuli are `images`."""
        chosen = self.places.get(record.name, [])
        if chosen:
            drawn = draw_pictures(
                images[[number for _, number in chosen]],
                self.layout.side,
                colour_axes(images, self.statistics),
                self.statistics,
            )
            for (tile, _), picture in zip(chosen, drawn, strict=True):
                self.tiles[tile] = picture


def render(run: RunDirectory, folder: Path, progress: Progress) -> None:
    """Write the whole report of `run` into the empty directory `folder`.

    Raises
    ------
    UserError
        If the run's parts are missing, damaged or disagree.
    """
    provenance = run.read_provenance()
    decisions = run.decisions_so_far()
    filters = run.read_filters()
    rows = layer_rows(run.layers(), filters)
    network = network_page(run.path, provenance, decisions, rows, filters)
    templates = _environment()
    _write_assets(folder / "assets")
    reviewed = run_data(rows, decisions, filters, "" if provenance.to_come else identity(run))
    _write_data(folder / "run.js", "window.pruneVizRun", reviewed)
    (folder / "layers").mkdir()
    statistics = stored_statistics(provenance.inputs, provenance.channels)
    overview = map_drawing.draw_map(rows, filters)
    strip, shown = _strip(network, statistics), _shown_on_map(overview, statistics)
    tables = dict(tuple(filters.groupby("layer", sort=False)))
    files = {row.record.name: row.record.slug for row in rows}
    counts = {row.record.name: row.record.filters for row in rows}
    examples = read_top_patches(run.examples_file, files, counts)
    _write_examples(folder, examples)
    coherences: list[LayerCoherence | None] = []
    progress.start("report", len(rows))
    with ThreadPoolExecutor(1) as pool:  # one layer's pictures are drawn while the next one's page is written
        drawn: Future[None] | None = None
        for index, row in enumerate(rows):
            progress.note(row.record.name)
            tensors = run.read_layer_of(row.record, provenance.channels)
            page = layer_page(rows, index, tables[row.record.name], tensors.responses, decisions)
            windows = examples.windows[row.record.name] if examples else None
            before, plan = drawn, _plan_pictures(page, tensors)
            drawn = pool.submit(_draw_layer, folder / "layers", page, plan, tensors, statistics)
            _write_layer(folder / "layers", page, plan, network, tensors, windows, templates)
            strip.add(row.record, tensors.images)
            shown.add(row.record, tensors.images)
            kept = ~tables[row.record.name].sort_values("filter")["verdict"].isin(FLAGGED).to_numpy()
            coherences.append(layer_coherence(row, tensors.images, kept))
            if before is not None:
                before.result()
            progress.advance()
        if drawn is not None:
            drawn.result()
    known, tried = budgets(decisions), measured_budgets(decisions)
    parts = {
        "budgets": tried or known[1::2],
        "curve": draw_curve(known, tried, default_budget(decisions, provenance.summary)),
        "rough": decisions.rough,
        "coherence": draw_coherence([one for one in coherences if one is not None]),
    }
    _write_network(folder, network, strip, overview, shown, templates, parts)
    progress.finish()


@cache
def _environment() -> jinja2.Environment:
    # autoescape=True, not select_autoescape: that one goes by the ending and would miss .html.j2.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_viz.report"),
        autoescape=True,
        finalize=_printed,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {
            name: getattr(wording, name)
            for name in (
                "count", "quantity", "percent", "plural", "r_squared", "damage", "magnitude", "activation",
                "coefficient", "duration", "memory", "size", "printable", "label",
            )
        }
    )  # fmt: skip
    environment.globals.update(
        saving=wording.saving,
        policy=CONTENT_SECURITY_POLICY,
        scripts=SCRIPTS,
        generator=MARK,
        Verdict=Verdict,
        Unit=Unit,
    )
    return environment


def _printed(value: Any) -> Any:
    """Pass every value that a template prints; strings lose what cannot be seen."""
    return wording.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _write_assets(folder: Path) -> None:
    folder.mkdir()
    for asset in resources.files("prune_viz.report").joinpath("assets").iterdir():
        (folder / asset.name).write_bytes(asset.read_bytes())
    with (folder / "report.css").open("a", encoding="utf-8") as sheet:
        sheet.write("\n".join(verdict_styles()) + "\n")


@dataclass(frozen=True)
class _Pictures:
    """The picture files of a layer.

    Attributes
    ----------
    sheets : list of Sheet
        All its stimuli.
    small : Sheet
        The same in small, for its map.
    weights : Sheet or None
        Its weights, where they are pictures.
    """

    sheets: list[sprites.Sheet]
    small: sprites.Sheet
    weights: sprites.Sheet | None


def _plan_pictures(page: LayerPage, tensors: LayerTensors) -> _Pictures:
    record, weights = page.row.record, None
    if tensors.weights is not None:
        layout = sprites.grid(record.filters, _WEIGHTS_SIDE)
        weights = sprites.Sheet(f"{record.slug}-weights.png", layout, tuple(range(record.filters)))
    return _Pictures(
        sprites.sheets(record.slug, page.order, record.canvas),
        sprites.thumbnails(record.slug, page.order, page.map.side / 100 * _MAP_WIDTH),
        weights,
    )


def _draw_layer(
    folder: Path,
    page: LayerPage,
    plan: _Pictures,
    tensors: LayerTensors,
    statistics: InputStatistics | None,
) -> None:
    """Write a layer's picture files."""
    sprites.write_layer_sheets(folder, tensors.images, plan.sheets, plan.small, statistics)
    matrix = folder / f"{page.row.record.slug}-responses.png"
    sprites.write_response_matrix(matrix, tensors.responses, np.array(page.order))
    if plan.weights is not None and tensors.weights is not None:
        sprites.write_weights(folder / plan.weights.file, tensors.weights, plan.weights.layout)


def _write_layer(
    folder: Path,
    page: LayerPage,
    plan: _Pictures,
    network: NetworkPage,
    tensors: LayerTensors,
    windows: np.ndarray | None,
    templates: jinja2.Environment,
) -> None:
    """Write a layer's page, its styles and the data of its panels."""
    record = page.row.record
    place = page.row.place
    styles = [
        *_sheet_styles(f"t{place}-", plan.sheets),
        *_sheet_styles(f"m{place}-", [plan.small]),
        *_map_styles(page.map, place, plan.small.layout.side),
        *_sheet_styles(f"w{place}-", [] if plan.weights is None else [plan.weights]),
    ]
    _write(folder / f"{record.slug}.css", "\n".join(styles) + "\n")
    places = {row.record.name: row.place for row in network.rows}
    panels = panel_data(page, tensors, network.damage_unit, places, windows)
    _write_text_data(folder / f"{record.slug}.js", f"(window.pruneVizLayers ||= {{}})[{place}]", panels)
    text = templates.get_template("layer.html.j2").render(
        page=page,
        network=network,
        record=record,
        root="../",
        main=f"layer-{place}",
        channels=tensors.images.shape[1],
        place=place,
        examples=windows is not None,
        histogram=draw_histogram(
            [card for cluster in page.clusters for card in cluster.cards], network.damage_unit
        ),
    )
    _write(folder / page.row.page, text)


def _write_network(
    folder: Path,
    network: NetworkPage,
    strip: _Strip,
    overview: map_drawing.NetworkMap | None,
    shown: _Strip,
    templates: jinja2.Environment,
    parts: dict[str, Any],
) -> None:
    _write_strip(folder, "depth", "s", strip, [])
    _write_strip(folder, "network", "n", shown, map_drawing.styles(overview) if overview else [])
    if overview:
        _write_data(folder / "network.js", "window.pruneVizNetwork", overview.data)
    text = templates.get_template("index.html.j2").render(
        network=network, map=overview, root="", main="main", **parts
    )
    _write(folder / "index.html", text)


def _write_examples(folder: Path, examples: TopPatches | None) -> None:
    """Write example images, each a file, and a style sheet that shows one in the class `i` + its number."""
    if examples is None:
        return
    (folder / "examples").mkdir()
    rules = []
    for number, picture in enumerate(examples.pictures):
        file = f"examples/{number}.jpg"
        Image.fromarray(picture).save(folder / file, "JPEG", quality=_PHOTO_QUALITY)
        rules.append(f'.i{number}{{background-image:url("{file}")}}')
    _write(folder / "examples.css", "\n".join(rules) + "\n")


def _write_strip(folder: Path, name: str, prefix: str, strip: _Strip, styles: Iterable[str]) -> None:
    """Write a strip as a sheet and a style sheet of that name; `styles` go into it too."""
    sheet = sprites.Sheet(f"{name}.jpg", strip.layout, tuple(range(strip.layout.tiles)))
    sprites.write_sheet(folder / sheet.file, strip.tiles, strip.layout)
    _write(folder / f"{name}.css", "\n".join([*_sheet_styles(prefix, [sheet]), *styles]) + "\n")


def _strip(network: NetworkPage, statistics: InputStatistics | None) -> _Strip:
    layout = sprites.grid(_STRIP_COLUMNS * max(1, len(network.depths)), _STRIP_SIDE, columns=_STRIP_COLUMNS)
    places = {
        depth.row.record.name: [(tile.tile, tile.filter) for tile in depth.tiles] for depth in network.depths
    }
    return _blank_strip(places, layout, statistics)


def _shown_on_map(overview: map_drawing.NetworkMap | None, statistics: InputStatistics | None) -> _Strip:
    places: dict[str, list[tuple[int, int]]] = {}
    stimuli = overview.stimuli if overview else []
    for one in stimuli:
        places.setdefault(one.row.record.name, []).append((one.tile, one.filter))
    return _blank_strip(places, sprites.grid(max(1, len(stimuli)), _STRIP_SIDE), statistics)


def _blank_strip(
    places: dict[str, list[tuple[int, int]]], layout: sprites.Grid, statistics: InputStatistics | None
) -> _Strip:
    blank = np.full((layout.side, layout.side, 3), GREY, dtype=np.uint8)
    return _Strip(places, [blank] * layout.tiles, layout, statistics)


def _sheet_styles(prefix: str, plan: Iterable[sprites.Sheet]) -> Iterable[str]:
    """Rules that show a filter's tile in any square box of the class `prefix` + its number."""
    for sheet in plan:
        everyone = ",".join(f".{prefix}{number}" for number in sheet.filters)
        size = f"{sheet.layout.columns}00% {sheet.layout.rows}00%"
        yield f'{everyone}{{background-image:url("{sheet.file}");background-size:{size}}}'
        for tile, number in enumerate(sheet.filters):
            x, y = sheet.layout.position(tile)
            yield f".{prefix}{number}{{background-position:{x:.4f}% {y:.4f}%}}"


def _map_styles(page: Map, place: int, pixels: int) -> Iterable[str]:
    yield f"#map-{place}{{--shape:1/{page.height};--side:{page.side:.3f}%;--least:{pixels // 2 + 1}px}}"
    for tile in page.tiles:
        x, y = f"{tile.left:.2f}%", f"{tile.top:.2f}%"
        yield f"#m{place}-{tile.card.number}{{left:{x};top:{y};translate:-{x} -{y}}}"


def _write_data(path: Path, name: str, data: Any) -> None:
    """Write plain data as a script that binds it to a name.

    It is parsed, not written as an object, in which a name could be more than a name.
    """
    _write(path, f"{name} = JSON.parse({_quoted(data)});\n")


def _write_text_data(path: Path, name: str, data: Any) -> None:
    """Write plain data as a script that binds its JSON to a name, to be parsed when it is needed."""
    _write(path, f"{name} = {_quoted(data)};\n")


def _quoted(data: Any) -> str:
    """The JSON of `data` as a string of JavaScript, in which nothing can end a script element."""
    return json.dumps(json.dumps(data, separators=(",", ":"))).replace("<", "\\u003c")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
