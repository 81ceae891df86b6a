"""The options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Prior(StrEnum):
    """Which inputs count as equally likely."""

    natural = "natural"
    spectrogram = "spectrogram"
    none = "none"


class PrecisionName(StrEnum):
    """How precise the gradients of the search are."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class QualityName(StrEnum):
    """How much work an analysis does."""

    draft = "draft"
    standard = "standard"
    fine = "fine"


class Only(StrEnum):
    """What alone is done."""

    stimuli = "stimuli"


class RuntimeName(StrEnum):
    """What runs a network that is timed."""

    eager = "eager"
    compile = "compile"
    onnx = "onnx"


class TaskName(StrEnum):
    """What a network returns."""

    classes = "classes"
    labels = "labels"
    dense = "dense"
    values = "values"


class Mode(StrEnum):
    """What becomes of filters that are masked out."""

    zero = "zero"
    remove = "remove"


class Compensate(StrEnum):
    """What becomes of what removed filters contributed."""

    none = "none"
    merge = "merge"


class EngineName(StrEnum):
    """Where stimuli are sought."""

    local = "local"
    ray = "ray"


ModelFile = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="State dict, training checkpoint, safetensors or pickled network.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Architecture: torchvision:NAME, timm:NAME or package.module:factory.",
        show_default="the one that the weights fit",
    ),
]
ArchKwargs = Annotated[
    str | None, typer.Option(metavar="JSON", help="Keyword arguments for the architecture.")
]
Key = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where in MODEL the weights are, as in ema or ema.state_dict."),
]
Code = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where --arch finds modules of your own, beside here.")
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Let MODEL run code while it is read: for files you trust.")
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Directory that analyze wrote.", show_default=False)
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="C,H,W",
        help="Shape of one input, or its length if it has no channels. Of several the first is varied, the "
        "others are held at noise.",
        show_default="the architecture's own",
    ),
]
Example = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What the network is called with, a tensor, tuple or dict from torch.save: its first pictures "
        "(or signals) are varied, the rest is held.",
    ),
]
Engine = Annotated[
    EngineName, typer.Option(help="Seek stimuli on this machine, or on a Ray cluster (RAY_ADDRESS).")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tasks at a time.", show_default="a CPU's cores, a cluster's room"),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory that the run may take, as in 8G.", show_default="most of what is free"
    ),
]
GpusPerTask = Annotated[
    float, typer.Option(min=0.01, metavar="R", help="With --engine ray: of a GPU, what each task takes.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace what is there already, though prune-viz did not write it.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Mean = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Mean of the normalisation, of pixels in 0..1."),
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation of the normalisation.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Example inputs, unlabelled: a folder of pictures, arrays or sounds, a file of arrays "
        "(.npy, .npz, .pt, .safetensors), or module:function that returns batches.",
    ),
]
