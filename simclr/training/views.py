"""The views of an epoch: as many and as large as the settings say."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simclr.augment import SimCLRAugmentation

SMALL_CROP_SCALE = (0.05, 0.2)  # of the image's area


def small_crops(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of small crops with what was left open: half the side, a twentieth to a fifth of the area.

    Args:
        settings: of a method that has `small_crops`.
    """
    if not settings["small_crops"]:
        return {"small_crop_size": None, "small_crop_scale": None}
    size, scale = settings.get("small_crop_size"), settings.get("small_crop_scale")
    return {
        "small_crop_size": max(1, settings["image_size"] // 2) if size is None else size,
        "small_crop_scale": SMALL_CROP_SCALE if scale is None else scale,
    }


class EpochViews:
    """Makes the views of a batch, a pure function of (seed, epoch, image index, view number): again, the same.

    Args:
        augment: the augmentation at full size.
        settings: of the method, all of the augmentation's among them; `views`, 2 if absent, of each image; `seed`;
            `start_size` and `grow_epochs`, for a progressive resolution; `small_crops`, which follow the views, with
            `small_crop_size` and `small_crop_scale`.
    """

    def __init__(self, augment: SimCLRAugmentation, settings: Mapping[str, Any]):
        self.augment, self.settings = augment, settings
        self._growing: SimCLRAugmentation | None = None  # of the epochs while views grow
        self._small = self._small_augment() if self.small else None

    @property
    def large(self) -> int:
        """Views of each image at full size."""
        return self.settings.get("views", 2)

    @property
    def small(self) -> int:
        """Small crops of each image."""
        return self.settings.get("small_crops") or 0

    @property
    def count(self) -> int:
        """Views of each image, small crops among them."""
        return self.large + self.small

    def groups(self, epoch: int | None = None) -> list[tuple[int, int]]:
        """The views of each image that go through the network together: how many, and their side in pixels.

        Args:
            epoch: from 0; at full size if None.
        """
        side = self.settings["image_size"] if epoch is None else self.size(epoch)
        small = [(self.small, self.settings["small_crop_size"])] if self.small else []
        return [(self.large, side), *small]

    def pixels(self, epoch: int | None = None) -> int:
        """Of all views of an image; see `groups`."""
        return sum(count * side**2 for count, side in self.groups(epoch))

    def work(self, epochs: float) -> float:
        """How many epochs of the first one's size have as many pixels as the first `epochs` have: more if views grow.

        The last epoch counts for the part of it that is asked for.
        """
        if self.settings.get("start_size") is None:
            return epochs
        whole = int(epochs)
        growing = min(whole, self.settings["grow_epochs"])
        done = sum(map(self.pixels, range(growing))) + (whole - growing) * self.pixels()
        return (done + (epochs - whole) * self.pixels(whole)) / self.pixels(0)

    def make(self, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """All views of a batch.

        Args:
            images: (n, C, H, W), uint8, uint16 or float in [0, 1], on the device that makes the views.
            index: (n,) integer on the CPU, the images' numbers in the data set.
            epoch: from 0.
        Returns:
            For each view (n, C, S, S) float32, normalised; S of the small crops, which come last, is their own.
        """
        seed = self.settings["seed"]
        return tuple(self.augment_of(epoch, v).view(images, index, epoch, seed, v) for v in range(self.count))

    def size(self, epoch: int) -> int:
        """The side of the views of an epoch, in pixels: image_size, or less while a progressive resolution grows."""
        start, end = self.settings.get("start_size"), self.settings["image_size"]
        epochs = self.settings.get("grow_epochs", 0)
        if start is None or epoch >= epochs:
            return end
        step = 32 if end >= 128 else 4
        return min(end, start + math.ceil((end - start) / step) * epoch // epochs * step)

    def augment_of(self, epoch: int, view: int = 0) -> SimCLRAugmentation:
        """The augmentation of an epoch, at its resolution; of a small crop, by its number among the views, its own."""
        if view >= self.large:
            if self._small is None or self._small.compile_views != self.augment.compile_views:
                self._small = self._small_augment()  # settled since
            return self._small
        size = self.size(epoch)
        if size == self.augment.image_size:
            return self.augment
        if self._growing is None or size != self._growing.image_size:
            self._growing = self._like(image_size=size)
        return self._growing

    def _small_augment(self) -> SimCLRAugmentation:
        size, scale = self.settings["small_crop_size"], self.settings["small_crop_scale"]
        return self._like(image_size=size, crop_scale=scale, compile_views=self.augment.compile_views)

    def _like(self, **otherwise: Any) -> SimCLRAugmentation:
        settings = {name: self.settings[name] for name in inspect.signature(SimCLRAugmentation).parameters}
        return SimCLRAugmentation(**{**settings, **otherwise})
