"""Images to views: the SimCLR augmentation (Chen et al. 2020, appendix A) as a pure function.

A view is what is left of an image after a random crop, a flip and changes of its colors. SimCLR makes two of each image
and learns an encoder that tells, among the views of many images, which two are of the same one.

`SimCLRAugmentation.draw` draws what happens to each image, a table on the CPU that depends on (seed, epoch, image
index, view number) alone; `view` makes the views from it, by a Kornia pipeline or compiled functions (`simclr/views/`).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from kornia.augmentation import AugmentationBase2D, AugmentationSequential, Normalize
from kornia.augmentation.container.params import ParamItem
from torch import Tensor, nn

from simclr.precision import in_float32
from simclr.seeding import uniforms, view_stream
from simclr.views import operations
from simclr.views.checks import refuse_bad_arguments, refuse_bad_batch
from simclr.views.compiled import compiled_views
from simclr.views.drawing import CROP_TRIES, crop_boxes

_CHUNK_VALUES = 2**19  # A CPU makes views in parts of about 2 MB: what one operation leaves is in cache for the next.
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4): of brightness, contrast, saturation, hue

LARGEST_SMALL_VIEW = 64  # pixels
# What is done to views where nothing is said: up to LARGEST_SMALL_VIEW, and above.
BY_SIZE: tuple[dict[str, Any], ...] = (
    {"strength": 0.5, "crop_scale": (0.2, 1.0), "blur_prob": 0.0},
    {"strength": 1.0, "crop_scale": (0.08, 1.0), "blur_prob": 0.5},
)


class SimCLRAugmentation(nn.Module):
    """Random views of each image, on the images' device; `__init__`, with every setting, stands last.

    A view is a pure function of (seed, epoch, image index, view number): it does not depend on the batch around the
    image, on the number of devices or workers, or on any random number drawn elsewhere. On a CPU that holds to the last
    bit, for either way of `compile_views`; on other devices the parameters are the same bits (they are drawn on the
    CPU) and the pixels agree to rounding.

    Each operation is applied to an image with its own probability. An image's random numbers are the same whatever is
    switched on, so two configurations differ in nothing but what they say. Resizing is bilinear (antialiased where a
    crop shrinks), where the paper's code, google-research/simclr, is bicubic.
    """

    def draw(
        self, index: Tensor, height: int, width: int, epoch: int = 0, seed: int = 0, view: int = 0
    ) -> dict[str, Tensor]:
        """What happens to each image in one view: a pure function, drawn on the CPU so that every device agrees.

        Args:
            index: (N,) integer, the images' numbers in the data set.
            height, width: of the images, in pixels.
            epoch, seed, view: as for `view`.
        Returns:
            One row per image, on the CPU. Whether: "flip", "rotation", "jitter", "gray", "blur", "sobel", "noise",
            "cutout", "solarize" (N,) bool. How: "box" (N, 4) top, left, height, width in source pixels; "quarter_turns"
            (N,) counter-clockwise; "order" (N, 4), a permutation of brightness 0, contrast 1, saturation 2, hue 3;
            "brightness", "contrast", "saturation" (N,) factors; "hue" (N,) in turns; "sigma" (N,) in pixels;
            "noise_stream" (N, 2); "hole" (N, 4) top, left, bottom, right in view pixels.
        """
        index = index.cpu()
        if (index < 0).any():
            raise ValueError(f"index={index.min().item()} is negative. Pass the images' numbers in the data set.")
        # One column of numbers per use, at a fixed place, in double so that no rounding decides between two boxes.
        u = uniforms(seed, epoch, index, view, 2 * CROP_TRIES + 20).double().T.contiguous()  # (40, N)
        # The last effect's gate is apart: numbers are only ever appended, so that views keep their bits.
        box, gates, values, last_gate = u.split((2 * CROP_TRIES + 2, 8, 9, 1))
        gates = torch.cat((gates, last_gate))  # (9, N), one row for each name in `probs`
        table = {  # whether: an effect of probability p happens where a number is below p
            name: gate < by_view[min(view, len(by_view) - 1)]
            for gate, (name, by_view) in zip(gates, self.probs.items(), strict=True)
        }
        change = 0.8 * self.strength  # of brightness, contrast and saturation: factors from 1 - change to 1 + change
        low, high = max(0.0, 1 - change), 1 + change
        side = round(self.cutout_size * self.image_size)
        hole_start = (values[7:9] * self.image_size).long() - side // 2  # (2, N): top, left
        return table | {
            "box": crop_boxes(box, height, width, self.crop_scale, self.crop_ratio),
            "order": _ORDERS[(values[0] * len(_ORDERS)).long()],
            "brightness": (low + (high - low) * values[1]).float(),
            "contrast": (low + (high - low) * values[2]).float(),
            "saturation": (low + (high - low) * values[3]).float() if self.channels == 3 else torch.ones(len(index)),
            "hue": (0.2 * self.strength * (2 * values[4] - 1) * (self.channels == 3)).float(),
            "sigma": (self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * values[5]).float(),
            "quarter_turns": (4 * values[6]).long(),
            "hole": torch.cat((hole_start, hole_start + side)).T,
            "noise_stream": view_stream(seed, epoch, index, view),
        }

    def _operations(self) -> list[AugmentationBase2D]:
        """The pipeline, in the order it runs; what never happens is left out."""
        # The paper's kernel is a tenth of the side, made odd: 23 at 224 pixels, 3 at 32.
        kernel_size = max(3, 2 * (self.image_size // 20) + 1)
        chosen = {
            "rotation": operations.Rotate(),
            "jitter": operations.ColorJitter(strength=self.strength),
            "gray": operations.Grayscale(),
            "blur": operations.GaussianBlur(kernel_size=kernel_size, sigma=self.blur_sigma),
            "solarize": operations.Solarize(threshold=self.solarize_threshold),
            "sobel": operations.Sobel(),
            "noise": operations.GaussianNoise(std=self.noise_std),
            "cutout": operations.Cutout(size=self.cutout_size, fill=self.mean),
        }
        happens = {name: any(by_view) for name, by_view in self.probs.items()}
        happens["jitter"] &= self.strength > 0
        return [
            operations.ResizedCrop(self.image_size),  # and flip
            *(operation for name, operation in chosen.items() if happens[name]),
            Normalize(self.mean, self.std),
        ]

    @torch.no_grad()
    def view(self, images: Tensor, index: Tensor, epoch: int = 0, seed: int = 0, view: int = 0) -> Tensor:
        """One view of each image.

        Args:
            images: (N, C, H, W), uint8, uint16, or floating point in [0, 1], on any device.
            index: (N,) integer, the images' numbers in the data set, each >= 0. Keep it on the CPU where a device must
                never be waited for; elsewhere it is copied there, once a view.
            epoch: the epoch, in [0, 2^32).
            seed: the run's seed, in [0, 2^64).
            view: the view's number, in [0, 2^16).
        Returns:
            (N, C, image_size, image_size) float32, normalised, whatever the autocast or the module's own dtype.
        Raises:
            ValueError: if the images or the index are not of these shapes and types, or a number is out of its range.
        """
        refuse_bad_batch(images, index, self.channels)
        compiles = images.device.type == "cuda" if self.compile_views is None else self.compile_views
        on_cpu, size = images.device.type == "cpu", self.image_size
        part = _CHUNK_VALUES / (self.channels * size**2) if on_cpu else max(1, len(images))  # images at a time
        with in_float32(images.device.type):
            images = images.float() / (2**16 - 1) if images.dtype == torch.uint16 else images
            table = self.draw(index, images.shape[2], images.shape[3], epoch, seed, view)
            if compiles and len(images):
                steps = list(self.pipeline.children())
                views = compiled_views(images, table, steps, size, part, self.mean, self.std)
                if views is not None:  # None: compiling failed, a warning has said so
                    return views
            views = images.new_empty(len(images), self.channels, size, size, dtype=torch.float32)
            for start in range(0, len(images), max(1, int(part))):
                rows = slice(start, start + max(1, int(part)))
                views[rows] = self._replay(images[rows], {name: values[rows] for name, values in table.items()})
            return views

    def _replay(self, images: Tensor, table: dict[str, Tensor]) -> Tensor:
        """The Kornia pipeline with the parameters of the table, of which each operation reads its `columns`."""
        steps = self.pipeline.named_children()
        params = [ParamItem(name, {c: table[c] for c in getattr(step, "columns", ())}) for name, step in steps]
        return self.pipeline(images, params=params)

    def forward(self, images: Tensor, index: Tensor, epoch: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Views 0 and 1 of each image; see `view`."""
        return self.view(images, index, epoch, seed, 0), self.view(images, index, epoch, seed, 1)

    def __init__(
        self,
        image_size: int,
        *,
        strength: float | None = None,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float | list[float] = 0.5,
        jitter_prob: float | list[float] = 0.8,
        gray_prob: float | list[float] = 0.2,
        blur_prob: float | list[float] | None = None,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        rotation_prob: float | list[float] = 0.0,
        solarize_prob: float | list[float] = 0.0,
        solarize_threshold: float = 0.5,
        cutout_prob: float | list[float] = 0.0,
        cutout_size: float = 0.5,
        noise_prob: float | list[float] = 0.0,
        noise_std: float = 0.1,
        sobel_prob: float | list[float] = 0.0,
        augment_second_view: bool = True,
        channels: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        compile_views: bool | None = None,
    ):
        """A probability is one number for all views, or a list with one for each; views beyond it take its last.

        Args:
            image_size: side of the views, in pixels.
            strength: of the color jitter, s in the paper: brightness, contrast and saturation are changed by up to 0.8
                s, the hue by up to 0.2 s of a full turn, in an order drawn for each image. If not given: 0.5 up to 64
                px, 1 above, the paper's for CIFAR-10 (appendix B.9) and ImageNet.
            crop_scale: smallest and largest part of the image's area that a crop takes. If not given: 0.2 to 1 up to 64
                px, 0.08 to 1, the paper's, above.
            crop_ratio: smallest and largest ratio of a crop's width to its height, drawn evenly in its logarithm.
            flip_prob: probability of mirroring left and right.
            jitter_prob: probability of color jitter.
            gray_prob: probability of dropping the color; 0 whatever is given for images that are not RGB.
            blur_prob: probability of Gaussian blur, with a kernel of a tenth of `image_size`. If not given: 0 up to 64
                px, 0.5 above, as the paper.
            blur_sigma: smallest and largest standard deviation of the blur, in pixels.
            rotation_prob: probability of rotation, by 0, 90, 180 or 270 degrees with equal chances.
            solarize_prob: probability of inverting the bright values (BYOL: 0 for view 1, 0.2 for view 2).
            solarize_threshold: the value from which on they are inverted, for pixels in [0, 1].
            cutout_prob: probability of covering a square with the mean color (DeVries & Taylor 2017). Its centre is
                anywhere in the view, so that part of it may lie outside.
            cutout_size: side of that square, as a part of `image_size`.
            noise_prob: probability of adding Gaussian noise to every pixel.
            noise_std: standard deviation of that noise, for pixels in [0, 1].
            sobel_prob: probability of replacing each channel by its gradient's magnitude (Sobel filter).
            augment_second_view: False leaves every view but the first at crop and resize, as in Figure 5 of the paper.
            channels: of an image. 3 are RGB. All others have no color: the jitter changes brightness and contrast
                alone, the contrast about the mean of all channels, and solarize is refused but for one.
            mean: of each channel, for pixels in [0, 1]; subtracted from the views. If not given: 0.5 each.
            std: of each channel, for pixels in [0, 1]; divides the views. If not given: 0.25 each.
            compile_views: make the views by functions that torch.compile builds at the first batch, in about a minute,
                in place of Kornia's operations: the same views up to rounding, several times as fast. None: on CUDA
                only. A CPU needs a C++ compiler. Where compiling fails for a size of images or views, a warning says so
                and Kornia's operations make these.
        Raises:
            ValueError: if an argument is out of its range, with every such argument listed.
        """
        super().__init__()
        usual = BY_SIZE[image_size > LARGEST_SMALL_VIEW]
        self.image_size, self.strength = image_size, usual["strength"] if strength is None else strength
        self.crop_scale = tuple(usual["crop_scale"] if crop_scale is None else crop_scale)
        self.blur_prob = usual["blur_prob"] if blur_prob is None else blur_prob
        self.crop_ratio, self.blur_sigma = tuple(crop_ratio), tuple(blur_sigma)
        # The probabilities of each effect by view, in the order of their columns among the random numbers.
        self.channels, self.gray_prob = channels, gray_prob if channels == 3 else 0.0
        probs = {"flip": flip_prob, "rotation": rotation_prob, "jitter": jitter_prob, "gray": self.gray_prob}
        probs |= {"blur": self.blur_prob, "sobel": sobel_prob, "noise": noise_prob, "cutout": cutout_prob}
        probs |= {"solarize": solarize_prob}
        self.probs = {name: tuple(p) if isinstance(p, Sequence) else (p,) for name, p in probs.items()}
        if not augment_second_view:
            self.probs = {name: (*by_view[:1], 0.0) for name, by_view in self.probs.items()}
        self.solarize_threshold, self.cutout_size, self.noise_std = solarize_threshold, cutout_size, noise_std
        self.mean = (0.5,) * channels if mean is None else tuple(mean)
        self.std, self.compile_views = (0.25,) * channels if std is None else tuple(std), compile_views
        refuse_bad_arguments(self)
        self.pipeline = AugmentationSequential(*self._operations(), data_keys=["input"])

    def extra_repr(self) -> str:
        on = {name: by_view for name, by_view in self.probs.items() if any(by_view)}
        return f"image_size={self.image_size}, strength={self.strength}, probabilities by view: {on}"
