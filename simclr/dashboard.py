"""What a dashboard shows beside curves: views, neighbours, a map of the features, how their cosines are distributed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from simclr import distributed
from simclr.callbacks import ViewGrid, view_grid
from simclr.contrast import tiles
from simclr.data import ImageData, TrainLoader
from simclr.eval import nearest
from simclr.eval.features import encode, frozen
from simclr.inputs import fit_to_size, for_display, normalize, to_unit_range
from simclr.loggers import Points, Shown, can_show, show
from simclr.report.pictures import as_picture, draw_map, draw_spectrum, neighbour_picture
from simclr.report.sample import Sample, choose_queries, tsne
from simclr.run_length import is_due, is_last
from simclr.seeding import epoch_order
from simclr.training.internals import optimizer_batches

_SEED = (
    20200213  # of the choice of images and of their views, which no run's seed may change: runs are compared by them
)
_AT_ONCE = 256  # images
_BINS = 64
_QUERIES, _NEIGHBOURS, _CELL = 8, 8, 64
_FEWEST_ON_MAP = 20
_THUMBNAIL = 32  # pixels


class Dashboard(Callback):
    """Pictures and histograms for TensorBoard and W&B, of a fixed choice of images: test images, else training images.

    - `views`: images and what the network sees of them, as training starts and whenever views change their size.
    - `neighbours`: fixed queries and the images nearest to them; of a labelled class in a frame if it is another.
    - `cosines/positive`, `cosines/negative`: histograms over pairs of projections, of the two views of an image and of
      two images; `features/spectrum`, of the eigenvalues of the features' covariance, as powers of ten of the largest.
    - At the end `map`, the images by t-SNE; `spectrum` beside that of the network before its first step; and `features`
      for TensorBoard's projector, with thumbnails.

    Measured before the first step, every n epochs and at the end, in eval mode and in float32; nothing that the run
    computes depends on it. Rank 0 writes. A dashboard that cannot be written ends no run.

    Args:
        every_n_epochs: how often; 0 for no pictures at all.
        images: how many, or fewer if there are fewer.
    """

    def __init__(self, every_n_epochs: int = 10, images: int = 400):
        if every_n_epochs < 0 or images < 2:
            raise ValueError(f"dashboard needs every_n_epochs >= 0 and images >= 2; got {every_n_epochs} and {images}.")
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.before: list[float] | None = None  # spectrum of the network before its first step
        self._sample: Sample | None = None
        self._shows = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether anything will be shown."""
        watched = self.every_n_epochs > 0 and not (trainer.barebones or trainer.fast_dev_run)
        self._shows = watched and isinstance(trainer.datamodule, ImageData) and can_show(trainer)
        self._sample = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the views, and the network that has not trained yet."""
        if self._shows and trainer.global_step == 0:
            self._on_rank_0(lambda: self._begin(trainer, pl_module))

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        shown = self._look(trainer.datamodule, module)
        loader = trainer.train_dataloader
        if isinstance(loader, TrainLoader):
            shown.pictures["views"] = ViewGrid(Path()).draw(module, loader, trainer)
        show(trainer.loggers, shown, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the views, where they have another size than in the epoch before."""
        epoch, loader = trainer.current_epoch, trainer.train_dataloader
        if not self._shows or epoch == 0 or not isinstance(loader, TrainLoader):
            return
        if pl_module.views.size(epoch) != pl_module.views.size(epoch - 1):
            self._on_rank_0(lambda: self._show_views(trainer, pl_module, loader))

    def _show_views(self, trainer: Trainer, module: LightningModule, loader: TrainLoader) -> None:
        epoch = trainer.current_epoch
        index = loader.sampler.global_batches(epoch, 1).flatten()[:10]
        picture = view_grid(module, loader.source.images(index), index, epochs=1, first=epoch)
        show(trainer.loggers, Shown(pictures={"views": picture}), _row(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what there is to see, if it is time."""
        if self._shows and is_due(trainer, self.every_n_epochs):
            last = is_last(trainer)
            self._on_rank_0(
                lambda: show(trainer.loggers, self._look(trainer.datamodule, pl_module, last), _row(trainer))
            )

    def _on_rank_0(self, work: Callable[[], Any]) -> None:
        """The others wait for as long as it takes."""
        distributed.from_rank_0(lambda: (work(), None)[1])

    def _look(self, data: ImageData, module: LightningModule, last: bool = False) -> Shown:
        """What the network as it stands makes of the images."""
        sample = self._images(data)
        h, z = self._features(module, sample)
        if not (h.isfinite().all() and z.isfinite().all()):  # ruined weights, of which training tells
            return Shown({}, {}, {})
        z1, z2 = F.normalize(z, dim=1).chunk(2)
        values = _spectrum(h)
        edges = torch.linspace(-1, 1, _BINS + 1)
        powers = (values / values[0].clamp_min(1e-30)).clamp_min(1e-12).log10()
        histograms = {
            "cosines/positive": (torch.histc((z1 * z2).sum(1).clamp(-1, 1), _BINS, -1, 1).long(), edges),
            "cosines/negative": (tiles.histogram(torch.cat((z1, z2)), 2, _BINS), edges),
            "features/spectrum": (torch.histc(powers, 48, -12, 0).long(), torch.linspace(-12, 0, 49)),
        }
        shown = Shown({}, histograms, {})
        sample = replace(sample, features=h)
        shown.pictures["neighbours"] = _neighbours(sample)
        if self.before is None and not last:
            self.before = values.tolist()
        if last:
            before = {} if self.before is None else {"before training": torch.tensor(self.before)}
            shown.pictures["spectrum"] = as_picture(draw_spectrum({**before, "at the end": values}))
            shown.points["features"] = _points(sample)
            if len(h) >= _FEWEST_ON_MAP:
                shown.pictures["map"] = as_picture(draw_map(tsne(h), sample.labels, sample.classes))
        return shown

    def _images(self, data: ImageData) -> Sample:
        """The images that are shown, read once; their features are still to come."""
        if self._sample is None:
            source = data.train if data.test is None else data.test
            assert source is not None  # set up
            index = epoch_order(_SEED, 0, len(source))[: self.images].sort().values
            pixels = torch.cat([source.images(part).cpu() for part in index.split(_AT_ONCE)])
            labels = None if source.labels is None else source.labels[index]
            self._sample = Sample(source.name, index, pixels, torch.empty(0), labels, source.classes, len(source))
        return self._sample

    def _features(self, module: LightningModule, sample: Sample) -> tuple[Tensor, Tensor]:
        """h (N, F) of the images as they are, and z (2 N, D) of view 1 of all of them, then of view 2; on the CPU."""
        encoder, *heads = module.networks
        with frozen(torch.nn.Sequential(encoder, *heads)), torch.autocast(module.device.type, enabled=False):
            h = torch.cat([encode(encoder, images) for images, _ in _plain(module, sample)])
            z = []
            for view in range(2):
                for images, index in _parts(module, sample):
                    x = encode(encoder, module.views.augment.view(images, index, 0, _SEED, view))
                    for head in heads:
                        x = head(x)
                    z.append(x.float())
        return h.cpu(), torch.cat(z).cpu()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the run's first process saw."""
        self.before = state_dict["before"]


def _row(trainer: Trainer) -> int:
    """The step of the row that Lightning logs of an epoch that ends, or has logged before one that begins."""
    return max(0, optimizer_batches(trainer) - 1)


def _parts(module: LightningModule, sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
    """Some images at a time, on the device of the network, and their numbers."""
    for pixels, index in zip(sample.pixels.split(_AT_ONCE), sample.index.split(_AT_ONCE), strict=True):
        yield pixels.to(module.device), index


def _plain(module: LightningModule, sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
    """Likewise, as an evaluation prepares them."""
    encoder: Any = module.encoder
    for images, index in _parts(module, sample):
        square = fit_to_size(to_unit_range(images, len(encoder.mean)), encoder.image_size)
        yield normalize(square, encoder.mean, encoder.std), index


def _spectrum(h: Tensor) -> Tensor:
    """The eigenvalues of the covariance of features (N, F), from the largest: min(N, F) of them, never negative."""
    x = h.double() - h.double().mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).float() / max(1, len(x) - 1)


def _neighbours(sample: Sample) -> Any:
    """Queries and the nearest of the other images."""
    places = choose_queries(sample, _QUERIES)
    k = min(_NEIGHBOURS, len(sample.index) - 1)
    near = nearest(sample.features[places], sample.features, k + 1)  # (n, k + 1)
    own = near == places[:, None]
    own[:, -1] |= ~own.any(1)  # of several equal images others may stand before it
    near = near[~own].view(len(places), k)
    wrong = None if sample.labels is None else sample.labels[near] != sample.labels[places][:, None]
    title = f"the nearest of {len(sample.index):,} images of {sample.name}"
    title += "" if wrong is None else "; framed: of another class"
    return neighbour_picture(sample.pixels[places], sample.pixels[near], wrong, cell=_CELL, title=title)


def _points(sample: Sample) -> Points:
    names = [str(number) for number in sample.index.tolist()]
    if sample.labels is not None:
        classes = sample.classes
        names = [classes[label] if classes else str(label) for label in sample.labels.tolist()]
    thumbnails = F.interpolate(for_display(sample.pixels).float() / 255, (_THUMBNAIL, _THUMBNAIL), mode="area")
    return Points(sample.features, names, thumbnails)
