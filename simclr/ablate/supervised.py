"""The program that trains a classifier for a cell: `python -m simclr.ablate.supervised --out FILE`.

By the loop of `simclr.eval.training`: from scratch, as He et al. 2015 train on CIFAR-10 (section 4.2: SGD, momentum .9,
decay 1e-4, a tenth of the rate after half and three quarters of the steps, pad 4 and crop). It goes on after a kill
from the last epoch, to the same bits: an epoch's order and its crops are functions of (seed, epoch, image). The
counterpart of a run, on its schedule, is that of `simclr supervised`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.ablate.program import Outcome, arguments, labels_sha256, run_program
from simclr.ablate.responses import layer_responses
from simclr.augment import SimCLRAugmentation
from simclr.data import EvalLoader, ImageData
from simclr.encoders import build_encoder
from simclr.eval.few_labels import labelled_part, labels_per_class
from simclr.eval.training import train_epochs
from simclr.files import written_whole
from simclr.inputs import to_unit_range
from simclr.resnet import ResNet
from simclr.seeding import epoch_order, uniforms

_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_CROP_VIEW = 7  # of the random numbers of pad and crop: no view of pretraining is so numbered


@dataclass(frozen=True)
class Settings:
    """Of a classifier.

    Attributes:
        encoder, image_size, stem, width, shortcut, zero_init: see `build_encoder`.
        train, test: images, at most.
        labels: the part of the training images that it learns from.
        steps: of the optimiser.
        batch_size: images a step.
        lr, warmup_steps, weight_decay: of SGD; the warm-up is at a tenth of the rate.
        augment: "pad_crop", or "simclr" with `strength` and `blur_prob`.
        seed: of weights, order and crops.
    """

    encoder: str = "resnet20"
    image_size: int = 16
    stem: str = "small"
    width: float = 1.0
    shortcut: str = "A"
    zero_init: bool = False
    train: int = 8192
    test: int = 10_000
    labels: float = 1.0
    steps: int = 300
    batch_size: int = 128
    lr: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 1e-4
    augment: str = "pad_crop"
    strength: float = 0.5
    blur_prob: float = 0.0
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Train a classifier, and write the outcome."""
    given = arguments(argv, images=False)
    train_classifier(Settings(**given.settings), given.out.parent, given.images, given.device).write(given.out)


def train_classifier(settings: Settings, folder: Path, images: Path | None = None, device: str = "cpu") -> Outcome:
    """Train, measure on the training images without augmentation and on the test images.

    Args:
        settings: see `Settings`.
        folder: keeps what it takes to go on.
        images: a folder with `train` and `test`; None for the built-in ones.
        device: where.
    """
    body, data = _begin(settings, images)
    train, test = data.eval_loader("train", limit=settings.train), data.eval_loader("test", limit=settings.test)
    pixels, labels = _all(train)
    tested, wanted = _all(test)
    network = nn.Sequential(body, nn.Linear(body.feature_dim, int(labels.max()) + 1)).to(device)
    if settings.labels < 1:
        kept = labelled_part(labels, labels_per_class(labels, settings.labels), seed=settings.seed, draw=0)
        pixels, labels = pixels[kept], labels[kept]
    augment = None
    if settings.augment == "simclr":
        options: dict[str, Any] = {"strength": settings.strength, "blur_prob": settings.blur_prob}
        augment = SimCLRAugmentation(settings.image_size, **options, mean=_MEAN, std=_STD)
    prepare = _Prepare(_MEAN, _STD, augment, settings.seed, device)
    curve = _fit(network, pixels, labels, settings, prepare, folder / "supervised.pt")
    outcome = Outcome()
    outcome.curves["train_error"] = curve
    outcome.metrics["last_train_error"] = curve[-1][1]
    wrong = _predict(network, pixels, prepare) != labels
    outcome.add_images("train_error", wrong, labels_sha256(labels, f"{train.source.name} {len(labels)}"))
    outcome.add_images(
        "test_top1", _predict(network, tested, prepare) == wanted, labels_sha256(wanted, test.source.name)
    )
    if isinstance(body, ResNet):
        with layer_responses(body) as stds, torch.no_grad():
            network.eval()(prepare.plain(tested[:256]))
        outcome.metrics["response_std"] = sum(stds) / len(stds)
        outcome.curves["response_std"] = [[float(i + 1), std] for i, std in enumerate(stds)]
    return outcome


def _begin(settings: Settings, images: Path | None) -> tuple[Any, ImageData]:
    torch.manual_seed(settings.seed)
    folders: dict[str, Any] = {"train_dir": str(images / "train"), "test_dir": str(images / "test")} if images else {}
    options: dict[str, Any] = {"stem": settings.stem, "width": settings.width, "shortcut": settings.shortcut}
    body = build_encoder(settings.encoder, image_size=settings.image_size, **options, zero_init=settings.zero_init)
    return body, ImageData(**folders, image_size=settings.image_size, batch_size=settings.batch_size, held_out=0)


def _all(loader: EvalLoader) -> tuple[Tensor, Tensor]:
    parts = list(loader)
    return torch.cat([images.cpu() for images, _ in parts]), torch.cat([labels.cpu() for _, labels in parts])


class _Prepare:
    """Bytes to what a network takes."""

    def __init__(self, mean: Any, std: Any, augment: SimCLRAugmentation | None, seed: int, device: str):
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.augment, self.seed, self.device = augment, seed, device

    def plain(self, pixels: Tensor) -> Tensor:
        return ((to_unit_range(pixels, channels=None) - self.mean) / self.std).to(self.device)

    def training(self, pixels: Tensor, index: Tensor, epoch: int) -> Tensor:
        if self.augment is not None:
            return self.augment.view(pixels, index, epoch, self.seed).to(self.device)
        x = self.plain(pixels).cpu()
        side = x.shape[-1]
        u = uniforms(self.seed, epoch, index, _CROP_VIEW, 4)
        pad = side // 8  # 4 of 32 pixels
        top, left = ((u[:, i] * (2 * pad + 1)).long().view(-1, 1, 1, 1) for i in (0, 1))
        padded = F.pad(x, (pad,) * 4)
        rows = top + torch.arange(side).view(1, 1, -1, 1)
        columns = left + torch.arange(side).view(1, 1, 1, -1)
        flipped = (u[:, 2] < 0.5).view(-1, 1, 1, 1)
        columns = torch.where(flipped, columns.flip(-1), columns)
        place = torch.arange(len(x)).view(-1, 1, 1, 1), torch.arange(x.shape[1]).view(1, -1, 1, 1)
        return padded[place[0], place[1], rows, columns].to(self.device)


def _fit(
    network: nn.Module, pixels: Tensor, labels: Tensor, settings: Settings, prepare: _Prepare, path: Path
) -> list[list[float]]:
    """Train; the training error, in percent, over each epoch's augmented images: (steps, error)."""
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    size = min(settings.batch_size, len(labels))
    per_epoch = len(labels) // size
    step, curve = 0, list[list[float]]()
    if path.is_file():
        kept = torch.load(path, weights_only=True, map_location=prepare.device)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        step, curve = kept["step"], kept["curve"]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(settings.seed, epoch, len(labels))
        for batch in order[: per_epoch * size].view(per_epoch, size):
            yield prepare.training(pixels[batch], batch, epoch), labels[batch].to(prepare.device)

    training = train_epochs(
        network,
        optimizer,
        batches,
        partial(rate, settings=settings),
        steps=settings.steps,
        per_epoch=per_epoch,
        step=step,
        hint=f"lower lr={settings.lr}",
    )
    for done in training:
        curve.append([float(done.step), 100 * done.wrong / done.seen])
        content = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        with written_whole(path) as file:
            torch.save({**content, "step": done.step, "curve": curve}, file)
    return curve


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step: a tenth while it warms up, and after half and three quarters of the steps each."""
    if step < settings.warmup_steps:
        return settings.lr / 10
    done = step / settings.steps
    return settings.lr * (0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0)


@torch.no_grad()
def _predict(network: nn.Module, pixels: Tensor, prepare: _Prepare) -> Tensor:
    network.eval()
    return torch.cat([network(prepare.plain(part)).argmax(1).cpu() for part in pixels.split(512)])


if __name__ == "__main__":
    run_program(main)
