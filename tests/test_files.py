"""Files are complete or absent, and say when they are damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prune_viz.errors import UserError
from prune_viz.files import read_arrays, read_header, write_arrays, written_aside
from prune_viz.run_log import RunLog

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


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    path, chance = tmp_path / "file", random.Random(0)
    write_arrays(path, ARRAYS, {"told": "x"})
    sound = path.read_bytes()
    noticed = 0
    for _ in range(400):
        content = bytearray(sound)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        read = read_arrays(path)
        if read is None:
            noticed += 1
        else:  # a bit between the header's words, say
            assert read[1] == {"told": "x"}
            assert all(np.array_equal(read[0][name], array) for name, array in ARRAYS.items())
    assert noticed > 350
    for length in range(0, len(sound), 7):
        path.write_bytes(sound[:length])
        assert read_arrays(path) is None


def test_files_without_a_digest_count_only_where_that_is_allowed(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "file", {"told": "x"})
    assert read_arrays(tmp_path / "file") is None
    assert read_arrays(tmp_path / "file", strict=False)[1] == {"told": "x"}
    assert read_arrays(tmp_path / "none", strict=False) is None


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
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
