"""How large a report is, how fast its pages open, and how smoothly its map moves, in a real browser.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/pip install plotly bokeh                         # for plots of those libraries beside it
    .venv/bin/python scripts/benchmarks/bench_report.py RUN  # any run; EfficientNet-lite0's, 2 minutes
    .venv/bin/python scripts/benchmarks/bench_report.py                   # 26,000 made-up filters, 4 minutes

The report of RUN is written anew. Times are medians of several openings in new windows, from asking for the
page until it has been drawn with its scripts run; frames are those between two movements of the pointer over
the map. Needs Chromium. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright
from tables import print_table

from prune_viz.report import write_report
from prune_viz.report.map_drawing import HEIGHT
from prune_viz.runs.run_directory import RunDirectory

OPENINGS = 5
LAYERS, FILTERS = 50, 520  # of the made-up run
POINTER = 90  # movements
# Moves the pointer along a wave over the map, one movement a frame, and tells how long each frame took.
WAVE = """async ([selector, count]) => {
  const node = document.querySelector(selector);
  node.scrollIntoView({ block: "center" });
  const frame = () => new Promise(requestAnimationFrame);
  await frame(); await frame();
  const box = node.getBoundingClientRect(), times = [];
  for (let i = 0; i < count; i += 1) {
    const x = box.left + box.width * (0.1 + 0.8 * i / count);
    const y = box.top + box.height * (0.5 + 0.3 * Math.sin(i / 7));
    const start = performance.now();
    const on = document.elementFromPoint(x, y) || node;
    for (const kind of ["pointermove", "mousemove"]) {
      const make = kind === "pointermove" ? PointerEvent : MouseEvent;
      on.dispatchEvent(new make(kind, { clientX: x, clientY: y, bubbles: true, pointerType: "mouse" }));
    }
    await frame();
    times.push(performance.now() - start);
  }
  return times.sort((a, b) => a - b);
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with WebGL, which the plots of other libraries need."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--enable-unsafe-swiftshader"],
        )
        yield browser
        browser.close()


def made_up_run(folder: Path) -> RunDirectory:
    """A run of many filters, from what the tests draw."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from report_fixture import Plan, write_run

    return write_run(
        folder, [Plan(f"stage{i // 10}.block{i % 10}", FILTERS, (16, 16)) for i in range(LAYERS)]
    )


def loaded_bytes(browser: Browser, page_file: Path) -> int:
    """Bytes of all files that a page asks for."""
    asked: set[str] = set()
    page = browser.new_page()
    page.on("request", lambda request: asked.add(request.url.partition("#")[0]))
    page.goto(page_file.as_uri())
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(300)
    page.close()
    return sum(Path(url.removeprefix("file://")).stat().st_size for url in asked if url.startswith("file://"))


def opening(browser: Browser, page_file: Path, ready: str) -> float:
    """Median of seconds until a page is drawn and `ready`, a condition in the page, holds."""
    seconds = []
    for _ in range(OPENINGS):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page = context.new_page()
        start = time.perf_counter()
        page.goto(page_file.as_uri(), wait_until="load")
        page.wait_for_function(ready)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seconds.append(time.perf_counter() - start)
        context.close()
    return statistics.median(seconds)


def pointing(page: Page, selector: str) -> tuple[float, float]:
    """Median and 95th percentile of milliseconds a frame while the pointer moves over a map."""
    times = page.evaluate(WAVE, [selector, POINTER])
    return statistics.median(times), times[int(0.95 * len(times))]


def lasso(page: Page, selector: str, done: str) -> float:
    """Seconds from letting a lasso around half of a map go until `done` holds."""
    box = page.locator(selector).bounding_box()
    assert box is not None
    left, top, width, height = (box[name] for name in ("x", "y", "width", "height"))
    top, height = max(top, 0), min(height, 780 - max(top, 0))
    page.mouse.move(left + 5, top + 5)
    page.mouse.down()
    for x, y in ((0.5, 0.01), (0.5, 0.98), (0.01, 0.98)):
        page.mouse.move(left + x * width, top + y * height, steps=6)
    start = time.perf_counter()
    page.mouse.up()
    page.wait_for_function(done)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return time.perf_counter() - start


def write_plotly(places: np.ndarray, out: Path) -> None:
    """The same points with plotly, its script in the file."""
    from plotly import graph_objects

    figure = graph_objects.Figure(
        graph_objects.Scattergl(x=places[:, 0], y=places[:, 1], mode="markers", marker={"size": 3})
    )
    figure.update_layout(width=1120, height=round(1120 * HEIGHT), dragmode="lasso")
    figure.write_html(out, include_plotlyjs=True)


def write_bokeh(places: np.ndarray, out: Path) -> None:
    """The same points with bokeh, its script in the file."""
    from bokeh.embed import file_html
    from bokeh.plotting import figure
    from bokeh.resources import INLINE

    plot = figure(width=1120, height=round(1120 * HEIGHT), tools="lasso_select,hover", output_backend="webgl")
    plot.scatter(places[:, 0], places[:, 1], size=3)
    out.write_text(file_html(plot, INLINE, "map"))


PLOTS: dict[str, tuple[Callable[[np.ndarray, Path], None], str, str]] = {
    "plotly": (write_plotly, ".plot-container", "document.querySelector('.nsewdrag')"),
    "bokeh": (
        write_bokeh,
        "body > div",
        "window.Bokeh && (Object.keys(Bokeh.index).length || (Bokeh.index.roots || []).length)",
    ),
}


def measure(browser: Browser, run: RunDirectory) -> dict[str, Any]:
    """Sizes and times of a run's report."""
    start = time.perf_counter()
    write_report(run)
    found: dict[str, Any] = {"written_s": time.perf_counter() - start}
    folder = run.report_page.parent
    records = run.layers()
    found["filters"] = sum(record.filters for record in records)
    found["whole_mb"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    found["overview_mb"] = loaded_bytes(browser, run.report_page) / 1e6
    ready = "window.pruneViz && document.documentElement.classList.contains('reviewing')"
    found["overview_s"] = opening(browser, run.report_page, ready)
    largest = max(records, key=lambda record: record.filters)
    page_file = folder / "layers" / f"{largest.slug}.html"
    found["largest_layer"] = largest.filters
    found["layer_mb"] = loaded_bytes(browser, page_file) / 1e6
    found["layer_s"] = opening(browser, page_file, ready)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
    page.goto(run.report_page.as_uri())
    found["frame_ms"], found["slow_frame_ms"] = pointing(page, ".network")
    found["lasso_s"] = lasso(page, ".network", "!document.querySelector('.selected').hidden")
    found["selected"] = page.evaluate("pruneViz.selection.listed().length")
    page.close()
    return found


def measure_plots(browser: Browser, count: int, folder: Path) -> list[dict[str, Any]]:
    """What the installed plotting libraries make of as many points."""
    places = np.random.default_rng(0).uniform(size=(count, 2))
    rows = []
    for name, (write, selector, ready) in PLOTS.items():
        out = folder / f"{name}.html"
        try:
            write(places, out)
        except ImportError:
            continue
        row: dict[str, Any] = {"library": name, "points": count, "page_mb": out.stat().st_size / 1e6}
        row["page_s"] = opening(browser, out, ready)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(out.as_uri())
        page.wait_for_function(ready)
        row["frame_ms"], row["slow_frame_ms"] = pointing(page, selector)
        page.close()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run; without it one is made up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        run = RunDirectory(options.run) if options.run else made_up_run(Path(name) / "run")
        found = measure(browser, run)
        print_table("The report", list(found), [list(found.values())])
        plots = measure_plots(browser, found["filters"], Path(name))
        if plots:
            print_table("The same number of points", list(plots[0]), [list(row.values()) for row in plots])
    print(json.dumps({**found, "plots": plots}))


if __name__ == "__main__":
    main()
