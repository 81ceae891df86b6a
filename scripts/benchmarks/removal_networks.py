"""Networks that `bench_removal.py` makes smaller: torchvision's, timm's, and those of public bug reports."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SIZE, LARGE_SIZE = 96, 224  # of pictures; the larger for those that are built for it
BUILT_FOR_LARGE = ("vit_", "maxvit", "swin")
EVERY_BOX = ("ssd", "retina", "fcos")  # their threshold of scores has this name, others' that of a box
TIMM = (  # one of each family
    "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "convnextv2_atto",
    "crossvit_tiny_240", "cspresnet50", "darknet53", "davit_tiny", "dla34", "dpn48b", "eca_resnet33ts",
    "edgenext_xx_small", "efficientvit_b0", "ese_vovnet19b_dw", "fastvit_t8", "focalnet_tiny_srf",
    "ghostnet_100", "gmlp_s16_224", "hardcorenas_a", "hrnet_w18_small", "inception_next_atto",
    "inception_v4", "lcnet_050", "levit_128s", "mixer_s32_224", "mobilenetv4_conv_small",
    "mobilevit_xxs", "nf_resnet26", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnety_002",
    "repghostnet_050", "repvgg_a0", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "rexnet_100",
    "selecsls42b", "seresnet50", "skresnet18", "starnet_s1", "swin_tiny_patch4_window7_224",
    "tresnet_m", "twins_svt_small", "visformer_tiny", "vit_tiny_patch16_224", "xception41",
    "xcit_nano_12_p16_224",
)  # fmt: skip
KINDS = ("classification", "segmentation", "detection", "timm", "reported")


def names_of(kind: str) -> list[str]:
    """What networks there are of a kind."""
    if kind == "timm":
        return list(TIMM)
    if kind == "reported":
        return sorted(_reported().REPORTED)
    module = torchvision.models if kind == "classification" else getattr(torchvision.models, kind)
    return torchvision.models.list_models(module=module)


def build(kind: str, name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, norms that are not the identity, and noise that it runs on."""
    torch.manual_seed(0)
    if kind == "reported":
        reported = _reported()
        model, shape = copy.deepcopy(reported.REPORTED[name][0]).eval(), reported.SHAPE
    elif kind == "timm":
        import timm  # not required; `pip install --no-deps timm`

        model = timm.create_model(name, num_classes=10).eval()
        shape = model.default_cfg["input_size"]
    else:
        model = _of_torchvision(kind, name)
        size = LARGE_SIZE if kind == "classification" and name.startswith(BUILT_FOR_LARGE) else SIZE
        shape = (3, size, size)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # the head of ViT
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    if kind == "detection":
        model.double()  # rounding must not change which boxes are the best
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return model, images.to(next(model.parameters()).dtype)


def _of_torchvision(kind: str, name: str) -> nn.Module:
    kwargs: dict[str, Any] = {"weights": None}
    inception = name in ("googlenet", "inception_v3")
    if inception:
        kwargs["init_weights"] = False
    if kind == "classification":
        kwargs["num_classes"] = 10
    else:
        kwargs["weights_backbone"] = None
    if kind == "detection":
        kwargs["score_thresh" if name.startswith(EVERY_BOX) else "box_score_thresh"] = 0.0
        if not name.startswith("ssd"):  # which have one size; others enlarge pictures to 800 pixels
            kwargs |= {"min_size": LARGE_SIZE, "max_size": LARGE_SIZE}
    model = torchvision.models.get_model(name, **kwargs).eval()
    for module in model.modules():
        if inception and isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return model


def _reported() -> Any:
    """The networks that tests try as well."""
    tests = str(Path(__file__).parents[2] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    import reported_networks

    return reported_networks
