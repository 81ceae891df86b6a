"""The reader of untrusted files of torch.save: it reads what torch.load reads, within bounds.

What could take all memory or never end runs in a process of its own, under limits: this file, as a script.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import Plain, Residual, mask_without
from torch import nn

from prune_viz.demo.run import DigitsNet
from prune_viz.loading.architectures import resolve_architecture
from prune_viz.loading.checkpoints import load_checkpoint
from prune_viz.loading.fixed_inputs import read_example
from prune_viz.loading.formats import read_content
from prune_viz.loading.smaller_networks import compose_steps
from prune_viz.loading.tensor_checks import UnusableTensor
from prune_viz.pruning.masks import check_masks, load_masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.errors import UserError

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
MOST_GROWTH = 200  # MiB
LONGEST = 4  # seconds of the CPU that one file may take


def zipped(pickled: bytes, **entries: bytes) -> bytes:
    """A file in the zip format with a pickle of one's own."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **entries}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return stream.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, stream, **options)
    return stream.getvalue()


# Contents that both readers give


class Tagged(torch.Tensor):
    pass


def _ordinary() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    values = torch.randn(6, 4)
    dtypes = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
        torch.complex64,
        torch.complex128,
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    steps = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 1, 5, 5)).sum().backward()
    steps.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(steps, [3, 3, 5])
    training = {
        "model": net.state_dict(),
        "optimizer": steps.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": 3,
        "rng": torch.get_rng_state(),
        "generator": np.random.default_rng(0).bit_generator.state,
        "best": 0.25,
        "names": ["a", ("b", None)],
        "flags": {True, 3, "x"},
        "raw": b"\0\xff",
        "device": torch.device("cuda:1"),
        "dtype": torch.float16,
        "complex": 1 - 2j,
        "mutable": bytearray(b"ab"),
        "size": torch.Size([2, 3]),
        "counts": Counter("aab"),
        "large": [2**62, -(2**63), 2**63],
        7: {0.5: "half", None: -1},
    }
    return {
        "a network": lambda: torchvision.models.mobilenet_v3_small(num_classes=3).state_dict(),
        "an older network": lambda: torchvision.models.squeezenet1_1(num_classes=2).state_dict(),
        "kinds of numbers": lambda: {str(dtype): (values * 3).abs().to(dtype) for dtype in dtypes},
        "parameters": lambda: dict(net.named_parameters()),
        "training": lambda: training,
        "views": lambda: [
            values.T,
            values[::2, 1:3],
            values[2],
            values.flatten()[5:],
            values,
            values.unfold(0, 2, 1),
        ],
        "few": lambda: {
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3),
            "expanded": torch.ones(1).expand(9),
        },
        "conjugates": lambda: [
            torch.view_as_complex(torch.randn(3, 2)).conj().imag,
            torch.randn(2).to(torch.cfloat).conj(),
        ],
        "nothing": lambda: None,
        "a tensor": lambda: values,
        "tagged": lambda: {"w": torch.nn.Parameter(values)},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        one, other = (each.detach().resolve_conj().resolve_neg().contiguous() for each in (one, other))
        return one.numel() == 0 or torch.equal(*(each.flatten().view(torch.uint8) for each in (one, other)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", list(_ordinary()))
@pytest.mark.parametrize("zip_format", [True, False])
def test_ordinary_contents_are_read_as_torch_reads_them(tmp_path: Path, name: str, zip_format: bool) -> None:
    file = tmp_path / "file.pt"
    file.write_bytes(saved(_ordinary()[name](), _use_new_zipfile_serialization=zip_format))
    ours = read_content(file)
    if name == "kinds of numbers" and not zip_format:  # torch does not read what it writes
        theirs = _ordinary()[name]()
    else:
        theirs = torch.load(file, map_location="cpu", weights_only=True)
    assert same(theirs, ours)
    if isinstance(theirs, OrderedDict):
        assert type(ours) is OrderedDict
        assert ours._metadata == theirs._metadata


def test_storages_that_tensors_share_stay_shared(tmp_path: Path) -> None:
    values = torch.zeros(6)
    for zip_format in (True, False):
        torch.save([values, values[2:], values], tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format)
        one, part, again = read_content(tmp_path / "x.pt")
        assert one is again
        part += 1
        assert one.tolist() == [0, 0, 1, 1, 1, 1]


def test_views_of_storages_in_old_files_are_read(tmp_path: Path) -> None:
    tensor = b"ctorch._utils\n_rebuild_tensor\n(("
    for text in ("storage", None, "7", "cpu"):
        tensor += (
            b"ctorch\nFloatStorage\n" if text is None else b"X" + struct.pack("<I", len(text)) + text.encode()
        )
    tensor += b"K\x05(X\x01\0\0\0vK\x01K\x03ttQK\x01K\x02\x85K\x01\x85tR."
    storage = struct.pack("<q5f", 5, 1, 2, 3, 4, 5)
    (tmp_path / "x.pt").write_bytes(MAGIC + b"\x80\x02" + tensor + pickle.dumps(["7"], 2) + storage)
    assert read_content(tmp_path / "x.pt").tolist() == [3, 4]


def test_a_trusted_file_without_code_is_read_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_bytes(saved({"w": torch.ones(2)}))
    monkeypatch.delattr(torch, "load")
    assert read_content(tmp_path / "x.pt", trust_pickle=True)["w"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zip_format", [True, False])
def test_tensors_of_other_kinds_say_why_they_cannot_be_used(tmp_path: Path, zip_format: bool) -> None:
    content = {
        "is sparse": [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()],
        "is quantised": [_quantised()],
        "has no values": [torch.empty(2, device="meta")],
        "is a nested": [torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])],
        r"claims the shape \(40000, 40000\)": [torch.ones(1).expand(40_000, 40_000)],
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format)
    for why, tensors in read_content(tmp_path / "x.pt").items():
        for tensor in tensors:
            assert isinstance(tensor, UnusableTensor)
            with pytest.raises(UserError, match=why):
                raise UserError(tensor.why)


# Steps of removal


def test_composed_removals_equal_removals_in_turn() -> None:
    example = torch.randn(1, 3, 16, 16)
    for network, first, second in (
        (
            Plain(),
            {"conv1": mask_without(8, 1, 4), "conv2": mask_without(8, 0)},
            {"conv1": mask_without(6, 0, 5)},
        ),
        (
            Residual(),
            {"inner": mask_without(8, 2)},
            {"inner": mask_without(7, 2, 6), "expand": mask_without(16)},
        ),
    ):
        network.eval()
        step_by_step = remove_filters(remove_filters(network, first, example), second, example)
        at_once = remove_filters(network, compose_steps([first, second]), example)
        assert same(at_once.state_dict(), step_by_step.state_dict())
    assert compose_steps([{"a": mask_without(4, 1)}, {"a": mask_without(3, 1)}])["a"].tolist() == [1, 0, 0, 1]


def test_claimed_input_size_allocates_nothing(tmp_path: Path) -> None:
    for arch, shape, kwargs in (
        ("prune_viz.demo:DigitsNet", [1, 8192, 8192], {}),
        ("torchvision:squeezenet1_1", [3, 4096, 4096], {"num_classes": 2}),
    ):
        network = resolve_architecture(arch, kwargs)
        name, layer = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
        content = {
            "arch": arch,
            "arch_kwargs": kwargs,
            "input_shape": shape,
            "pruning": [{name: torch.ones(layer.out_channels, dtype=torch.bool)}],
            "state_dict": network.state_dict(),
        }
        torch.save(content, tmp_path / "model.pt")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert same(load_checkpoint(tmp_path / "model.pt").model.state_dict(), network.state_dict())
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH << 10


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"a": mask_without(4, 1)}, {"a": mask_without(4, 1)}], "a has 4 filters, where 3 are left"),
        ([{"a": torch.ones(3)}], "a is not a bool tensor"),
        ([{"a": torch.ones(2, 2, dtype=torch.bool)}], "of one axis"),
        ([{"a": [True]}], "a is of type list, not a tensor"),
        ([{"a": torch.ones(3, dtype=torch.bool).to_sparse()}], "a is sparse"),
        ([{"a": torch.ones(2**20, dtype=torch.bool)}] * 1000, "too many filters"),
    ],
)
def test_steps_that_do_not_fit_are_named(steps: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compose_steps(steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([True] * 8, "of type list"),
        (torch.ones(8, dtype=torch.bool).to_sparse(), "is sparse"),
        (torch.ones(8, dtype=torch.bool, device="meta"), "has no values"),
        ("quantised", "is quantised"),
        (torch.ones(8), "masks are bool tensors"),
    ],
)
def test_masks_of_other_kinds_are_named(tmp_path: Path, mask: Any, says: str) -> None:
    if isinstance(mask, str):
        mask = _quantised()
    with pytest.raises(UserError, match=f"conv1.* {says}"):
        check_masks(Plain(), {"conv1": mask})
    torch.save({"conv1": mask}, tmp_path / "masks.pt")
    with pytest.raises(UserError, match="conv1"):
        load_masks(tmp_path / "masks.pt")


# Archives


def _changed(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def _archives() -> dict[str, bytes]:
    plain = saved({"weight": torch.zeros(4000)})
    start = struct.unpack("<I", plain[-6:-2])[0]
    storage = plain.index(b"archive/data/0", start) - 46  # in the directory
    (header,) = struct.unpack_from("<I", plain, storage + 42)
    links = io.BytesIO()
    with zipfile.ZipFile(links, "w") as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, "/etc/passwd")
    wide = zipped(pickle.dumps(1))
    end = plain.rindex(b"PK\x05\x06")
    return {
        "a link": links.getvalue(),
        "two sizes": _changed(plain, storage + 24, struct.pack("<I", 16004)),
        "both sizes too large": _changed(plain, storage + 20, struct.pack("<II", 16_384, 16_384)),
        "both sizes four GiB": _changed(plain, storage + 20, struct.pack("<II", 2**32 - 2, 2**32 - 2)),
        "sizes in a field that is missing": _changed(plain, storage + 20, b"\xff" * 8),
        "a local header of another size": _changed(plain, header + 18, struct.pack("<II", 99, 99)),
        "a local header of another name": _changed(plain, header + 30, b"brchive"),
        "compressed, the local header says": _changed(plain, header + 8, b"\x08\0"),
        "encrypted": _changed(plain, storage + 8, b"\x01\0"),
        "a header within another entry": _changed(plain, storage + 42, struct.pack("<I", header + 40)),
        "a header behind the directory": _changed(plain, storage + 42, struct.pack("<I", start + 5)),
        "a header at the largest place": _changed(plain, storage + 42, struct.pack("<I", 2**32 - 2)),
        "many entries": _changed(plain, len(plain) - 66, b"\xff" * 16),
        "more entries than there are": _changed(wide, len(wide) - 14, b"\xff\0\xff\0"),
        "no directory": _changed(plain, end + 12, struct.pack("<II", 0, 0)),
        "a comment": plain[:-2] + b"\x04\0note",
        "names that lead elsewhere": zipped(pickle.dumps(1), **{"..__..__x": b"1"}),
        "an absolute name": zipped(pickle.dumps(1)).replace(b"archive/version", b"/rchive/version"),
        "two entries of one name": zipped(pickle.dumps(1), versiom=b"1").replace(b"versiom", b"version"),
        "several checkpoints": zipped(pickle.dumps(1), **{"a__data.pkl": pickle.dumps(1)}),
        "big-endian": zipped(pickle.dumps(1), byteorder=b"big"),
        "no storage": saved({"w": torch.ones(2)}).replace(b"archive/data/0", b"archive/data/1"),
        "bools of 255": saved(torch.ones(9, dtype=torch.bool)).replace(b"\1" * 9, b"\xff" * 9),
    }


@pytest.mark.parametrize("name", list(_archives()))
def test_archives_that_lie_get_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(_archives()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"damaged|unpack to more|entries, more than") as caught:
        read_content(file)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
    assert list(tmp_path.iterdir()) == [file]


# What runs under limits

_PUSHED = {
    "alone": b"",
    "list": b"](K\x01K\x02",
    "dict": b"}(X\x01\0\0\0aK\x02",
    "numbers": b"K\x01K\x02K\x03",
    "stub": b"cos\nsystem\nX\x01\0\0\0a\x85",
    "made": b"cos\nsystem\n)R}",
    "ordered": b"ccollections\nOrderedDict\n)R}",
    "storage": b"ctorch\nFloatStorage\n\x8a\x08" + b"\xff" * 7 + b"\x7f\x85",
    "bytearray": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85",
    "tensor": b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85",
    "mark": b"(((",
}
_LENGTHS = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    b"",
    b"0",
    b"-1",
    b"9" * 400,
    b"9" * 100_000,
    b"1e400",
    b"nan",
    b"'a'",
    b"x",
    b"0x7fffffffffffffff",
    b"os\nsystem",
)


def opcodes() -> Iterator[bytes]:
    """Every opcode with the largest arguments it allows."""
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin-1")
        if opcode.arg is None:
            yield code
        elif opcode.arg.name.endswith(("nl", "short", "long", "pair", "noescape")):
            yield from (code + text + b"\n" for text in _TEXTS)
            yield code + b"9" * 50
        else:
            digits = "".join(filter(str.isdigit, opcode.arg.name)) or "8"
            width = int(digits)
            yield from (
                code + length.to_bytes(width, "little") + b"abcdefgh"
                for length in _LENGTHS
                if length < 256**width
            )
            yield code + b"\x80" * width
            yield code


def _amplified() -> Iterator[bytes]:
    """Few bytes that ask for many objects, or for copies of large ones."""
    many = 100_000
    yield b"(" + b"K\x01" * many + b"tq\0" + b"ctorch\nSize\nq\1" + b"h\1h\0\x85R0" * many + b"N."
    yield b"(" + b"K\x01" * many + b"tq\0" + b"cos\nsystem\nq\1" + b"h\1h\0R0" * many + b"N."
    yield (
        b"X\x00\x00\x10\0"
        + b"a" * 2**20
        + b"q\0X\6\0\0\0latin1q\1c_codecs\nencode\nq\2"
        + b"h\2h\0h\1\x86R0" * many
        + b"N."
    )
    yield b"](" + b"}" * 1_200_000 + b"e."
    yield b"](" + b"\x8f" * 300_000 + b"e."
    yield b"(" * 300_000 + b"."
    yield b"ccollections\nOrderedDict\nq\0](" + b"h\0)R" * 100_000 + b"e."
    yield b"cos\nsystem\nq\0](" + b"h\0)R" * 100_000 + b"e."
    yield b"".join(b"ca\n%x\n" % number for number in range(50_000)) + b"."
    yield (
        b"}("
        + b"".join(b"\x8a\x08" + (number * 2**40).to_bytes(8, "little") + b"N" for number in range(100_000))
        + b"u."
    )
    yield (
        b"N"
        + b"".join(b"r" + (number * 65_537 % 2**32).to_bytes(4, "little") for number in range(100_000))
        + b"."
    )
    yield b"K\x01" + b"\x85" * 300_000 + b"."
    yield b"]" + b"](" * 200_000 + b"."
    yield b"}(" + b"(K\x01K\x02tN" * 50_000 + b"u."
    yield b"L" + b"9" * 5_000_000 + b"L\n."
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
        b"0X\3\0\0\0cpuK\1tQK\0"
    )
    yield tensor + b"(" + b"K\1" * 100_000 + b"t(" + b"K\1" * 100_000 + b"t\x89NtR."
    yield tensor + b"\x8a\x09" + b"\xff" * 8 + b"\0\x85K\1\x85\x89NtR."


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)


def _values() -> dict[str, Any]:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    itself: list[Any] = []
    itself.append(itself)
    return {
        "expanded": torch.zeros(1).expand(36_000, 36_000),
        "meta": torch.empty(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": _quantised(),
        "deep": deep,
        "long": [0] * 200_000,
        "dicts": [{}] * 5_000,
        "huge": 10**400,
        "large": 10**18,
        "nan": float("nan"),
        "negative": -1,
        "zero": 0,
        "bytes": b"\xff" * 9,
        "text": "torchvision:" + "x" * 2**20,
        "lines": "torchvision:a\nb\x1b[31m",
        "none": None,
        "true": True,
        "float": 1.5,
        "set": {1},
        "stub": os_system(),
        "tensor": torch.ones(1, 3, 8, 8),
        "bools": torch.ones(8, dtype=torch.bool),
        "complex": torch.ones(2, dtype=torch.cfloat),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "itself": itself,
        "empty": torch.zeros(0),
        "wide": torch.zeros(0, 3).expand(0, 3),
        "names": {"a" * 5000: 1, (1, 2): 3, None: 4},
        "nested": [[1, 16, 10**7, 1]],
        "many": [1] * 60,
        "pairs": {0: torch.ones(1, 3, 8, 8), 1: torch.ones(1).expand(10**5, 10**5)},
    }


class os_system:  # noqa: N801
    """Pickles as a call of anything."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("called",)


def fields() -> Iterator[tuple[str, dict[str, Any]]]:
    """A checkpoint of prune-viz with one field after another replaced by what should not be there."""
    network = DigitsNet()
    honest = {
        "arch": "prune_viz.demo:DigitsNet",
        "arch_kwargs": {},
        "input_shape": [1, 8, 8],
        "pruning": [{"conv1": torch.ones(network.conv1.out_channels, dtype=torch.bool)}],
        "held_inputs": {"arguments": {0: torch.zeros(1, 1, 8, 8)}, "varied": 0},
        "state_dict": network.state_dict(),
    }
    yield "honest", honest
    places = [
        *honest,
        "held_inputs.arguments",
        "held_inputs.varied",
        "held_inputs.arguments.0",
        "pruning.0",
        "pruning.0.conv1",
        "state_dict.conv1/weight",
        "arch_kwargs.more",
        "input_shape.1",
        "held_inputs.arguments.more",
        "held_inputs.more",
    ]
    for place in (tuple(part.replace("/", ".") for part in dotted.split(".")) for dotted in places):
        for name, value in _values().items():
            if place == ("arch",) and not isinstance(value, str):
                continue  # which would be recognised from the weights, in a second
            if name == "long" and len(place) > 1:
                continue
            yield f"{'.'.join(place)}: {name}", _with(honest, place, value)


def _with(content: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    key: Any = int(place[0]) if place[0].isdigit() else place[0]
    copy = dict(content) if isinstance(content, dict) else dict(enumerate(content))
    copy[key] = _with(copy.get(key), place[1:], value)
    return copy if isinstance(content, dict) else list(copy.values())


def attempts(folder: Path) -> Iterator[tuple[str, bytes, Callable[[Path], Any]]]:
    for opcode in opcodes():
        for name, pushed in _PUSHED.items():
            yield f"{name} {opcode[:12]!r}", zipped(b"\x80\x04" + pushed + opcode + b"."), read_content
        yield f"old {opcode[:12]!r}", MAGIC + b"\x80\x04" + opcode + b".", read_content
    for number, pickled in enumerate(_amplified()):
        yield f"amplified {number}", zipped(b"\x80\x04" + pickled), read_content
    old = saved(torch.zeros(3), _use_new_zipfile_serialization=False)
    for claim in (4, 2**33, 2**63 - 1, -1):
        yield f"old storage of {claim}", _changed(old, len(old) - 20, struct.pack("<q", claim)), read_content
    for name, value in _values().items():
        for format_ in (True, False):
            content = saved(value, _use_new_zipfile_serialization=format_)
            yield f"example {name}", content, read_example
            yield f"masks {name}", saved({"conv1": value}, _use_new_zipfile_serialization=format_), load_masks
    for name, checkpoint in fields():
        yield name, saved(checkpoint), load_checkpoint


def main() -> None:
    """Read each attempt; say which were slow, large or not refused in one line."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    torch.set_num_threads(1)
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.pt"
        file.write_bytes(
            saved(
                {
                    "state_dict": DigitsNet().state_dict(),
                    "arch": "prune_viz.demo:DigitsNet",
                }
            )
        )
        load_checkpoint(file)
        for name, content, read in attempts(Path(folder)):
            file.write_bytes(content)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_PROF, LONGEST)
            try:
                read(file)
                outcome = "read"
            except UserError as error:
                outcome = "refused"
                if len(str(error)) > 2000 or (read is load_checkpoint and not str(error).isprintable()):
                    print("many lines:", name, str(error)[:300])
            except BaseException as error:
                outcome = "failed"
                print("failed:", name, repr(error)[:300])
            signal.setitimer(signal.ITIMER_PROF, 0)
            if name == "honest" and outcome != "read":
                print("honest:", outcome)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if grown > MOST_GROWTH:
                print("large:", name, grown, "MiB")
            if sorted(Path(folder).iterdir()) != [file]:
                print("wrote:", name)
            tried[f"{read.__name__} {outcome}"] += 1
    print("tried", dict(tried), file=sys.stderr)


@pytest.mark.slow
def test_any_file_is_read_or_refused_within_bounds() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "default", __file__],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("tried"), run.stderr  # and no warning


if __name__ == "__main__":
    main()
