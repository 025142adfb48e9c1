"""The views of an epoch: as many and as large as the settings say."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simclr.augment import SimCLRAugmentation


class EpochViews:
    """Makes the views of a batch, a pure function of (seed, epoch, image index, view number): again, the same.

    Args:
        augment: the augmentation at full size.
        settings: of the method, all of the augmentation's among them; `views`, 2 if absent, of each image; `seed`;
            `start_size` and `grow_epochs`, for a progressive resolution.
    """

    def __init__(self, augment: SimCLRAugmentation, settings: Mapping[str, Any]):
        self.augment, self.settings = augment, settings
        self._growing: SimCLRAugmentation | None = None  # of the epochs while views grow

    @property
    def count(self) -> int:
        """Views of each image."""
        return self.settings.get("views", 2)

    def make(self, images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """All views of a batch.

        Args:
            images: (n, C, H, W), uint8, uint16 or float in [0, 1], on the device that makes the views.
            index: (n,) integer on the CPU, the images' numbers in the data set.
            epoch: from 0.
        Returns:
            For each view (n, C, S, S) float32, normalised.
        """
        augment, seed = self.augment_of(epoch), self.settings["seed"]
        return tuple(augment.view(images, index, epoch, seed, view) for view in range(self.count))

    def size(self, epoch: int) -> int:
        """The side of the views of an epoch, in pixels: image_size, or less while a progressive resolution grows."""
        start, end = self.settings.get("start_size"), self.settings["image_size"]
        epochs = self.settings.get("grow_epochs", 0)
        if start is None or epoch >= epochs:
            return end
        step = 32 if end >= 128 else 4
        return min(end, start + math.ceil((end - start) / step) * epoch // epochs * step)

    def augment_of(self, epoch: int) -> SimCLRAugmentation:
        """The augmentation of an epoch, at its resolution."""
        size = self.size(epoch)
        if size == self.augment.image_size:
            return self.augment
        if self._growing is None or size != self._growing.image_size:
            settings = {name: self.settings[name] for name in inspect.signature(SimCLRAugmentation).parameters}
            self._growing = SimCLRAugmentation(**{**settings, "image_size": size})
        return self._growing
