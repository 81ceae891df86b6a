from __future__ import annotations

import math

import pytest
import torch
from networks import Plain, Residual, randomise_norms
from scores import SCORES, SCORING
from torch import Tensor, nn

from prune_viz.calibration import losses as objectives
from prune_viz.calibration.images import Start, calibration_starts, natural_noise
from prune_viz.calibration.losses import (
    Means,
    Watched,
    classes_error,
    norms_error,
    own_shares,
    pool,
    total_error,
)
from prune_viz.calibration.synthetic_images import calibrate
from prune_viz.demo.digits import DigitsNet
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.tracing import norms_behind
from prune_viz.runs.output_kind import OutputKind, Task

pytestmark = pytest.mark.usefixtures("whole_calibration")


def _means(shares: Tensor) -> Means:
    """What calibration images with these probabilities give a network that hands its input on."""
    with Watched(nn.Sequential(nn.Flatten()).eval(), OutputKind(Task.CLASSES, normalised=True)) as watched:
        classes = watched.see(shares.view(len(shares), -1, 1, 1)).means().classes
    return Means([torch.zeros(2, 1)], classes)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (torch.full((3, 4), 0.25), math.log(2)),  # unsure, of all alike
        (torch.eye(4)[[2, 2, 2]], math.log(4)),  # sure, of one
        (torch.eye(4), 0.0),
        (0.5 * torch.eye(4) + 0.5 * torch.eye(4).roll(1, 0), 0.0),  # half sure is enough
    ],
)
def test_classes_error_asks_for_all_classes_half_sure(shares: Tensor, expected: float) -> None:
    assert float(classes_error(_means(shares))) == pytest.approx(expected, abs=1e-6)
    # Unsureness is counted calibration image by calibration image, evenness over all calibration images.
    parts = [_means(row[None]) for row in shares]
    assert float(classes_error(pool(parts, [1 / len(parts)] * len(parts)))) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("make", [Plain, Residual])
def test_watched_sees_norm_inputs_and_own_filters(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise_norms(make()).eval()
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    images = natural_noise((3, 16, 16), 6, seed=0)
    owners = [(convs[row % 3], row) for row in range(6)]
    norm = norms_behind(model)
    fed: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor, output: Tensor) -> None:
        if isinstance(model.get_submodule(name), nn.BatchNorm2d):
            fed[name] = inputs.clone()
        given[name] = output.clone()

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda _, taken, out, name=name: note(name, taken[0], out))
    with Watched(model, SCORES) as watched, torch.no_grad():
        seen = watched.see(images, owners)
    with torch.no_grad():
        shares = model(images).softmax(dim=1)
    for (name, inputs), gram_matrices in zip(fed.items(), seen.means().norms, strict=True):
        module = model.get_submodule(name)
        values = inputs.transpose(0, 1).flatten(1) - module.running_mean[:, None]
        values = values / module.running_var.sqrt()[:, None]
        torch.testing.assert_close(gram_matrices[0], values.mean(dim=1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gram_matrices[1], values.square().mean(dim=1), rtol=1e-3, atol=1e-3)
    for row, (conv, channel) in enumerate(owners):
        own = given[norm.get(conv, conv)][row, channel]
        sides = torch.stack([own.clamp_min(0).norm(), own.clamp_max(0).norm()])
        torch.testing.assert_close(seen.own[row], sides, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.classes[:, :-1], shares)
    torch.testing.assert_close(seen.means().classes[:-1], shares.mean(dim=0))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sum(len(m._forward_hooks) for m in model.modules()) == len(given)  # this test's own


def test_the_side_that_gave_more_at_the_start_counts() -> None:
    asked = torch.tensor([[4.0, 1.0], [1.0, 5.0], [0.0, 0.0]])
    own = torch.tensor([[1.0, 9.0], [9.0, 10.0], [7.0, 7.0]])
    assert own_shares(own, asked).tolist() == [0.25, 2.0, 1.0]
    seen = Means([torch.stack([torch.zeros(1), torch.ones(1)])], None)
    # Of the first alone something is missing: half of what is asked, a third of the calibration images.
    assert float(total_error(seen, own, asked)) == pytest.approx(objectives.OWN * 0.5 / 3)
    assert float(total_error(seen, None, None)) == float(norms_error(seen)) == 0


def test_where_no_classes_come_out_none_are_asked_for() -> None:
    class Maps(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv1(x))

    with Watched(Maps().eval(), OutputKind()) as watched:
        seen = watched.see(natural_noise((3, 16, 16), 2, seed=0))
    assert seen.classes is None
    assert float(classes_error(seen.means())) == 0


def test_stimuli_are_not_held_where_rows_mix() -> None:
    class Folded(nn.Module):
        """Both halves of every picture pass as pictures of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.cat(x.chunk(2, dim=2))))

    with Watched(Folded().eval(), OutputKind()) as watched:
        assert watched.see(natural_noise((3, 16, 16), 2, seed=0), [("conv", 0), ("conv", 1)]).own is None


@pytest.mark.slow
def test_synthetic_images_are_sure_diverse_and_activating(
    trained: DigitsNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = calibration_starts(FilterNetwork(trained, (1, 8, 8)), (8, 8), 96, seed=0)

    def moved() -> tuple[float, ...]:
        images = calibrate(trained.eval(), starts, SCORING)
        with torch.no_grad():
            shares = trained(images.images).softmax(dim=1)
        mean = shares.mean(dim=0)
        evenness = float(-(mean * mean.log()).sum())
        short = float((math.log(0.5) - shares.amax(dim=1).log()).clamp_min(0).mean())
        return (
            short + math.log(10) - evenness,
            float(shares.amax(dim=1).clamp_max(0.5).mean()),
            evenness,
            images.activation_kept,
            images.distance,
        )

    error, sure, even, kept, distance = moved()
    assert sure > 0.45
    assert even > 0.95 * math.log(10)
    assert kept > 0.45
    # Each term on its own: it does what it is there for.
    with monkeypatch.context() as patched:
        patched.setattr(objectives, "CLASSES", 0.0)
        unasked = moved()
        patched.setattr(objectives, "CLASSES", 0.05)
        much = moved()
    assert much[0] < min(error, unasked[0])
    assert sure > unasked[1]
    with monkeypatch.context() as patched:
        patched.setattr(objectives, "OWN", 0.0)
        let_go = moved()
    assert kept > 1.2 * let_go[3]
    assert distance < 1.5 * min(unasked[4], let_go[4]) + 0.01


class _Closed(Plain):
    """A head that changes in place what its gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x).exp()
        scores += 1
        return scores


def test_head_without_gradient_calibrates_by_norms() -> None:
    torch.manual_seed(0)
    model = randomise_norms(_Closed()).eval()
    found = calibrate(model, [Start(natural_noise((3, 16, 16), 32, seed=0))], SCORING, passes=20)
    assert found is not None
    assert found.distance < found.before


def test_shared_norm_is_nobodys_map() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.other(self.norm(self.one(x)).relu()))

    model = Shared().eval()
    images = natural_noise((3, 16, 16), 2, seed=0)
    with Watched(model, OutputKind()) as watched, torch.no_grad():
        own = watched.see(images, [("one", 1), ("other", 2)]).own
        expected = model.one(images)[0, 1]
    torch.testing.assert_close(
        own[0], torch.stack([expected.clamp_min(0).norm(), expected.clamp_max(0).norm()])
    )
