"""Decoded images in one file that later runs map into memory: found by what determines its bytes, never half-written.

The file is plain .npy, (N, C, S, S) uint8 or uint16. Its name ends in a hash of the files' relative paths, sizes and
times of change, of S, of the code that decodes, and of the channels and what it makes of 16 bits. Sizes and times, as
`make` and `rsync` compare them, because hashing the content would read the whole folder at every start, which is what
the cache is there to avoid. So a file that is replaced by another of the same size and the same time of change to the
nanosecond is not noticed; a copy of the folder with new times is decoded again, which costs time only.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from simclr.data.decode import RULES, ReadingRules, Unread, decoder, refuse_unreadable, try_images
from simclr.files import remove_abandoned, written_whole
from simclr.paths import expanded, shown

_NUMPY: dict[int, np.dtype[Any]] = {8: np.dtype("uint8"), 16: np.dtype("<u2")}  # by bits of a sample
_BLOCK = 256e6  # bytes decoded at a time: enough files to keep every thread busy, little beside a model


def map_decoded(
    paths: Sequence[str],
    fingerprint: str,
    side: int,
    cache_dir: str,
    threads: int = 1,
    name: str = "images",
    rules: ReadingRules = RULES,
) -> Tensor:
    """The images of these files, decoded once and mapped into memory from then on.

    A build that is interrupted leaves nothing that is read, and what it leaves is removed by the next one. Of several
    processes that ask at once one builds and the others wait; if it dies, the next takes over.

    Args:
        paths: N image files.
        fingerprint: a hash of their names below the folder they belong to.
        side: as in `read_images`.
        cache_dir: the folder that holds the decoded images; made if only itself is missing.
        threads: how many decode at once.
        name: what the file's name begins with, for people.
        rules: how they are read.
    Returns:
        (N, C, side, side), equal to what `read_images` returns. What is written into it stays in this process.
    Raises:
        ValueError: naming the images that cannot be read or the room that is lacking.
    """
    folder, shape = expanded(cache_dir), (len(paths), rules.channels, side, side)
    key = _key(paths, fingerprint, side, rules)
    file = folder / f"{name[:40]}-{side}px-{key}.npy"
    try:
        pixels = _map(file, shape, rules)
        if pixels is not None:  # asked before anything is locked or made: the folder may be read-only
            return pixels
        folder.mkdir(exist_ok=True)
        with _lock(file):
            pixels = _map(file, shape, rules)  # another process may have built it by the time it is our turn
            if pixels is not None:
                return pixels
            remove_abandoned(folder)  # the disk may be full of them
            with written_whole(file) as out:
                _decode_into(out, folder, paths, side, threads, rules)
                if _key(paths, fingerprint, side, rules) != key:
                    raise ValueError(f"images of {name} changed while they were being read. Start again.")
            pixels = _map(file, shape, rules)
            assert pixels is not None  # it was just written
            return pixels
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, shape, rules, f" ({error.strerror})") from error
        raise ValueError(f"data.cache_dir={shown(folder)} cannot be used: {error}.") from error


def _key(paths: Sequence[str], fingerprint: str, side: int, rules: ReadingRules) -> str:
    try:
        stats = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    except OSError as error:
        refuse_unreadable([f"{error.filename} ({error})"])
    kept = "" if rules.plain else f" {rules.channels} {rules.bits}"
    whole = hashlib.sha256(f"{fingerprint} {side} {decoder(rules)} {rules.sixteen_bit_max}{kept}".encode())
    whole.update(np.array(stats, dtype="<i8").tobytes())
    return whole.hexdigest()[:20]


def _map(file: Path, shape: tuple[int, ...], rules: ReadingRules) -> Tensor | None:
    """The file's images; None if it is not there, or cut short, or something else, and so has to be built."""
    try:
        # "c": written to in memory only. torch warns of arrays that it cannot write to.
        pixels = np.lib.format.open_memmap(file, mode="c")
    except (FileNotFoundError, ValueError):
        return None
    meant = pixels.shape == shape and pixels.dtype == _NUMPY[rules.bits]
    whole = meant and file.stat().st_size == pixels.offset + pixels.nbytes
    return torch.from_numpy(pixels) if whole else None


def _lock(file: Path) -> FileLock:
    """Held by who builds this file. The operating system takes it back from a process that dies."""
    return FileLock(file.with_name(f".{file.name}.lock"))


def _decode_into(
    out: BinaryIO, folder: Path, paths: Sequence[str], side: int, threads: int, rules: ReadingRules
) -> None:
    shape = (len(paths), rules.channels, side, side)
    if shutil.disk_usage(folder).free < _bytes_of(shape, rules):
        raise _no_room(folder, shape, rules)
    some = max(1, int(_BLOCK / (rules.pixel_bytes * side**2)))
    block = torch.empty(min(some, len(paths)), *shape[1:], dtype=rules.dtype)
    unreadable: list[Unread] = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # A line that comes and goes on a terminal; nothing in a log.
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with progress:
        shown = progress.add_task(f"decoding into {folder}", total=len(paths))
        described = {"descr": _NUMPY[rules.bits].str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, described)
        for first in range(0, len(paths), some):
            part = paths[first : first + some]
            unreadable += try_images(part, side, block, threads, rules)
            if not unreadable:  # else the others are only tried, to name all that cannot be read
                out.write(block[: len(part)].numpy().data)
            progress.advance(shown, len(part))
    refuse_unreadable(unreadable)


def _bytes_of(shape: tuple[int, ...], rules: ReadingRules) -> int:
    return int(np.prod(shape, dtype=np.int64)) * rules.bits // 8


def _no_room(folder: Path, shape: tuple[int, ...], rules: ReadingRules, reason: str = "") -> ValueError:
    needed, free = _bytes_of(shape, rules), shutil.disk_usage(folder).free
    return ValueError(
        f"data.cache_dir={shown(folder)} has no room: {shape[0]:,} decoded images take {needed:,} bytes, {free:,} are "
        f"free{reason}. Make room, choose another folder, or leave data.cache_dir out."
    )
