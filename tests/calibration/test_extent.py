"""How many calibration images there are, and how large."""

import pytest
from torch import nn

from prune_viz.calibration import extent
from prune_viz.calibration.extent import plan_extent

pytestmark = pytest.mark.usefixtures("whole_calibration")


def _network(width: int) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers).eval()


def _planned(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    found = plan_extent(model, shape)
    return found.count, found.size


def test_small_networks_get_all_images() -> None:
    assert _planned(_network(2), (3, 28, 28)) == (extent.IMAGES, (28, 28))
    assert plan_extent(_network(2), (3, 640, 640)).size == (160, 160)
    assert plan_extent(_network(2), (3, 28, 28)).passes == extent.PASSES


@pytest.mark.slow
def test_costly_networks_get_fewer_then_smaller_images() -> None:
    plans = [plan_extent(_network(width), (3, 224, 224)) for width in (2, 64, 96, 128, 512)]
    counts, sizes = [plan.count for plan in plans], [plan.size[0] for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert counts[0] == extent.IMAGES
    assert extent.FEWEST <= min(counts) < extent.IMAGES
    assert sizes[0] == 160
    assert sizes[-1] == 96
    passes = [plan.passes for plan in plans]
    assert (passes[0], passes[-1]) == (extent.PASSES, extent.FEWEST_PASSES)
    assert passes == sorted(passes, reverse=True)


@pytest.mark.slow
def test_a_network_of_one_size_keeps_it() -> None:
    tied = nn.Sequential(_network(512), nn.Flatten(), nn.Linear(512 * 120 * 120, 1)).eval()
    assert _planned(tied, (3, 120, 120)) == (extent.FEWEST, (120, 120))
