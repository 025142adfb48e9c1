"""The samples of an image as a run holds them: so many channels, in so many bits."""

import torch
from torch import Tensor

from simclr.data.kinds import Refused
from simclr.data.rules import DEEPEST, ReadingRules


def refuse_other_channels(own: int, alpha: bool, rules: ReadingRules, what: str = "an image") -> None:
    """Raise a `Refused` for an image whose channels cannot be those that are asked for.

    Args:
        own: its channels, alpha included.
        alpha: whether the last of them is.
        rules: what is asked for.
        what: the image, for people.
    """
    colours = own - alpha
    if rules.channels in (own, colours) or (rules.channels == 3 and colours == 1):
        return
    many = "1 channel" if own == 1 else f"{own} channels"
    last = ", the last of them alpha," if alpha else ""
    todo = "convert it to gray" if rules.channels == 1 and colours == 3 else "convert it"
    raise Refused(
        f"{what} of {many}{last} where data.channels={rules.channels}: {todo}, or train on such images with "
        f"--data.channels {colours}"
    )


def fitted(samples: Tensor, alpha: bool, rules: ReadingRules) -> Tensor:
    """Samples (C, H, W) as the channels that are asked for: as they are, without alpha, or gray three times.

    Args:
        samples: of an image, all of its channels.
        alpha: whether the last of them is.
        rules: what is asked for.
    Raises:
        Refused: if they cannot be.
    """
    refuse_other_channels(len(samples), alpha, rules)
    if len(samples) == rules.channels:
        return samples
    colours = samples[: len(samples) - alpha]
    return colours if len(colours) == rules.channels else colours.expand(rules.channels, -1, -1)


def as_held(samples: Tensor, rules: ReadingRules) -> Tensor:
    """Samples in the bits that they are held in, their white brought to white; see `ReadingRules.sixteen_bit_max`.

    Args:
        samples: uint8, or int32 or uint16 where a sample has 16 bits.
        rules: how images are held.
    Returns:
        uint8 or uint16, contiguous unless they are left as they came.
    Raises:
        Refused: for a sample above the white one, which would have been cut off.
    """
    if samples.dtype == torch.uint8:
        return samples if rules.bits == 8 else (samples.to(torch.int32) * 257).to(torch.uint16)
    white, samples = rules.sixteen_bit_max, samples.to(torch.int32)
    if (peak := int(samples.max())) > white:
        raise Refused(f"16-bit values up to {peak}, above data.sixteen_bit_max={white}: raise it")
    if rules.bits == 8:
        return (samples * 256 // (white + 1)).to(torch.uint8).contiguous()
    if white == DEEPEST:
        return samples.to(torch.uint16).contiguous()
    return ((2 * DEEPEST * samples.long() + white) // (2 * white)).to(torch.uint16).contiguous()  # rounded
