import argparse
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict, defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import prune_viz
from prune_viz.loading.architectures import default_input_shape, default_normalisation, resolve_architecture
from prune_viz.loading.checkpoints import load_checkpoint, load_model
from prune_viz.utils.errors import UserError

SMALL = "torchvision:squeezenet1_1"


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).relu()


NET = f"{__name__}:Net"


def seeded(width: int = 4) -> Net:
    torch.manual_seed(width)
    net = Net(width)
    nn.init.uniform_(net.norm.running_mean)
    return net


def same(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(state, prefix):
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}},
        lambda s: {"model": s, "best": np.float64(0.9), "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model_state_dict": s, "rng": torch.zeros(5)},
        lambda s: {"net": s, "acc": 0.5},
        lambda s: {"ema": prefixed(s, "module.") | {"n_averaged": torch.tensor(3)}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"generator": s, "loss": {"weight": torch.ones(3)}},
        lambda s: prefixed(s, "module."),
        lambda s: prefixed(s, "_orig_mod."),
        lambda s: prefixed(s, "_orig_mod.module."),
        lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(10)}},
        lambda s: {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in s.items()},
        lambda s: {name: tensor for name, tensor in s.items() if "num_batches" not in name},
        lambda s: {"ema": {name: tensor + 1 for name, tensor in s.items()}, "model": s},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_takes_what_training_loops_save(file: Path, wrap, zipped: bool) -> None:
    net = seeded()
    torch.save(wrap(net.state_dict()), file, _use_new_zipfile_serialization=zipped)
    assert same(load_model(file, NET), net)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "is_best": np.bool_(True), "step": np.int32(3), "scores": np.arange(3)},
        lambda s: {"state_dict": s, "hyper_parameters": {"root": Path("/data"), "sizes": defaultdict(list)}},
        lambda s: {"state_dict": s, "criterion": nn.CrossEntropyLoss(), "when": datetime.now(UTC)},
        lambda s: {"generator": s, "params": {"mean": torch.zeros(3), "std": torch.ones(3)}},
        lambda s: {"net_state": s, "weights": {"of_classes": torch.ones(3)}},
        lambda s: {"state_dict": prefixed(s, "encoder_q.")},
        lambda s: s | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
    ],
)
def test_takes_weights_from_beside_whatever_else_is_saved(file: Path, wrap) -> None:
    net = seeded()
    torch.save(wrap(net.state_dict()), file)
    assert same(load_model(file, NET), net)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("mnasnet0_5", lambda name: name),
        ("densenet121", lambda name: re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name)),
    ],
)
@pytest.mark.slow
def test_torchvision_files_load_under_old_names(file: Path, name: str, rename) -> None:
    net = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
    renamed = {rename(key): tensor for key, tensor in net.state_dict().items()}
    assert (renamed.keys() != net.state_dict().keys()) == (name == "densenet121")
    torch.save(renamed, file)
    for checkpoint in (load_checkpoint(file), load_checkpoint(file, f"torchvision:{name}")):
        assert checkpoint.arch_kwargs == {"num_classes": 4}
        assert same(checkpoint.model, net)


def test_a_prefix_that_belongs_to_the_network_stays(file: Path) -> None:
    net = nn.Module()
    net.model = seeded()
    torch.save(net.state_dict(), file)
    sys.modules[__name__].__dict__["wrapped"] = lambda: net
    assert same(load_model(file, f"{__name__}:wrapped"), net)


def test_half_precision_comes_out_as_float32_in_eval_mode(file: Path) -> None:
    torch.save(seeded().half().state_dict(), file)
    model = load_model(file, NET)
    assert model.conv.weight.dtype == torch.float32
    assert not model.training
    assert not model.norm.training


def test_safetensors_are_recognised_by_content(tmp_path: Path) -> None:
    net, path = seeded(), tmp_path / "weights.bin"
    safetensors.torch.save_file(net.state_dict(), path)
    checkpoint = load_checkpoint(path, NET, {"width": 4})
    assert same(checkpoint.model, net)
    assert checkpoint.source == {
        "path": str(path),
        "sha256": __import__("hashlib").sha256(path.read_bytes()).hexdigest(),
        "arch": NET,
        "arch_kwargs": {"width": 4},
        "recognised": False,
        "key": "",
        "trust_pickle": False,
        "held_inputs": None,
        "inputs_said": [],
    }


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: {"model": m, "epoch": 1}])
def test_a_pickled_module_needs_trust(file: Path, wrap, zipped: bool) -> None:
    torch.save(wrap(seeded()), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"pickled code.*test_checkpoints\.Net.*--arch.*--trust-pickle"
    ) as caught:
        load_model(file)
    assert "\n" not in str(caught.value)
    assert same(load_model(file, trust_pickle=True), seeded())
    assert same(load_model(file, NET, trust_pickle=True), seeded())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("flip_default", [True, False])
def test_hostile_code_does_not_run(file: Path, tmp_path: Path, monkeypatch, zipped, flip_default) -> None:
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    if flip_default:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(
        {"state_dict": seeded().state_dict(), "x": Hostile()}, file, _use_new_zipfile_serialization=zipped
    )
    assert same(load_model(file, NET), seeded())  # what would run is left out
    assert not ran.exists()
    load_model(file, NET, trust_pickle=True)  # it would have run
    assert ran.exists()


def test_a_file_may_not_choose_what_is_imported(file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "unknown.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    for arch in ("unknown:build", "prune_viz.runs:os.system", "prune_viz.demo:run_demo"):
        torch.save({"arch": arch, "arch_kwargs": {}, "state_dict": seeded().state_dict()}, file)
        with pytest.raises(UserError, match=f"--arch {arch} if you trust it"):
            load_model(file)
    content = {"arch": SMALL, "arch_kwargs": {"weights": "DEFAULT"}, "state_dict": seeded().state_dict()}
    torch.save(content, file)
    with pytest.raises(UserError, match="leave out weights"):
        load_model(file)


def test_a_file_may_name_a_torchvision_architecture(file: Path) -> None:
    net = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save({"arch": SMALL, "arch_kwargs": {"num_classes": 7}, "state_dict": net.state_dict()}, file)
    assert same(load_model(file), net)
    torch.save({"arch": "squeezenet1_1", "state_dict": net.state_dict()}, file)
    assert same(load_model(file), net)  # what it says is no SPEC, but the weights tell


@pytest.mark.parametrize("masks", [{"none": torch.ones(3, dtype=torch.bool)}, {"conv1": 3}, {3: "x"}])
def test_a_false_record_of_removed_filters_gets_one_line(file: Path, masks: dict) -> None:
    arch, net = "prune_viz.demo:DigitsNet", resolve_architecture("prune_viz.demo:DigitsNet")
    content = {"arch": arch, "input_shape": [1, 8, 8], "pruning": [masks], "state_dict": net.state_dict()}
    torch.save(content, file)
    with pytest.raises(UserError, match="record of removed filters does not fit"):
        load_model(file)
    torch.save({**content, "pruning": 0.5}, file)
    assert same(load_model(file), net)


@pytest.mark.slow
def test_the_number_of_classes_is_read_from_the_weights(file: Path) -> None:
    for name, classes in (("squeezenet1_1", 7), ("resnet18", 3)):
        net = torchvision.models.get_model(name, num_classes=classes)
        torch.save(prefixed(net.state_dict(), "module."), file)
        checkpoint = load_checkpoint(file, f"torchvision:{name}")
        assert same(checkpoint.model, net)
        assert checkpoint.arch_kwargs == {"num_classes": classes}
    with pytest.raises(UserError, match=r"2 of another shape \(fc.weight is \(3, 512\), not \(5, 512\)"):
        load_checkpoint(file, "torchvision:resnet18", {"num_classes": 5})


def test_keys_that_do_not_fit_are_named_and_counted(file: Path) -> None:
    state = seeded().state_dict()
    bias = state.pop("conv.bias")
    torch.save({**state, "conv.bais": bias}, file)
    with pytest.raises(UserError, match=r"1 missing \(conv\.bias\); 1 unexpected \(conv\.bais\)$"):
        load_model(file, NET)
    torch.save(seeded(6).state_dict(), file)
    with pytest.raises(UserError, match=r"6 of another shape \(conv.weight is \(6, 3.*and 3 more\)$"):
        load_model(file, NET)
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(
        UserError, match=r"do not fit.*missing.*and \d+ more.*unexpected.*and \d+ more"
    ) as caught:
        load_model(file, SMALL, {"num_classes": 1000})
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "value"), [("conv.weight", float("nan")), ("norm.running_var", float("inf"))]
)
def test_weights_that_are_not_finite_are_named(file: Path, name: str, value: float) -> None:
    state = seeded().state_dict()
    state[name].view(-1)[1] = value
    torch.save(state, file)
    with pytest.raises(UserError, match=rf"{name} holds 1 values that are not finite"):
        load_model(file, NET)


def test_negative_variances_are_named(file: Path) -> None:
    net = seeded()
    net.norm.running_var[:3] = -0.5
    torch.save(net.state_dict(), file)
    with pytest.raises(UserError, match=r"norm\.running_var holds 3 negative values; repair the model first"):
        load_model(file, NET)


def test_complex_weights_are_named(file: Path) -> None:
    state = seeded().state_dict()
    torch.save(state | {"conv.weight": state["conv.weight"].to(torch.complex64)}, file)
    with pytest.raises(UserError, match=r"conv\.weight holds complex numbers"):
        load_model(file, NET)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda weight: weight.to("meta"), "conv.weight has no values"),
        (lambda weight: weight.flatten(1).to_sparse(), "conv.weight is sparse"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "conv.weight is quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_weights_are_refused_by_name(tmp_path: Path, spoil, says) -> None:
    net = seeded()
    net.conv.weight = nn.Parameter(spoil(net.conv.weight.detach()), requires_grad=False)
    for use in (
        lambda: prune_viz.analyze(net, out=tmp_path / "run", input_shape=(3, 8, 8)),
        lambda: prune_viz.maximize(net, "conv", input_shape=(3, 8, 8)),
    ):
        with pytest.raises(UserError, match=says) as caught:
            use()
        assert "\n" not in str(caught.value)


def write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path: Path, zipped: bool) -> None:
    torch.save(seeded(64).state_dict(), path, _use_new_zipfile_serialization=zipped)
    write(path, path.read_bytes()[: path.stat().st_size // 2])


def cut_safetensors(path: Path) -> None:
    safetensors.torch.save_file(seeded().state_dict(), path)
    write(path, path.read_bytes()[:-40])


def overwrite_middle(path: Path) -> None:
    torch.save(seeded().state_dict(), path)
    data = bytearray(path.read_bytes())
    data[300:500] = bytes(200)
    write(path, bytes(data))


def zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")


def torchscript(path: Path) -> None:
    torch.jit.trace(seeded().eval(), torch.zeros(1, 3, 8, 8)).save(path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(seeded().eval(), (torch.zeros(1, 3, 8, 8),)), path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: write(path, ""), "is empty"),
        (lambda path: write(path, "hello world, this is no model at all"), "is not a PyTorch checkpoint"),
        (lambda path: write(path, np.random.default_rng(0).bytes(5000)), "is not a PyTorch checkpoint"),
        (lambda path: write(path, pickle.dumps({"a": [1.0]})), "pickle that torch.save did not write"),
        (lambda path: cut(path, True), "damaged or was cut short"),
        (lambda path: cut(path, False), "is damaged"),
        (cut_safetensors, "is damaged"),
        (overwrite_middle, "is damaged"),
        (zip_of_text, "zip archive but not a PyTorch checkpoint"),
        (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "of numpy's arrays"),
        (lambda path: write(path, "version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (lambda path: write(path, "\n<!DOCTYPE html><html>404</html>"), "is a web page"),
        (lambda path: write(path, b"\x1f\x8b\x08" + bytes(40)), "unpack it first"),
        (lambda path: write(path, b"\x89HDF\r\n\x1a\n" + bytes(40)), "HDF5"),
        (lambda path: write(path, b"\x08\x07\x12\x07pytorch" + bytes(40)), "ONNX"),
        (lambda path: torch.save({"epoch": 3, "lr": [0.1]}, path), "holds no tensors"),
        (lambda path: torch.save([torch.ones(3)], path), "holds no tensors"),
        (lambda path: torch.save(torch.ones(3), path), "holds no tensors"),
    ],
)
def test_what_is_no_checkpoint_gets_one_clear_line(file: Path, make, says: str, trust: bool) -> None:
    make(file)
    with pytest.raises(UserError, match=says) as caught:
        load_model(file, NET, trust_pickle=trust)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_unknown_weights_ask_for_the_architecture(file: Path) -> None:
    torch.save(seeded().state_dict(), file)
    with pytest.raises(UserError, match="fit none that is known: name their architecture with --arch"):
        load_model(file)


def test_weights_are_found_in_lists_and_deep_down(file: Path) -> None:
    first, second = seeded(), seeded()
    nn.init.ones_(second.conv.weight)
    torch.save({"run": {"best": {"of": {"net": first.state_dict()}}}, "epoch": 3}, file)
    assert same(load_model(file, NET), first)
    torch.save(({"step": 1}, [first.state_dict(), second.state_dict()]), file)
    checkpoint = load_checkpoint(file, NET)
    assert same(checkpoint.model, first)
    assert (checkpoint.key, checkpoint.other_keys) == ("1.0", ["1.1"])
    assert same(load_model(file, NET, key="1.1"), second)


@pytest.mark.slow
def test_of_a_compiled_network_the_weights_are_taken(file: Path) -> None:
    model = seeded()
    torch.save(torch.compile(model), file)
    assert same(load_model(file, NET), model)


def test_plain_weights_are_preferred_over_keyed(file: Path) -> None:
    plain, average, other = seeded(), seeded(), seeded()
    nn.init.ones_(average.conv.weight)
    nn.init.zeros_(other.conv.weight)
    content = {
        "ema": {"state_dict": average.state_dict(), "decay": 0.9},
        "model": plain.state_dict(),
        "teacher": other.state_dict(),
    }
    torch.save(content, file)
    checkpoint = load_checkpoint(file, NET)
    assert same(checkpoint.model, plain)
    assert (checkpoint.key, sorted(checkpoint.other_keys)) == ("model", ["ema.state_dict", "teacher"])
    (line,) = checkpoint.describe()
    assert "weights under model of the file are used" in line
    assert "ema.state_dict, teacher" in line
    assert same(load_model(file, NET, key="ema.state_dict"), average)
    assert load_checkpoint(file, NET, key="teacher").source["key"] == "teacher"
    with pytest.raises(UserError, match=r"no weights at --key ema; there are: 'ema.state_dict', 'model'"):
        load_model(file, NET, key="ema")
    torch.save(plain.state_dict(), file)
    assert load_checkpoint(file, NET).describe() == []
    with pytest.raises(UserError, match="there are: none: the weights are at the top"):
        load_model(file, NET, key="model")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "kind"), [(torchscript, "TorchScript"), (exported, "an exported program")])
def test_of_programs_the_weights_are_taken_once_trusted(file: Path, make, kind: str) -> None:
    make(file)
    with pytest.raises(UserError, match=f"is {kind}, which is code with weights.*--trust-pickle"):
        load_model(file, NET)
    assert same(load_model(file, NET, trust_pickle=True), seeded())


def broken() -> nn.Module:
    raise RuntimeError("no such size")


class Home:
    build = staticmethod(Net)


@pytest.mark.parametrize(
    ("spec", "kwargs", "says"),
    [
        ("resnet18", {}, "expected torchvision:NAME"),
        ("torchvision:resnet81", {}, "no model resnet81; did you mean .*resnet18"),
        ("torchvision:zzzz", {}, "no model zzzz$"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "leave out weights"),
        ("torchvision:resnet18", {"widths": 3}, "TypeError.*widths"),
        ("no_such_package:Net", {}, "module no_such_package could not be imported"),
        (f"{__name__}:Nett", {}, "has no Nett; did you mean Net"),
        (f"{__name__}:broken", {}, "could not be built: RuntimeError: no such size"),
        (f"{__name__}:SMALL", {}, "cannot be called"),
        ("builtins:dict", {}, "gave a dict, not a torch.nn.Module"),
    ],
)
def test_architectures_that_cannot_be_had(spec: str, kwargs: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        resolve_architecture(spec, kwargs)


def test_timm_missing_or_present(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        resolve_architecture("timm:resnet18")


def test_factories_may_be_dotted_and_local(tmp_path: Path, monkeypatch) -> None:
    assert isinstance(resolve_architecture(f"{__name__}:Home.build", {"width": 2}), Net)
    (tmp_path / "my_nets.py").write_text("import torch\ndef build(n): return torch.nn.Conv2d(1, n, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    assert resolve_architecture("my_nets:build", {"n": 5}).out_channels == 5
    assert sys.path == before


def test_arguments_may_say_otherwise_than_is_usual() -> None:
    model = resolve_architecture("torchvision:googlenet", {"transform_input": False, "aux_logits": False})
    assert not model.transform_input
    assert resolve_architecture("torchvision:googlenet").transform_input


def test_detection_backbones_are_not_downloaded(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    assert isinstance(resolve_architecture("torchvision:lraspp_mobilenet_v3_large"), nn.Module)


@pytest.mark.parametrize(
    ("spec", "kwargs", "shape"),
    [
        ("torchvision:squeezenet1_1", {}, (3, 224, 224)),
        ("torchvision:efficientnet_b1", {}, (3, 240, 240)),
        ("torchvision:lraspp_mobilenet_v3_large", {}, (3, 224, 224)),
        ("prune_viz.demo:DigitsNet", {}, (1, 8, 8)),
        (NET, {}, (3, 224, 224)),
    ],
)
def test_default_input_shape(spec: str, kwargs: dict, shape: tuple[int, ...]) -> None:
    assert default_input_shape(resolve_architecture(spec, kwargs), spec) == shape


@pytest.mark.parametrize("kwargs", [{}, {"image_size": 98}])
def test_a_transformer_says_what_its_positions_take(kwargs: dict) -> None:
    spec = "torchvision:vit_h_14"  # its published weights take 518 pixels, the plain network 224
    with torch.device("meta"):
        model = resolve_architecture(spec, kwargs)
    side = kwargs.get("image_size", 224)
    assert default_input_shape(model, spec) == (3, side, side)


def test_default_input_shape_only_where_known() -> None:
    assert default_input_shape(nn.Conv2d(5, 2, 3)) == (5, 224, 224)
    with pytest.raises(UserError, match="--input-shape"):
        default_input_shape(nn.Conv1d(2, 2, 3))
    with pytest.raises(UserError, match="no convolution"):
        default_input_shape(nn.Linear(2, 2))


def test_the_normalisation_of_published_weights_is_known() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert default_normalisation("torchvision:resnet18", 3) == imagenet
    assert default_normalisation("torchvision:fcn_resnet50", 3) == imagenet
    assert default_normalisation("torchvision:resnet18", 1) is None
    assert default_normalisation("torchvision:fasterrcnn_resnet50_fpn", 3) is None  # it normalises itself
    assert default_normalisation(NET, 3) is None
    assert default_normalisation(None, 3) is None
