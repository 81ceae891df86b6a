"""The style sheet of verdicts: their colours, and what is hidden where one of them is shown alone."""

from __future__ import annotations

from collections.abc import Iterable

from prune_viz.runs.verdicts import Verdict


def verdict_styles() -> Iterable[str]:
    """Rules for every `Verdict`; ``--verdict`` is the colour of an element that has its class."""
    light = "".join(f"--{verdict}:{verdict.look.colour};" for verdict in Verdict)
    dark = "".join(f"--{verdict}:{verdict.look.dark};" for verdict in Verdict)
    yield f":root{{{light}}}"
    yield f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    for verdict in Verdict:
        shown = f'[data-show="{verdict}"]'
        yield f".{verdict}{{--verdict:var(--{verdict})}}"
        yield f"{shown} .network path:not(.{verdict}){{opacity:0.06}}"
        yield f"{shown} .map a:not(.{verdict}){{opacity:0.08;pointer-events:none}}"
        hidden = (".card", ".case", ".evidence")
        others = ",".join(f"{shown} {one}:not(.{verdict})" for one in hidden)
        yield f"{others},{shown} .cluster:not(:has(.card.{verdict})){{display:none}}"
        if verdict.flagged:  # the stimuli on the network's map are of kept filters
            yield f"{shown} .network>.t{{visibility:hidden}}"
