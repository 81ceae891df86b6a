"""Runs that are killed, interrupted, or find the disk full or pieces damaged end as undisturbed ones do."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tortured
from comparing import assert_equal

from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.status import read_status
from prune_viz.utils.array_files import read_arrays
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import ASIDE

pytestmark = pytest.mark.slow
PROGRAM = str(Path(tortured.__file__))
KILLS = 24
LONG = 100  # steps
FORKS = multiprocessing.get_context("forkserver")  # processes that have everything imported already
FORKS.set_forkserver_preload(["tortured", "warmed"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(out)
    return out


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed when a layer was done, and some of the next."""
    out = tmp_path / "run"
    kill_at(out, 44)
    return out


def start(out: Path, *arguments: str, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, PROGRAM, str(out), *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(out: Path, *arguments: int) -> None:
    process = FORKS.Process(target=tortured.run, args=(out, *arguments))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def done(out: Path) -> int:
    try:
        return read_status(RunDirectory(out))["done"]
    except UserError:  # not even begun
        return 0


def wait_for(out: Path, filters: int, process: subprocess.Popen) -> None:
    """Wait until so many filters are done."""
    until = time.monotonic() + 120
    while done(out) < filters:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def kill_at(out: Path, filters: int, workers: int = 1, seed: int = 0) -> None:
    """Begin a run, and kill it when so many filters are done."""
    process = start(out, str(workers), str(seed))
    wait_for(out, filters, process)
    process.kill()
    process.wait()


def assert_sound(out: Path) -> None:
    """What is on disk is complete; masks never stand without the decisions and the table they come from."""
    for file in out.rglob("*"):
        if file.name.startswith(ASIDE) or file.is_dir():
            continue
        if file.suffix == ".safetensors":
            assert read_arrays(file) is not None, file
        elif file.suffix == ".json":
            json.loads(file.read_text())
    run = RunDirectory(out)
    if run.masks_file.exists():
        assert run.decisions_file.exists()
        assert run.filters_file.exists()


def test_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    chance = random.Random(8)
    out, kills, most_lost, found = tmp_path / "run", 0, 0, set()
    warm = FORKS.Process(target=tortured.network)
    warm.start()
    warm.join()
    while kills < KILLS:
        if kills % 6 == 0:  # begin anew
            shutil.rmtree(out, ignore_errors=True)
        before = done(out)
        process = FORKS.Process(target=tortured.run, args=(out, 2, 0, LONG))
        process.start()
        if kills % 6 < 4:  # most while stimuli are sought, some at any time
            more = before + 4 * chance.randint(0, 6)
            while process.is_alive() and done(out) < more:
                time.sleep(0.01)
            process.join(chance.uniform(0, 0.5))
        else:
            process.join(chance.uniform(0, 6))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:
            assert process.exitcode == 0
        process.join()
        if out.exists():
            assert_sound(out)
            after = done(out)
            found.add(after)
            most_lost = max(most_lost, before - after)
            if (out / "run.json").exists() and process.exitcode:
                assert read_status(RunDirectory(out))["state"] != "running"
    assert most_lost == 0  # what was done stays done, whatever comes after
    assert len(found) >= 10  # the kills struck at many moments
    finish(out, 2, 0, LONG)
    finish(tmp_path / "undisturbed", 1, 0, LONG)
    assert_equal(tmp_path / "undisturbed", out)
    assert not list(out.rglob(f"{ASIDE}*"))
    print(f"{kills} kills survived, at {sorted(found)} filters done")


def test_reported_tasks_are_on_disk(tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_at(out, 40, workers=2)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = 4 * sum(event["event"] == "task done" for event in log)
    begun = 4 * sum(event["event"] == "task begun" for event in log)
    assert begun - logged <= 2 * 4  # one a worker
    assert logged <= done(out) <= logged + 4  # the last may be written but not yet logged
    assert done(out) >= 40


def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "2", start_new_session=True)
    wait_for(out, 24, process)
    os.killpg(process.pid, signal.SIGINT)
    shown, complaints = process.communicate(timeout=30)
    assert process.returncode == 130
    assert complaints == "interrupted: what is done is kept, and the same command goes on from there\n"
    assert shown == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left behind
    status = read_status(RunDirectory(out))
    assert (status["state"], status["stopped_by"]) == ("stopped", "interrupted")
    before = status["done"]
    assert before >= 24
    finish(out)
    assert_equal(undisturbed, out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "task done" for event in log) == status["filters"] / 4  # none twice


def test_two_processes_do_not_write_one_run(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(out, "1")
    wait_for(out, 8, first)
    assert read_status(RunDirectory(out))["state"] == "running"
    second = start(out, "1")
    _, complaints = second.communicate(timeout=60)
    assert second.returncode == 2
    assert complaints == (
        f"error: another prune-viz is at work in {out}: wait until it ends, or give another --out\n"
    )
    assert first.wait(300) == 0
    assert_equal(undisturbed, out)


@pytest.mark.parametrize("first", range(2))
def test_damaged_pieces_are_found_again(undisturbed: Path, killed: Path, first: int) -> None:
    layers, results = sorted(killed.glob("layers/*")), sorted(killed.glob("tasks/*.safetensors"))
    assert layers
    assert results
    foreign = {
        file: (layers[-1] if file in results else results[-1]).read_bytes() for file in layers + results
    }
    for number, file in enumerate([layers[0], *results]):  # the layer is hurt in two ways, pieces in all
        harm = ("foreign", "flip", "truncate", "empty")[(number + first) % 4]
        content = bytearray(file.read_bytes())
        if harm == "truncate":
            del content[len(content) // 2 :]
        elif harm == "flip":
            content[random.Random(number).randrange(8, len(content))] ^= 0x10
        elif harm == "empty":
            content.clear()
        else:
            content[:] = foreign[file]
        file.write_bytes(content)
    finish(killed)
    assert_equal(undisturbed, killed)


def test_another_seed_reuses_nothing(killed: Path) -> None:
    kill_at(killed, 4, seed=1)
    log = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    begun = max(number for number, event in enumerate(log) if event["event"] == "run started")
    again = [event["task"] for event in log[begun:] if event["event"] == "task done"]
    assert again[0] == "stem, filters 0 to 3"  # from the first on
    assert done(killed) in (4 * len(again), 4 * len(again) + 4)


SMALL_DISK = r"""
mount -t tmpfs -o size="$4" none "$1" || exit 77
"$3" "$2" "$1/run" 1 2>"$1.first"; echo $? >"$1.code"
mount -o remount,ro,size=64m "$1"
"$3" "$2" "$1/run" 1 2>"$1.forbidden" && exit 1
ls -a "$1/run" "$1/run/tasks" "$1/run/layers" >"$1.listed" 2>&1
mount -o remount,rw,size=64m "$1"
"$3" "$2" "$1/run" 1 2>"$1.second" || exit 1
cp -r "$1/run" "$1.run"
"""


# Full among the stimuli, and at the report.
@pytest.mark.parametrize("size", ["120k", "600k"])
def test_full_disk_is_one_line_and_the_run_goes_on(undisturbed: Path, tmp_path: Path, size: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    own = [] if os.geteuid() == 0 else ["-r"]
    ended = subprocess.run(
        ["unshare", *own, "-m", "sh", "-c", SMALL_DISK, "sh", str(disk), PROGRAM, sys.executable, size],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip(f"no file system can be mounted here: {ended.stderr}")
    complaints = Path(f"{disk}.first").read_text()
    assert Path(f"{disk}.code").read_text().strip() == "2", complaints
    assert complaints.startswith("error: ")
    assert complaints.count("\n") == 1
    assert "No space left on device" in complaints
    forbidden = Path(f"{disk}.forbidden").read_text()
    assert forbidden == f"error: {disk}/run cannot be written (Read-only file system); give another --out\n"
    assert ASIDE not in Path(f"{disk}.listed").read_text()
    assert ended.returncode == 0, Path(f"{disk}.second").read_text()
    assert_equal(undisturbed, Path(f"{disk}.run"))


def test_what_stands_in_the_way_is_said_in_one_line(killed: Path) -> None:
    shutil.rmtree(killed / "tasks")
    (killed / "tasks").write_text("")
    process = start(killed, "1")
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaints.startswith(f"error: {killed}/tasks")
    assert complaints.count("\n") == 1
