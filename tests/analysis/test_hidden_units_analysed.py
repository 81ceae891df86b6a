"""Hidden units of linear layers from the model to the smaller network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.loading.checkpoints import load_checkpoint
from prune_viz.pruning.write import write_removed
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError

SHAPE = (3, 24, 24)


class Block(nn.Module):
    """A depthwise convolution, a layer norm and an MLP over channels, as ConvNeXt has."""

    def __init__(self, channels: int = 6, inner: int = 14) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.fc1 = nn.LayerNorm(channels), nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + self.fc2(torch.relu(y)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Attention of four heads: the third repeats the second, and the last one's values are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.attn_dim = 4, 12
        self.patches, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.qkv, self.proj, self.scores = nn.Linear(8, 36), nn.Linear(12, 8), nn.Linear(8, 5)
        with torch.no_grad():
            for tensor in (self.qkv.weight, self.qkv.bias):
                heads = tensor.view(3, 4, 3, *tensor.shape[1:])
                heads[:, 2] = heads[:, 1]
                heads[2, 3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.scores((x + self.proj(heads.reshape(*x.shape[:2], self.attn_dim))).mean(dim=1))


def _network() -> nn.Module:
    """Unit 5 of the block repeats unit 2, half as strong; unit 7 never fires."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 2, stride=2), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).eval()
    with torch.no_grad():
        for tensor in (model[1].fc1.weight, model[1].fc1.bias):
            tensor[5] = 0.5 * tensor[2]
        model[1].fc1.bias[7] = -100.0
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, pv.Analysis, Path]:
    model, out = _network(), tmp_path_factory.mktemp("run") / "run"
    return model, pv.analyze(model, input_shape=SHAPE, steps=4, out=out), out


def test_hidden_units_are_judged(run: tuple[nn.Module, pv.Analysis, Path]) -> None:
    _, analysis, out = run
    table = analysis.filters[analysis.filters["layer"] == "1.fc1"].set_index("filter")
    assert len(table) == 14
    assert table.loc[7, "verdict"] == "dead"
    copies = table.loc[[2, 5]]
    (redundant,) = copies.index[copies["verdict"] == "redundant"]
    assert copies.loc[redundant, "representative"] == str(7 - redundant)
    masks = pv.load_masks(out / "masks.pt")
    assert set(masks) == {"0", "1.depthwise", "1.fc1"}
    assert (~masks["1.fc1"]).nonzero().ravel().tolist() == sorted([7, redundant])
    assert (out / "report" / "layers").is_dir()
    assert "linear layer, 6 inputs" in next((out / "report" / "layers").glob("*fc1.html")).read_text()


def test_removed_hidden_units_change_nothing(run: tuple[nn.Module, pv.Analysis, Path]) -> None:
    model, analysis, _ = run
    images = torch.randn(4, *SHAPE)
    smaller = pv.remove_filters(model, analysis.masks, images[:1], compensate="merge")
    assert (smaller[1].fc1.out_features, smaller[1].fc2.in_features) == (12, 12)
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-5)


def test_stimulus_of_a_hidden_unit_is_that_of_the_run(run: tuple[nn.Module, pv.Analysis, Path]) -> None:
    model, _, out = run
    found = pv.maximize(model, "1.fc1", filters=[3], input_shape=SHAPE, steps=4)
    record = next(one for one in RunDirectory(out).read_provenance().layers if one.name == "1.fc1")
    kept = RunDirectory(out).read_layer(record.file).images[3]
    np.testing.assert_allclose(found.images[0].numpy(), kept, atol=2e-3 * np.abs(kept).max())


def test_kept_linear_layers_are_named_with_the_reason(run: tuple[nn.Module, pv.Analysis, Path]) -> None:
    model, _, out = run
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert any("not analysed: 4. Its filters are the network's output" in note for note in notes)
    with pytest.raises(UserError, match="all outputs of the linear layer 4 are kept"):
        pv.analyze(model, input_shape=SHAPE, layers=["4"], steps=2)


def test_heads_are_judged_removed_and_loaded_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Attention().eval(), torch.randn(4, *SHAPE)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    spec = f"{Attention.__module__}:{Attention.__name__}"
    loaded = load_checkpoint(tmp_path / "model.pt", arch=spec)
    analysis = pv.analyze(loaded.model, input_shape=SHAPE, steps=2, out=tmp_path / "run")
    table = analysis.filters[analysis.filters["layer"] == "qkv"]
    verdicts = table["verdict"].to_numpy().reshape(3, 4, 3)
    assert (verdicts == verdicts[:1, :, :1]).all()  # one verdict a head
    first, *pair, last = verdicts[0, :, 0]
    assert (first, last, set(pair)) == ("keep", "dead", {"keep", "redundant"})
    write_removed(loaded, tmp_path / "run" / "masks.pt", SHAPE, tmp_path / "smaller.pt")
    smaller = pv.load_model(tmp_path / "smaller.pt", arch=spec)
    assert (smaller.num_heads, smaller.attn_dim, smaller.qkv.out_features) == (2, 6, 18)
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-5)
