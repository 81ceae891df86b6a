from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from marks import slow
from networks import Concatenating, Flattening, Residual, randomise_norms
from torch import nn

from prune_viz.pruning import export
from prune_viz.pruning.export import export_model
from prune_viz.utils.errors import UserError
from prune_viz.utils.nested_tensors import tensors_of

NETWORKS = {
    "residual": (Residual, (3, 16, 16)), "concatenating": (Concatenating, (3, 12, 12)),
    "flattening": (Flattening, (1, 8, 8)),
}  # fmt: skip


def _run(path: Path, inputs: torch.Tensor) -> list[torch.Tensor]:
    if path.suffix == ".pt2":
        return tensors_of(torch.export.load(path).module()(inputs))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return [torch.from_numpy(out) for out in given]


@pytest.mark.parametrize("ending", [".pt2", slow(".onnx")])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_gives_the_same_for_any_batch(tmp_path: Path, name: str, ending: str) -> None:
    make, shape = NETWORKS[name]
    model, path = randomise_norms(make()), tmp_path / f"network{ending}"
    said = export_model(model, shape, path)
    assert f"exported to {path}, for batches of any size" in said
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no data beside it
    inputs = torch.randn(5, *shape)
    with torch.no_grad():
        torch.testing.assert_close(_run(path, inputs), tensors_of(model(inputs)), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


class OneByOne(Flattening):
    """Counts on single inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).reshape(1, -1))


class Branching(Flattening):
    """Goes by what it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if float(x.mean()) > 0 else -x)


def test_a_network_for_single_inputs_is_exported_for_them(tmp_path: Path) -> None:
    model, path = OneByOne().eval(), tmp_path / "network.pt2"
    said = export_model(model, (1, 8, 8), path)
    assert "for batches of one" in said
    inputs = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(_run(path, inputs)[0], model(inputs))


def test_a_network_that_gives_no_tensors_is_refused(tmp_path: Path) -> None:
    class Silent(Flattening):
        def forward(self, x: torch.Tensor) -> None:
            super().forward(x)

    with pytest.raises(UserError, match="returns no tensors"):
        export_model(Silent(), (1, 8, 8), tmp_path / "network.pt2")


def test_unexportable_model_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be exported to pt2"):
        export_model(Branching(), (1, 8, 8), tmp_path / "network.pt2")
    with pytest.raises(UserError, match="does not run"):
        export_model(Flattening(), (2, 8, 8), tmp_path / "network.pt2")
    with pytest.raises(UserError, match=r"should end in \.pt2"):
        export_model(Flattening(), (1, 8, 8), tmp_path / "network.tflite")

    def wrong(model: nn.Module, inputs: torch.Tensor, axes: object) -> tuple[bytes, export.Runner]:
        return b"", lambda batch: [out + 1e-3 for out in tensors_of(model(batch))]

    monkeypatch.setattr(export, "_to_pt2", wrong)
    with pytest.raises(UserError, match="returns other outputs"):
        export_model(Flattening(), (1, 8, 8), tmp_path / "network.pt2")
    monkeypatch.setattr(export, "_ONNX", ("no_such_package",))
    with pytest.raises(UserError, match=r"needs no_such_package; pip install 'prune-viz\[onnx\]'"):
        export_model(Flattening(), (1, 8, 8), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", ["../../up", "/etc/up", "a\\..\\b", "a\nb", "\u202eup"])
def test_names_of_layers_lead_to_no_files(tmp_path: Path, name: str, ending: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network._modules[name] = nn.Conv2d(4, 2, 3)
    home = tmp_path / "a" / "b" / "a folder, with spaces"
    home.mkdir(parents=True)
    out = home / f"net work{ending}"
    try:
        export_model(network.eval(), (3, 16, 16), out)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files == ([] if said else [out])
    assert said.isprintable()
