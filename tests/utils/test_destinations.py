"""No result replaces what is not a regular file, an input, or a file that prune-viz did not write."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from marks import slow
from networks import random_residual
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz import cli
from prune_viz.utils.array_files import write_arrays
from prune_viz.utils.destinations import is_ours
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import ASIDE, MARK, write_json, write_torch


@pytest.fixture(scope="module")
def made(analysed: Callable[[str], Path]) -> Path:
    """A model file `model.pt`, its architecture, and a run of it in `run`."""
    home = analysed("residual").parent
    torch.save(random_residual().state_dict(), home / "model.pt")
    tests = Path(__file__).parents[1]
    (home / "networks.py").write_text((tests / "networks.py").read_text())
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    home = tmp_path / "here"
    shutil.copytree(made, home)
    monkeypatch.chdir(home)
    return home


APPLY = ["apply", "model.pt", "run/masks.pt", "--arch", "networks:Residual"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "masks --out": (["masks", "run", "--ratio", "0.2", "--out"], ".pt"),
    "apply --out": ([*APPLY, "--out"], ".pt"),
    "apply --export": (
        [*APPLY, "--input-shape", "3,16,16", "--out", "written.pt", "--export"],
        ".pt2",
    ),
    "report --single-file": (["report", "run", "--single-file"], ".html"),
    "figure --out": (["figure", "run", "--out"], ".svg"),
}
SLOW = ("apply --export", "figure --out")


def _directory(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    home = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(home)


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # as /dev/null, in a folder of the test's own
    except PermissionError:
        pytest.skip("no device node can be made here")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _link_to(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        target = path.with_name("target")
        make(target)
        path.symlink_to(target)

    return link


IRREGULAR = {
    "directory": _directory, "pipe": _pipe, "socket": _socket, "device": _device, "loop": _loop,
    "link to a directory": _link_to(_directory), "link to a pipe": _link_to(_pipe),
    "link to a device": _link_to(_device),
}  # fmt: skip


@pytest.mark.parametrize("irregular", IRREGULAR)
@pytest.mark.parametrize("command", COMMANDS)
def test_irregular_destination_is_refused(here: Path, command: str, irregular: str) -> None:
    given, ending = COMMANDS[command]
    destination = here / "apart" / f"destination{ending}"
    destination.parent.mkdir()
    IRREGULAR[irregular](destination)
    before = [(file.name, file.lstat().st_mode, file.lstat().st_ino) for file in destination.parent.iterdir()]
    for more in ([], ["--force"]):
        done = CliRunner().invoke(cli.app, [*given, str(destination), *more])
        assert done.exit_code == 2, done.output
        assert done.output.count("\n") == 1
        assert "name a" in done.output
    after = [(file.name, file.lstat().st_mode, file.lstat().st_ino) for file in destination.parent.iterdir()]
    assert after == before
    assert not (here / "written.pt").exists()  # nothing was begun


@pytest.mark.parametrize("command", [slow(one) if one in SLOW else one for one in COMMANDS])
def test_foreign_file_needs_force(here: Path, command: str) -> None:
    given, ending = COMMANDS[command]
    destination = here / f"mine{ending}"
    torch.save({"weight": torch.ones(2)}, destination)
    before = destination.read_bytes()
    refused = CliRunner().invoke(cli.app, [*given, str(destination)])
    assert refused.exit_code == 2
    assert "give --force to replace it" in refused.output
    assert refused.output.count("\n") == 1
    assert destination.read_bytes() == before
    done = CliRunner().invoke(cli.app, [*given, str(destination), "--force"])
    assert done.exit_code == 0, done.output
    assert destination.read_bytes() != before
    again = CliRunner().invoke(cli.app, [*given, str(destination)])  # which is ours now
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("beside", ["smaller.merges.json", "smaller.probes.safetensors"])
def test_foreign_file_beside_masks_stays(here: Path, beside: str) -> None:
    (here / beside).write_text("mine")
    done = CliRunner().invoke(cli.app, ["masks", "run", "--ratio", "0.2", "--out", "smaller.pt"])
    assert done.exit_code == 2
    assert beside in done.output
    assert (here / beside).read_text() == "mine"
    assert not (here / "smaller.pt").exists()


@pytest.mark.parametrize("name", ["decisions.json", "run.json", "moments.safetensors", "filters.csv"])
def test_masks_do_not_replace_their_run(here: Path, name: str) -> None:
    before = (here / "run" / name).read_bytes()
    for more in ([], ["--force"]):
        done = CliRunner().invoke(cli.app, ["masks", "run", "--ratio", "0.2", "--out", f"run/{name}", *more])
        assert done.exit_code == 2
        assert "would overwrite an input" in done.output
    assert (here / "run" / name).read_bytes() == before


def test_link_to_a_regular_file_is_followed(here: Path) -> None:
    (here / "elsewhere").mkdir()
    for target in ("there.pt", "missing.pt"):
        link = here / f"link to {target}"
        link.symlink_to(here / "elsewhere" / target)
        done = CliRunner().invoke(cli.app, ["masks", "run", "--ratio", "0.2", "--out", str(link)])
        assert done.exit_code == 0, done.output
        assert link.is_symlink()
        assert pv.load_masks(here / "elsewhere" / target).removed


def test_masks_of_python_replace_no_device(tmp_path: Path) -> None:
    _device(tmp_path / "null.pt")
    with pytest.raises(UserError, match="is a device, which is not replaced"):
        pv.save_masks({"conv": torch.tensor([True, False])}, tmp_path / "null.pt")
    assert stat.S_ISCHR((tmp_path / "null.pt").stat().st_mode)
    assert [file.name for file in tmp_path.iterdir()] == ["null.pt"]


def test_marks_are_known(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", {"weight": torch.ones(2)})
    write_arrays(tmp_path / "a.safetensors", {"a": torch.ones(2).numpy()})
    write_json(tmp_path / "a.json", {"written_by": MARK, "values": list(range(100_000))})
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"weight": torch.ones(2)}, tmp_path / "theirs.pt")
    (tmp_path / "notes.txt").write_text("how I use prune-viz")
    (tmp_path / "long.bin").write_bytes(bytes(2**20) + MARK.encode() + bytes(2**20))
    found = {file.name: is_ours(file) for file in tmp_path.iterdir()}
    assert found == {
        "a.pt": True, "a.safetensors": True, "a.json": True, "empty": True,
        "theirs.pt": False, "notes.txt": False, "long.bin": False,
    }  # fmt: skip
    assert not [name for name in found if name.startswith(ASIDE)]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.pt", "another name.pt"):
        write_torch(tmp_path / name, {"weight": torch.ones(2)})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another name.pt").read_bytes()
