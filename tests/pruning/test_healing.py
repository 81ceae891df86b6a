"""Healing: what a smaller network learns from the whole one, and what becomes of it when it is cut short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Plain, mask_without, random_residual, randomise_norms
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.calibration.image_files import RunImages
from prune_viz.pruning import distillation, healing
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.distillation import Healing
from prune_viz.pruning.healing import heal_as
from prune_viz.pruning.healing_state import read_state
from prune_viz.pruning.hints import Hints
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.errors import RunInterruptedError, UserError
from prune_viz.utils.memory import RowLimit
from prune_viz.utils.progress import Progress


def inputs(count: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def damaged() -> tuple[nn.Module, nn.Module, Masks]:
    """A network, the same without some filters, and the masks."""
    whole = random_residual()
    gone = {"inner": mask_without(8, 0, 1), "expand": mask_without(16, 2), "depthwise": mask_without(16, 2)}
    masks = reconcile_masks(whole, gone, inputs(1))
    masks.images = RunImages(inputs())
    return whole, pv.remove_filters(whole, masks, inputs(1)), masks


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


class Interrupting(Progress):
    """Interrupts after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_linear_network_heals_exactly() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 4, 1, bias=False)).eval()
    with torch.no_grad():
        whole[0].weight[4:] = whole[0].weight[:2]  # what goes is there a second time
        whole[1].weight[:, 4:] *= 0.3
    masks = {"0": mask_without(6, 4, 5)}
    smaller = pv.remove_filters(whole, masks, inputs(1))
    healed = pv.heal(smaller, whole, masks, steps=600, examples=inputs())
    assert healed.before.value > 0.01
    assert healed.after.value < 1e-6
    unseen = inputs(8, seed=9)
    scale = whole(unseen).abs().max().item()
    torch.testing.assert_close(healed.model(unseen), whole(unseen), atol=1e-3 * scale, rtol=0)


def test_networks_come_nearer_to_the_whole_one() -> None:
    whole, smaller, masks = damaged()
    healed = pv.heal(smaller, whole, masks, steps=100)
    unseen = inputs(64, seed=9)
    with torch.no_grad():
        before, after = ((whole(unseen) - one(unseen)).square().mean() for one in (smaller, healed.model))
    assert after < 0.5 * before
    assert healed.after.value < 0.5 * healed.before.value
    assert healed.best > 0


def test_healing_is_never_worse_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "RATES", (1e3,))
    whole, smaller, masks = damaged()
    healed = pv.heal(smaller, whole, masks, steps=20)
    assert healed.best == 0
    assert healed.after == healed.before
    assert same_weights(healed.model, smaller)
    assert str(healed).startswith("20 steps of healing did not halve the change on 16 synthetic images")


def test_little_gain_counts_on_real_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "MARGIN", 1e9)
    whole, smaller, masks = damaged()
    synthetic = pv.heal(smaller, whole, masks, steps=20)
    assert (synthetic.best, synthetic.after) == (0, synthetic.before)
    assert same_weights(synthetic.model, smaller)
    real = pv.heal(smaller, whole, masks, steps=20, examples=inputs())
    assert real.best > 0
    assert real.after.value < real.before.value
    assert "on 16 inputs of --data that no fit saw" in str(real)


def test_what_was_given_stays_as_it_is() -> None:
    whole, smaller, masks = damaged()
    before = [{name: one.clone() for name, one in net.state_dict().items()} for net in (whole, smaller)]
    pv.heal(smaller, whole, masks, steps=5)
    for network, state in zip((whole, smaller), before, strict=True):
        assert all(torch.equal(one, state[name]) for name, one in network.state_dict().items())
        assert all(one.requires_grad for one in network.parameters())


def test_statistics_and_layers_before_the_first_change_stay() -> None:
    torch.manual_seed(0)
    whole = randomise_norms(Plain())
    masks = Masks({"conv2": mask_without(whole.conv2.out_channels, 0, 1)})
    smaller = pv.remove_filters(whole, masks, inputs(1))
    healed = pv.heal(smaller, whole, masks, steps=10, examples=inputs()).model
    for name, value in healed.state_dict().items():
        learns = name.partition(".")[0] not in ("conv1", "bn1") and "running" not in name
        if "num_batches" not in name:
            assert torch.equal(value, smaller.state_dict()[name]) != learns, name


@pytest.mark.parametrize("after", [20, 27, 41])  # of 12 steps in trials and 30 more
def test_an_interrupted_one_ends_as_an_undisturbed_one(after: int, tmp_path: Path) -> None:
    whole, smaller, masks = damaged()
    undisturbed = heal_as(smaller, whole, masks, Healing(30))
    state = tmp_path / "state"
    with pytest.raises(RunInterruptedError):
        heal_as(smaller, whole, masks, Healing(30, state=state, progress=Interrupting(after)))
    assert state.exists()
    resumed = heal_as(smaller, whole, masks, Healing(30, state=state))
    assert same_weights(resumed.model, undisturbed.model)
    assert (resumed.before, resumed.after, resumed.best) == (
        undisturbed.before, undisturbed.after, undisturbed.best
    )  # fmt: skip


def test_the_seed_alone_decides() -> None:
    whole, smaller, masks = damaged()
    first, again, other = (heal_as(smaller, whole, masks, Healing(10, seed=seed)).model for seed in (0, 0, 1))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_states_of_other_healing_and_damaged_ones_are_not_used(tmp_path: Path) -> None:
    whole, smaller, masks = damaged()
    state, undisturbed = tmp_path / "state", heal_as(smaller, whole, masks, Healing(20))
    for other in (Healing(20, seed=1, state=state), Healing(40, state=state)):
        heal_as(smaller, whole, masks, other)
        assert state.exists()
        assert same_weights(heal_as(smaller, whole, masks, Healing(20, state=state)).model, undisturbed.model)
    state.write_bytes(state.read_bytes()[:100])
    assert read_state(state, "") is None
    assert same_weights(heal_as(smaller, whole, masks, Healing(20, state=state)).model, undisturbed.model)


def test_the_result_does_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, smaller, masks = damaged()
    at_once = heal_as(smaller, whole, masks, Healing(20))
    monkeypatch.setattr(RowLimit, "rows", lambda self, shape, most: 3)
    in_parts = heal_as(smaller, whole, masks, Healing(20))
    for one, other in zip(at_once.model.parameters(), in_parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_hints_compare_kept_filters_alone() -> None:
    whole, smaller, masks = damaged()
    hints = Hints(whole, smaller, masks, inputs(8))
    asked = hints.ask(inputs(4))
    outputs, missed = hints.answer(inputs(4), asked)
    assert torch.equal(asked.outputs[0], whole(inputs(4)))
    assert torch.equal(outputs[0], smaller(inputs(4)))
    assert missed.item() > 0
    same = Hints(whole, whole, {}, inputs(8))
    assert same.answer(inputs(4), same.ask(inputs(4)))[1].item() == 0


class Mixer(nn.Module):
    """A convolution, and a block whose hidden units are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(dim=1))


def test_linear_layers_that_read_what_went_learn() -> None:
    torch.manual_seed(0)
    whole, masks = Mixer().eval(), {"fc1": mask_without(16, 0, 1, 2, 3)}
    smaller = pv.remove_filters(whole, masks, inputs(1))
    healed = pv.heal(smaller, whole, masks, steps=60, examples=inputs())
    assert healed.after.value < 0.3 * healed.before.value
    for name, value in healed.model.state_dict().items():
        assert torch.equal(value, smaller.state_dict()[name]) == (name.partition(".")[0] in ("patch", "norm"))


class Shifting(Plain):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 2
        return super().forward(x)


def test_examples_stay_as_they_are() -> None:
    torch.manual_seed(0)
    whole, smaller, examples = randomise_norms(Shifting()), randomise_norms(Shifting(6)), inputs()
    hints = Hints(whole, smaller, {}, examples)
    hints.answer(examples, hints.ask(examples))
    assert OutputMeter(whole, examples, OutputKind()).change(whole) == 0
    pv.heal(whole, whole, {"conv2": mask_without(8, 0, 1)}, steps=3, examples=examples)
    assert torch.equal(examples, inputs())


def test_half_precision_heals() -> None:
    whole, smaller, masks = damaged()
    healed = pv.heal(smaller.half(), whole.half(), masks, steps=30, examples=inputs().half())
    assert {one.dtype for one in healed.model.parameters()} == {torch.float16}
    assert healed.after.value < healed.before.value


def test_parameters_that_are_held_do_not_learn() -> None:
    whole, smaller, masks = damaged()
    smaller.head.weight.requires_grad_(False)
    healed = pv.heal(smaller, whole, masks, steps=5).model
    assert torch.equal(healed.head.weight, smaller.head.weight)
    assert not torch.equal(healed.head.bias, smaller.head.bias)
    with pytest.raises(UserError, match="none of its parameters is to learn"):
        pv.heal(smaller.requires_grad_(False), whole, masks, steps=5)


def test_nothing_removed_is_nothing_to_heal() -> None:
    whole, _, masks = damaged()
    healed = pv.heal(whole, whole, {}, steps=5, examples=masks.images.fitted)
    assert str(healed) == "nothing to heal: the output is as it was"


def test_mixed_images_keep_mean_and_contrast() -> None:
    whole, smaller, masks = damaged()
    given = 5 + 0.5 * inputs()
    batches: list[Tensor] = []
    seen = Hints.ask

    def note(self: Hints, images: Tensor) -> object:
        batches.append(images)
        return seen(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hints, "ask", note)
        pv.heal(smaller, whole, masks, steps=10, examples=given)
    mixed = torch.cat([batch for batch in batches if len(batch) == distillation.BATCH])
    assert mixed.mean().item() == pytest.approx(5, abs=0.05)
    assert mixed.std().item() == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_healed_is_said() -> None:
    whole, smaller, masks = damaged()
    with pytest.raises(UserError, match="at least 8 inputs, not 7"):
        pv.heal(smaller, whole, masks, examples=inputs(7))
    with pytest.raises(UserError, match="no calibration images beside the masks"):
        pv.heal(smaller, whole, dict(masks))
    with pytest.raises(UserError, match="a seed is at least 0"):
        pv.heal(smaller, whole, masks, seed=-1)
    with pytest.raises(UserError, match="at least 1 step"):
        pv.heal(smaller, whole, masks, steps=0)
    with pytest.raises(UserError, match="does not run on an input of shape"):
        pv.heal(smaller, whole, masks, examples=inputs()[:, :1])


def test_a_network_whose_outputs_have_no_gradient_learns_from_hints() -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    torch.manual_seed(0)
    whole = randomise_norms(Detached())
    masks = {"conv2": mask_without(whole.conv2.out_channels, 0)}
    smaller = pv.remove_filters(whole, masks, inputs(1))
    healed = pv.heal(smaller, whole, masks, steps=40, examples=inputs())
    assert healed.after.value < 0.9 * healed.before.value
