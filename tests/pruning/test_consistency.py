from __future__ import annotations

import pytest
import torch
from networks import Concatenating, Plain, Residual, mask_without

from prune_viz.channels import labelling
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.masks import Masks
from prune_viz.utils.errors import UserError

IMAGE = torch.zeros(1, 3, 16, 16)


def test_coupled_channel_goes_only_whole() -> None:
    masks = {
        "stem": mask_without(8, 0, 1), "outer": mask_without(8, 1, 2), "project": mask_without(8, 1),
        "expand": mask_without(16, 3, 4), "depthwise": mask_without(16, 4),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="tied"):
        reconciled = reconcile_masks(Residual(), masks, IMAGE)
    for layer in ("stem", "outer", "project"):
        assert (~reconciled[layer]).nonzero().ravel().tolist() == [1]
    for layer in ("expand", "depthwise"):
        assert (~reconciled[layer]).nonzero().ravel().tolist() == [4]
    assert reconciled["inner"].all()
    assert any("stem: 1 masked filters are kept" in note for note in reconciled.notes)
    again = reconcile_masks(Residual(), reconciled, IMAGE)
    assert all(torch.equal(again[name], reconciled[name]) for name in reconciled)
    assert again.notes == []


def test_output_filters_are_kept_with_reason() -> None:
    with pytest.warns(UserWarning, match="output"):
        reconciled = reconcile_masks(Concatenating(), {"out": mask_without(2, 0)}, IMAGE)
    assert reconciled["out"].all()


def test_what_cannot_be_reconciled_is_said_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "SECONDS", -1.0)
    with pytest.raises(UserError, match="cannot be traced") as raised:
        reconcile_masks(Plain(), {}, IMAGE)
    assert "takes too long" in str(raised.value)
    with pytest.raises(UserError, match="does not run on an input of shape 9,16,16"):
        reconcile_masks(Plain(), Masks({"conv1": mask_without(8, 0)}), torch.zeros(1, 9, 16, 16))
