"""Runs on Ray clusters, each in a process of its own: `python tests/on_ray.py SCENE OUT`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tortured
import typer
from torch import Tensor, nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.cli.console import exit_codes
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.status import read_status

STEPS = 40


class Deadly(nn.ConvTranspose2d):
    """A convolution that takes its process down when a worker of Ray differentiates through it."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2 and os.getpid() != int(os.environ["DRIVER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Slow(nn.ConvTranspose2d):
    """A convolution that takes its time in workers of Ray, so that things can happen meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != int(os.environ["DRIVER"]):
            time.sleep(0.015)
        return super().forward(x)


def slow() -> nn.Module:
    """The network, its stem a slow one."""
    model = tortured.network()
    model.stem = Slow(3, 12, 3, padding=1)
    return model.eval()


def poisoned() -> nn.Module:
    """The network, and one deadly convolution more of four filters, at its end."""
    model = tortured.network()
    model.blocks.append(nn.Sequential(Deadly(12, 4, 1), nn.ReLU()))
    model.head = nn.Linear(4, 5)
    return model.eval()


def search(model: nn.Module, out: Path, engine: str, steps: int) -> None:
    """Analyse in tasks of four filters."""
    tortured.cut_small()
    analyze(model, input_shape=(3, 16, 16), out=out, engine=engine, steps=steps)


def at(out: Path, filters: int, event: Callable[[], object], workers: int = 1) -> threading.Thread:
    """Let something happen once so many filters are done, by at least so many workers."""

    def wait() -> None:
        while True:
            time.sleep(0.05)
            if (out / "run.json").exists() and read_status(RunDirectory(out))["done"] >= filters:
                log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
                if len({said["worker"] for said in log if said["event"] == "task done"}) >= workers:
                    event()
                    return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def on_nodes(out: Path) -> None:
    """On three nodes, of which one is lost; another joins later."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # this cluster is not of our making
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    os.environ["RAY_ADDRESS"] = cluster.address

    def change() -> None:
        ours = ray._private.worker.global_worker.node.unique_id  # whose loss would be the run's own
        doomed = next(node for node in nodes if node.unique_id != ours)
        cluster.remove_node(doomed, allow_graceful=False)
        joining = ["start", "--address", cluster.address, "--num-cpus=1", "--block"]
        joined.append(
            subprocess.Popen([Path(sys.executable).with_name("ray"), *joining], stdout=subprocess.DEVNULL)
        )

    joined: list[subprocess.Popen] = []
    changed = at(out, 8, change, workers=2)
    search(slow(), out, "ray", STEPS)
    assert not changed.is_alive()
    assert not ray.is_initialized()
    joined[0].terminate()
    joined[0].wait(30)
    cluster.shutdown()


def alone(out: Path) -> None:
    """On a new cluster of this machine; prints where its processes listen."""
    import psutil

    def show() -> None:
        children = psutil.Process().children(recursive=True)
        for process in [psutil.Process(), *children]:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    print("listens", connection.laddr.ip.removeprefix("::ffff:"), flush=True)
        print("token", len(os.environ["RAY_AUTH_TOKEN"]), os.environ["RAY_USAGE_STATS_ENABLED"], flush=True)

    shown = at(out, 8, show)
    search(tortured.network(), out, "ray", 40)
    shown.join()


def shared(out: Path) -> None:
    """On a cluster that another run uses at the same time, which goes to `beside`."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    os.environ["RAY_ADDRESS"] = cluster.address
    beside = subprocess.Popen([sys.executable, __file__, "long", str(out.with_name("beside"))])
    search(slow(), out, "ray", STEPS)
    assert beside.wait(300) == 0
    cluster.shutdown()


SCENES: dict[str, Callable[[Path], None]] = {
    "nodes": on_nodes,
    "alone": alone,
    "shared": shared,
    "long": lambda out: search(slow(), out, "ray", STEPS),
    "local": lambda out: search(slow(), out, "local", STEPS),
    "poisoned": lambda out: search(poisoned(), out, "ray", 40),
    "survived": lambda out: search(poisoned(), out, "local", 40),
}

if __name__ == "__main__":
    os.environ["DRIVER"] = str(os.getpid())
    try:
        exit_codes(SCENES[sys.argv[1]])(Path(sys.argv[2]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
