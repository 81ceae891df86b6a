"""Files made to do harm: none runs code, takes all memory, or writes anything."""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import importlib
import io
import operator
import os
import pickle
import resource
import runpy
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from prune_viz.feature_visualization.stimuli import maximize
from prune_viz.loading.architectures import default_input_shape
from prune_viz.loading.checkpoints import load_model
from prune_viz.network.calls import largest_tensor
from prune_viz.network.tracing import trace
from prune_viz.pruning.export import export_model
from prune_viz.utils.errors import UserError

CONV = "torch.nn:Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": 3}
CODE = "import pathlib; pathlib.Path({!r}).touch()"


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call, self.state = (function, arguments), state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call if self.state is None else (*self.call, self.state)


def _archive(path: Path, pickled: bytes, folder: str = "archive", **entries: bytes) -> None:
    """A zip archive as torch.save writes it, with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(f"{folder}/data/{name.lstrip('_')}", content)


def _roads(ran: Path) -> dict[str, Any]:
    code, touch = CODE.format(str(ran)), f"touch {ran}"
    script = ran.with_name("script.py")
    script.write_text(code)
    inner = ran.with_name("inner.pt")
    torch.save(Calls(os.system, touch), inner)
    return {
        "os.system": Calls(os.system, touch),
        "subprocess": Calls(subprocess.call, ["touch", str(ran)]),
        "eval": Calls(builtins.eval, f"__import__('os').system({touch!r})"),
        "exec": Calls(builtins.exec, code),
        "getattr": Calls(builtins.getattr, Calls(importlib.import_module, "os"), "system"),
        "partial": Calls(functools.partial(os.system, touch)),
        "methodcaller": Calls(operator.methodcaller("system", touch), Calls(importlib.import_module, "os")),
        "runpy": Calls(runpy.run_path, str(script)),
        "pickle in pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "torch.load": Calls(functools.partial(torch.load, weights_only=False), str(inner)),
        "torch.hub": Calls(torch.hub.load, str(ran.parent), "script"),
        "a function of torchvision": Calls(torchvision.models.get_model, "resnet18"),
        "a name through a module": Calls(torch.nn.modules.module.torch.load, str(inner)),
        "state of a layer": Calls(nn.ReLU, False, state={"forward": Calls(os.system, touch)}),
        "hook of a layer": Calls(nn.ReLU, False, state={"_forward_hooks": {0: os.system}}),
        "breakpoint": Calls(builtins.breakpoint),
        "exit": Calls(sys.exit, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("flipped", [True, False])
def test_no_road_leads_to_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, flipped: bool
) -> None:
    if flipped:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran, file = tmp_path / "ran", tmp_path / "model.pt"
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    torch.save(network, tmp_path / "honest.pt")
    for name, hostile in _roads(ran).items():
        for content in (hostile, {"state_dict": network.state_dict(), "x": hostile}):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            before = set(tmp_path.iterdir())
            found, message = None, ""
            try:
                found = load_model(file, *CONV)
            except UserError as error:
                message = str(error)
            if found is not None:  # the weights alone
                assert torch.equal(found.weight, network[0].weight)
            else:
                assert "\n" not in message
                assert "pickled code" in message or "holds no tensors" in message
            assert not ran.exists(), name
            assert set(tmp_path.iterdir()) == before, name


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: {"model": m, "epoch": 1}])
def test_networks_of_known_libraries_need_no_trust(tmp_path: Path, wrap: Callable[[nn.Module], Any]) -> None:
    network = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    torch.save(wrap(network), tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))


def _nested(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b"\x80\x02" + opening * depth + closing * (depth - 1) + b"."


def _references(path: Path) -> None:
    """A mapping of 300 names for one mapping of 300 names for one mapping: 27 million places to look at."""
    inner: dict[str, Any] = {"weight": torch.ones(2)}
    for _ in range(3):
        inner = {f"name{index}": inner for index in range(300)}
    torch.save(inner, path)


def _bomb(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(20_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert path.stat().st_size < 1_000_000


def _copies_of_an_entry(path: Path) -> None:
    """A zip whose directory lists one stretch of the file under many names."""
    torch.save({"weight": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(50):
            twin = copy.copy(largest)
            twin.filename = f"archive/data/{number + 10}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]


def _elsewhere(path: Path) -> None:
    _archive(path, pickle.dumps({"a": 1}, 2), folder="../../elsewhere", **{"_../../../escaped": b"x" * 64})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: _archive(path, _nested(200_000, b"]", b"a")), "holds no tensors|is damaged"),
        (lambda path: _archive(path, _nested(200_000, b"}K\x01", b"s")), "holds no tensors|is damaged"),
        (lambda path: _archive(path, b"\x80\x02\x8a\xff" + b"\xff" * 255 + b"."), "is damaged|holds no"),
        (lambda path: _archive(path, b"\x80\x02X\xff\xff\xff\x7fshort"), "is damaged"),
        (_references, "do not fit|holds no"),
        (_bomb, "would unpack to more than it holds"),
        (_copies_of_an_entry, "would unpack to more than it holds"),
        (_elsewhere, "is damaged|holds no tensors"),
        (lambda path: torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path), "w claims the shape"),
        (lambda path: torch.save({"w": torch.zeros(1).expand(2**20, 1)}, path), "w claims the shape"),
        (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "w is sparse"),
        (lambda path: torch.save({"w": torch.eye(3).to_sparse_csr()}, path), "w is sparse"),
        (lambda path: torch.save({"w": torch.sparse_coo_tensor(size=(10**9, 10**9))}, path), "w is sparse"),
        (lambda path: torch.save({"w": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}, path),
         "w is quantised"),
        (lambda path: torch.save({"w": torch.empty(3, 10**12, device="meta")}, path), "w has no values"),
    ],
)  # fmt: skip
def test_what_would_exhaust_memory_or_escape_gets_one_line(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    home = tmp_path / "a" / "b" / "c"
    home.mkdir(parents=True)
    file = home / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=says) as caught:
        load_model(file, "torchvision:squeezenet1_1")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_every_load_says_whether_code_may_run() -> None:
    readers = ("torch.load", "torch.jit.load", "torch.export.load", "pickle.load", "pickle.loads")
    safe, unsafe = [], []
    home = Path(__file__).parents[2]
    for file in [*home.glob("prune_viz/**/*.py"), *home.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and (reader := ast.unparse(node.func)) in readers:
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                loads = safe if given.get("weights_only") == "True" else unsafe
                loads.append((file.name, reader, given.get("weights_only")))
    assert {file for file, _, _ in safe} <= {"finetune.py"}  # the package has a reader of its own
    assert sorted(unsafe, key=str) == [
        ("export.py", "torch.export.load", None),  # what it has just written
        ("formats.py", "torch.export.load", None),  # these three behind --trust-pickle
        ("formats.py", "torch.jit.load", None),
        ("formats.py", "torch.load", "False"),
    ]


EVIL_NAME = '0" if getattr(__import__("os"), "system")("touch ran") == 0 else "0'


def test_names_of_layers_are_never_made_source_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    network._modules[EVIL_NAME] = nn.Conv2d(2, 3, 3)
    torch.save(network.eval(), "model.pt")
    model = load_model("model.pt")
    assert trace(model) is None
    stimuli = maximize(model, EVIL_NAME, input_shape=(1, 16, 16), steps=1)
    assert len(stimuli.activations) == 3
    with pytest.raises(UserError, match="could be taken for code"):
        export_model(model, (1, 16, 16), tmp_path / "model.pt2")
    assert not Path("ran").exists()
    twice = nn.Conv2d(1, 1, 3)
    network = nn.Sequential(twice)
    network._modules[EVIL_NAME] = twice  # a second name of a layer that has an honest one
    assert trace(network) is None
    for name in ("quo'te", "back\\slash", "new\nline", "nul\0"):
        network = nn.Sequential()
        network._modules[name] = nn.Conv2d(1, 2, 3)
        assert trace(network) is None
    assert trace(nn.Sequential(*network)) is not None


@pytest.mark.slow
def test_numbers_of_numpy_are_not_made_of_strangers_bytes(tmp_path: Path) -> None:
    """A type whose state says that its bytes are pointers."""
    objects = Calls(np.dtype, "O")
    pointers = Calls(np.dtype, "f8", False, True, state=(3, "<", (objects, (1,)), None, None, 8, 8, 0))
    scalar = np.float64(0).__reduce__()[0]
    record = Calls(scalar, Calls(np.dtype, [("a", pointers)]), b"A" * 8)
    torch.save({"w": Calls(OrderedDict, record)}, tmp_path / "model.pt")
    command = [sys.executable, "-m", "prune_viz", "analyze", str(tmp_path / "model.pt"), "--out", "no"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert [line[:6] for line in run.stderr.splitlines()] == ["loadin", "error:"]


def test_all_readers_find_the_same_directory_of_an_archive(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, file)
    content = file.read_bytes()
    start = zipfile.ZipFile(file).start_dir
    end = content.rindex(b"PK\x05\x06")
    for changed in (content[:end] + content[start:end] + content[end:], content + b"more"):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"would unpack to more|is damaged"):
            load_model(file, "torchvision:resnet18")


@pytest.mark.parametrize(
    "attributes",
    [
        {"forward": "x"}, {"_call_impl": 3}, {"__class__": "y"}, {"_forward_hooks": {0: "x"}},
        {"_state_dict_hooks": {0: nn.ReLU()}}, {"note": nn.ReLU()}, {"a b": 1},
        {"note": {"inner": [Calls(os.system, "x")]}},
    ],
)  # fmt: skip
def test_networks_are_put_together_from_plain_data_alone(tmp_path: Path, attributes: dict[str, Any]) -> None:
    state = {**nn.Sequential(nn.Conv2d(1, 2, 3)).__dict__, **attributes}
    network = nn.Sequential()
    network.__dict__.clear()
    network.__dict__.update(state)
    torch.save(network, tmp_path / "model.pt")
    with pytest.raises(UserError, match="pickled code, which could do anything"):
        load_model(tmp_path / "model.pt")
    assert isinstance(load_model(tmp_path / "model.pt", *CONV), nn.Conv2d)  # the weights can be had


@pytest.mark.parametrize("attribute", [{"input_shape": (3, 60_000, 60_000)}, {"image_size": 60_000}])
def test_pickled_network_has_no_input_size(attribute: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    vars(network).update(attribute)
    with pytest.raises(UserError, match="too large to be ones"):
        default_input_shape(network)


def _tuples() -> Any:
    value: Any = ("x",)
    for _ in range(60):
        value = (value, value)
    return {"a": value, "b": PurePosixPath("c")}  # which torch itself does not read


def _in_one_another(layers: int = 60) -> nn.Module:
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(layers):
        module = nn.Sequential(module, module)
    return module


def _wide_attribute() -> nn.Module:
    value: list[Any] = [1]
    for _ in range(7):
        value = [value] * 60
    module = nn.Sequential(nn.Conv2d(1, 1, 1))
    module.extra = value  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("make", "says"),
    [(_tuples, "holds no tensors"), (_in_one_another, "without end"), (_wide_attribute, None)],
)
def test_small_files_do_not_unfold_without_end(
    tmp_path: Path, make: Callable[[], Any], says: str | None
) -> None:
    torch.save(make(), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 2**16
    if says is None:
        load_model(tmp_path / "model.pt")
        return
    with pytest.raises(UserError, match=says):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"arch": "torchvision:resnet50", "arch_kwargs": {"width_per_group": 2000}},
        {"arch": "torchvision:resnet18", "arch_kwargs": {"num_classes": 10**7}},
        {"arch": "torchvision:resnet18", "input_shape": [3, 60000, 60000]},
    ],
)
def test_a_file_does_not_say_how_much_memory_is_taken(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, **content}, tmp_path / "model.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"larger than the file|too large"):
        load_model(tmp_path / "model.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    "layer", [nn.Upsample(size=60_000), nn.ZeroPad2d(60_000), nn.Upsample(scale_factor=4_000)]
)
def test_pickled_layer_has_no_map_size(tmp_path: Path, layer: nn.Module) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3)).eval(), tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt")
    assert largest_tensor(model, (3, 32, 32)) > 2**35
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="the model makes a tensor of"):
        maximize(model, "0", input_shape=(3, 32, 32), steps=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_largest_tensor_found_without_allocating() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    assert largest_tensor(network, (3, 10, 10)) == 4 * 8 * 10 * 10
