"""Only runs of ours are worked in, and only what we wrote is removed from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Plain, randomise_norms
from safetensors.numpy import save_file
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz import cli
from prune_viz.runs.log import RunLog
from prune_viz.runs.ownership import check_run_directory, claimed
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.status import read_status
from prune_viz.utils.destinations import check_writable
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import ASIDE


def _analyze(out: Path, seed: int = 0, **options: object) -> pv.Analysis:
    torch.manual_seed(seed)
    model = randomise_norms(Plain(), seed=seed)
    return pv.analyze(model, input_shape=(3, 16, 16), steps=2, layers=["conv1"], out=out, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    _analyze(out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(file.relative_to(folder)): f"-> {file.readlink()}" if file.is_symlink() else file.read_bytes()
        for file in folder.rglob("*")
        if file.is_symlink() or file.is_file()
    }


OTHERS = {
    "another tool's": json.dumps({"tool": "other", "state": "complete", "layers": []}),
    "another tool's format 1": json.dumps({"format": 1, "model": {"sha256": "ab" * 32}, "layers": []}),
    "later format": json.dumps({"format": 2, "written_by": "prune-viz 9.0", "model": {"sha256": "ab" * 32}}),
    "list": "[]",
    "nothing": "",
    "words": "hello",
    "bytes": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "large number": '{"format": 1' + "0" * 5000 + "}",
    "duplicate": '{"format": 1, "format": 1, "model": {}, "versions": {"prune_viz": "0.1.0"}}',
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_foreign_run_json_is_refused(tmp_path: Path, other: str, fresh: bool) -> None:
    for name in ("report/index.html", "layers/000-conv1.safetensors", "tasks/a.safetensors", "log.jsonl"):
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_text("theirs")
    content = OTHERS[other]
    (tmp_path / "theirs" / "run.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    shutil.rmtree(tmp_path / "theirs" / "report")  # so that nothing but the mark is at fault
    before = _contents(tmp_path)
    with pytest.raises(UserError, match="is not a prune-viz run"):
        _analyze(tmp_path / "theirs", fresh=fresh)
    with (
        pytest.raises(UserError, match="is not a prune-viz run"),
        claimed(RunDirectory(tmp_path / "theirs"), "ab" * 32, fresh),
    ):
        pass
    assert _contents(tmp_path) == before


def _run_json_is(kind: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / "run.json").unlink()
        {
            "directory": (out / "run.json").mkdir,
            "pipe": lambda: os.mkfifo(out / "run.json"),
            "link": lambda: (out / "run.json").symlink_to(out.parent / "elsewhere" / "victim.json"),
        }[kind]()

    return change


def _linked(name: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        place = out / name
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        target = out.parent / "elsewhere" / ("victim.json" if "." in name else "")
        place.symlink_to(target)

    return change


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *(_run_json_is(kind) for kind in ("directory", "pipe", "link")),
        *(_linked(name) for name in ("tasks", "layers", "report", ".prune-viz.report-new")),
        *(
            _linked(name)
            for name in ("log.jsonl", "masks.pt", "decisions.json", "probes.safetensors", ".lock")
        ),
    ],
)
def test_links_and_pipes_in_our_places_are_refused(
    out: Path, change: Callable[[Path], None], fresh: bool
) -> None:
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "victim.json").write_text("precious")
    save_file({"w": torch.ones(3).numpy()}, elsewhere / "000-conv1-0-0123456789abcdef.safetensors")
    shutil.copy(next((out / "layers").iterdir()), elsewhere)  # even what we wrote, elsewhere
    change(out)
    before = _contents(elsewhere)
    with pytest.raises(UserError, match=r"move it away|is not a prune-viz run") as caught:
        _analyze(out, fresh=fresh)
    assert "\n" not in str(caught.value)
    assert _contents(elsewhere) == before


@pytest.mark.slow
def test_tidying_leaves_other_tensors(out: Path) -> None:
    tasks = out / "tasks"
    tasks.mkdir()
    theirs = {
        "model.safetensors": {"run": "ab" * 32, "layer": "conv1"},  # not a name of ours
        "000-conv1-0-0123456789abcdef.safetensors": None,  # not a header of ours
        "000-conv1-8-0123456789abcdef.safetensors": {"run": "x", "layer": "conv1"},
    }
    for folder in (tasks, out / "layers"):
        for name, metadata in theirs.items():
            save_file({"w": torch.ones(3).numpy()}, folder / name, metadata)
    (out / "layers" / "notes.txt").write_text("mine")
    (out / "movie.part").write_text("mine")
    (out / "layers" / ".hidden.part").write_text("mine")
    (out / f"{ASIDE}abcd1234").write_text("half")
    before = _contents(out)
    for fresh in (False, True):
        _analyze(out, fresh=fresh)
    kept = _contents(out)
    for name in theirs:
        assert kept[f"tasks/{name}"] == before[f"tasks/{name}"]
        assert kept[f"layers/{name}"] == before[f"layers/{name}"]
    assert {"layers/notes.txt", "layers/.hidden.part", "movie.part"} <= kept.keys()
    assert f"{ASIDE}abcd1234" not in kept


@pytest.mark.parametrize("fresh", [False, True])
def test_report_of_anothers_is_refused_at_once(out: Path, fresh: bool) -> None:
    shutil.rmtree(out / "report")
    (out / "report").mkdir()
    (out / "report" / "thesis.html").write_text("mine")
    with pytest.raises(UserError, match="report was not written by prune-viz"):
        _analyze(out, fresh=fresh)
    done = CliRunner().invoke(cli.app, ["report", str(out)])
    assert done.exit_code == 2
    assert (out / "report" / "thesis.html").read_text() == "mine"


def test_list_of_a_report_names_only_its_own_files(out: Path) -> None:
    victim = out.parent / "victim.html"
    victim.write_text("precious")
    names = ["../../victim.html", "/etc/hostname", "..", "assets/../../../victim.html", "a\u0000b"]
    listed = json.loads((out / "report" / "files.json").read_text())
    (out / "report" / "files.json").write_text(json.dumps({**listed, "files": [*listed["files"], *names]}))
    (out / "report" / "layers" / "inner").symlink_to(out.parent)
    _analyze(out, fresh=True)
    assert victim.read_text() == "precious"


def test_mounted_folder_is_refused(out: Path) -> None:
    """In a mount namespace of its own; inodes do not show that a part of the same file system is mounted."""
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    (out / "tasks").mkdir()
    check = (
        "from pathlib import Path; from prune_viz.runs.ownership import check_run_directory; "
        f"check_run_directory(Path({str(out)!r}))"
    )
    own = [] if os.geteuid() == 0 else ["-r"]
    shell = f'mount --bind "{elsewhere}" "{out}/tasks" || exit 77; exec "{sys.executable}" -c "{check}"'
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    ended = subprocess.run(["unshare", *own, "-m", "sh", "-c", shell], capture_output=True, text=True)
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip(f"nothing can be mounted here: {ended.stderr}")
    assert "tasks is a mount point" in ended.stderr
    check_run_directory(out)


def test_moved_run_goes_on(out: Path, tmp_path: Path) -> None:
    moved = out.rename(tmp_path / "moved and renamed")
    assert read_status(RunDirectory(moved))["state"] == "complete"
    before = {file.name: file.stat().st_ino for file in (moved / "layers").iterdir()}
    _analyze(moved)
    assert {file.name: file.stat().st_ino for file in (moved / "layers").iterdir()} == before
    assert CliRunner().invoke(cli.app, ["masks", str(moved)]).exit_code == 0


def test_clock_that_goes_back_harms_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_viz.runs.log.now", lambda: "1970-01-01T00:00:00+00:00")
    monkeypatch.setattr("prune_viz.analysis.planned_run.now", lambda: "1970-01-01T00:00:00+00:00")
    _analyze(out)
    assert read_status(RunDirectory(out))["state"] == "complete"
    assert read_status(RunDirectory(out))["failed"] == []
    assert "1970-01-01" in (out / "report" / "index.html").read_text()


def test_other_users_run_is_left_alone(out: Path) -> None:
    """In a child that becomes another user once all is imported."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for file in (out, *out.rglob("*")):
        os.chown(file, 12345, 12345)
    for folder in [one for one in out.parents if one.is_relative_to(tempfile.gettempdir())]:
        folder.chmod(0o755)
    before = _contents(out)
    reading, writing = os.pipe()
    if not os.fork():
        os.setgid(23456)
        os.setuid(23456)
        said = []
        for work in (lambda: check_writable(out), lambda: claimed(RunDirectory(out), "", True).__enter__()):
            try:
                work()
            except UserError as error:
                said.append(str(error))
        os.write(writing, "\n".join(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        lines = said.read().splitlines()
    os.wait()
    assert len(lines) == 2
    assert all("cannot be written" in line for line in lines)
    assert _contents(out) == before


def test_log_lines_of_any_kind_are_left_out(out: Path) -> None:
    RunLog(out / "log.jsonl")("task failed", task="conv1, filters 0 to 3", error="boom")
    with (out / "log.jsonl").open("ab") as log:
        for line in (
            b"[]",
            b"3",
            b"null",
            b'{"event": 3}',
            b"[" * 100_000,
            b"\xff",
            b'{"event": "task done"}',
        ):
            log.write(line + b"\n")
    (failed,) = read_status(RunDirectory(out))["failed"]
    assert failed == {"task": "conv1, filters 0 to 3", "error": "boom"}
