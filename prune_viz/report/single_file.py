"""The whole report in one file, for a mail: every page, style, script and picture in it.

What is in the pages was escaped when they were written, so that markup found in them is the report's own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from prune_viz.report.render import SCRIPTS
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import write_text

LIMIT = 25_000_000  # bytes; what most mail servers take
_KINDS = {".jpg": "image/jpeg", ".png": "image/png"}
_PAGE = re.compile(r"<!--page-->(.*)<!--/page-->", re.S)
_LINK = re.compile(r'href="(?:\.\./)?(?:layers/)?([A-Za-z0-9_-]+)\.html(#[^"]*)?"')
_SOURCE = re.compile(r'src="([A-Za-z0-9_./-]+\.png)"')
_URL = re.compile(r'url\("([A-Za-z0-9_./-]+)"\)')


def write_single_file(run: RunDirectory, out: Path) -> int:
    """Write the report of a run, which must have been written, as one file.

    Parameters
    ----------
    run : RunDirectory
        The run.
    out : Path
        Where to write.

    Returns
    -------
    int
        Its size in bytes.

    Raises
    ------
    UserError
        If the run has no report, or the file would be larger than `LIMIT`.
    """
    folder = run.report_page.parent
    if not run.report_page.exists():
        raise UserError(f"{run.path} has no report; write it with: prune-viz report {run.path}")
    expected = sum(
        path.stat().st_size * (4 / 3 if path.suffix in _KINDS else 1)
        for path in folder.rglob("*")
        if path.is_file()
    )
    if expected > LIMIT:
        raise UserError(
            f"--single-file: the report would take {expected / 1e6:.0f} MB, more than the "
            f"{LIMIT / 1e6:.0f} MB that a mail holds; share the folder {folder} instead"
        )
    text = _bundled(folder, [record.slug for record in run.layers()])
    write_text(out, text)
    return len(text.encode())


def _bundled(folder: Path, slugs: Sequence[str]) -> str:
    layers, assets = folder / "layers", folder / "assets"
    first = _read(folder / "index.html")
    places = {"index": "main", **{slug: f"layer-{place}" for place, slug in enumerate(slugs)}}
    pages = [_page(first, folder, places)]
    pages += [_page(_read(layers / f"{slug}.html"), layers, places) for slug in slugs]
    sheets = [assets / "report.css", folder / "depth.css", folder / "network.css"]
    sheets += _present(folder / "examples.css") + [layers / f"{slug}.css" for slug in slugs]
    scripts = [folder / "run.js", *_present(folder / "network.js")]
    scripts += [layers / f"{slug}.js" for slug in slugs] + [assets / f"{name}.js" for name in SCRIPTS]
    styles, codes = [_style(file) for file in sheets], [_read(file) for file in scripts]
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashes(styles)}; script-src {_hashes(codes)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head, _, rest = first.partition("</head>")
    head = re.sub(r'<link rel="stylesheet"[^>]*>|<script [^>]*></script>', "", head)
    head = re.sub(r'(http-equiv="Content-Security-Policy" content=")[^"]*', lambda tag: tag[1] + policy, head)
    head = re.sub(r'(rel="icon" href=")[^"]*', lambda tag: tag[1] + _data(assets / "icon.png"), head)
    body = _PAGE.sub(lambda _: "".join(pages), rest)
    return "".join(
        [
            re.sub(r"\n\s*\n+", "\n", head),
            *(f"<style>{style}</style>\n" for style in styles),
            "</head>",
            body.partition("</body>")[0],
            *(f"<script>{code}</script>\n" for code in codes),
            "</body>\n</html>\n",
        ]
    )


def _present(file: Path) -> list[Path]:
    """What only some reports have: one without maps, or without example images, does without it."""
    return [file] if file.exists() else []


def _page(text: str, folder: Path, places: dict[str, str]) -> str:
    """What is a page's own, links to other pages leading to their places in the file."""
    found = _PAGE.search(text)
    if found is None:
        raise UserError(f"{folder} was written by another version of prune-viz; write the report again")
    text = _LINK.sub(lambda link: f'href="{link[2] or "#" + places[link[1]]}"', found[1])
    return _SOURCE.sub(lambda source: f'src="{_data(folder / source[1])}"', text)


def _style(file: Path) -> str:
    """A style sheet with its pictures in it."""
    return _URL.sub(lambda url: f'url("{_data(file.parent / url[1])}")', _read(file))


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _data(file: Path) -> str:
    """A picture as a URL that holds it."""
    return f"data:{_KINDS[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _hashes(texts: Sequence[str]) -> str:
    """What a policy calls these inline styles or scripts, and no others."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
