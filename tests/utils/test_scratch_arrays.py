"""Large arrays where memory does not hold them: the same numbers from a file, little of it in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from networks import Residual, randomise_norms
from scores import SCORES

from prune_viz.analysis import conclude as conclusions
from prune_viz.analysis.pipeline import analyze
from prune_viz.channels.coupling import find_groups
from prune_viz.redundancy.fisher import gather_fisher
from prune_viz.redundancy.gram_matrices import gather_gram_matrices, pool_gram_matrices, weigh_outputs
from prune_viz.redundancy.judge import judge, rank
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils import scratch_arrays as spill
from prune_viz.utils.errors import UserError
from prune_viz.utils.file_arrays import release
from prune_viz.utils.memory import Budget
from prune_viz.utils.scratch_arrays import ScratchArrays

CPU = torch.device("cpu")


class Tight(Budget):
    """Lets as many rows through at a time as one likes, and keeps no array."""

    def rows(self, a_row: int, aside: int = 0) -> int:
        return 64


@pytest.fixture(autouse=True)
def nothing_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_LEAST", 0)


def _held() -> int:
    return Budget(CPU, 0).held()


def test_released_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    array = ScratchArrays(Budget(CPU, 0, tmp_path)).zeros((4, 2000, 1000))
    plain = array.view(np.ndarray)
    assert not plain.any()
    plain += np.arange(4.0)[:, None, None]
    full = _held()
    release(array[1])  # any part stands for all
    assert full - _held() > 0.9 * array.nbytes
    np.testing.assert_array_equal(array.mean(axis=(1, 2)), np.arange(4.0))
    assert not list(tmp_path.iterdir())  # no name, so nothing stays behind whatever happens


OPERATIONS: dict[str, Callable[[np.ndarray], object]] = {
    "arithmetic": lambda a: 2 * a[0] + a[1],
    "in place": lambda a: np.add(a, 1, out=a),
    "augmented": lambda a: a.__imul__(3),
    "product": lambda a: a[0] @ a[1],
    "reduction": lambda a: a.sum(axis=0),
    "all of it": lambda a: a.any(),
    "function": lambda a: np.trace(a, axis1=1, axis2=2),
    "decomposition": lambda a: np.linalg.eigvalsh(a[2]),
    "rows by number": lambda a: a[[0, 2]],
    "entries": lambda a: a[np.ix_([1], range(900), range(900))],
    "assignment": lambda a: a.__setitem__(0, 5.0),
    "several at once": lambda a: np.stack([a[0], a[1]]),
    "clipped": lambda a: a[1].clip(min=0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_memory_back_by_themselves(name: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 900, 900))
    array = ScratchArrays(Budget(CPU, 0, tmp_path)).zeros(values.shape)
    array[:] = values
    found = OPERATIONS[name](array)
    expected = OPERATIONS[name](values)
    assert _resident(array) < 0.05 * array.nbytes
    np.testing.assert_array_equal(array.view(np.ndarray), values)
    if expected is not None:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected))
    if name in ("in place", "augmented"):
        assert found is array


def _resident(array: np.ndarray) -> int:
    """Bytes of an array's file that this process has in memory, as the kernel counts them."""
    begin = f"{array.__array_interface__['data'][0]:x}-"
    maps = psutil.Process().memory_maps(grouped=False)
    return int(next(region.rss for region in maps if region.addr.startswith(begin)))


def test_only_what_a_budget_does_not_hold_goes_to_a_file() -> None:
    plenty = ScratchArrays(Budget(CPU, _held() + 2**30))
    assert not isinstance(plenty.zeros((1000, 1000)), np.memmap)
    assert isinstance(plenty.zeros((6000, 6000)), np.memmap)
    whole = ScratchArrays(None).zeros((6000, 6000))
    assert not isinstance(whole, np.memmap)
    release(whole)  # which is in no file
    assert not whole.any()


def test_a_disk_without_room_is_said_in_one_line(tmp_path: Path) -> None:
    store = ScratchArrays(Budget(CPU, 0, tmp_path))
    with pytest.raises(UserError, match=rf"GiB that memory does not hold cannot be kept in {tmp_path}: .+;"):
        store.zeros((2**30, 2**26))
    with pytest.raises(UserError, match="absent: No such file or directory"):
        ScratchArrays(Budget(CPU, 0, tmp_path / "absent")).zeros((2, 2))


def test_verdicts_from_files_equal_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Residual()).eval()
    groups = [group for group in find_groups(model, torch.zeros(1, 3, 16, 16)) if group.removable]
    calibration, far = torch.randn(2, 24, 3, 16, 16).unbind()
    fisher = {
        places.module: np.eye(dict(model.named_modules())[places.module].weight.shape[0])
        for group in groups
        for places in group.consumers
    }

    def conclude(budget: Budget | None) -> tuple[list[object], list[np.ndarray]]:
        # Rows at a time are what they are without a budget, so that nothing rounds differently.
        ranked, pooled = [], []
        for group in groups:
            sets = []
            for images in (calibration, far):
                images = [(images[:16], False), (images[16:], True)]
                sets.append(gather_gram_matrices(model, [group], partial(iter, images), budget)[group.number])
            gram_matrices = pool_gram_matrices(sets, [0.5, 0.5])
            assert isinstance(gram_matrices[0].fit, np.memmap) == (budget is not None)
            weighed = weigh_outputs(model, group, gram_matrices, fisher, ScratchArrays(budget))
            assert isinstance(weighed[0].weight_gram, np.memmap) == (budget is not None)
            found, matrix = rank(judge(group, gram_matrices), gram_matrices, weighed, None, Unit.NATS)
            ranked.append(found)
            pooled.append(np.array(matrix))
        return ranked, pooled

    expected, matrices = conclude(None)
    found, others = conclude(Tight(CPU, 0, tmp_path))
    assert [repr(one) for one in found] == [repr(one) for one in expected]
    for one, same in zip(others, matrices, strict=True):
        np.testing.assert_array_equal(one, same)
    assert not list(tmp_path.iterdir())


def test_fisher_in_a_file_equals_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Residual()).eval()
    groups = [group for group in find_groups(model, torch.zeros(1, 3, 16, 16)) if group.removable]
    images = torch.randn(24, 3, 16, 16)
    expected = gather_fisher(model, groups, lambda: images.split(16), SCORES, seed=0)
    found = gather_fisher(model, groups, lambda: images.split(16), SCORES, 0, Tight(CPU, 0, tmp_path))
    assert expected is not None
    assert found is not None
    for name, square in expected.consumers.items():
        assert isinstance(found.consumers[name], np.memmap)
        np.testing.assert_array_equal(found.consumers[name], square)
    for number, cost in expected.ablations.items():
        np.testing.assert_array_equal(found.ablations[number], cost)


@pytest.mark.slow
def test_run_with_matrices_in_files_equals_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, zeros = randomise_norms(Residual()), [], ScratchArrays.zeros

    def noted(store: ScratchArrays, *given: Any) -> np.ndarray:
        made.append(zeros(store, *given))
        return made[-1]

    pooled: dict[int, np.ndarray] = {}
    rank_groups = conclusions.rank_groups

    def ranking(*given: Any) -> Any:
        ranked = rank_groups(*given)
        pooled.update({number: square.astype(np.float32) for number, square in ranked.gram_matrices.items()})
        return ranked

    monkeypatch.setattr(ScratchArrays, "zeros", noted)
    monkeypatch.setattr(conclusions, "rank_groups", ranking)
    for name, share in (("memory", 1), ("files", 2**62)):
        monkeypatch.setattr(spill, "_SHARE", share)
        made.clear()
        analyze(model, input_shape=(3, 16, 16), steps=2, out=tmp_path / name)
        assert {array.dtype.name for array in made} == {"float32", "float64"}
        assert all(isinstance(array, np.memmap) == (name == "files") for array in made)
        gram_matrices = RunDirectory(tmp_path / name).read_gram_matrices()
        assert len(gram_matrices) > 1
        assert gram_matrices.keys() == pooled.keys()
        for number, square in gram_matrices.items():
            np.testing.assert_array_equal(square, pooled[number])
    decisions = [(tmp_path / name / "decisions.json").read_text() for name in ("memory", "files")]
    assert decisions[0] == decisions[1]
