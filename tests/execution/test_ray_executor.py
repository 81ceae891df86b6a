"""The same run on Ray clusters: of one machine, of nodes that come and go, with a task that kills workers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import on_ray
import psutil
import pytest
from comparing import assert_equal

from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.status import read_status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


def start(scene: str, out: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, str(Path(on_ray.__file__)), scene, str(out)], text=True,
        env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def play(scene: str, out: Path) -> tuple[int, str, str]:
    process = start(scene, out)
    shown, complaints = process.communicate(timeout=400)
    return process.returncode, shown, complaints


def events(out: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "run"
    assert play("local", out)[0] == 0
    return out


def test_changing_nodes_equal_one_machine(local: Path, tmp_path: Path) -> None:
    code, _, complaints = play("nodes", tmp_path / "nodes")
    assert code == 0, complaints
    assert_equal(local, tmp_path / "nodes")
    done = events(tmp_path / "nodes", "task done")
    assert len(done) == len({event["task"] for event in done}) == 33
    assert len({event["worker"] for event in done}) >= 3  # that of the lost node and of the new one too


def test_runs_share_a_cluster(local: Path, tmp_path: Path) -> None:
    code, _, complaints = play("shared", tmp_path / "run")
    assert code == 0, complaints
    for name in ("run", "beside"):
        assert_equal(local, tmp_path / name)
    done = [events(tmp_path / name, "task done") for name in ("run", "beside")]
    # Both had results before either had all.
    assert max(found[0]["time"] for found in done) < min(found[-1]["time"] for found in done)


def test_a_new_cluster_is_of_this_machine_alone(tmp_path: Path) -> None:
    code, shown, complaints = play("alone", tmp_path / "run")
    assert code == 0, complaints
    lines = shown.splitlines()
    listening = [line.split()[1] for line in lines if line.startswith("listens")]
    assert len(listening) >= 4
    assert set(listening) == {"127.0.0.1"}
    assert "token 64 0" in lines


def test_task_killing_workers_spares_others(tmp_path: Path) -> None:
    code, _, complaints = play("poisoned", tmp_path / "run")
    assert code == 1
    assert complaints.startswith("incomplete: 1 of 34 tasks failed (blocks.2.0, filters 0 to 3: ")
    assert complaints.count("\n") == 1
    status = read_status(RunDirectory(tmp_path / "run"))
    assert (status["state"], status["left"]) == ("stopped", 4)
    assert [failed["task"] for failed in status["failed"]] == ["blocks.2.0, filters 0 to 3"]
    assert play("survived", tmp_path / "run")[0] == 0  # where it can be done, only that is left to do
    assert len(events(tmp_path / "run", "task done")) == 34
    assert read_status(RunDirectory(tmp_path / "run"))["failed"] == []


def test_ctrl_c_ends_the_cluster_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("long", out)
    while not ((out / "run.json").exists() and read_status(RunDirectory(out))["done"] >= 8):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3
    os.kill(process.pid, signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    assert complaints == "interrupted: what is done is kept, and the same command goes on from there\n"
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert read_status(RunDirectory(out))["done"] >= 8
