"""How image files are read: the settings that decide which pixels they give."""

from dataclasses import dataclass

import torch

DEEPEST = 2**16 - 1  # the largest sample of 16 bits


@dataclass(frozen=True)
class ReadingRules:
    """How image files are read.

    Attributes:
        max_pixels: a picture of more is refused before it is decoded; None for no limit. The default is what Pillow
            refuses too, twice the size of which it warns.
        sixteen_bit_max: which value of 16-bit samples is white, 1 to 65 535. Held in 8 bits value v becomes
            v * 256 / (this + 1), held in 16 bits v * 65535 / this, rounded.
        timeout_s: seconds that reading one file may take; None for no limit.
        channels: of an image, 1 or more. An image of another number of them is refused, but for gray where 3 are asked
            for, which is repeated, and for alpha, which is dropped where the others are as many as asked for.
        bits: that samples are held in, 8 or 16. Samples of 8 bits are held in 16 without loss.
    """

    max_pixels: int | None = 178_956_970
    sixteen_bit_max: int = DEEPEST
    timeout_s: float | None = None
    channels: int = 3
    bits: int = 8

    @property
    def dtype(self) -> torch.dtype:
        """Of the images as they are held: uint8, or uint16, where 65 535 is white."""
        return torch.uint8 if self.bits == 8 else torch.uint16

    @property
    def pixel_bytes(self) -> int:
        """Bytes that a pixel takes as it is held."""
        return self.channels * self.bits // 8

    @property
    def plain(self) -> bool:
        """Whether images are read as 8-bit RGB, which every picture can be brought to."""
        return self.channels == 3 and self.bits == 8


RULES = ReadingRules()
