"""Where tasks are done, and doing all of them: `LocalEngine`, `run_tasks`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Protocol, Self

import torch

from prune_viz.execution.task_results import TaskResults
from prune_viz.execution.tasks import StartingStimuli, StimulusSettings, Task, TaskResult, run_task
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.runs.stages import Log
from prune_viz.utils.devices import one_thread_each, release_memory
from prune_viz.utils.errors import IncompleteError, UserError, few, one_line
from prune_viz.utils.progress import Progress

HOPELESS = 3  # tasks that fail before any is done, after which no other is tried
GLANCE = 0.5  # seconds of waiting, at most, until a Ctrl-C that came just as it began is noticed


class Engine(AbstractContextManager["Engine"], Protocol):
    """Where tasks are done, while it is entered; left, it ends whatever is still being done."""

    def slots(self) -> int:
        """How many tasks it takes at a time."""
        ...

    def submit(self, task: Task, starts: StartingStimuli) -> Future[TaskResult]:
        """Start a task, from what its search begins with."""
        ...


class LocalEngine:
    """Tasks on this machine, each in a thread whose operations run in it alone.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    settings : StimulusSettings
        What stimuli depend on.
    workers : int
        How many tasks at a time.
    batch : callable
        From a layer's name to the most filters at a time; None: as many as usual.
    progress : Progress, optional
        Advanced by each filter that is done.
    """

    def __init__(
        self,
        network: FilterNetwork,
        settings: StimulusSettings,
        workers: int,
        batch: Callable[[str], int | None] = lambda layer: None,
        progress: Progress | None = None,
    ) -> None:
        self._network, self._settings, self._batch, self._progress = network, settings, batch, progress
        self._workers = workers
        self._stop = threading.Event()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(one_thread_each())
        self._pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End at the next step of whatever is still being done."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._open.close()
        release_memory(self._network.device)

    def slots(self) -> int:
        """How many tasks it takes at a time."""
        return self._workers

    def submit(self, task: Task, starts: StartingStimuli) -> Future[TaskResult]:
        """Start a task, from what its search begins with."""
        return self._pool.submit(
            run_task, self._network, task, self._settings, starts, self._batch(task.layer), self._stop,
            self._progress,
        )  # fmt: skip


def run_tasks(
    tasks: Sequence[Task],
    results: TaskResults,
    engine: Engine,
    log: Log,
    advance: Callable[[Task], None],
    kind: str = "task",
) -> None:
    """Have all tasks done that are not done yet; one that fails does not keep others from it.

    Parameters
    ----------
    tasks : sequence of Task
        In the order in which they are begun, if they can be.
    results : TaskResults
        Where results go.
    engine : Engine
        Where they are done.
    log : Log
        Records each.
    advance : callable
        Called with each that is done.
    kind : {"task", "draft"}
        What the log calls them.

    Raises
    ------
    UserError
        If tasks failed for want of something that the user can provide.
    IncompleteError
        If tasks failed otherwise.
    """
    waiting = [task for task in tasks if task not in results.done]
    running: dict[Future[TaskResult], Task] = {}
    failures: dict[Task, BaseException] = {}
    while waiting or running:
        for task in [task for task in waiting if results.ready(task)][
            : max(0, engine.slots() - len(running))
        ]:
            waiting.remove(task)
            log(f"{kind} begun", task=task.title)
            running[engine.submit(task, results.starting_stimuli(task))] = task
        if not running:  # what the rest start from has failed
            break
        for future in wait(running, timeout=GLANCE, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            error = future.exception()
            error = getattr(error, "cause", None) or error  # Ray wraps what a task raised in its traceback
            if error is not None:
                failures[task] = error
                log("task failed", task=task.title, error=_describe(error))
                continue
            result = future.result()
            results.add(task, result)
            log(f"{kind} done", task=task.title, seconds=round(result.seconds, 3), worker=result.worker)
            advance(task)
        if len(failures) >= HOPELESS and not results.done:
            waiting.clear()
    if failures:
        _raise(failures, len(tasks), len(results.done))


def _raise(failures: Mapping[Task, BaseException], count: int, done: int) -> None:
    reasons = few([f"{task.title}: {_describe(error)}" for task, error in failures.items()], 2)
    line = (
        f"{len(failures)} of {count} tasks failed ({reasons}); {done} are done, and the same command goes on"
    )
    if all(isinstance(error, UserError) for error in failures.values()):
        raise UserError(line)
    raise IncompleteError(line) from next(iter(failures.values()))


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else one_line(f"{type(error).__name__}: {error}")
