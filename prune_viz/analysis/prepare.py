"""What is analysed, made ready: the network as its filters' maps, its layers, groups and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from prune_viz.analysis.options import AnalysisOptions
from prune_viz.channels.coupling import ChannelGraph, build_graph
from prune_viz.channels.groups import CouplingGroup, group_of_layer, hidden_layers
from prune_viz.channels.labelling import UntraceableError
from prune_viz.loading.input_data import read_inputs
from prune_viz.loading.state_dicts import check_finite
from prune_viz.network.calls import blank_input, ordinary_input
from prune_viz.network.copies import opened
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics, as_spectrograms
from prune_viz.network.layers import Layer, check_patterns, select_layers
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.network.tall_kernels import turned
from prune_viz.runs.fingerprint import Origin, hash_model
from prune_viz.runs.output_kind import OutputKind, Task
from prune_viz.runs.run_directory import slug
from prune_viz.runs.run_json import LayerRecord
from prune_viz.utils.devices import pick_device
from prune_viz.utils.errors import UserError, few

ONLY_STIMULI = "only stimuli were asked for"
DRAFT = (
    "This is a draft: its pictures took few steps, and its verdicts rest on a part of them. "
    "The same command with --quality standard goes on from here."
)


@dataclass(frozen=True)
class Prepared:
    """What is analysed.

    Attributes
    ----------
    model : nn.Module
        The network, with the layers that its copies have (`prune_viz.network.copies.opened`), and tall
        kernels turned (`prune_viz.network.tall_kernels`).
    network : FilterNetwork
        It, prepared.
    layers : list of Layer
        Those that are analysed.
    records : list of LayerRecord
        The same as the run directory has them.
    groups : list of CouplingGroup
        Of all layers.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    examples : Tensor or None, shape (N, C, *size)
        The user's images, in the model's own input units.
    output : OutputKind
        What it returns.
    origin : Origin
        What model it is.
    notes : list of str
        For the report: what had to be left out.
    warnings : list of str
        Those of them that are said before the run: on groups of which only a part is analysed.
    unjudged : str
        Why no group is judged, though some could be; empty where they are.
    """

    model: nn.Module
    network: FilterNetwork
    layers: list[Layer]
    records: list[LayerRecord]
    groups: list[CouplingGroup]
    statistics: InputStatistics | None
    examples: Tensor | None
    output: OutputKind
    origin: Origin
    notes: list[str]
    warnings: list[str]
    unjudged: str = ""

    @property
    def judged(self) -> list[CouplingGroup]:
        """Groups that are judged: removable ones of which every layer is analysed."""
        if self.unjudged:
            return []
        names = {layer.name for layer in self.layers}
        return [group for group in self.groups if group.removable and names.issuperset(group.layers)]


def prepare(
    model: nn.Module,
    options: AnalysisOptions,
    out: str | Path | None = None,
    file_sha256: str | None = None,
) -> Prepared:
    """Make a model ready for its analysis; errors are those of `analyze`.

    Parameters
    ----------
    model : nn.Module
        The network.
    options : AnalysisOptions
        What is asked of the analysis.
    out : path, optional
        The run directory.
    file_sha256 : str, optional
        SHA-256 of the file that the model came from, if it did.
    """
    given, model = model, turned(opened(model))
    check_patterns(model, options.layers)
    check_finite(model)
    graph, untraced = _couple(model, options)
    groups, hidden = graph.groups, hidden_layers(model, graph.groups)
    network = FilterNetwork(
        model, options.input_shape, options.canvas, pick_device(options.device), linear=hidden,
        precision=options.precision,
    )  # fmt: skip
    if options.effort.is_draft:
        network = network.draft
    if network.overflowing:
        raise UserError(
            f"{network.overflowing[0]} has outputs on noise that are not finite; its weights are too large"
        )
    chosen = select_layers(network.layers, options.layers, graph.kept_linear)
    statistics, examples, unread = read_inputs(
        network.input_shape, options.mean, options.std, options.data, out
    )
    if options.prior == "spectrogram":
        statistics = as_spectrograms(statistics, network.input_shape)
    task = None if options.task is None else Task(options.task)
    output = find_output_kind(model, _noise(model, network), task)
    notes = [str(output), *_notes(network, graph)]
    if options.only is not None:
        notes.insert(0, f"Nothing is judged, as {ONLY_STIMULI}.")
    if options.effort.is_draft:
        notes.insert(0, DRAFT)
    if not network.takes_batches:
        groups = []
    elif untraced:
        notes.append(untraced)
    warnings = _cut_groups(groups, chosen, network)
    tied = group_of_layer(groups)
    records = [_record(layer, tied.get(layer.name)) for layer in chosen]
    weights = hash_model(given)
    return Prepared(
        model, network, chosen, records, groups, statistics, examples, output,
        Origin(file_sha256 or weights, weights, output), warnings + notes + unread, warnings,
        "" if options.only is None else ONLY_STIMULI,
    )  # fmt: skip


def _noise(model: nn.Module, network: FilterNetwork) -> Tensor:
    """Noise that a network runs on, of two rows where it takes them."""
    rows = 2 if network.takes_batches else 1
    return ordinary_input(network.input_shape, rows).to(blank_input(model, network.input_shape).device)


def _couple(model: nn.Module, options: AnalysisOptions) -> tuple[ChannelGraph, str]:
    """The channel graph; where there is none, an empty one and a note for the report on why."""
    try:
        return build_graph(model, blank_input(model, options.input_shape)), ""
    except UntraceableError as error:
        return ChannelGraph([], {}), (
            f"The ties between layers could not be traced ({error}), so no filter is called redundant and "
            "only silent ones are called dead."
        )


def _notes(network: FilterNetwork, graph: ChannelGraph) -> list[str]:
    """What of a network is left out, for the report."""
    reasons: dict[str, list[str]] = {}
    for name, why in graph.kept_linear.items():
        reasons.setdefault(why, []).append(name)
    notes = [f"{name} never runs when the model is called; it was left out." for name in network.skipped]
    if network.repeated:
        names = few(list(network.repeated))
        notes.append(f"Run several times when the model is called, analysed as of the first time: {names}.")
    if graph.drops:
        notes.append("The model drops values at random though it does not train, so its outputs vary.")
    if not network.takes_batches:
        notes.append("The model takes one input at a time, so its filters are shown, not judged.")
    elif network.linear:
        notes += [
            f"Linear layers that are kept whole, and not analysed: {few(names)}. {why[:1].upper()}{why[1:]}."
            for why, names in reasons.items()
        ]
    return notes


def _cut_groups(
    groups: Sequence[CouplingGroup], chosen: Sequence[Layer], network: FilterNetwork
) -> list[str]:
    """What to add to `--layers`, where it names only a part of some groups, so that these are judged."""
    names = {layer.name for layer in chosen}
    cut = [
        group
        for group in groups
        if group.removable and not names.isdisjoint(group.layers) and not names.issuperset(group.layers)
    ]
    tied = {name for group in cut for name in group.layers} - names
    missing = [layer for layer in network.layers if layer.name in tied]
    if not missing:
        return []
    filters = sum(layer.filters for layer in missing)
    count = f"{len(cut)} coupling group{'s' * (len(cut) > 1)}"
    names_missing = few([layer.name for layer in missing])
    return [
        f"--layers names only a part of {count}, which cannot be judged so. "
        f"To have them judged, name {names_missing} too: {filters:,} more filters."
    ]


def _record(layer: Layer, group: CouplingGroup | None) -> LayerRecord:
    number = None if group is None else group.number
    file = f"layers/{slug(layer.depth, layer.name)}.safetensors"
    return LayerRecord(**vars(layer), group=number, file=file)
