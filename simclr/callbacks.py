"""What watches a pretraining run: a picture of the views, a line per epoch. None of it changes the run."""

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from simclr.data import GlobalBatchSampler, TrainLoader
from simclr.files import say_unwritten, written_whole
from simclr.inputs import for_display, to_unit_range
from simclr.online_accuracy import METRIC, PROBE, OnlineKNN, OnlineProbe
from simclr.online_quality import RETRIEVAL, OnlineQuality
from simclr.paths import expanded
from simclr.run_length import RunLength, run_length

# What the line of an epoch shows where it was measured: who measures, its name there, the metric.
_SHOWN: tuple[tuple[type[Callback], str, str], ...] = (
    (OnlineKNN, "kNN", METRIC),
    (OnlineProbe, "probe", PROBE),
    (OnlineQuality, "retrieval", RETRIEVAL),
)


_LABEL = 54  # pixels that three lines of a label take


class ViewGrid(Callback):
    """Writes `views.png` when training starts: images of the first batch and exactly the views the network sees.

    Shown are only epochs that the run has by its settings, and images that each of them trains on: an epoch leaves out
    those that make no whole batch. Does nothing for batches that are not `simclr.data`'s.

    Args:
        run_dir: the folder to write to.
        images: how many images, at most.
        epochs: how many epochs' views of each, at most.
    """

    def __init__(self, run_dir: Path, images: int = 10, epochs: int = 3):
        self.run_dir = expanded(run_dir)
        self.images = images
        self.epochs = epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw on rank 0, once a run."""
        path, loader = self.run_dir / "views.png", trainer.train_dataloader
        if not trainer.is_global_zero or not isinstance(loader, TrainLoader) or path.exists():
            return
        picture = self.draw(pl_module, loader, trainer)
        try:
            with written_whole(path) as file:
                picture.save(file, "PNG")
        except OSError as error:
            say_unwritten(path, error, "the run goes on without the picture")

    def draw(self, module: LightningModule, loader: TrainLoader, trainer: Trainer) -> Image.Image:
        """The picture, of a run's first epochs."""
        index, epochs = self._choose(loader.sampler, run_length(len(loader), trainer))
        return view_grid(module, loader.source.images(index), index, epochs=epochs)

    def _choose(self, sampler: GlobalBatchSampler, length: RunLength) -> tuple[Tensor, int]:
        """Numbers of images, and for how many epochs to show them: fewer where none are trained on in all."""
        trained = [sampler.global_batches(epoch, length.batches_of(epoch)).flatten() for epoch in range(self.epochs)]
        index, epochs = trained[0][: self.images], 1
        for number in range(2, 1 + self.epochs):
            common = trained[0][torch.stack([torch.isin(trained[0], other) for other in trained[:number]]).all(0)]
            if len(common) < min(self.images, len(trained[0])):
                break
            index, epochs = common[: self.images], number
        return index, epochs


def view_grid(module: LightningModule, images: Tensor, index: Tensor, epochs: int = 3, first: int = 0) -> Image.Image:
    """A picture: one column an image; the image on top, below it every view of each epoch, at the size of that epoch.

    A pixel of a view is a square of whole pixels of the picture, so views are shown as they are, not resized.

    Args:
        module: a method, which says how many views an epoch has, and of what size.
        images: (N, C, H, W) uint8 or uint16.
        index: (N,), the images' numbers in the data set.
        epochs: how many epochs to show.
        first: the first of them, from 0.
    """
    device, hparams = module.device, module.hparams
    mean, std = (torch.tensor(hparams[name]).view(-1, 1, 1) for name in ("mean", "std"))
    whole = torch.nn.functional.interpolate(to_unit_range(images.cpu(), channels=None), hparams.image_size, mode="area")
    zoom = max(1, 96 // hparams.image_size)
    groups = [[("image", whole, zoom)]]
    for epoch in range(first, first + epochs):
        group = []
        for view in range(module.views.count):
            augment, small = module.views.augment_of(epoch, view), view >= module.views.large
            side = augment.image_size
            tiles = augment.view(images.to(device), index.to(device), epoch, hparams.seed, view)
            size = f"\n{side} px" if small or hparams.get("start_size") is not None else ""
            # Of a progressive resolution as large as they go in; a small crop as small as it is.
            times = zoom if small else max(1, hparams.image_size * zoom // side)
            name = f"small {view + 1 - module.views.large}" if small else f"view {view + 1}"
            group.append((f"epoch {epoch + 1}\n{name}{size}", (tiles.cpu() * std + mean).clamp(0, 1), times))
        groups.append(group)
    return _draw_rows(groups, cell=hparams.image_size * zoom)


def _draw_rows(groups: list[list[tuple[str, Tensor, int]]], cell: int) -> Image.Image:
    """Rows of (label, (N, C, S, S) in [0, 1], zoom), one below the other, each image in the middle of its cell."""
    margin, gap, air = 72, 2, 8  # air above each group
    columns = len(groups[0][0][1])
    height = sum(_tall(*row[1:], cell) + gap for group in groups for row in group) + (len(groups) - 1) * air + gap
    picture = Image.new("RGB", (margin + columns * (cell + gap) + gap, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    y = 0
    for number, group in enumerate(groups):
        y += air if number else 0
        for label, tiles, zoom in group:
            side, tall = tiles.shape[-1] * zoom, _tall(tiles, zoom, cell)
            left, top = (cell - side) // 2, (tall - side) // 2
            for column, tile in enumerate(for_display(tiles).permute(0, 2, 3, 1).contiguous().numpy()):
                shown = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
                picture.paste(shown, (margin + column * (cell + gap) + left, y + top))
            draw.multiline_text((margin - 8, y + tall / 2), label, "black", font, anchor="rm", align="right", spacing=3)
            y += tall + gap
    return picture


def _tall(tiles: Tensor, zoom: int, cell: int) -> int:
    """The height of a row: a whole cell, but for tiles that are shown smaller than they could be."""
    side = tiles.shape[-1]
    return cell if zoom == max(1, cell // side) else max(side * zoom, _LABEL)


class EpochLines(Callback):
    """Prints one line per epoch: loss, seconds, and what was measured by those that stand before it in the list."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: a run continued in the middle of an epoch does not start that epoch."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        found = ""
        for kind, name, metric in _SHOWN:
            # callback_metrics keeps what earlier epochs have measured.
            if any(c.measured_epoch == trainer.current_epoch for c in trainer.callbacks if isinstance(c, kind)):
                found += f"  {name} {100 * trainer.callback_metrics[metric].item():5.1f} %"
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        epoch = f"{trainer.current_epoch + 1:>{max(1, len(last) - 1)}}{last}"
        line = f"epoch {epoch}  loss {pl_module.step_log.mean():.4f}  {seconds:5.1f} s{found}"
        print_line(trainer, line)


def print_line(trainer: Trainer, line: str) -> None:
    """Print above the progress bar, if there is one."""
    bar = trainer.progress_bar_callback
    bar.print(line) if bar is not None else print(line, flush=True)
