"""Which images of a run are fitted to, which are measured on, and how they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_viz.calibration.image_files import (
    FEWEST_EXAMPLES,
    MOST_EXAMPLES,
    MOST_VALUES,
    RunImages,
    examples_to_keep,
    read_run_images,
    write_run_images,
)
from prune_viz.calibration.images import fitted, kept_out


def _images(count: int) -> torch.Tensor:
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


@pytest.mark.parametrize("count", [0, 3, 4, 9, 32])
def test_each_image_is_fitted_to_or_measured_on(count: int) -> None:
    images = _images(count)
    own, out = fitted(images)[:, 0, 0, 0].tolist(), kept_out(images)[:, 0, 0, 0].tolist()
    assert len(out) == count // 4
    assert sorted(own + out) == list(range(count))


def test_the_users_images_are_measured_on_if_enough() -> None:
    synthetic, examples = _images(16), _images(FEWEST_EXAMPLES)
    both = RunImages(synthetic, examples)
    assert both.are_real
    assert both.kept_out is examples
    assert torch.equal(both.fitted, fitted(synthetic))
    few = RunImages(synthetic, examples[1:])
    assert not few.are_real
    assert torch.equal(few.kept_out, kept_out(synthetic))
    alone = RunImages(None, examples[1:])
    assert alone.are_real
    assert alone.fitted is None
    assert RunImages().kept_out is None
    assert not RunImages()


def test_only_images_kept_out_are_stored() -> None:
    assert examples_to_keep(None) is None
    assert examples_to_keep(_images(3)) is None
    assert torch.equal(examples_to_keep(_images(40)), kept_out(_images(40)))
    assert len(examples_to_keep(_images(8 * MOST_EXAMPLES))) == MOST_EXAMPLES
    large = torch.zeros(1, 1, MOST_VALUES // 2).expand(40, 1, -1)
    assert len(examples_to_keep(large)) == 2


@pytest.mark.parametrize(("synthetic", "examples"), [(8, 5), (8, 0), (0, 5)])
def test_a_runs_images_read_back(tmp_path: Path, synthetic: int, examples: int) -> None:
    images = RunImages(_images(synthetic) if synthetic else None, _images(examples) if examples else None)
    write_run_images(images, tmp_path / "images")
    found = read_run_images(tmp_path / "images")
    for one, other in ((found.synthetic, images.synthetic), (found.examples, images.examples)):
        assert (one is None) == (other is None)
        assert other is None or torch.equal(one, other)
    write_run_images(RunImages(), tmp_path / "images")
    assert not list(tmp_path.iterdir())
    assert not read_run_images(tmp_path / "images")
