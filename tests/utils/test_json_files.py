"""JSON that others wrote: whatever is in it, one line that names the field, or a result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import slow
from networks import Residual, randomise_norms, residual_with_a_copy
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz import cli
from prune_viz.report import write_report
from prune_viz.report.pages import layer_rows
from prune_viz.runs.decisions_json import BesideMasks, Decisions
from prune_viz.runs.filters_csv import read_filters
from prune_viz.runs.ownership import check_run_directory
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import Provenance
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import sha256
from prune_viz.utils.json_files import decode_json, read_json

# As JSON, since not all of it can be a value of Python's.
HOSTILE = [
    "null", "true", "-1", "0", "1.5", "-0.0", "1e400", "NaN", "-Infinity", str(2**31), str(2**63), str(2**64),
    "1" + 400 * "0", "9" * 5000, '""', '"x"', '"\\ud800"', '"\\u0000\\u202e</script>"', '"../../etc/passwd"',
    "[]", "{}", "[null]", '{"a": {"a": []}}', 50 * "[" + 50 * "]", 5000 * '{"a":' + "1" + 5000 * "}",
    100_000 * "[", "[" + ",".join(["1"] * 3000) + "]", '{"a": 1, "a": 2}', '["prune-viz"]',
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a review and masks of a budget beside it: one of each of our JSON files."""
    home = tmp_path_factory.mktemp("made")
    model = residual_with_a_copy()
    pv.analyze(model, input_shape=(3, 16, 16), steps=12, out=home / "run", mean=[0.5] * 3, std=[0.2] * 3)
    for name in ("run/run.json", "run/decisions.json"):  # fields that this run leaves empty
        content = json.loads((home / name).read_text())
        content.setdefault("stopped_by", "interrupted")
        (home / name).write_text(json.dumps(content))
    decisions = [{"layer": "inner", "filter": 7, "decision": "keep"}]
    review = {"format": 1, "run": sha256(home / "run" / "decisions.json"), "decisions": decisions}
    (home / "review.json").write_text(json.dumps(review))
    done = CliRunner().invoke(
        cli.app, ["masks", str(home / "run"), "--ratio", "0.2", "--out", str(home / "m.pt")]
    )
    assert done.exit_code == 0, done.output
    return home


FILES = ["run/run.json", "run/decisions.json", "review.json", "m.merges.json", "run/report/files.json"]
Place = tuple[str | int, ...]


def _places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every field of a value; of lists the first and last element."""
    yield here
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list) and value:
        inner = {0: value[0], len(value) - 1: value[-1]}.items()
    for name, part in inner:
        yield from _places(part, (*here, name))


def _with(value: Any, place: Place, hostile: str) -> str:
    """The value as JSON with something hostile at one place."""
    if not place:
        return hostile
    value = json.loads(json.dumps(value))
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = "@hostile@"
    return json.dumps(value).replace('"@hostile@"', hostile)


def _without(value: Any, place: Place) -> str:
    value = json.loads(json.dumps(value))
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    return json.dumps(value)


def _readers(home: Path) -> dict[str, Callable[[], object]]:
    run = RunDirectory(home / "run")
    return {
        "run/run.json": lambda: (check_run_directory(run.path), run.read_provenance()),
        "run/decisions.json": lambda: (run.read_decisions(), pv.load_masks(run.masks_file)),
        "m.merges.json": lambda: pv.load_masks(home / "m.pt"),
    }


def _commands(home: Path) -> list[tuple[list[str], set[str]]]:
    """Commands, and which of the files each reads."""
    run = str(home / "run")
    decided = {"run/run.json", "run/decisions.json"}
    return [
        (["status", run], {"run/run.json"}),
        (["status", run, "--json"], {"run/run.json"}),
        (["masks", run, "--ratio", "0.3", "--out", str(home / "n.pt")], decided),
        (
            ["masks", run, "--review", str(home / "review.json"), "--out", str(home / "r.pt")],
            {*decided, "review.json"},
        ),
        (["masks", run, "--tolerance", "0.001", "--round-to", "2", "--out", str(home / "t.pt")], decided),
        (["masks", run], decided),
        (["report", run, "--single-file", str(home / "one.html")], {*decided, "run/report/files.json"}),
        (["figure", run, "--out", str(home / "f.svg")], {"run/run.json"}),
        (["figure", run, "--layer", "inner", "--out", str(home / "l.svg")], {"run/run.json"}),
    ]


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every file that is opened during a test; an audit hook cannot be removed, so it does nothing after."""
    found: list[str] = []
    ended = False

    def note(event: str, given: tuple[object, ...]) -> None:
        if event == "open" and not ended:
            found.append(str(given[0]))

    sys.addaudithook(note)
    yield found
    ended = True


@pytest.mark.slow
def test_commands_read_the_files_that_they_are_tried_with(
    made: Path, tmp_path: Path, opened: list[str]
) -> None:
    home = Path(shutil.copytree(made, tmp_path / "home"))
    paths = {str(home / name): name for name in FILES}
    for command, files in _commands(home):
        opened.clear()
        assert CliRunner().invoke(cli.app, command).exit_code == 0
        assert {paths[file] for file in opened if file in paths} == files


def _refusal(work: Callable[[], object]) -> str:
    """What a `UserError` says; empty where all went well."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def _run_all(home: Path, changed: str) -> None:
    for command in (command for command, files in _commands(home) if changed in files):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code in (0, 2), (command, done.output)
        if done.exit_code == 2:
            assert done.stderr.count("\n") == 1, done.stderr
            assert done.stderr.isprintable() or done.stderr.rstrip("\n").isprintable(), done.stderr
    if changed != "m.merges.json":
        return
    model, example = randomise_norms(Residual()), torch.zeros(1, 3, 16, 16)
    message = _refusal(
        lambda: pv.remove_filters(model, pv.load_masks(home / "m.pt"), example, compensate="merge")
    )
    assert message.isprintable()


@pytest.mark.parametrize("every", [slow(1), 13])
@pytest.mark.parametrize("name", ["run/run.json", "run/decisions.json", "m.merges.json"])
def test_every_field_of_every_kind(made: Path, tmp_path: Path, name: str, every: int) -> None:
    """Hostile values in all fields, all or every thirteenth: they are refused in a line, or read."""
    home = Path(shutil.copytree(made, tmp_path / "home"))
    value = json.loads((home / name).read_text())
    read = _readers(home)[name]
    read()
    refused = tried = 0
    for number, place in enumerate(_places(value)):
        texts = [_with(value, place, hostile) for hostile in HOSTILE[number % every :: every]]
        for text in texts + ([_without(value, place)] if place else []):
            (home / name).write_text(text)
            tried += 1
            message = _refusal(read)
            refused += bool(message)
            assert message.isprintable()
            assert len(message) < 1000
    assert tried > 300 / every
    assert refused > tried / 3


@dataclass(frozen=True)
class Change:
    """Something hostile at a place in a file; `place` counts through its places."""

    name: str
    place: int
    hostile: int


def _change(home: Path, change: Change) -> None:
    value = json.loads((home / change.name).read_text())
    places = list(_places(value))
    place = places[change.place % len(places)]
    if change.hostile == len(HOSTILE):
        text = _without(value, place) if place else ""
    else:
        text = _with(value, place, HOSTILE[change.hostile])
    (home / change.name).write_text(text)


CHANGES = st.builds(Change, st.sampled_from(FILES), st.integers(0, 10_000), st.integers(0, len(HOSTILE)))


def _fuzz(made: Path, folder: Path, change: Change) -> None:
    shutil.rmtree(folder / "home", ignore_errors=True)
    home = Path(shutil.copytree(made, folder / "home"))
    _change(home, change)
    _run_all(home, change.name)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(change=CHANGES)
def test_commands_survive_changed_files(
    made: Path, tmp_path_factory: pytest.TempPathFactory, change: Change
) -> None:
    _fuzz(made, tmp_path_factory.getbasetemp(), change)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(change=CHANGES)
def test_commands_survive_many_changed_files(
    made: Path, tmp_path_factory: pytest.TempPathFactory, change: Change
) -> None:
    _fuzz(made, tmp_path_factory.getbasetemp(), change)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"a": 2, "a": 3}}', "names a twice"),
        ("1" + 400 * "0", "the number 10000000000000000000... is too large"),
        ("1e999", "the number 1e999 is too large"),
        ("[NaN]", "NaN is not JSON"),
        (100_000 * "[", "nested too deep"),
        (50_000 * '{"a":', "nested too deep"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ('"\\ud800"', "not valid Unicode"),
        (b'"\xff"', "not valid Unicode"),
        ("9" * 5000, "is too large"),
    ],
)
def test_bounds_of_json(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        decode_json(text, "file")
    assert "\n" not in str(caught.value)


def test_pairs_of_surrogates_are_text() -> None:
    assert decode_json('"\\ud83d\\ude00"', "file") == "\U0001f600"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layers", [{"name": 3}], r"at layers\[0\].name: expected str, got int"),
        ("seed", "x", "at seed: expected int, got str"),
        ("state", "asleep", "at state: invalid enum value"),
        ("notes", {"a": 1}, "at notes: expected array, got object"),
        ("model", None, "at model: expected object, got null"),
    ],
)
def test_wrong_field_is_named(made: Path, tmp_path: Path, field: str, value: Any, says: str) -> None:
    content = json.loads((made / "run" / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(UserError, match=f"run.json is damaged: {says}"):
        read_json(tmp_path / "run.json", Provenance)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["filters"].update(inner=10**6 + 10**5), "filters"),
        (lambda d: d["filters"].update({f"l{i}": 2**20 for i in range(20)}), "more than any network has"),
        (lambda d: d["groups"][0].update(channels=2**19), "more channels than filters"),
        (lambda d: d["groups"][0]["writers"][0]["filters"].append(3), "each of its filters at one channel"),
        (lambda d: d["verdicts"][0].update(filter=99), "a filter that its layer does not have"),
        (lambda d: d["verdicts"][0].update(layer="none"), "a filter that its layer does not have"),
        (lambda d: d["removal_order"].append(d["removal_order"][0]), "stands there twice"),
        (lambda d: d["removal_order"][0].update(channels=[99], damage=[0.0]), "no such channel"),
        (lambda d: d["merges"][0].update(coefficients=[]), "as many coefficients"),
        (lambda d: d["groups"].append(d["groups"][0]), "an id stands there twice"),
    ],
)
def test_fields_that_contradict_are_refused(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    content = json.loads((made / "run" / "decisions.json").read_text())
    change(content)
    (tmp_path / "decisions.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        read_json(tmp_path / "decisions.json", Decisions)


def test_written_decisions_are_read_again(made: Path, tmp_path: Path) -> None:
    run = RunDirectory(made / "run")
    found = run.read_decisions()
    assert found.merges
    assert found.verdicts
    copy = RunDirectory(tmp_path)
    copy.write_decisions(found)
    assert read_json(copy.decisions_file, Decisions) == found
    assert read_json(copy.decisions_file, BesideMasks).merges == found.merges


@pytest.mark.parametrize(
    "text",
    ["", "layer,filter\n", "a\n" * 1000, "\x00\x00", '"' * 10_001, "layer" + ",x" * 100_000, "9" * 100_000],
)
def test_damaged_tables_get_one_line(made: Path, tmp_path: Path, text: str) -> None:
    home = Path(shutil.copytree(made, tmp_path / "home"))
    run = RunDirectory(home / "run")
    run.filters_file.write_text(text)
    with pytest.raises(UserError, match=r"filters\.csv is damaged") as caught:
        write_report(run)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("column", ["filter", "representative", "score", "cluster", "damage", "layer"])
@pytest.mark.parametrize("hostile", ["x", "-1", "9" * 400, "1;2;x", "inf", "9" * 20])
def test_hostile_cells_of_tables(made: Path, tmp_path: Path, column: str, hostile: str) -> None:
    run = RunDirectory(made / "run")
    lines = run.filters_file.read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index(column)] = hostile
    (tmp_path / "filters.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    assert _refusal(lambda: layer_rows(run.layers(), read_filters(tmp_path / "filters.csv"))).isprintable()
