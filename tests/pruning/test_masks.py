from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Plain, mask_without

from prune_viz.channels.groups import NormChannel
from prune_viz.pruning.masks import Masks, load_masks, save_masks
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.decisions_json import Merge
from prune_viz.runs.fingerprint import Origin, hash_model
from prune_viz.utils.errors import UserError


def test_masks_survive_the_disk_and_load_without_pickle(tmp_path: Path) -> None:
    masks = {"conv1": mask_without(8, 1), "conv2": mask_without(8)}
    save_masks(masks, tmp_path / "masks.pt")
    plain = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert type(plain) is dict
    loaded = load_masks(tmp_path / "masks.pt")
    assert all(torch.equal(loaded[name], plain[name]) and loaded[name].dtype == torch.bool for name in masks)
    assert (loaded.removed, loaded.filters, loaded.merges) == (1, 16, ())


def test_merges_come_from_the_decisions_beside_the_masks(tmp_path: Path) -> None:
    save_masks({"conv1": mask_without(8, 1)}, tmp_path / "masks.pt")
    merge = {"layer": "conv1", "filter": 1, "representatives": [0], "coefficients": [2.0], "constant": 0.5}
    (tmp_path / "decisions.json").write_text(json.dumps({"merges": [merge], "model_sha256": "5a"}))
    (loaded,) = load_masks(tmp_path / "masks.pt").merges
    assert (loaded.filter, loaded.representatives, loaded.coefficients, loaded.constant) == (
        1,
        (0,),
        (2.0,),
        0.5,
    )
    whole = {"merges": [merge], "model_sha256": "5a", "passages": [["bn1", 1, [["conv1", 1]]]]}
    for damage in (
        {"merges": [{**merge, "coefficients": [1.0, 2.0]}]}, {"merges": [{**merge, "filter": "1"}]},
        {"merges": [{**merge, "representatives": [-1]}]}, {"passages": ["bn1"]},
        {"passages": [["bn1", 1.5, []]]}, {"predicted": [1]}, {"merges": None},
    ):  # fmt: skip
        (tmp_path / "decisions.json").write_text(json.dumps({**whole, **damage}))
        with pytest.raises(UserError, match="damaged"):
            load_masks(tmp_path / "masks.pt")
    (tmp_path / "decisions.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_masks(tmp_path / "masks.pt")
    (tmp_path / "decisions.json").write_text(
        json.dumps({**whole, "predicted": {"damage": None, "unit": "nats"}})
    )
    assert load_masks(tmp_path / "masks.pt").predicted is None


def test_masks_whose_writing_fails_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_masks({"conv1": mask_without(8, 1)}, tmp_path / "masks.pt")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("prune_viz.pruning.masks.write_plain_masks", full)
    with pytest.raises(OSError, match="no space"):
        Masks({"conv1": mask_without(8, 2)}, origin=Origin("a")).save(tmp_path / "masks.pt")
    assert not (tmp_path / "masks.pt").exists()  # rather than the old ones beside the new merges


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_masks(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a masks file"):
        load_masks(tmp_path / "text.pt")
    torch.save({"conv1": torch.zeros(3)}, tmp_path / "floats.pt")
    with pytest.raises(UserError, match="bool"):
        load_masks(tmp_path / "floats.pt")


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        save_masks({"conv1": mask_without(8, 1)}, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_saved_masks_keep_merges_and_images(tmp_path: Path) -> None:
    masks = Masks(
        {"conv1": mask_without(8, 1), "conv2": mask_without(8)},
        (Merge("conv1", 1, (0, 2), (0.5, -1.25), 0.1),),
        Origin("5a" * 32, "6b" * 32),
        torch.randn(3, 3, 16, 16),
        Damage(0.25, Unit.NATS),
        [NormChannel("bn1", 1, (("conv1", 1),))],
    )
    masks.save(tmp_path / "mine.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "mine.merges.json", "mine.probes.safetensors", "mine.pt"
    ]  # fmt: skip
    again = Masks.load(tmp_path / "mine.pt")
    assert again == masks
    assert (again.merges, again.origin, again.predicted) == (masks.merges, masks.origin, masks.predicted)
    assert again.norm_channels == masks.norm_channels
    assert torch.equal(again.calibration_images, masks.calibration_images)
    Masks({"conv1": mask_without(8, 3)}).save(tmp_path / "mine.pt")  # nothing of the earlier ones stays
    assert [file.name for file in tmp_path.iterdir()] == ["mine.pt"]


def test_masks_are_equal_if_they_keep_the_same_filters() -> None:
    masks = Masks({"conv1": mask_without(8, 1)})
    assert masks == Masks({"conv1": mask_without(8, 1)}, (Merge("conv1", 1, (), (), 0.0),))
    assert masks == {"conv1": mask_without(8, 1)}
    assert masks != Masks({"conv1": mask_without(8, 2)})
    assert masks != Masks({"conv1": mask_without(7, 1)})
    assert masks != Masks({"conv2": mask_without(8, 1)})
    assert masks != 3
    assert repr(masks) == "Masks(1 of 8 filters go, in 1 of 1 layers)"


def test_a_summary_counts_what_goes() -> None:
    table = Masks({"conv1": mask_without(8, 1, 5), "conv2": mask_without(4)}).summary()
    assert table.loc["conv1"].tolist() == [8, 2, 0.25]
    assert table.loc["conv2"].tolist() == [4, 0, 0.0]


def _drawn(seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({name: torch.rand(6, generator=generator) > 0.4 for name in ("conv1", "conv2")})


@given(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))
def test_combining_is_a_lattice(one: int, two: int, three: int) -> None:
    a, b, c = map(_drawn, (one, two, three))
    for remove in ("any", "both"):
        assert a.combine(a, remove) == a
        assert a.combine(b, remove) == b.combine(a, remove)
        assert a.combine(b, remove).combine(c, remove) == a.combine(b.combine(c, remove), remove)
    assert a.combine(a.combine(b, "any"), "both") == a
    assert a.removed + b.removed == a.combine(b, "any").removed + a.combine(b, "both").removed


def test_combined_masks_keep_the_merges_that_still_hold() -> None:
    own, lost, theirs = (Merge("conv1", *rest, (1.0,), 0.0) for rest in ((1, (0,)), (3, (5,)), (5, (2,))))
    one = Masks({"conv1": mask_without(8, 1, 3)}, (own, lost), Origin("a"))
    other = Masks({"conv1": mask_without(8, 5), "conv2": mask_without(4, 0)}, (theirs,))
    one.norm_channels = [NormChannel("bn1", index, (("conv1", index),)) for index in (1, 3)]
    other.norm_channels = [
        NormChannel("bn1", 5, (("conv1", 5),)),
        NormChannel("bn2", 0, (("conv2", 0), ("conv9", 1))),
    ]
    combined = one.combine(other)
    assert combined == {"conv1": mask_without(8, 1, 3, 5), "conv2": mask_without(4, 0)}
    assert set(combined.merges) == {own, theirs}  # what rebuilt filter 3 has gone itself
    assert combined.origin == Origin("a")
    assert combined.norm_channels == [
        *one.norm_channels,
        other.norm_channels[0],
    ]  # conv9 still writes bn2's channel 0
    assert one.combine(other, "both").removed == 0
    assert one.combine(other, "both").norm_channels == []


def test_masks_of_different_models_are_not_combined() -> None:
    one = Masks({"conv1": mask_without(8, 1)}, origin=Origin("a", "w"))
    with pytest.raises(UserError, match="different models"):
        one.combine(Masks({"conv1": mask_without(8, 1)}, origin=Origin("b")))
    for same in (Origin(), Origin("a"), Origin("w", "w")):  # nothing known; an older run; one in Python
        assert one.combine(Masks({"conv1": mask_without(8, 1)}, origin=same)).origin.weights == "w"
    with pytest.raises(UserError, match="not 'neither'"):
        one.combine(one, "neither")
    with pytest.raises(UserError, match="conv1 has 8 filters in one, 7 in the other"):
        one.combine({"conv1": mask_without(7, 1)})


def test_an_origin_knows_its_model_by_file_or_by_weights() -> None:
    model, other = Plain(), Plain()
    for origin in (Origin("file", hash_model(model)), Origin(hash_model(model))):
        assert origin.is_of(model)
        assert not origin.is_of(other)
    assert Origin("file").is_of(other, "file")
    assert Origin().is_of(other)
    assert Origin("file", hash_model(model)).has_weights_of(model)
    assert not Origin("file", hash_model(model)).has_weights_of(other)
    assert Origin("file").has_weights_of(other)  # written before weights had digests of their own
    assert Origin("file", hash_model(model)).has_weights_of(other.half())  # which cannot be checked


def _laden(*gone: int, origin: str = "a") -> Masks:
    merges = tuple(Merge("conv1", number, (0,), (1.0,), 0.0) for number in gone)
    norm_channels = [NormChannel("bn1", number, (("conv1", number),)) for number in gone]
    given = {
        "calibration_images": torch.ones(1, 3, 4, 4),
        "predicted": Damage(0.5, Unit.NATS),
        "norm_channels": norm_channels,
    }
    return Masks({"conv1": mask_without(8, *gone)}, merges, Origin(origin), **given)


@pytest.mark.parametrize(
    "way",
    [Masks.copy, copy.copy, copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))],
)
def test_copies_keep_merges_and_images(way: Callable[[Masks], Masks]) -> None:
    masks = _laden(1, 2)
    made = way(masks)
    assert type(made) is Masks
    assert made == masks
    assert (made.merges, made.origin, made.predicted) == (masks.merges, masks.origin, masks.predicted)
    assert made.norm_channels == masks.norm_channels
    assert torch.equal(made.calibration_images, masks.calibration_images)


def test_union_keeps_what_holds() -> None:
    first, other = _laden(1, 2), {"conv2": mask_without(4, 3)}
    for united in (first | other, other | first):
        assert united.keys() == {"conv1", "conv2"}
        assert united.merges == first.merges
        assert united.norm_channels == first.norm_channels
        assert united.calibration_images is first.calibration_images
    second = _laden(2)
    united = first | second  # where filter 1 stays
    assert [merge.filter for merge in united.merges] == [2]
    assert united["conv1"][1]
    changed = first.copy()
    changed |= second
    assert changed == united
    assert changed.merges == united.merges
    assert first.merges == _laden(1, 2).merges
    with pytest.raises(UserError, match="two different models"):
        first | _laden(1, origin="b")
