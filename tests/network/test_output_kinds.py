"""What a network returns is found out, and its change measured accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from marks import slow
from networks import Plain, randomise_norms
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from prune_viz.cli.options import TaskName
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.network.outputs import class_probabilities, output_change, scores_of
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.output_kind import Evidence, OutputKind, Task
from prune_viz.utils.errors import UserError

NOISE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ASSUMED = Evidence.ASSUMED
SIGMOID = OutputKind(Task.LABELS, True, Evidence.STRUCTURE)


class Ending(nn.Module):
    """Scores or maps of a small network, and what is made of them."""

    def __init__(self, ending: Callable[[Tensor], Any], maps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 5, 3, padding=1) if maps else randomise_norms(Plain())
        self.ending = ending

    def forward(self, x: Tensor) -> Any:
        return self.ending(self.body(x))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Ending(lambda y: y), OutputKind(Task.CLASSES, False, ASSUMED)),
        (Ending(lambda y: y / 0.07), OutputKind(Task.CLASSES, False, ASSUMED)),
        (Ending(lambda y: y.log_softmax(1)), OutputKind(Task.CLASSES, False, ASSUMED)),
        (Ending(lambda y: y.softmax(1)), OutputKind(Task.CLASSES, True, Evidence.STRUCTURE)),
        (Ending(lambda y: y.exp() / y.exp().sum(1, True)), OutputKind(Task.CLASSES, True, Evidence.RANGE)),
        (
            Ending(lambda y: y.sigmoid()[:, :, None].squeeze(2)),
            SIGMOID,
        ),
        (Ending(lambda y: y[:, :1].sigmoid()), SIGMOID),
        (Ending(lambda y: y[:, 0].sigmoid()), SIGMOID),
        (Ending(lambda y: y[:, :1]), OutputKind(Task.VALUES, False, ASSUMED)),
        (Ending(lambda y: F.normalize(y)), OutputKind(Task.VALUES, False, ASSUMED)),
        (Ending(torch.tanh), OutputKind(Task.VALUES, False, ASSUMED)),
        (Ending(lambda y: (y, y)), OutputKind(Task.VALUES, False, Evidence.STRUCTURE)),
        (Ending(lambda y: (y, y.argmax(1), y.mean())), OutputKind(Task.CLASSES, False, ASSUMED)),
        (Ending(lambda y: y, maps=True), OutputKind(Task.VALUES, False, ASSUMED)),
        (Ending(lambda y: y.softmax(1), maps=True), OutputKind(Task.DENSE, True, Evidence.STRUCTURE)),
        (Ending(lambda y: y.sigmoid(), maps=True), SIGMOID),
        (Ending(lambda y: {"out": y}, maps=True), OutputKind(Task.DENSE, False, Evidence.STRUCTURE)),
    ],
)
def test_output_is_recognised(model: nn.Module, expected: OutputKind) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert find_output_kind(model.eval(), NOISE) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("squeezenet1_1", Task.CLASSES),
        ("shufflenet_v2_x0_5", Task.CLASSES),
        slow("resnet18", Task.CLASSES),
        slow("swin_t", Task.CLASSES),
        slow("lraspp_mobilenet_v3_large", Task.DENSE),
        slow("ssdlite320_mobilenet_v3_large", Task.VALUES),
    ],
)
def test_torchvision_networks_are_recognised(name: str, task: Task) -> None:
    backbone = {} if task is Task.CLASSES else {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **backbone).eval()
    assert find_output_kind(model, torch.randn(2, 3, 64, 64)).task is task


def test_the_user_knows_better() -> None:
    model = Ending(lambda y: y.sigmoid()).eval()
    assert find_output_kind(model, NOISE, Task.VALUES) == OutputKind(Task.VALUES, False, Evidence.GIVEN)
    scores = Ending(lambda y: y).eval()
    assert find_output_kind(scores, NOISE, Task.LABELS) == OutputKind(Task.LABELS, False, Evidence.GIVEN)
    maps = Ending(lambda y: y, maps=True).eval()
    assert find_output_kind(maps, NOISE, Task.DENSE) == OutputKind(Task.DENSE, False, Evidence.GIVEN)


@pytest.mark.parametrize(
    ("ending", "maps", "task", "message"),
    [
        (lambda y: y[:, :1], False, Task.CLASSES, r"--task classes takes one row .* returns \(1\)"),
        (lambda y: y, True, Task.CLASSES, r"returns \(5, 16, 16\)"),
        (lambda y: (y, y), False, Task.LABELS, r"--task labels takes a single output.* \(5\), \(5\)"),
        (lambda y: y, False, Task.DENSE, "at every position"),
        (lambda y: y.sum(), False, Task.LABELS, "returns nothing"),
    ],
)
def test_contradictory_task_is_refused(
    ending: Callable[[Tensor], Any], maps: bool, task: Task, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_output_kind(Ending(ending, maps).eval(), NOISE, task)


def test_command_line_offers_every_task() -> None:
    assert {task.value for task in TaskName} == {task.value for task in Task}


def test_change_of_classes_is_their_divergence() -> None:
    one, other = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = float(kl_divergence(Categorical(logits=one), Categorical(logits=other)).mean())
    found = output_change([one], [other], OutputKind(Task.CLASSES), 6)
    assert found == Damage(pytest.approx(expected), Unit.NATS)
    shares = OutputKind(Task.CLASSES, normalised=True)
    found = output_change([one.softmax(1)], [other.softmax(1)], shares, 6)
    assert found.value == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(6, 5), (6,), (6, 5, 3, 2)])
def test_change_of_labels_is_summed_over_them(shape: tuple[int, ...]) -> None:
    one, other = torch.randn(2, *shape, dtype=torch.float64)
    each = kl_divergence(Bernoulli(logits=one), Bernoulli(logits=other))
    expected = float(each.mean()) * (5 if len(shape) > 1 else 1)
    found = output_change([one], [other], OutputKind(Task.LABELS), 6)
    assert found == Damage(pytest.approx(expected), Unit.LABELS)
    shares = OutputKind(Task.LABELS, normalised=True)
    assert output_change([one.sigmoid()], [other.sigmoid()], shares, 6).value == pytest.approx(expected)


def test_change_of_dense_scores_is_a_mean_over_positions() -> None:
    one, other = torch.randn(2, 6, 5, 3, 2, dtype=torch.float64)
    rows = [scores.movedim(1, -1).reshape(-1, 5) for scores in (one, other)]
    expected = output_change([rows[0]], [rows[1]], OutputKind(Task.CLASSES), 36).value
    found = output_change([one], [other], OutputKind(Task.DENSE), 6)
    assert found == Damage(pytest.approx(expected), Unit.POSITION)
    assert str(found).endswith("nats a position")


def test_no_change_is_below_zero() -> None:
    scores = 20 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    nearly = scores * (1 + 1e-7)
    for kind in (OutputKind(Task.CLASSES), OutputKind(Task.LABELS), OutputKind(Task.CLASSES, True)):
        one, other = (scores.softmax(1), nearly.softmax(1)) if kind.normalised else (scores, nearly)
        assert output_change([one], [other], kind, 64).value >= 0


def test_certain_labels_have_finite_scores() -> None:
    kind = OutputKind(Task.LABELS, normalised=True)
    assert scores_of(torch.tensor([[0.0, 1.0]]), kind).isfinite().all()


def test_class_probabilities_are_of_classes_alone() -> None:
    scores = torch.randn(6, 4)
    shares = scores.softmax(dim=1)
    torch.testing.assert_close(class_probabilities([scores], OutputKind(Task.CLASSES), 6), shares)
    assert class_probabilities([shares], OutputKind(Task.CLASSES, True), 6) is shares
    assert class_probabilities([scores], OutputKind(Task.LABELS), 6) is None


@pytest.mark.parametrize("task", list(Task))
def test_outputs_that_are_not_finite_are_no_small_change(task: Task) -> None:
    shape = (6, 4, 3) if task is Task.DENSE else (6, 4)
    one = torch.randn(shape)
    assert not math.isfinite(output_change([one], [one * math.nan], OutputKind(task), 6).value)
