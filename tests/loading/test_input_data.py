"""Example inputs of every kind: what is read of them, and what is refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from prune_viz.loading.input_data import MOST_INPUTS, describe_data, normalise, read_inputs
from prune_viz.network.inputs import InputStatistics
from prune_viz.utils.errors import UserError

SHAPE = (3, 16, 16)


def _read(data: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
    examples = read_inputs(shape, None, None, data, None)[1]
    assert examples is not None
    assert examples.dtype == torch.float32
    assert examples.shape[1:] == shape
    return examples


def _inputs(count: int = 12, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Far from 0..1, as a model's own units may be."""
    return 100 + 30 * torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def _pixels(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


FILES: dict[str, Callable[[Path, Tensor], object]] = {
    "a.npy": lambda path, inputs: np.save(path, inputs.numpy()),
    "a.npz": lambda path, inputs: np.savez(path, inputs=inputs.numpy()),
    "a.pt": lambda path, inputs: torch.save(inputs, path),
    "a.pth": lambda path, inputs: torch.save({"inputs": inputs, "classes": torch.zeros(3)}, path),
    "a.safetensors": lambda path, inputs: save_file({"inputs": inputs}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_floats_are_in_the_models_units(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name, _inputs())
    for data in (tmp_path / name, str(tmp_path / name), tmp_path):  # a folder of such files, too
        assert torch.equal(_read(data), _inputs())


@pytest.mark.parametrize(
    "given",
    [
        lambda inputs: inputs,
        lambda inputs: inputs.numpy(),
        lambda inputs: inputs.double(),
        lambda inputs: [inputs[:5], inputs[5:]],
        lambda inputs: (part.numpy() for part in inputs.split(5)),
        lambda inputs: [{"inputs": part, "classes": torch.zeros(len(part))} for part in inputs.split(5)],
        lambda inputs: DataLoader(TensorDataset(inputs, torch.arange(len(inputs))), batch_size=5),
        lambda inputs: DataLoader(list(inputs), batch_size=None),
    ],
)
def test_arrays_and_batches_are_taken_as_they_are(given: Callable[[Tensor], Any]) -> None:
    torch.testing.assert_close(_read(given(_inputs())), _inputs(), rtol=0, atol=0)


def test_bytes_are_pixels_and_normalised() -> None:
    statistics, examples, notes = read_inputs(SHAPE, [0.5] * 3, [0.25] * 3, _pixels(), None)
    assert statistics is not None
    assert (statistics.mean, statistics.std) == ((0.5,) * 3, (0.25,) * 3)
    assert examples is not None
    torch.testing.assert_close(examples, (_pixels() / 255 - 0.5) / 0.25)
    assert notes == []
    measured, examples, _ = read_inputs(SHAPE, None, None, _pixels().numpy(), None)
    assert measured is not None
    assert examples is not None
    torch.testing.assert_close(examples.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert torch.equal(examples, normalise(_pixels(), measured))


def test_pictures_are_pixels(tmp_path: Path) -> None:
    for number, picture in enumerate(_pixels()):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
    np.save(tmp_path / "a.npy", _inputs().numpy())  # pictures count where there are any
    (tmp_path / "broken.png").write_text("not a picture")
    statistics, examples, notes = read_inputs(SHAPE, None, None, tmp_path, None)
    assert statistics is not None
    assert torch.equal(examples, normalise(_pixels(), statistics))
    assert notes == ["Example inputs that could not be read and were left out: 1 of the files."]


def test_floats_are_measured_in_their_own_units() -> None:
    inputs = _inputs(count=40)
    flat = inputs.double().movedim(1, 0).flatten(1)
    statistics = read_inputs(SHAPE, None, None, inputs, None)[0]
    assert statistics is not None
    np.testing.assert_allclose(statistics.covariance, np.cov(flat.numpy(), bias=True), rtol=1e-3, atol=0.1)
    assert statistics.exponent == 0.5  # white noise; the least there is
    # The mean is shown as mid grey, two deviations about it as black and white.
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (statistics.mean, statistics.std))
    shown = (inputs * std + mean).movedim(1, 0).flatten(1)
    torch.testing.assert_close(shown.mean(dim=1), torch.full((3,), 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(shown.std(dim=1), torch.full((3,), 0.25), rtol=0, atol=1e-3)
    given = read_inputs(SHAPE, [0.1] * 3, [0.2] * 3, inputs, None)[0]
    assert given is not None
    assert (given.mean, given.std) == ((0.1,) * 3, (0.2,) * 3)
    np.testing.assert_allclose(given.covariance, statistics.covariance)


def test_constant_inputs_are_measured_too() -> None:
    statistics = read_inputs(SHAPE, None, None, torch.full((4, *SHAPE), 7.0), None)[0]
    assert statistics is not None
    assert np.isfinite([*statistics.mean, *statistics.std]).all()
    assert min(statistics.std) > 0


def test_nothing_is_known_without_data() -> None:
    assert read_inputs(SHAPE, None, None, None, None) == (None, None, [])
    given = read_inputs(SHAPE, 0.5, 0.25, None, None)
    assert given == (InputStatistics((0.5,) * 3, (0.25,) * 3), None, [])


@pytest.mark.parametrize("shape", [(2, 6), (5, 4, 6), (1, 4, 5, 6), (3, 8), (3, 4, 6)])
def test_larger_arrays_are_cropped_about_the_centre(tmp_path: Path, shape: tuple[int, ...]) -> None:
    centre = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    larger = np.zeros((shape[0], *(extent + 2 for extent in shape[1:])), dtype=np.uint8)
    larger[(slice(None), *(slice(1, -1) for _ in shape[1:]))] = centre
    np.save(tmp_path / "a.npy", larger)
    np.save(tmp_path / "b.npy", np.stack([centre, 255 - centre]))
    np.save(tmp_path / "small.npy", centre[..., 1:])
    np.save(tmp_path / "channels.npy", np.concatenate([centre, centre]))
    np.save(tmp_path / "flat.npy", centre.ravel())
    np.save(tmp_path / "yes.npy", centre > 128)
    np.save(tmp_path / "code.npy", np.full(shape, None), allow_pickle=True)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-3])
    statistics, examples, notes = read_inputs(shape, None, None, tmp_path, None)
    assert statistics is not None
    expected = [centre, centre, 255 - centre]
    if shape[0] == 1:  # twice as many channels are two inputs of one channel
        expected += [centre, centre]
    assert torch.equal(examples, normalise(torch.from_numpy(np.stack(expected)), statistics))
    left_out = 6 - (shape[0] == 1)
    assert notes == [f"Example inputs that could not be read and were left out: {left_out} of the files."]


@pytest.mark.parametrize("shape", [(1, 6), (1, 4, 6), (1, 4, 5, 6)])
def test_one_channel_needs_no_axis(shape: tuple[int, ...]) -> None:
    inputs = _inputs(5, shape)
    assert torch.equal(_read(inputs[:, 0], shape), inputs)
    assert torch.equal(_read(inputs[0, 0], shape), inputs[:1])
    assert torch.equal(_read(inputs[0], shape), inputs[:1])


def test_of_many_inputs_evenly_spaced_ones_are_kept() -> None:
    many = torch.arange(1024.0).view(-1, 1, 1).expand(-1, 1, 4)
    found = _read(many, (1, 4))[:, 0, 0]
    assert len(found) == MOST_INPUTS
    assert (found[0], found[-1]) == (0, 1023)
    assert (found.diff() - 2).abs().max() <= 1


def test_no_more_batches_are_drawn_than_needed() -> None:
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(len(drawn))
            yield torch.zeros(200, 1, 4)

    assert len(_read(endless(), (1, 4))) == MOST_INPUTS
    assert len(drawn) == 3


CODE = """
import numpy as np
import torch

def batches():
    for number in range(3):
        yield torch.full((2, 3, 16, 16), float(number)), torch.zeros(2)

def array():
    return np.full((4, 3, 16, 16), 200, dtype=np.uint8)

def fails():
    raise RuntimeError("the disk is full")

def fails_later():
    yield torch.zeros(2, 3, 16, 16)
    raise RuntimeError("the disk is full")

def number():
    return 3

def nothing():
    return []
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current directory that gives inputs."""
    (tmp_path / "own_inputs.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield "own_inputs"
    sys.modules.pop("own_inputs", None)


def test_a_function_of_the_users_gives_inputs(factory: str) -> None:
    assert _read(f"{factory}:batches")[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    statistics, examples, _ = read_inputs(SHAPE, [0.0] * 3, [1.0] * 3, f"{factory}:array", None)
    assert statistics is not None
    assert examples is not None
    torch.testing.assert_close(examples, torch.full((4, *SHAPE), 200 / 255))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("fails", "own_inputs:fails failed: .*the disk is full"),
        ("fails_later", "own_inputs:fails_later failed: .*the disk is full"),
        ("number", "own_inputs:number failed: .*not iterable"),
        ("nothing", "own_inputs:nothing holds no inputs"),
        ("missing", "own_inputs:missing failed: .*missing"),
    ],
)
def test_a_function_that_fails_is_named(factory: str, function: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^--data {says}") as caught:
        _read(f"{factory}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(4, 3, 16, 15), "4 x 3 x 16 x 15; the model takes inputs of"),
        (torch.zeros(4, 2, 16, 16), "4 x 2 x 16 x 16; the model takes"),
        (np.zeros((16, 16)), "16 x 16; the model takes"),
        (np.zeros(()), "is empty; the model takes"),
        (torch.zeros(0, *SHAPE), "0 x 3 x 16 x 16; the model takes"),
        (torch.full((2, *SHAPE), torch.nan), "not finite"),
        (np.full((2, *SHAPE), np.inf), "not finite"),
        (torch.zeros(2, *SHAPE, dtype=torch.bool), "not numbers of bytes or floats"),
        (torch.zeros(2, *SHAPE, dtype=torch.complex64), "not numbers of bytes or floats"),
        ([], "--data holds no inputs"),
        ([torch.zeros(2, *SHAPE), torch.zeros(2, 3, 8, 8)], "a batch of --data is 2 x 3 x 8 x 8"),
        (["words", 3], "--data holds no inputs"),
        (3, "--data failed: .*not iterable"),
        ("no/such/folder", "there is no file or folder no/such/folder"),
        ("nothing:", "there is no file or folder nothing:"),
        ("no_such_module:function", "--data no_such_module:function failed"),
    ],
)
def test_unfit_data_gets_one_line(data: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read_inputs(SHAPE, None, None, data, None)
    assert str(caught.value).startswith("--data")
    assert "\n" not in str(caught.value)


def _text(path: Path) -> None:
    path.write_text("not an array")


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.txt", _text, "is none of .aif"),
        ("a.npy", _text, "cannot be read"),
        ("a.npz", _text, "cannot be read"),
        ("a.pt", _text, "cannot be read"),
        ("a.safetensors", _text, "cannot be read"),
        ("a.npz", np.savez, "holds no array"),
        ("b.pt", lambda path: torch.save({}, path), "holds no array"),
        ("c.pt", lambda path: torch.save(Path("a"), path), "holds no array"),  # is not unpickled
        ("b.npy", lambda path: np.save(path, np.full((2, *SHAPE), np.nan)), "not finite"),
        ("c.npy", lambda path: np.save(path, np.zeros((2, 3, 8, 8))), "c.npy is 2 x 3 x 8 x 8"),
        ("a.wav", _text, "is a sound, and the model takes inputs of"),
    ],
)
def test_unfit_files_get_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], object], says: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"--data: .*{says}") as caught:
        read_inputs(SHAPE, None, None, tmp_path / name, None)
    assert "\n" not in str(caught.value)


def test_folders_without_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file in .* holds inputs of shape \(3, 16, 16\).*\(0 tried\)"):
        _read(tmp_path)
    (tmp_path / "words.png").write_text("not a picture")
    np.save(tmp_path / "small.npy", np.zeros((3, 8, 8)))
    with pytest.raises(UserError, match=r"\(2 tried\)"):
        _read(tmp_path)
    np.save(tmp_path / "a.npy", _inputs(2).numpy())
    np.save(tmp_path / "b.npy", _pixels(2).numpy())
    with pytest.raises(UserError, match=r"some arrays in .* are bytes, others floats"):
        _read(tmp_path)


def test_the_run_may_not_lie_in_the_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", _inputs().numpy())
    for out in (tmp_path, tmp_path / "deep" / "run"):
        with pytest.raises(UserError, match=r"--data: the run directory .* lies in"):
            read_inputs(SHAPE, None, None, tmp_path, out)
    read_inputs(SHAPE, None, None, tmp_path / "a.npy", tmp_path / "run")


def test_data_are_described_for_the_run(tmp_path: Path) -> None:
    assert describe_data(None) is None
    assert describe_data(tmp_path) == describe_data(str(tmp_path)) == str(tmp_path)
    assert describe_data(torch.zeros(2, 3)) == "Tensor (2, 3)"
    assert describe_data(np.zeros((2, 3))) == "ndarray (2, 3)"
    assert describe_data([1]) == "list"


def test_frames_are_cut_from_sounds(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    wave = np.sin(np.arange(4000) / 20).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], axis=1), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.flac", wave[:10], 8000)
    _, frames, notes = read_inputs((1, 500), None, None, tmp_path, None)
    assert frames is not None
    assert frames.shape == (8, 1, 500)
    assert notes == ["Example inputs that could not be read and were left out: 1 of the files."]
    starts = np.linspace(0, 3500, 8).astype(int)
    for frame, start in zip(frames[:, 0].numpy(), starts, strict=True):
        np.testing.assert_array_equal(frame, wave[start : start + 500])
    with pytest.raises(UserError, match=r"short.flac is shorter, or of fewer channels"):
        read_inputs((1, 500), None, None, tmp_path / "short.flac", None)
    with pytest.raises(UserError, match=r"a.wav is a sound, and the model takes inputs of"):
        read_inputs(SHAPE, None, None, tmp_path / "a.wav", None)
