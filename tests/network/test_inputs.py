from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune_viz.network.inputs import (
    InputStatistics,
    given_statistics,
    measure_statistics,
    read_images,
    stored_statistics,
)
from prune_viz.utils.errors import UserError

# Of an exponent: the window mixes neighbouring frequencies, which tells at the lowest of a small image.
TOLERANCE = 0.09
COVARIANCE = np.array([[0.010, 0.006, 0.001], [0.006, 0.008, -0.002], [0.001, -0.002, 0.005]])


def _images(
    exponent: float, covariance: np.ndarray, size: tuple[int, ...], count: int = 32, crop: int = 1
) -> np.ndarray:
    """Images (N, C, *size) about 0.5 with a 1/f^a spectrum and exactly this channel covariance.

    With `crop` 2 they are corners of canvases twice as large, so that they do not wrap around.
    """
    channels = len(covariance)
    canvas = [crop * extent for extent in size]
    white = np.random.default_rng(0).normal(size=(channels, count, *canvas))
    grids = np.meshgrid(*(np.fft.fftfreq(extent) for extent in canvas), indexing="ij")
    frequency = np.sqrt(sum(grid**2 for grid in grids))
    frequency.flat[0] = np.inf
    axes = tuple(range(2, white.ndim))
    coloured = np.fft.ifftn(np.fft.fftn(white, axes=axes) * frequency**-exponent, axes=axes).real
    flat = coloured[(..., *(slice(extent) for extent in size))].reshape(channels, -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat = np.linalg.solve(np.linalg.cholesky(np.cov(flat, bias=True).reshape(channels, channels)), flat)
    mixed = (np.linalg.cholesky(covariance) @ flat).reshape(channels, count, *size)
    return 0.5 + np.moveaxis(mixed, 0, 1).clip(-0.5, 0.5)


def test_given_numbers_are_taken() -> None:
    assert given_statistics(3, None, None) is None
    assert given_statistics(3, [0.5], [0.25]) == InputStatistics((0.5,) * 3, (0.25,) * 3)
    assert given_statistics(2, 0, 1) == InputStatistics((0.0, 0.0), (1.0, 1.0))
    assert given_statistics(2, (0.1, 0.2), [1, 2]) == InputStatistics((0.1, 0.2), (1.0, 2.0))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "--mean and --std belong together"),
        (None, [0.5], "--mean and --std belong together"),
        ([0.5, 0.5], [1], "--mean takes one number or 3"),
        ([0.5], [], "--std takes one number or 3"),
        ([0.5], [1, 0, 1], "--std must be positive"),
        ([0.5], -1, "--std must be positive"),
        (math.nan, 1, "--mean must be finite"),
        (0, [1, 1, math.inf], "--std must be finite"),
        (["grey"], [1], "--mean takes numbers"),
    ],
)
def test_bad_numbers_are_refused_in_one_line(mean: object, std: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        given_statistics(3, mean, std)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_statistics_are_plain_data() -> None:
    measured = measure_statistics(_images(1.0, COVARIANCE, (16, 16)))
    assert hash(measured) == hash(measure_statistics(_images(1.0, COVARIANCE, (16, 16))))
    again = json.loads(json.dumps(asdict(measured)))
    assert again["mean"] == list(measured.mean)
    assert again["covariance"] == [list(row) for row in measured.covariance or ()]


def test_statistics_survive_json_damaged_are_refused() -> None:
    assert stored_statistics(None, 3) is None
    known = InputStatistics((0.5, 0.4), (0.2, 0.3), ((1.0, 0.1), (0.1, 1.0)), 0.9)
    stored = json.loads(json.dumps(asdict(known)))
    assert stored_statistics(stored, len(known.mean)) == known
    for name, value in (("mean", None), ("std", ["wide", 1]), ("covariance", [1, 2]), ("exponent", "steep")):
        with pytest.raises(UserError, match=r"run\.json is damaged: at "):
            stored_statistics({**stored, name: value}, len(known.mean))
    for wrong in (
        [],
        {**stored, "mean": []},
        {**stored, "std": [0.0, 1.0]},
        {**stored, "covariance": [[1.0]]},
    ):
        with pytest.raises(UserError, match="is damaged"):
            stored_statistics(wrong, 2)


def test_mean_std_and_covariance_are_measured_back() -> None:
    images = _images(1.0, COVARIANCE, (24, 20))
    measured = measure_statistics(images)
    deviation = np.sqrt(np.diag(COVARIANCE))
    # Only the few pixels clipped to [0, 1] part them.
    np.testing.assert_allclose(measured.mean, 0.5, atol=1e-4)
    np.testing.assert_allclose(measured.std, deviation, rtol=1e-3)
    expected = COVARIANCE / np.outer(deviation, deviation)
    np.testing.assert_allclose(measured.covariance, expected, atol=2e-3)

    normalised = measure_statistics(images, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.5])
    assert normalised.mean == (0.4, 0.5, 0.6)
    assert normalised.std == (0.1, 0.2, 0.5)
    expected = COVARIANCE / np.outer([0.1, 0.2, 0.5], [0.1, 0.2, 0.5])
    np.testing.assert_allclose(normalised.covariance, expected, rtol=2e-2, atol=1e-3)
    assert normalised.exponent is not None


@pytest.mark.parametrize("size", [(256,), (64, 64), (48, 80), (24, 24, 24)])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_the_exponent_is_measured_back(exponent: float, size: tuple[int, ...]) -> None:
    images = _images(exponent, np.diag([0.01, 0.004]), size)
    assert measure_statistics(images).exponent == pytest.approx(exponent, abs=TOLERANCE)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_borders_do_not_tilt_the_exponent(exponent: float) -> None:
    images = _images(exponent, np.diag([0.01]), (48, 48), crop=2)
    assert measure_statistics(images).exponent == pytest.approx(exponent, abs=TOLERANCE)


def test_the_exponent_is_kept_in_range() -> None:
    rng = np.random.default_rng(0)
    assert measure_statistics(rng.random((8, 1, 32, 32))).exponent == 0.5
    ramps = np.linspace(0, 1, 32) * rng.random((8, 1, 1, 1)) * np.ones((32, 1))
    assert measure_statistics(ramps).exponent == 1.5


def test_bytes_tensors_and_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = (_images(1.0, COVARIANCE, (16, 16)) * 255).astype(np.uint8)
    expected = measure_statistics(stored)
    assert measure_statistics(torch.from_numpy(stored)) == expected
    monkeypatch.setattr("prune_viz.network.inputs._BATCH_VALUES", 5 * 3 * 16 * 16)
    for images in (stored, stored / 255, torch.from_numpy(stored / 255).float()):
        measured = measure_statistics(images)
        for name in ("mean", "std", "covariance", "exponent"):
            np.testing.assert_allclose(getattr(measured, name), getattr(expected, name), rtol=1e-5)


def test_flat_channels_and_few_images() -> None:
    images = _images(1.0, COVARIANCE, (16, 16))
    images[:, 1] = 0.3
    measured = measure_statistics(images)
    assert measured.mean[1] == pytest.approx(0.3)
    assert measured.std[1] == 1
    assert np.asarray(measured.covariance)[1] == pytest.approx(np.zeros(3), abs=1e-6)
    assert measured.exponent is not None

    few = measure_statistics(images[:7])
    assert few.covariance is not None
    assert few.exponent is None
    assert measure_statistics(images[..., :11]).exponent is None

    shades = np.broadcast_to(np.linspace(0, 1, 9).reshape(9, 1, 1, 1), (9, 1, 16, 16))
    each_constant = measure_statistics(shades)
    assert each_constant.covariance == pytest.approx(np.ones((1, 1)))
    assert each_constant.exponent is None
    for shade in (0.0, 0.3, 1.0):
        assert measure_statistics(np.full((9, 2, 16, 16), shade)) == InputStatistics(
            (pytest.approx(shade),) * 2, (1.0, 1.0), None, None
        )


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 8)),
        np.zeros((2, 1, 4, 4, 4, 4)),
        np.zeros((0, 3, 8, 8)),
        np.zeros((2, 3, 8, 8), dtype=np.int64),
        np.full((2, 3, 8, 8), 3.0),
        np.full((2, 3, 8, 8), np.nan),
        np.full((2, 3, 8, 8), -1.0),
    ],
)
def test_unsuitable_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"images must|pixels must"):
        measure_statistics(images)
    with pytest.raises(UserError, match="--mean and --std"):
        measure_statistics(np.zeros((2, 3, 8, 8)), mean=[0.5])


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_pictures_are_scaled_and_cropped_about_their_centre(tmp_path: Path) -> None:
    # Red, green and blue thirds; the middle one alone fits a square.
    thirds = np.repeat(np.eye(3) * 255, 20, axis=0)[None].repeat(20, axis=0)
    _save(tmp_path / "b.png", thirds)
    _save(tmp_path / "a" / "c.PNG", np.full((50, 30, 3), 200))
    (tmp_path / "notes.txt").write_text("not a picture")
    images, skipped = read_images(tmp_path, (3, 10, 10))
    assert skipped == 0
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 10, 10)
    assert (images[0] == 200).all()
    assert (images[1, 1, :, 1:-1] == 255).all()  # the outermost are mixed with what is cut off
    assert (images[1, [0, 2], :, 1:-1] == 0).all()

    wide, _ = read_images(tmp_path, (1, 10, 30))
    assert wide.shape == (2, 1, 10, 30)
    assert (wide[0] == 200).all()
    assert [int(wide[1, 0, 5, x]) for x in (5, 15, 25)] == [76, 150, 29]  # grey of red, green and blue


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x4080, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    images, skipped = read_images(tmp_path, (1, 8, 8))
    assert skipped == 1
    assert (images == 0x40).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_any_mode_are_read(tmp_path: Path, mode: str) -> None:
    halves = np.zeros((160, 160, 3), dtype=np.uint8)
    halves[:, 80:] = 255
    kind = "jpg" if mode in ("L", "RGB", "CMYK") else "png"  # large JPEGs are decoded at a fraction
    Image.fromarray(halves).convert(mode).save(tmp_path / f"halves.{kind}")
    for channels in (1, 3):
        images, skipped = read_images(tmp_path, (channels, 8, 8))
        assert skipped == 0
        assert (images[..., :3] < 12).all()
        assert (images[..., 5:] > 243).all()


def test_of_many_files_evenly_spaced_ones_are_read(tmp_path: Path) -> None:
    for number in range(10):
        _save(tmp_path / f"{number}.png", np.full((4, 4), 20 * number))
    images, skipped = read_images(tmp_path, (1, 4, 4), limit=4)
    assert images[:, 0, 0, 0].tolist() == [0, 40, 100, 140]
    assert skipped == 0
    assert torch.equal(images, read_images(tmp_path, (1, 4, 4), limit=4)[0])


def test_broken_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    _save(tmp_path / "good.jpg", np.full((40, 40, 3), 100))
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    images, skipped = read_images(tmp_path, (3, 16, 16))
    assert images.shape == (1, 3, 16, 16)
    assert skipped == 4


@pytest.mark.parametrize("pixels", [700, 300])  # warned about, refused
def test_decompression_bombs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    _save(tmp_path / "bomb.png", np.full((32, 32), 9))
    _save(tmp_path / "good.png", np.full((16, 16), 7))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    images, skipped = read_images(tmp_path, (1, 16, 16))
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
        images, skipped = read_images(folder, (1, 8, 8))
        assert len(images) == 2
        assert (images == 2).all()
        assert skipped == 1


@pytest.mark.parametrize("shape", [(2, 6), (5, 4, 6), (1, 4, 5, 6), (3, 8)])
def test_other_inputs_are_read_from_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    larger = np.zeros((shape[0], *(extent + 2 for extent in shape[1:])), dtype=np.uint8)
    centre = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    larger[(slice(None), *(slice(1, -1) for _ in shape[1:]))] = centre
    np.save(tmp_path / "a.npy", larger)
    np.save(tmp_path / "b.npy", np.full(shape, 0.5, dtype=np.float32))
    np.save(tmp_path / "small.npy", centre[..., 1:])
    np.save(tmp_path / "channels.npy", np.concatenate([centre, centre]))
    np.save(tmp_path / "flat.npy", centre.ravel())
    np.save(tmp_path / "range.npy", np.full(shape, 1.5))
    np.save(tmp_path / "nan.npy", np.full(shape, np.nan))
    np.save(tmp_path / "signed.npy", centre.astype(np.int64))
    np.save(tmp_path / "code.npy", np.full(shape, None), allow_pickle=True)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-3])
    images, skipped = read_images(tmp_path, shape)
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images[0], centre)
    assert (images[1] == 128).all()
    assert len(images) == 2
    assert skipped == 8


@pytest.mark.parametrize(
    ("prepare", "shape", "message"),
    [
        (lambda path: None, (3, 8, 8), "--data: there is no folder"),
        (lambda path: path.write_text("a file"), (3, 8, 8), "--data: there is no folder"),
        (lambda path: path.mkdir(), (3, 8, 8), "--data: no picture"),
        (lambda path: _save(path / "grey.png", np.zeros((8, 8))), (2, 8, 8), r"--data: no \.npy array"),
    ],
)
def test_a_folder_without_inputs_is_refused(
    tmp_path: Path, prepare: Callable[[Path], object], shape: tuple[int, ...], message: str
) -> None:
    prepare(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        read_images(tmp_path / "data", shape)
