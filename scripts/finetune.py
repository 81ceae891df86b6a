"""Fine-tune a pruned network on a folder of images, with its masks held or already smaller.

    python scripts/finetune.py model.pt --arch torchvision:resnet18 --masks reports/model/masks.pt \
        --train images/train --val images/val --out tuned.pt
    python scripts/finetune.py smaller.pt --train images/train --val images/val --out tuned.pt

Folders hold a folder of pictures a class, in the order of their names (torchvision's `ImageFolder`). After
each epoch everything is written to ``OUT.checkpoint``; the same command goes on from there after an
interruption, and ends with the same weights as if there had been none. What is written to ``OUT`` at the end
loads with `prune_viz.load_model`; masked filters are zero in it, and `prune-viz apply --mode remove` takes
them out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from prune_viz.cli.arguments import parse_kwargs, parse_numbers, parse_shape
from prune_viz.loading.architectures import default_input_shape
from prune_viz.loading.checkpoints import load_checkpoint
from prune_viz.loading.formats import read_content
from prune_viz.loading.state_dicts import check_finite
from prune_viz.pruning.apply import apply_masks, make_permanent
from prune_viz.pruning.masks import load_masks
from prune_viz.pruning.write import check_origin, check_plain, save_checkpoint
from prune_viz.utils.destinations import check_destination
from prune_viz.utils.devices import pick_device
from prune_viz.utils.errors import UserError, one_line
from prune_viz.utils.files import sha256, written_aside

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in 0..1
SMALL = 64  # inputs up to this size are not cropped at random scales


def main() -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    try:
        finetune(parse(), console)
    except UserError as error:
        # From a process that reads pictures it comes with that one's traceback before it.
        said = str(error).rpartition(f"{UserError.__module__}.UserError: ")[2]
        console.print(f"error: {one_line(said)}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last whole epoch")
        sys.exit(130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, help="weights, or a smaller network that prune-viz wrote")
    parser.add_argument("--arch", help="architecture of the weights, as for prune-viz analyze")
    parser.add_argument("--arch-kwargs", metavar="JSON", help="what it is built with")
    parser.add_argument("--key", help="where in the file the weights are, as for prune-viz analyze")
    parser.add_argument("--input-shape", metavar="C,H,W", help="of one input [what the network takes]")
    parser.add_argument("--masks", type=Path, help="masks.pt, held at zero while training")
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="pictures to train on")
    parser.add_argument("--val", type=Path, required=True, metavar="DIR", help="pictures to validate on")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write")
    parser.add_argument("--force", action="store_true", help="replace what is there, whoever wrote it")
    parser.add_argument("--epochs", type=at_least(int, 1), default=5)
    parser.add_argument("--batch", type=at_least(int, 1), default=64)
    parser.add_argument("--rate", type=at_least(float, 0), default=3e-4, help="largest, of AdamW")
    parser.add_argument("--weight-decay", type=at_least(float, 0), default=0.01)
    parser.add_argument("--mean", metavar="R,G,B", help="of pixels in 0..1 [ImageNet's, or 0.5]")
    parser.add_argument("--std", metavar="R,G,B", help="of pixels in 0..1 [ImageNet's, or 0.5]")
    parser.add_argument("--workers", type=at_least(int, 0), default=2, help="processes that read pictures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def at_least(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    """A number of that kind, for `argparse`."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"should be at least {least}, not {text}")
        return value

    number.__name__ = "number"
    return number


def finetune(options: argparse.Namespace, console: Console) -> None:
    """Train as the options say, print a line an epoch, write the result."""
    device = pick_device(options.device)
    kwargs, wished = parse_kwargs(options.arch_kwargs), parse_shape(options.input_shape)
    inputs = [file for file in (options.model, options.masks) if file is not None]
    for file in (options.out, checkpoint_beside(options.out)):
        check_destination("--out", file, inputs, options.force)
    checkpoint = load_checkpoint(options.model, options.arch, kwargs, key=options.key)
    check_plain(checkpoint.model)
    shape = wished or checkpoint.input_shape or default_input_shape(checkpoint.model, checkpoint.arch)
    masks = None if options.masks is None else load_masks(options.masks)
    if masks is not None:
        check_origin(checkpoint, masks, options.masks)
    model = checkpoint.model.to(device)
    if masks is not None:
        apply_masks(model, masks)
    train, val = read_folders(options, shape)
    check_classes(model, shape, len(train.classes), device)
    training = Training(model, options, len(train))
    training.resume(console)
    console.print(f"epoch  train loss  val loss  val top-1  ({len(train):,} and {len(val):,} pictures)")
    if training.epoch == 0:
        console.print("    0           -  " + described(*validate(model, val, options, device)))
    while training.epoch < options.epochs:
        loss = train_epoch(training, train, options, device, console)
        said = described(*validate(model, val, options, device))
        console.print(f"{training.epoch:>5}  {loss:>10.4f}  {said}")
        check_finite(model)  # rather than write what nothing can be made of
        training.save()
    make_permanent(model.cpu().eval())
    save_checkpoint(checkpoint, model, options.out, shape)
    training.file.unlink(missing_ok=True)
    console.print(f"written to {one_line(options.out)}", soft_wrap=True)


# Pictures


class Pictures(datasets.ImageFolder):
    """An `ImageFolder` that says which picture it cannot read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return super().__getitem__(index)
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{self.samples[index][0]} cannot be read as a picture: {error}") from None


def read_folders(options: argparse.Namespace, shape: tuple[int, ...]) -> tuple[Pictures, Pictures]:
    """Pictures to train and to validate on, laid out as the network takes them."""
    channels, *size = shape
    if channels not in (1, 3) or len(size) != 2:
        raise UserError(
            f"pictures have one channel or three; inputs of shape {shape} need a loop of your own"
        )
    given = [parse_numbers(f"--{name}", getattr(options, name)) for name in ("mean", "std")]
    usual = [MEAN, STD] if channels == 3 else [(0.5,), (0.5,)]
    mean, std = (list(a or b) for a, b in zip(given, usual, strict=True))
    if any(len(numbers) not in (1, channels) for numbers in (mean, std)) or min(std) <= 0:
        raise UserError(f"--mean and --std take {channels} numbers, or one for all, and --std none below 0")
    shared = [
        transforms.Grayscale() if channels == 1 else transforms.RGB(),
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(mean, std),
    ]
    if max(size) <= SMALL:
        moved: list[Any] = [
            transforms.Resize(size),
            transforms.RandomCrop(size, padding=max(1, size[0] // 8)),
        ]
        fitted: list[Any] = [transforms.Resize(size)]
    else:
        moved = [transforms.RandomResizedCrop(size, scale=(0.35, 1)), transforms.RandomHorizontalFlip()]
        fitted = [transforms.Resize(size[0] * 8 // 7), transforms.CenterCrop(size)]
    folders = []
    for option, folder, layout in (("--train", options.train, moved), ("--val", options.val, fitted)):
        try:
            folders.append(Pictures(folder, transforms.Compose([*layout, *shared])))
        except (OSError, FileNotFoundError) as error:
            raise UserError(f"{option} {folder} is not a folder of folders of pictures ({error})") from None
    if folders[0].classes != folders[1].classes:
        raise UserError("--train and --val do not hold the same folders, one a class")
    return folders[0], folders[1]


def check_classes(model: nn.Module, shape: tuple[int, ...], classes: int, device: torch.device) -> None:
    """Raise `UserError` unless the network gives one score a class."""
    try:
        with torch.no_grad():
            scores = model.eval()(torch.zeros(1, *shape, device=device))
    except Exception as error:  # whatever an untrusted forward pass raises
        raise UserError(f"the network does not run on inputs of shape {shape}: {error}") from None
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise UserError("this network gives no row of class scores; fine-tune it in a loop of your own")
    if scores.shape[1] != classes:
        raise UserError(f"the network knows {scores.shape[1]} classes, but --train has {classes} folders")


def batches(
    pictures: Dataset[Any], options: argparse.Namespace, epoch: int | None, device: torch.device
) -> DataLoader[Any]:
    """Batches in order, or, for an epoch of training, shuffled as the seed and the epoch say."""
    generator = torch.Generator().manual_seed(options.seed + 1_000_003 * (epoch or 0))
    return DataLoader(
        pictures,
        options.batch,
        shuffle=epoch is not None,
        drop_last=epoch is not None and len(pictures) > options.batch,  # type: ignore[arg-type]
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        generator=generator,
    )


# Training


def checkpoint_beside(out: Path) -> Path:
    """Where training keeps what it has reached, beside the file that it is to write."""
    return out.with_name(f"{out.name}.checkpoint")


class Training:
    """What training has reached: the model, its optimiser and rate, and the epoch; kept on disk."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, pictures: int) -> None:
        self.model = model
        self.file = checkpoint_beside(options.out)
        self.epoch = 0
        count = pictures // options.batch if pictures > options.batch else 1
        # Scales, shifts and biases have no reason to be small.
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(1, options.epochs * count)
        )
        beside = ("device", "out", "force")
        given = {name: str(value) for name, value in vars(options).items() if name not in beside}
        files = [file for file in (options.model, options.masks) if file is not None]
        self._key = json.dumps([given, [sha256(file) for file in files]], sort_keys=True)

    def save(self) -> None:
        """Write all that going on needs, whole or not at all."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with written_aside(self.file) as aside:
            torch.save({**parts, "epoch": self.epoch, "key": self._key}, aside)

    def resume(self, console: Console) -> None:
        """Go on from an earlier run of the same command, if there is one."""
        if not self.file.exists():
            return
        try:
            found = read_content(self.file)
            known = found["key"] == self._key
        except (UserError, KeyError, TypeError):
            raise UserError(f"{self.file} is damaged; delete it to start over") from None
        if not known:
            raise UserError(f"{self.file} is of another model or other options; delete it to start over")
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(found[name])
        self.epoch = found["epoch"]
        console.print(f"going on after epoch {self.epoch}")


def train_epoch(
    training: Training,
    pictures: Dataset[Any],
    options: argparse.Namespace,
    device: torch.device,
    console: Console,
) -> float:
    """Train for one epoch; give the mean loss."""
    # What is drawn at random in an epoch depends on the seed and the epoch alone.
    torch.manual_seed(options.seed + 1_000_003 * training.epoch)
    loader = batches(pictures, options, training.epoch, device)
    total, count = 0.0, 0
    training.model.train()
    shown = track(loader, f"epoch {training.epoch + 1}", console=console, transient=True)
    for images, labels in shown if console.is_terminal else loader:
        with mixed_precision(device):
            loss = F.cross_entropy(training.model(images.to(device)), labels.to(device))
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.schedule.step()
        total, count = total + float(loss.detach()) * len(images), count + len(images)
    training.epoch += 1
    return total / max(count, 1)


def validate(
    model: nn.Module, pictures: Dataset[Any], options: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Mean loss and top-1."""
    loss, right, count = 0.0, 0, 0
    model.eval()
    with torch.no_grad(), mixed_precision(device):
        for images, labels in batches(pictures, options, None, device):
            scores, truth = model(images.to(device)).float(), labels.to(device)
            loss += float(F.cross_entropy(scores, truth, reduction="sum"))
            right += int((scores.argmax(dim=1) == truth).sum())
            count += len(labels)
    return loss / max(count, 1), right / max(count, 1)


def described(loss: float, top1: float) -> str:
    return f"{loss:>8.4f}  {top1:>9.4f}"


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 where it is faster, on GPUs that have it; it needs no scaling of the loss."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        with torch.autocast("cuda", torch.bfloat16):
            yield
    else:
        yield


if __name__ == "__main__":
    main()
