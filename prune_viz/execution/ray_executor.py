"""Tasks on the machines of a Ray cluster: `RayEngine`.

The network goes to each node once, through the object store, and each worker process prepares it once. Ray
does a task again elsewhere when its worker or node is lost. Results come back to the one process that writes
the run directory, so nodes need not share a disk; they need prune-viz and the same versions of what it stands
on.
"""

from __future__ import annotations

import logging
import os
import secrets
import site
import sys
import sysconfig
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from prune_viz.execution.tasks import StartingStimuli, StimulusSettings, Task, TaskResult, run_task
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.precision import FULL
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.progress import Progress

RETRIES = 3  # of a task whose worker or node is lost


@dataclass(frozen=True)
class Work:
    """What all tasks of a run need, sent to every node.

    Attributes
    ----------
    model : nn.Module
        The network as it was given.
    input_shape : tuple of int
        (C, *size).
    canvas : int or None
        Size of every stimulus, if it was given.
    device : str
        Kind of the device to work on.
    settings : StimulusSettings
        What stimuli depend on.
    linear : frozenset of str
        Linear layers whose hidden units are filters too.
    draft : bool
        Whether drafts are sought.
    precision : str
        Precision of the gradients that searches follow.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    canvas: int | None
    device: str
    settings: StimulusSettings
    linear: frozenset[str] = frozenset()
    draft: bool = False
    precision: str = FULL


class RayEngine:
    """Tasks on the Ray cluster that ``RAY_ADDRESS`` names (``auto``: the one on this machine), or a new one.

    A new cluster is of this machine alone: it listens on the loopback interface, asks for a token that nobody
    else knows, has no dashboard and reports nothing to anyone. One that runs already keeps its own ways.

    Parameters
    ----------
    work : Work
        What tasks need.
    workers : int, optional
        How many tasks at a time; by default as many as the cluster has room for, nodes that join included.
    gpus_per_task : float
        Of a GPU, how much each task takes; only where the device is one.
    progress : Progress, optional
        Advanced by the filters of each task that is done.

    Raises
    ------
    UserError
        On entry, if the cluster cannot be reached, has no node for such tasks, or the network cannot be sent.
    """

    def __init__(
        self,
        work: Work,
        workers: int | None = None,
        gpus_per_task: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self._work, self._workers, self._progress = work, workers, progress or Progress()
        self._needs = {"CPU": 1.0, **({"GPU": gpus_per_task} if work.device == "cuda" else {})}
        self._own = False  # whether the connection to Ray is; another's of this process is left open
        self._running: set[Any] = set()

    def __enter__(self) -> Self:
        _isolate_new_cluster()
        import ray

        self._ray = ray
        if not ray.is_initialized():
            self._connect()
        try:
            self._prepare()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _prepare(self) -> None:
        """Send the network, and see that there is a node for its tasks."""
        ray = self._ray
        offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(offer.get(name, 0) >= need for name, need in self._needs.items()) for offer in offers):
            wanted = " and ".join(f"{need:g} {name}" for name, need in self._needs.items())
            raise UserError(f"no node of the Ray cluster offers {wanted}, which each task takes")
        _send_own_modules(self._work.model)
        try:
            sent = ray.put(self._work)
        except Exception as error:  # whatever an untrusted module cannot be packed for
            raise UserError(f"the network cannot be sent to other processes ({brief(error)})") from None
        self._shared = [sent]  # in a list, so that each process fetches it once, not each task

        remote = ray.remote(
            num_cpus=self._needs["CPU"], num_gpus=self._needs.get("GPU", 0), max_retries=RETRIES
        )
        self._remote: Any = remote(_do)

    def _connect(self) -> None:
        self._own = True
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address:
                self._ray.init(address=address, **quiet)
                return
            self._ray.init(address="local", include_dashboard=False, num_cpus=self._workers, **quiet)
        except Exception as error:  # Ray raises many kinds
            hint = "RAY_ADDRESS names a cluster; without it one is started here"
            raise UserError(f"Ray cannot be reached ({brief(error)}): {hint}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End whatever is still being done."""
        for reference in list(self._running):
            self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()

    def slots(self) -> int:
        """How many tasks it takes at a time; twice what there is room for, so that no worker waits."""
        if self._workers is not None:
            return self._workers
        there: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        room = min(int(there.get(name, 0) / needed) for name, needed in self._needs.items())
        return 2 * max(1, room)

    def submit(self, task: Task, starts: StartingStimuli) -> Future[TaskResult]:
        """Start a task, from what its search begins with."""
        reference = self._remote.remote(self._shared, task, starts)
        self._running.add(reference)
        future: Future[TaskResult] = reference.future()

        def note(done: Future[TaskResult]) -> None:
            self._running.discard(reference)
            if not done.cancelled() and done.exception() is None:
                self._progress.advance(task.filters)

        future.add_done_callback(note)
        return future


_prepared: dict[str, tuple[FilterNetwork, StimulusSettings]] = {}


def _do(shared: list[Any], task: Task, starts: StartingStimuli) -> TaskResult:
    """In a worker: prepare the network, once a process, and do a task."""
    torch.set_num_threads(1)  # as everywhere: a task's result does not depend on who does it
    name = shared[0].hex()
    if name not in _prepared:
        import ray

        work: Work = ray.get(shared[0])
        network = FilterNetwork(
            work.model, work.input_shape, work.canvas, work.device, work.linear, work.draft, work.precision
        )
        _prepared.clear()  # of an earlier run
        _prepared[name] = network, work.settings
    network, settings = _prepared[name]
    return run_task(network, task, settings, starts)


def _isolate_new_cluster() -> None:
    """Set what keeps a new cluster to this machine and user; Ray reads it when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Without clusters of several machines, as elsewhere, Ray listens on the loopback interface alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _send_own_modules(model: nn.Module) -> None:
    """Let modules of the user's own code travel with the network: other nodes have none of their files."""
    from ray import cloudpickle

    known = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages()]
    homes = tuple(str(Path(home).resolve()) + os.sep for home in known)
    ours = __name__.partition(".")[0]
    for name in {type(module).__module__.partition(".")[0] for module in model.modules()} - {ours}:
        package: ModuleType | None = sys.modules.get(name)
        file = getattr(package, "__file__", None)
        if package is not None and file and not str(Path(file).resolve()).startswith(homes):
            cloudpickle.register_pickle_by_value(package)  # type: ignore[no-untyped-call]
