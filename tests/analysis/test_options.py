"""The options of an analysis: one list of them for everyone, checked, and part of the key of stimuli."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest

from prune_viz.analysis.options import AnalysisOptions, OptionFields
from prune_viz.cli import commands
from prune_viz.execution.tasks import stimuli_key
from prune_viz.utils.errors import UserError

SHAPE = (3, 16, 16)
# Those on which stimuli do not depend, and those that reach their key otherwise: by the model's record,
# the seed and what is known of inputs.
APART = {"layers", "task", "engine", "workers", "gpus_per_task", "memory"}
OTHERWISE = {"only", "quality", "input_shape", "seed", "mean", "std", "data"}


def test_keywords_are_the_fields() -> None:
    assert set(OptionFields.__annotations__) == {field.name for field in fields(AnalysisOptions)}


def test_command_line_has_the_same_defaults() -> None:
    asked = inspect.signature(commands.analyze).parameters
    for field in fields(AnalysisOptions):
        if field.name in ("input_shape", "steps", "layers"):  # None stands for the default there
            continue
        given = asked[field.name].default
        assert getattr(given, "value", given) == field.default, field.name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prior": "nature"}, "--prior is natural, spectrogram or none, not 'nature'"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"precision": "int8"}, "--precision is auto, float32 or bfloat16, not 'int8'"),
        ({"canvas": 0}, "--canvas must be at least 1"),
        ({"engine": "dask"}, "--engine is local or ray, not 'dask'"),
        ({"engine": "ray", "memory": 2**30}, "leave it out with --engine ray"),
        ({"gpus_per_task": 1.5}, "a share of a GPU, or a whole number, not 1.5"),
        ({"gpus_per_task": 0.0}, "a share of a GPU"),
        ({"input_shape": (3, 10**6, 10**6)}, "--input-shape 3,1000000,1000000"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        AnalysisOptions(**{"input_shape": SHAPE, **options})


def test_every_option_is_in_the_key_or_known_to_be_apart() -> None:
    asked = AnalysisOptions(input_shape=SHAPE)
    in_key = set(AnalysisOptions.of_stimuli(asked.recorded("cpu", "float32")))
    assert {field.name for field in fields(AnalysisOptions)} | {"draft"} == in_key | APART | OTHERWISE
    assert not in_key & (APART | OTHERWISE)


@pytest.mark.parametrize(
    "change",
    [
        {"prior": "none"},
        {"steps": 3},
        {"canvas": 8},
        {"quality": "draft"},
        {"quality": "fine"},
    ],
)
def test_options_of_stimuli_change_their_key(change: dict[str, Any]) -> None:
    model = dict.fromkeys(
        ("sha256", "weights", "structure", "arch", "arch_kwargs", "held_inputs", "input_shape")
    )
    run = {"model": model, "inputs": None, "seed": 0, "versions": {"torch": "2"}}
    asked = AnalysisOptions(input_shape=SHAPE)

    def key(options: AnalysisOptions, device: str = "cpu", precision: str = "float32") -> str:
        return stimuli_key(run, AnalysisOptions.of_stimuli(options.recorded(device, precision)))

    assert key(replace(asked, **change)) != key(asked) == key(replace(asked, workers=7, layers=["x"]))
    assert len({key(asked), key(asked, "cuda"), key(asked, precision="bfloat16")}) == 3
