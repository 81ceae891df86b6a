"""Files are complete or absent, and say when they are damaged."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prune_viz.runs.log import RunLog
from prune_viz.utils.array_files import batches_of, read_arrays, read_header, write_arrays
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import written_aside

ARRAYS = {
    "half": np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4),
    "empty": np.zeros((0, 5), np.float32),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
}


def test_arrays_come_back_as_they_went(tmp_path: Path) -> None:
    write_arrays(tmp_path / "file", ARRAYS, {"told": "ä\n"})
    found, told = read_arrays(tmp_path / "file")
    assert told == {"told": "ä\n"}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert read_header(tmp_path / "file")["told"] == "ä\n"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.int32, np.uint8]),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    rest=st.lists(st.integers(1, 4), max_size=2),
)
def test_parts_make_the_file_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, kind: type, lengths: list[int], rest: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    parts = [
        np.random.default_rng(index).integers(0, 99, (length, *rest)).astype(kind)
        for index, length in enumerate(lengths)
    ]
    others = {"bytes": np.arange(3, dtype=np.uint8), "wide": np.arange(3.0)}
    write_arrays(folder / "parts", {"array": parts, **others}, {"told": "x"})
    write_arrays(folder / "whole", {"array": np.concatenate(parts), **others}, {"told": "x"})
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    by_library = load_file(folder / "parts")
    assert by_library.keys() == {"array", *others}
    mapped, _ = read_arrays(folder / "parts", mapped={"array", "wide"})
    for found in (by_library, mapped):
        assert found["array"].dtype == kind
        assert np.array_equal(found["array"], np.concatenate(parts))
        assert np.array_equal(found["wide"], others["wide"])
        assert np.array_equal(found["bytes"], others["bytes"])


def test_what_the_library_wrote_with_the_digest_is_read(tmp_path: Path) -> None:
    """As versions before wrote it."""
    write_arrays(tmp_path / "now", ARRAYS, {"told": "x"})
    whole = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}
    save_file(whole, tmp_path / "before", read_header(tmp_path / "now"))
    assert read_arrays(tmp_path / "before")[1] == {"told": "x"}
    digest = "5b6208aa8ccb3c3b45674e31035dccd5624bc72ab011b18c6cdadf2b3a9063e7"
    assert read_header(tmp_path / "now")["sha256"] == digest


def test_of_a_mapped_array_only_what_is_used_is_in_memory(tmp_path: Path) -> None:
    def held() -> int:
        return int(psutil.Process().memory_info().rss)

    rows = np.arange(2**13, dtype=np.float32)
    write_arrays(tmp_path / "file", {"images": [np.broadcast_to(row, (1, 2**12)) for row in rows]})
    before = held()
    images = read_arrays(tmp_path / "file", mapped={"images"})[0]["images"]
    assert images.nbytes == 2**27
    assert held() - before < 2**26  # though its digest was computed
    for number, batch in enumerate(batches_of(images, 512)):
        assert (batch == rows[512 * number : 512 * (number + 1), None]).all()
        assert held() - before < 2**26
    with pytest.raises(ValueError, match="read-only"):
        images[0] = -1


def test_what_the_machine_cannot_hold_is_not_called_damaged(tmp_path: Path) -> None:
    write_arrays(tmp_path / "file", ARRAYS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match="file cannot be read: Too many open files"):
            read_arrays(tmp_path / "file", mapped={"half"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_no_array_of_ours_is_nothing(tmp_path: Path) -> None:
    save_file({"images": np.array(1.0, np.float32)}, tmp_path / "file", {"sha256": "x"})
    assert read_arrays(tmp_path / "file") is None
    assert read_arrays(tmp_path / "file", mapped={"images"}) is None
    with pytest.raises(UnicodeEncodeError):
        write_arrays(tmp_path / "other", ARRAYS, {"layer": "\ud800"})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mapped", [(), ("half", "transposed")])
def test_any_damage_is_noticed(tmp_path: Path, mapped: tuple[str, ...]) -> None:
    path, chance = tmp_path / "file", random.Random(0)
    write_arrays(path, ARRAYS, {"told": "x"})
    sound = path.read_bytes()
    noticed = 0
    for _ in range(400):
        content = bytearray(sound)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        read = read_arrays(path, mapped=mapped)
        if read is None:
            noticed += 1
        else:  # a bit between the header's words, say
            assert read[1] == {"told": "x"}
            assert all(np.array_equal(read[0][name], array) for name, array in ARRAYS.items())
    assert noticed > 350
    for length in range(0, len(sound), 7):
        path.write_bytes(sound[:length])
        assert read_arrays(path, mapped=mapped) is None


def test_files_without_digest_need_permission(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "file", {"told": "x"})
    assert read_arrays(tmp_path / "file") is None
    assert read_arrays(tmp_path / "file", strict=False)[1] == {"told": "x"}
    assert read_arrays(tmp_path / "none", strict=False) is None


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_arrays(tmp_path / "file" / "below", {"a": np.ones(2)})
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "half") as aside:
        aside.write_text(f"half {1 / 0}")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_log_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    RunLog(path)("first", number=np.float32(1.5), missing=float("nan"))
    with path.open("a") as stream:
        stream.write('{"time": "20')
    log = RunLog(path)
    log("second")
    log("third")
    lines = path.read_text().splitlines()
    assert [json.loads(lines[row])["event"] for row in (0, 2, 3)] == ["first", "second", "third"]
    assert json.loads(lines[0])["number"] == 1.5
    assert json.loads(lines[0])["missing"] is None
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(tmp_path)("nothing")
