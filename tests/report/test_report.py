"""The report: what it shows, its pictures, escaping, and that it is written whole or not at all."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from PIL import Image
from report_fixture import HOSTILE, SMALL, Plan, write_run

from prune_viz.feature_visualization import rendering
from prune_viz.report import layout, map_drawing, render, sprites, wording, write_report
from prune_viz.report.finding import Counts, certainty, finding
from prune_viz.report.layer_pages import FilterCard, gallery, layer_map, layer_page
from prune_viz.report.pages import depth_rows, layer_rows, usage
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.report_files import NEW_REPORT, OLD_REPORT, remove_report
from prune_viz.runs.run_directory import LayerTensors, RunDirectory
from prune_viz.runs.verdicts import Verdict
from prune_viz.utils.errors import UserError
from prune_viz.utils.progress import Progress


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = write_run(tmp_path_factory.mktemp("run"))
    write_report(made)
    return made


def pages(run: RunDirectory) -> dict[str, str]:
    folder = run.report_page.parent
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.html"))
    }


class Tags(HTMLParser):
    """Every tag with its attributes, and the text, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# --- what is written ---------------------------------------------------------------------------------


def test_a_page_for_the_network_and_one_for_each_layer(run: RunDirectory) -> None:
    slugs = [record.slug for record in run.layers()]
    assert set(pages(run)) == {"index.html", *(f"layers/{slug}.html" for slug in slugs)}
    overview = pages(run)["index.html"]
    assert all(f'href="layers/{slug}.html"' in overview for slug in slugs)


def test_links_between_layers_use_their_slugs(run: RunDirectory) -> None:
    first, middle, last = (record.slug for record in run.layers())
    page = pages(run)[f"layers/{middle}.html"]
    assert f'rel="prev" href="{first}.html"' in page
    assert f'rel="next" href="{last}.html"' in page


def test_every_local_link_and_file_exists(run: RunDirectory) -> None:
    root = run.report_page.parent
    for name, text in pages(run).items():
        parsed = Tags(text)
        anchors = {attributes["id"] for _, attributes in parsed.tags if attributes.get("id")}
        for _, attributes in parsed.tags:
            for link in (attributes.get("href"), attributes.get("src")):
                if link is None:
                    continue
                file, _, anchor = link.partition("#")
                target = (root / name).parent / file if file else root / name
                assert target.is_file(), (name, link)
                if not file:
                    assert anchor in anchors, (name, link)


def test_pictures_named_in_style_sheets_exist(run: RunDirectory) -> None:
    found = 0
    for sheet in run.report_page.parent.rglob("*.css"):
        for file in re.findall(r'url\("([^"]+)"\)', sheet.read_text(encoding="utf-8")):
            assert (sheet.parent / file).is_file()
            found += 1
    assert found >= 2 * len(SMALL) + 1


def test_nothing_points_to_the_network(run: RunDirectory) -> None:
    for path in run.report_page.parent.rglob("*"):
        if path.suffix in {".html", ".css", ".js"}:
            text = re.sub(r"[A-Za-z0-9+/]{32,}", "", path.read_text(encoding="utf-8"))  # packed numbers
            assert not re.search(r"https?://|[\"'(=]//|@import", text), path


def test_strangers_names_are_escaped(run: RunDirectory) -> None:
    shown = wording.printable(HOSTILE)
    for name, text in pages(run).items():
        parsed = Tags(text)
        assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes), name
        assert not any(attributes.get("src") == "x" for _, attributes in parsed.tags), name
        assert [tag for tag, _ in parsed.tags].count("script") == len(render.SCRIPTS) + 2, name
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text), name
        assert shown in parsed.text, name


def test_no_inline_style_or_script(run: RunDirectory) -> None:
    for name, text in pages(run).items():
        for tag, attributes in Tags(text).tags:
            assert "style" not in attributes, name
            assert tag != "style", name
            if tag == "script":
                assert attributes.get("src"), name
        assert render.CONTENT_SECURITY_POLICY.replace("'", "&#39;") in text


def test_every_filter_in_map_gallery_and_evidence(run: RunDirectory) -> None:
    filters = run.read_filters()
    for place, record in enumerate(run.layers()):
        ids = {a["id"] for _, a in Tags(pages(run)[f"layers/{record.slug}.html"]).tags if a.get("id")}
        table = filters[filters["layer"] == record.name]
        for number, verdict in zip(table["filter"], table["verdict"], strict=True):
            assert {f"f{place}-{number}", f"m{place}-{number}"} <= ids
            assert (f"e{place}-{number}" in ids) == (verdict != "keep")


def test_overview_states_the_summary(run: RunDirectory) -> None:
    text = Tags(pages(run)["index.html"]).text
    filters = run.read_filters()
    flagged = (filters["verdict"] != "keep").sum()
    assert f"{flagged} of 80 filters can go" in text
    assert re.search(rf"80\s*→\s*(to )?\s*{80 - flagged}\b", text)
    for verdict in (Verdict.KEEP, Verdict.REDUNDANT, Verdict.DEAD):
        assert re.search(rf"{verdict}\s*{(filters['verdict'] == verdict).sum()}\b", text)
    assert "unjudged" not in text  # as none is
    assert "4.65\u202fM" in text
    assert "4.03\u202fM" in text
    assert "no calibration images were synthesised" in text
    assert "ab" * 32 in text
    assert "23\u202fmin 22\u202fs" in text


def test_pictures_have_names_for_those_who_do_not_see_them(run: RunDirectory) -> None:
    for name, text in pages(run).items():
        for tag, attributes in Tags(text).tags:
            if tag == "img":
                assert attributes.get("alt"), name
            if attributes.get("role") == "img":
                assert attributes.get("aria-label"), name
            if tag == "a" and "t" in (attributes.get("class") or "").split():
                assert attributes.get("aria-label"), name
        ids = [attributes["id"] for _, attributes in Tags(text).tags if attributes.get("id")]
        assert len(ids) == len(set(ids)), name


# --- written whole or not at all ---------------------------------------------------------------------


class Failing(Progress):
    def advance(self, steps: int = 1) -> None:
        raise RuntimeError("power cut")


def test_a_failing_write_leaves_the_old_report(tmp_path: Path) -> None:
    run = write_run(tmp_path, SMALL[:1])
    page = write_report(run)
    page.with_name("mark").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"):
        write_report(run, Failing())
    assert page.with_name("mark").read_text() == "old"
    assert page.is_file()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_new_report_replaces_the_old_one(tmp_path: Path) -> None:
    run = write_run(tmp_path, SMALL[:1])
    page = write_report(run)
    page.write_text("old")
    assert write_report(run) == page == tmp_path / "report" / "index.html"
    assert page.read_text() != "old"


def test_files_beside_the_pages_stay(tmp_path: Path) -> None:
    run = write_run(tmp_path, SMALL[:1])
    page = write_report(run)
    (page.parent / "layers" / "notes.txt").write_text("mine")
    (page.parent / "link").symlink_to(tmp_path / "run.json")
    write_report(run)
    assert (page.parent / "layers" / "notes.txt").read_text() == "mine"
    assert (page.parent / "link").is_symlink()
    remove_report(tmp_path)
    left = sorted(file.name for file in page.parent.rglob("*"))
    assert left == ["files.json", "layers", "link", "notes.txt"]


def test_what_a_killed_write_left_is_put_right(tmp_path: Path) -> None:
    run = write_run(tmp_path, SMALL[:1])
    page = write_report(run)
    page.with_name("mark").write_text("old")
    page.parent.rename(tmp_path / OLD_REPORT)
    (tmp_path / NEW_REPORT).mkdir()
    with pytest.raises(RuntimeError, match="power cut"):
        write_report(run, Failing())
    assert page.with_name("mark").read_text() == "old"


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prune-viz run"):
        write_report(RunDirectory(tmp_path))
    assert not list(tmp_path.iterdir())


def _edit(run: RunDirectory, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((run.path / "run.json").read_text())
    change(value)
    (run.path / "run.json").write_text(json.dumps(value))


def _edit_layer(run: RunDirectory, **values: str) -> None:
    _edit(run, lambda value: value["layers"][0].update(values))


def _unknown_verdict(run: RunDirectory) -> None:
    run.filters_file.write_text(run.filters_file.read_text().replace("keep", "kept"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run.path / run.layers()[0].file).write_bytes(b"no"), "cannot be read"),
        (lambda run: run.filters_file.unlink(), "does not exist"),
        (_unknown_verdict, "verdict"),
        (lambda run: _edit(run, lambda value: value.pop("summary")), "stopped before its first pictures"),
        (lambda run: _edit_layer(run, name="other"), "disagree on layer other"),
        (lambda run: _edit_layer(run, file="layers/a b.safetensors"), "would write"),
    ],
)
def test_a_damaged_run_gets_one_clear_line(
    tmp_path: Path, damage: Callable[[RunDirectory], object], message: str
) -> None:
    run = write_run(tmp_path, SMALL[:1])
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / NEW_REPORT).exists()


# --- pictures ----------------------------------------------------------------------------------------


def colours(count: int) -> np.ndarray:
    """Colours far apart enough to tell after compression, in input units of -1 to 1."""
    levels = np.array([-1.0, 0.0, 1.0])
    return np.array([[levels[i % 3], levels[i // 3 % 3], levels[i // 9 % 3]] for i in range(count)])


@pytest.mark.parametrize("count", [16, slow(130)])
def test_every_tile_shows_its_filter(tmp_path: Path, count: int) -> None:
    """Follow the style sheet as a browser would, from class to pixel, and compare the colour there."""
    wanted = colours(count)
    images = np.broadcast_to(wanted[:, :, None, None], (count, 3, 32, 32)).copy()
    images[:, :, :2], images[:, :, -2:] = 1.0, -1.0  # the same full scale for all
    run = write_run(tmp_path, [Plan("conv", count, (32, 32))], images={"conv": images})
    write_report(run)
    folder = run.report_page.parent / "layers"
    css = (folder / "000-conv.css").read_text()
    for prefix in ("t", "m"):
        for number in range(count):
            pixel = _pixel(folder, css, f"{prefix}0-{number}")
            assert np.abs(pixel / 127.5 - 1 - wanted[number]).max() < 0.15, (prefix, number)


def test_stimuli_by_depth_show_their_filters(tmp_path: Path) -> None:
    wanted = colours(16)
    images = np.broadcast_to(wanted[:, :, None, None], (16, 3, 32, 32)).copy()
    images[:, :, :2], images[:, :, -2:] = 1.0, -1.0
    run = write_run(tmp_path, [Plan("conv", 16, (32, 32))], images={"conv": images})
    page = write_report(run)
    css = page.with_name("depth.css").read_text()
    links = re.findall(r'class="t s(\d+)" href="layers/000-conv.html#f0-(\d+)"', page.read_text())
    assert len(links) == 8
    for tile, number in links:
        pixel = _pixel(page.parent, css, f"s{tile}")
        assert np.abs(pixel / 127.5 - 1 - wanted[int(number)]).max() < 0.15


def _pixel(folder: Path, css: str, name: str) -> np.ndarray:
    for names, file, across, down in re.findall(
        r'^([^{\n]+)\{background-image:url\("([^"]+)"\);background-size:(\d+)00% (\d+)00%\}', css, re.M
    ):
        if f".{name}" in names.split(","):
            x, y = map(
                float, re.search(rf"^\.{name}\{{background-position:(\S+)% (\S+)%\}}", css, re.M).groups()
            )  # type: ignore[union-attr]
            sheet = Image.open(folder / file).convert("RGB")
            side = sheet.width // int(across)
            assert sheet.height == side * int(down)
            left, top = (sheet.width - side) * x / 100, (sheet.height - side) * y / 100
            return np.asarray(sheet, dtype=float)[round(top + side / 2), round(left + side / 2)]
    raise AssertionError(f"no sheet for {name}")


def test_stretch_is_the_stated_rule() -> None:
    x = np.random.default_rng(0).normal(size=(3, 3, 20, 20)) * np.array([0.01, 1, 50]).reshape(3, 1, 1, 1)
    shown = rendering.stretch(x)
    for one, drawn in zip(x, shown, strict=True):
        q = np.sort(np.abs(one).ravel())[int(np.ceil(0.995 * one.size)) - 1]
        np.testing.assert_allclose(drawn, 0.5 + 0.5 * np.clip(one / q, -1, 1), atol=1e-5)


def test_flat_and_broken_stimuli_are_grey() -> None:
    x = np.zeros((2, 3, 8, 8))
    x[1, 0, 0, 0] = np.nan
    assert np.all(rendering.stretch(x) == 0.5)


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
@pytest.mark.parametrize("canvas", [(30,), (12, 12), (9, 20), (6, 10, 12)])
def test_any_kind_of_input_can_be_drawn(canvas: tuple[int, ...], channels: int) -> None:
    images = np.random.default_rng(0).normal(size=(4, channels, *canvas)).astype(np.float16)
    tiles = rendering.draw_pictures(images, 64, rendering.colour_axes(images))
    assert tiles.shape == (4, 64, 64, 3)
    assert tiles.dtype == np.uint8
    assert all(tile.std() > 5 for tile in tiles)
    if channels == 1 and len(canvas) > 1:
        assert np.array_equal(tiles[..., 0], tiles[..., 2])


def test_the_middle_slice_is_drawn() -> None:
    images = np.zeros((1, 3, 5, 8, 8))
    images[:, 0, 2] = 1
    tile = rendering.draw_pictures(images, 64, None)[0]
    assert tuple(tile[32, 32]) == (255, 128, 128)


def test_oblong_stimuli_keep_their_shape() -> None:
    images = np.ones((1, 3, 8, 32))
    tile = rendering.draw_pictures(images, 64, None)[0]
    assert tuple(tile[32, 32]) == (255, 255, 255)
    assert tuple(tile[4, 32]) == (rendering.GREY,) * 3


@pytest.mark.parametrize("filters", [1, 99, 100, 101, 1280, 40_000])
def test_no_sheet_is_too_large_for_a_browser(filters: int) -> None:
    order = list(range(filters))
    for sheet in [*sprites.sheets("x", order, (96, 96)), sprites.thumbnails("x", order, 18)]:
        assert max(sheet.layout.columns, sheet.layout.rows) * sheet.layout.side <= sprites.MAX_SIDE
        assert len(sheet.filters) == sheet.layout.tiles <= sheet.layout.columns * sheet.layout.rows
        assert sheet.layout.side >= 16
    assert [n for sheet in sprites.sheets("x", order, (96, 96)) for n in sheet.filters] == order


def test_response_matrix_is_in_the_given_order(tmp_path: Path) -> None:
    order = np.array([2, 0, 1])
    responses = np.zeros((3, 3), dtype=np.float32)
    responses[2, 0] = 5.0  # stimulus 2 moves filter 0: first row, second column
    responses[np.arange(3), np.arange(3)] = [1.25, 2, 3]
    sprites.write_response_matrix(tmp_path / "r.png", responses, order)
    alpha = np.asarray(Image.open(tmp_path / "r.png").convert("RGBA"))[..., 3]
    assert alpha[0, 1] == 255
    assert alpha[1, 1] == pytest.approx(255 * 0.5, abs=6)  # the square root of a quarter
    assert alpha[1, 0] == 0


def test_a_large_response_matrix_is_averaged(tmp_path: Path) -> None:
    sprites.write_response_matrix(
        tmp_path / "r.png", np.eye(700, dtype=np.float32), np.arange(700), limit=100
    )
    picture = Image.open(tmp_path / "r.png")
    assert picture.size == (100, 100)
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert (np.diag(alpha) > 0).all()
    assert alpha[0, 99] == 0


# --- what is shown -----------------------------------------------------------------------------------


def card(number: int, verdict: str = "keep", activation: float = 1.0, cluster: int = -1) -> FilterCard:
    return FilterCard(number, Verdict(verdict), activation, 0.5, 0.1, cluster, "")


def test_gallery_is_ordered_by_cluster_then_activation() -> None:
    cards = [card(0), card(1, cluster=4), card(2, activation=3, cluster=7), card(3, activation=5, cluster=7)]
    found = [(cluster.number, [c.number for c in cluster.cards]) for cluster in gallery(cards)]
    assert found == [(7, [3, 2]), (4, [1]), (-1, [0])]


def test_map_places_all_inside_and_apart() -> None:
    points = np.random.default_rng(0).normal(size=(150, 2))
    height = 0.56
    side = layout.thumbnail_side(len(points), height)
    centres = layout.place(points, height, side)
    assert (centres >= side / 2).all()
    assert (centres <= np.array([1, height]) - side / 2).all()
    apart = np.abs(centres[:, None] - centres[None]).max(-1) + np.eye(len(points))
    assert apart.min() > 0.85 * side  # none hides another
    assert np.corrcoef(points[:, 0], centres[:, 0])[0, 1] > 0.95
    assert np.corrcoef(points[:, 1], centres[:, 1])[0, 1] < -0.95  # up is up


def test_map_with_one_place_for_all_or_none() -> None:
    same = layer_map([card(i) for i in range(9)], np.ones((9, 2)))
    assert len({(round(tile.left, 1), round(tile.top, 1)) for tile in same.tiles}) == 9
    none = layer_map([card(0)], np.full((1, 2), np.nan))
    assert not none.tiles
    assert [c.number for c in none.unplaced] == [0]


def test_the_map_of_the_network_shows_every_filter_once(run: RunDirectory) -> None:
    rows = layer_rows(run.layers(), filters := run.read_filters())
    page = map_drawing.draw_map(rows, filters)
    assert page is not None
    for dots in page.layers:
        for verdict, end in zip(Verdict, ("h0", "z", "m0-", "h-"), strict=True):
            assert dots.paths.get(verdict, "").count(end) == dots.row.counts[verdict]
    kept_dots = page.layers[0].paths[Verdict.KEEP]
    steps = re.findall(r"[Mm](-?\d+) ?(-?\d+)h0", kept_dots)  # from each dot to the next
    places = np.cumsum(np.array(steps, dtype=int), axis=0)
    assert (places >= 0).all()
    assert (places <= [page.width, page.height]).all()
    own = filters["layer"] == "features.0"
    kept = filters[own & (filters["verdict"] == "keep")]
    assert np.corrcoef(places[:, 0], np.sort(kept["network_x"]))[0, 1] > 0.999
    packed = np.frombuffer(base64.b64decode(page.data["places"]), "<u2").reshape(-1, 2)
    assert len(packed) == len(filters)
    drawn = {tuple(place) for place in places.tolist()}
    said = np.round(packed[: own.sum()][(kept["filter"]).to_numpy()] / 65534 * page.width)
    assert all((abs(np.array(list(drawn)) - place).max(axis=1) <= 1).any() for place in said)
    clusters = np.frombuffer(base64.b64decode(page.data["clusters"]), "<i2")
    assert clusters.tolist() == filters["cluster"].tolist()
    overview = pages(run)["index.html"]
    for place, record in enumerate(run.layers()):
        link = f'<a class="d{record.depth}" data-place="{place}" href="layers/{record.slug}.html"'
        assert link in overview
    css = (run.report_page.parent / "network.css").read_text()
    assert len(page.stimuli) >= 5
    assert all(f"#n{one.tile}{{left:" in css for one in page.stimuli)


def test_network_map_stimuli_show_their_filters(tmp_path: Path) -> None:
    wanted = colours(16)
    images = np.broadcast_to(wanted[:, :, None, None], (16, 3, 32, 32)).copy()
    images[:, :, :2], images[:, :, -2:] = 1.0, -1.0
    page = write_report(write_run(tmp_path, [Plan("conv", 16, (32, 32))], images={"conv": images}))
    css = page.with_name("network.css").read_text()
    links = re.findall(
        r'class="t n(\d+) d0" data-place="0" data-number="(\d+)" href="layers/000-conv.html#f0-\2"',
        page.read_text(),
    )
    assert links
    for tile, number in links:
        pixel = _pixel(page.parent, css, f"n{tile}")
        assert np.abs(pixel / 127.5 - 1 - wanted[int(number)]).max() < 0.15


def test_map_stimuli_hide_no_flagged_filter() -> None:
    random = np.random.default_rng(0)
    centres = random.uniform(size=(4000, 2)) * np.array([1, map_drawing.HEIGHT])
    kept = random.uniform(size=4000) > 0.005
    chosen = map_drawing.spread(centres, kept)
    assert 30 < len(chosen) == len(set(chosen))
    assert kept[chosen].all()
    apart = np.abs(centres[chosen][:, None] - centres[chosen][None]).max(-1) + np.eye(len(chosen))
    assert apart.min() > map_drawing.SIDE
    flagged = np.abs(centres[chosen][:, None] - centres[~kept][None]).max(-1)
    assert flagged.min() > map_drawing.SIDE / 2
    assert map_drawing.spread(centres, random.uniform(size=4000) > 0.9)  # even where most are flagged
    assert map_drawing.spread(centres, np.zeros(4000, dtype=bool)) == []


def test_run_without_network_map_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, SMALL[:1])
    run.read_filters().drop(columns=["network_x", "network_y"]).to_csv(run.filters_file, index=False)
    text = write_report(run).read_text()
    assert 'id="network"' not in text
    assert 'href="#network"' not in text


def test_hull_holds_every_point() -> None:
    points = np.random.default_rng(1).normal(size=(60, 2))
    ring = layout.hull(points)
    assert layout.area(ring) > 0
    for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        assert ((bx - ax) * (points[:, 1] - ay) - (by - ay) * (points[:, 0] - ax) >= -1e-9).all()
    square = np.array([[0, 0], [0, 2], [2, 0], [2, 2], [1, 1]], dtype=float)
    assert layout.area(layout.hull(square)) == pytest.approx(4)


def test_evidence_of_a_redundant_filter(run: RunDirectory) -> None:
    rows = layer_rows(run.layers(), filters := run.read_filters())
    decisions = run.read_decisions()
    table = filters[filters["layer"] == "features.0"]
    responses = run.read_layer(rows[0].record.file).responses
    page = layer_page(rows, 0, table, responses, decisions)
    stated = next(v for v in decisions.verdicts if v.layer == "features.0" and v.verdict == "redundant")
    shown = next(one for one in page.redundant if one.card.number == stated.filter)
    assert tuple(one.number for one in shown.representatives) == stated.representatives
    assert tuple(one.coefficient for one in shown.representatives) == stated.coefficients
    assert shown.card.score == pytest.approx(stated.score)
    assert [one.card.verdict for one in page.dead] == ["dead"]
    assert page.previous is None
    assert page.following is rows[1]


def test_profiles_follow_the_responses(run: RunDirectory) -> None:
    rows = layer_rows(run.layers(), filters := run.read_filters())
    tensors: LayerTensors = run.read_layer(rows[0].record.file)
    table = filters[filters["layer"] == "features.0"]
    page = layer_page(rows, 0, table, tensors.responses, run.read_decisions())
    one = page.redundant[0]
    heights = 20 - np.array([float(v) for v in re.findall(r"V(\S+?)h1", one.profile)])
    column = tensors.responses[page.order, one.card.number]
    np.testing.assert_allclose(heights, 19 * column / column.max(), atol=0.06)
    silent = page.dead[0]
    flat = 20 - np.array([float(v) for v in re.findall(r"V(\S+?)h1", silent.profile)])
    assert flat.max() < 0.1  # noise is not blown up to look like a response
    assert silent.other == ""


def test_stimuli_by_depth_span_the_network() -> None:
    import pandas as pd

    from prune_viz.report.pages import LayerRow
    from prune_viz.runs.run_json import LayerRecord

    rows = [
        LayerRow(
            LayerRecord(f"l{i}", "", 20, i, None, (8, 8), None, f"layers/{i}.safetensors"),
            i,
            "",
            Counts(dict.fromkeys(Verdict, 0) | {Verdict.KEEP: 20}),
        )
        for i in range(30)
    ]
    table = pd.DataFrame(
        {
            "layer": np.repeat([row.record.name for row in rows], 20),
            "filter": np.tile(np.arange(20), 30),
            "verdict": np.tile(["dead"] + ["keep"] * 19, 30),
            "activation": np.tile(np.arange(20.0)[::-1], 30),
            "cluster": np.tile([0, 1, 1, 1, *range(2, 6), *[-1] * 12], 30),
        }
    )
    depths = depth_rows(rows, table)
    assert [depth.row.record.depth for depth in depths] == [0, 4, 8, 12, 17, 21, 25, 29]
    assert [tile.filter for tile in depths[0].tiles] == [1, 4, 5, 6, 7, 8, 9, 10]
    assert sum(bool(depth.band) for depth in depths) == 3
    tiles = [tile.tile for depth in depths for tile in depth.tiles]
    assert tiles == list(range(64))


def test_usage_of_a_model_without_a_file_names_none(run: RunDirectory) -> None:
    model = run.read_provenance().model
    with_file = usage("model.pt", run.path, model)
    without = usage(None, run.path, replace(model, path=None))
    commands = [line for _, lines in without for line in lines]
    assert len(without) == len(with_file) - 1  # `apply` needs a file
    assert any("pv.load_masks" in line for line in commands)
    assert not any("None" in line or "load_model" in line for line in commands)


def test_certainty_names_worst_score_and_damage() -> None:
    import pandas as pd

    table = pd.DataFrame(
        {"verdict": ["redundant", "redundant", "dead", "keep"], "score": [0.9991, 0.99123, np.nan, 0.2]}
    )
    said = certainty(table, Damage(0.0045, Unit.NATS))
    assert "R² of at least 0.9912." in said
    assert said.endswith("move the output by 0.0045\u202fnats.")
    both = certainty(table, Damage(0.0045, Unit.NATS), Damage(0.006, Unit.NATS), "no batch norm")
    assert both.endswith(
        "by 0.0045\u202fnats, and measured to move it by 0.006\u202fnats (rough: the notes say why)."
    )
    assert "R² of 0.9991." in certainty(table.iloc[[0, 3]], None)
    assert certainty(table.iloc[[3]], Damage(0.0, Unit.NATS)) == ""
    assert "move what reads the filters by 10\u202f%" in certainty(table, Damage(0.1, Unit.CONSUMERS))


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((5, 0, 0), "Each of the 5 filters does something that no other does."),
        ((4, 1, 0), "1 of 5 filters can go: it repeats what other filters compute."),
        ((2, 0, 3), "3 of 5 filters can go: they do nothing."),
        ((2, 2, 1), "3 of 5 filters can go: 2 repeat what other filters compute and 1 does nothing."),
        ((4, 1, 0, 2), "1 of 7 filters can go: it repeats what other filters compute. 2 were not judged."),
        (
            (4, 0, 0, 1),
            "Each of the 4 filters that were judged does something that no other does. 1 was not judged.",
        ),
        ((0, 0, 0, 464), "None of the 464 filters was judged; the reason stands at each."),
    ],
)
def test_finding(counts: tuple[int, ...], sentence: str) -> None:
    of = dict.fromkeys(Verdict, 0) | dict(zip(Verdict, counts, strict=False))
    assert finding(Counts(of)) == sentence


def test_finding_leaves_out_what_cannot_go() -> None:
    counts = Counts(dict.fromkeys(Verdict, 0) | {Verdict.KEEP: 6})
    assert finding(counts, tied=6) == "None of the 6 filters was judged; the reason stands at each."
    assert finding(counts, tied=2) == (
        "Each of the 4 filters that were judged does something that no other does. "
        "2 cannot go, whatever they do."
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.0", "plain.0"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("caf\u00e9 \u4e16", "caf\u00e9 \u4e16"),
        ("4\u202fM", "4\u202fM"),
        ("\n\u2028", "\\x0a\\u2028"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert wording.printable(text) == shown
    assert shown.encode("utf-8")


def test_long_names_lose_their_middle() -> None:
    assert wording.label("layer3.0.conv1") == "layer3.0.conv1"
    assert wording.label("ab" * 40, 80) == "ab" * 40
    shown = wording.label("begin" + "x" * 1000 + "end", 80)
    assert len(shown) == 81
    assert (shown[:5], shown[-3:], shown.count("\u2026")) == ("begin", "end", 1)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.quantity(4_652_008), "4.65 M"),
        (wording.quantity(9216), "9,216"),
        (wording.quantity(999_960), "1.00 M"),
        (wording.saving(100, 88), "\u221212.0 %"),
        (wording.saving(100_000, 99_994), "\u22120.006 %"),
        (wording.saving(5, 5), "0 %"),
        (wording.r_squared(0.99999), ">0.9999"),
        (wording.r_squared(1.0), "1.0000"),
        (wording.r_squared(float("nan")), "\u2013"),
        (wording.damage(0.0123, Unit.CONSUMERS), "1.2 %"),
        (wording.damage(1e-5, Unit.OUTPUT), "0.001 %"),
        (wording.damage(0.0123, Unit.NATS), "0.012 nats"),
        (wording.damage(1e-12, Unit.NATS), "under 1e-9 nats"),
        (wording.damage(1e-9, Unit.CONSUMERS), "under 0.0001 %"),
        (wording.activation(1234.5), "1,234"),
        (wording.activation(0.0123), "0.012"),
        (wording.coefficient(-0.49), "\u22120.490"),
        (wording.duration(3725), "1 h 02 min"),
        (wording.memory(2304.5), "2.3 GiB"),
        (wording.size((11, 11)), "11 \u00d7 11"),
        (wording.size(None), "\u2013"),
        (wording.moment("2026-03-02T09:14:03+00:00"), "2026-03-02 09:14 UTC"),
        (wording.moment("soon"), "soon"),
    ],
)
def test_figures_have_units_and_sane_rounding(written: str, expected: str) -> None:
    assert written.replace("\u202f", " ") == expected
