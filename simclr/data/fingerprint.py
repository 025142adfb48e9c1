"""Whether images in files are those they were: by their names, their sizes and a sample of their contents.

Reading all contents would read the whole set at every start. So an image that was replaced by another of the same name
and the same size to the byte is noticed if it is among the sampled ones, all of a set of 64.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr.data.decode import refuse_unreadable

DIGEST_BYTES = 16
_SAMPLED, _END = 64, 1024  # files whose contents are looked at, and bytes at either end of each
_AT_ONCE = 2**16  # paths taken out of a `PackedPaths`, six times faster than one by one


def fingerprint_files(root: str, paths: Sequence[str]) -> dict[str, Tensor]:
    """What tells N files below a folder from others, wherever the folder lies.

    Args:
        root: the folder.
        paths: files below it, in an order that depends on their names only.
    Returns:
        `files` (N,) int64: a hash of each file's name (32 bits), and its size in bytes modulo 2^32. `samples`
        (min(N, 64), 2) int64: the hash of a name, and one of the file's first and last KB, for files that the hashes of
        their names choose.
    Raises:
        ValueError: naming a file that is no longer there.
    """
    below = len(os.path.join(root, ""))

    def codes():
        for first in range(0, len(paths), _AT_ONCE):
            for path in paths[first : first + _AT_ONCE]:
                name = path[below:].replace(os.sep, "/")
                yield zlib.crc32(os.fsencode(name)) << 32 | os.stat(path).st_size & 0xFFFFFFFF

    try:
        files = np.fromiter(codes(), np.uint64, len(paths))
        names = files >> 32
        samples = [(int(names[i]), _content(paths[i])) for i in _some(names)]
    except OSError as error:
        refuse_unreadable([f"{error.filename} ({error})"])
    return {"files": torch.from_numpy(files.view(np.int64)), "samples": torch.tensor(samples, dtype=torch.int64)}


def sampled(root: str, paths: Sequence[str]) -> list[int]:
    """The places of the files, 64 at most, that `fingerprint_files` looks into, chosen by their names below a root."""
    below = len(os.path.join(root, ""))
    names = (zlib.crc32(os.fsencode(path[below:].replace(os.sep, "/"))) for path in paths)
    return _some(np.fromiter(names, np.uint64, len(paths)))


def _some(names: np.ndarray) -> list[int]:
    return np.argsort(names, kind="stable")[:_SAMPLED].tolist()


def digest_files(root: str, paths: Sequence[str]) -> str:
    """What tells files below a folder from others in a glance, on another machine too: a hash of N, names and samples.

    Unlike `fingerprint_files` it asks for no file's size but those of the sampled, which over a network takes long.

    Args:
        root, paths: as there.
    """
    below, whole = len(os.path.join(root, "")), hashlib.sha256()
    codes = np.empty(len(paths), np.uint32)
    for first in range(0, len(paths), _AT_ONCE):
        names = [path[below:].replace(os.sep, "/") for path in paths[first : first + _AT_ONCE]]
        codes[first : first + len(names)] = [zlib.crc32(os.fsencode(name)) for name in names]
    whole.update(codes.tobytes())
    for i in np.argsort(codes, kind="stable")[:_SAMPLED]:
        whole.update(_content(paths[int(i)]).to_bytes(8, "little", signed=True))
    return whole.hexdigest()[:12]


def digest_pixels(pixels: torch.Tensor) -> str:
    """The same for N images in memory, (N, C, S, S): a hash of N and of a sample.

    Args:
        pixels: on any device.
    """
    chosen = torch.linspace(0, len(pixels) - 1, min(len(pixels), _SAMPLED)).long()
    sample = pixels[chosen.to(pixels.device)].cpu().contiguous()
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + sample.numpy().tobytes()).hexdigest()[:12]


def pixel_digest(pixels: np.ndarray) -> bytes:
    """A hash of an image's bytes, of `DIGEST_BYTES`: among a million images two unlike ones share it with 1e-27.

    It keeps no secrets: of the hashes at hand it is the one that processors have instructions for.

    Args:
        pixels: contiguous, any shape and type.
    """
    return hashlib.sha256(pixels.data, usedforsecurity=False).digest()[:DIGEST_BYTES]


def _content(path: str) -> int:
    with Path(path).open("rb") as file:
        whole = hashlib.blake2b(file.read(_END), digest_size=8)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
        whole.update(file.read(_END))
    return int.from_bytes(whole.digest(), "little", signed=True)


def compare_files(was: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, int] | None:
    """What has become of a set of files, from two of `fingerprint_files`; None if nothing.

    Returns:
        `was` and `now`: how many files; `added` and `removed`: names that only one of the two has, so that a file under
        another name is one of each; `changed`: of another size, or of another content as far as that was sampled.
    """
    if torch.equal(was["files"], now["files"]) and torch.equal(was["samples"], now["samples"]):
        return None
    before, after = (part["files"].numpy().view(np.uint64) for part in (was, now))
    names, of_before, of_after = np.intersect1d(before >> 32, after >> 32, return_indices=True)
    changed = set(names[before[of_before] != after[of_after]].tolist())
    contents = dict(was["samples"].tolist())
    changed |= {name for name, content in now["samples"].tolist() if contents.get(name, content) != content}
    added, removed = (len(np.setdiff1d(a >> 32, b >> 32)) for a, b in ((after, before), (before, after)))
    return {"was": len(before), "now": len(after), "added": added, "removed": removed, "changed": len(changed)}
