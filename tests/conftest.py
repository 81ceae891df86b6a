"""What all tests share: slow ones only on demand, one thread, and the demo's trained network."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from browser import chromium, watched  # noqa: F401 (fixtures)
from filelock import FileLock
from networks import random_residual, residual_with_a_copy
from torch import nn

import prune_viz as pv
from prune_viz.calibration import extent, synthetic_images
from prune_viz.demo.digits import Digits, DigitsNet, load_digits, train_digits_net
from prune_viz.loading import architecture_inference


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a shell hands on to what it runs behind
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By far the longest goes first, so that the other workers are busy meanwhile.
    items.sort(key=lambda item: "test_real_network" not in item.nodeid)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors here are small; more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)  # so that no test depends on which ran before it


@pytest.fixture(autouse=True)
def _modules_called_as_before() -> Iterator[None]:
    """Tracing changes how every module is called, and what breaks off must set it back."""
    yield
    assert nn.Module.__call__ is CALL


CALL = nn.Module.__call__
SHORT: dict[tuple[ModuleType, str], int] = {(extent, "IMAGES"): 32, (synthetic_images, "_PATIENCE"): 2}
ANALYSED: dict[str, tuple[Callable[[], nn.Module], int]] = {  # networks, and steps of their stimuli
    "residual": (random_residual, 3),
    "residual with a copy": (residual_with_a_copy, 12),
}
WHOLE = {(module, name): getattr(module, name) for module, name in SHORT}


@contextmanager
def calibrating(settings: Mapping[tuple[ModuleType, str], int]) -> Iterator[None]:
    """Calibration with these settings."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in settings.items():
            patch.setattr(module, name, value)
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_calibration() -> Iterator[None]:
    """Most tests are of what comes before or after calibration, which takes most of a short run."""
    with calibrating(SHORT):
        yield


@pytest.fixture(autouse=True, scope="session")
def _architectures_built_once() -> Iterator[None]:
    """Libraries' own architectures have the same shapes in every test; users' may change."""
    build, known = architecture_inference.shapes_of, {}

    def shapes_of(spec: str, kwargs: Mapping[str, object]) -> dict[str, torch.Tensor]:
        if not spec.startswith("torchvision:"):
            return build(spec, kwargs)
        key = (spec, repr(sorted(kwargs.items())))
        if key not in known:
            known[key] = build(spec, kwargs)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture_inference, "shapes_of", shapes_of)
        yield


@pytest.fixture(scope="module")
def whole_calibration() -> Iterator[None]:
    """Calibration as users have it, for tests of what it is good for."""
    with calibrating(WHOLE):
        yield


@pytest.fixture(scope="session")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies of runs that several modules test; each is made once, by the worker that first asks."""
    base = tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "analysed"
    kept.mkdir(exist_ok=True)

    def copy_of(name: str) -> Path:
        with FileLock(kept / f"{name}.lock"):
            if not (kept / name).exists():
                make, steps = ANALYSED[name]
                pv.analyze(make(), input_shape=(3, 16, 16), steps=steps, out=kept / f"{name}.part")
                (kept / f"{name}.part").rename(kept / name)
        return Path(shutil.copytree(kept / name, tmp_path_factory.mktemp("analysed") / "run"))

    return copy_of


@pytest.fixture(scope="session")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="session")
def trained(digits: Digits) -> DigitsNet:
    """The demo's network before planting; copy it before changing it."""
    return train_digits_net(digits)
