"""Pictures of a folder, as inputs of a size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune_viz.loading.pictures import read_pictures
from prune_viz.utils.errors import UserError


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_pictures_are_scaled_and_cropped_about_their_centre(tmp_path: Path) -> None:
    # Red, green and blue thirds; the middle one alone fits a square.
    thirds = np.repeat(np.eye(3) * 255, 20, axis=0)[None].repeat(20, axis=0)
    _save(tmp_path / "b.png", thirds)
    _save(tmp_path / "a" / "c.PNG", np.full((50, 30, 3), 200))
    (tmp_path / "notes.txt").write_text("not a picture")
    images, skipped = read_pictures(tmp_path, (3, 10, 10))
    assert skipped == 0
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 10, 10)
    assert (images[0] == 200).all()
    assert (images[1, 1, :, 1:-1] == 255).all()  # the outermost are mixed with what is cut off
    assert (images[1, [0, 2], :, 1:-1] == 0).all()

    wide, _ = read_pictures(tmp_path, (1, 10, 30))
    assert wide.shape == (2, 1, 10, 30)
    assert (wide[0] == 200).all()
    assert [int(wide[1, 0, 5, x]) for x in (5, 15, 25)] == [76, 150, 29]  # grey of red, green and blue


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x4080, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    images, skipped = read_pictures(tmp_path, (1, 8, 8))
    assert skipped == 1
    assert (images == 0x40).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_any_mode_are_read(tmp_path: Path, mode: str) -> None:
    halves = np.zeros((160, 160, 3), dtype=np.uint8)
    halves[:, 80:] = 255
    kind = "jpg" if mode in ("L", "RGB", "CMYK") else "png"  # large JPEGs are decoded at a fraction
    Image.fromarray(halves).convert(mode).save(tmp_path / f"halves.{kind}")
    for channels in (1, 3):
        images, skipped = read_pictures(tmp_path, (channels, 8, 8))
        assert skipped == 0
        assert (images[..., :3] < 12).all()
        assert (images[..., 5:] > 243).all()


def test_of_many_files_evenly_spaced_ones_are_read(tmp_path: Path) -> None:
    for number in range(10):
        _save(tmp_path / f"{number}.png", np.full((4, 4), 20 * number))
    images, skipped = read_pictures(tmp_path, (1, 4, 4), limit=4)
    assert images[:, 0, 0, 0].tolist() == [0, 40, 100, 140]
    assert skipped == 0
    assert torch.equal(images, read_pictures(tmp_path, (1, 4, 4), limit=4)[0])


def test_broken_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    _save(tmp_path / "good.jpg", np.full((40, 40, 3), 100))
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    images, skipped = read_pictures(tmp_path, (3, 16, 16))
    assert images.shape == (1, 3, 16, 16)
    assert skipped == 4


@pytest.mark.parametrize("pixels", [700, 300])  # warned about, refused
def test_decompression_bombs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    _save(tmp_path / "bomb.png", np.full((32, 32), 9))
    _save(tmp_path / "good.png", np.full((16, 16), 7))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    images, skipped = read_pictures(tmp_path, (1, 16, 16))
    assert (images == 7).all()
    assert skipped == 1


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    _save(tmp_path / "outside" / "secret.png", np.full((8, 8), 1))
    _save(inside / "own.png", np.full((8, 8), 2))
    try:
        (inside / "again.png").symlink_to(inside / "own.png")
        (inside / "leak.png").symlink_to(tmp_path / "outside" / "secret.png")
        (inside / "leaks").symlink_to(tmp_path / "outside", target_is_directory=True)
        (inside / "loop").symlink_to(inside, target_is_directory=True)
        (tmp_path / "way").symlink_to(inside, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    for folder in (inside, tmp_path / "way"):
        images, skipped = read_pictures(folder, (1, 8, 8))
        assert len(images) == 2
        assert (images == 2).all()
        assert skipped == 0


def test_a_folder_without_pictures_gives_none(tmp_path: Path) -> None:
    assert read_pictures(tmp_path, (3, 8, 8)) == (None, 0)
    (tmp_path / "words.png").write_text("not a picture")
    assert read_pictures(tmp_path, (3, 8, 8)) == (None, 1)
    for missing in (tmp_path / "none", tmp_path / "words.png"):
        with pytest.raises(UserError, match="--data: there is no folder"):
            read_pictures(missing, (3, 8, 8))
