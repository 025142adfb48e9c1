"""Images of 16 bits: whether a folder holds some, and whether they use so little of their range that they are black."""

import os

from simclr.data.decode import DEEPEST, ReadingRules, own_of, sixteen_bit_peak
from simclr.data.fingerprint import sampled
from simclr.data.sources import Folder
from simclr.paths import stored

_LOW = 2**14  # a maximum below this leaves less than a quarter of 255


def bits_of(folder: Folder) -> int:
    """The bits that the samples of a folder's images are held in where none are asked for, 8 or 16.

    Of files chosen by their names, 64 at most, the headers are read: 16 if one of them has more than 8.
    """
    for i in sampled(stored(folder.root), folder.paths):
        try:
            with open(folder.paths[i], "rb") as file:
                own = own_of(file.read())
        except (OSError, ValueError):
            continue  # said by who reads all of them
        if own is not None and own.bits > 8:
            return 16
    return 8


def low_range(folder: Folder, rules: ReadingRules) -> str | None:
    """What to know of a folder whose 16-bit images stay low, and the setting for them; None for other folders.

    Of files chosen by their names, 64 at most, those of 16 bits are decoded: what is said depends on the folder alone.
    """
    peaks = []
    for i in sampled(stored(folder.root), folder.paths):
        try:
            with open(folder.paths[i], "rb") as file:
                peaks.append(sixteen_bit_peak(file.read(), rules))
        except (OSError, ValueError):
            continue  # said by who reads all of them
    found = [peak for peak in peaks if peak is not None]
    if not found:
        return None
    return low_range_text(max(found), f"the 16-bit images of {os.fspath(folder.root)} ({len(found)} looked at)")


def low_range_text(peak: int, images: str) -> str | None:
    """The sentence about images whose largest 16-bit sample is `peak`; None if that is not low."""
    if peak >= _LOW:
        return None
    whole = 2 ** max(1, peak.bit_length()) - 1
    return (
        f"{images} reach {peak} of {DEEPEST}, and so {peak >> 8} of 255: nearly black. If {whole} is white in them: "
        f"--data.sixteen_bit_max {whole}."
    )
