"""Where images come from: sets in memory, sets of files, and what a folder of images holds."""

import difflib
import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor

from simclr.checks import listed
from simclr.data.cache import map_decoded
from simclr.data.decode import RULES, ReadingRules, UnreadableError, read_images
from simclr.data.kinds import AVIF, GET_AVIF, GET_HEIF, HEIF, PICTURES, extensions
from simclr.paths import expanded, stored

MOST_SKIPPED = 10  # files of a folder, or 1 % of them
_SPLITS = frozenset(("train", "training", "test", "val", "valid", "validation", "unlabeled"))


class ImageSet(Protocol):
    """A numbered set of square images of one size, channels and type: uint8, or uint16 with 65 535 for white.

    Attributes:
        name: what to call it in messages.
        side: the images' side in pixels.
        labels: (N,) int64 into `classes`, or None.
        classes: the classes' names, or None.
        paths: the N files that they are from, or None.
    """

    name: str
    side: int
    labels: Tensor | None
    classes: list[str] | None

    @property
    def paths(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def images(self, index: Tensor | Sequence[int], threads: int = 1) -> Tensor:
        """The images of these numbers: (n,) integer -> (n, C, side, side). `threads` read files, if there are."""
        ...


class MemoryImages:
    """Images held in one tensor: in memory, mapped from a file, or on the training device.

    Args:
        name, labels, classes: as in ImageSet.
        pixels: (N, C, S, S) uint8 or uint16.
        paths: the N files that they were read from, if any.

    Attributes:
        pin: whether batches are to be gathered ahead into page-locked memory, for a GPU that has no room for all.
    """

    pin = False

    def __init__(
        self,
        name: str,
        pixels: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
    ):
        self.name, self.pixels, self.labels = name, pixels, labels
        self.paths = paths
        self.classes = None if classes is None else list(classes)
        self.side = pixels.shape[-1]

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor | Sequence[int], threads: int = 1) -> Tensor:
        index = torch.as_tensor(index, dtype=torch.int64).to(self.pixels.device)
        if self.pixels.dtype == torch.uint16:  # whose bits every device selects, as those of another type
            return self.pixels.view(torch.int16).index_select(0, index).view(torch.uint16)
        return self.pixels.index_select(0, index)

    def hold_pixels_on(self, device: torch.device, share: float = 0.25) -> None:
        """Move the pixels to a CUDA device if they take at most this share of its free memory; else see `pin`."""
        if device.type != "cuda" or self.pixels.device == device:
            return
        free, _ = torch.cuda.mem_get_info(device)
        self.pin = self.pixels.nbytes > share * free
        if not self.pin:
            self.pixels = self.pixels.to(device)


class ImagesChangedError(ValueError):
    """A file is not what it was when this run read it before."""


_GO_ON = (
    "The run can be continued from its last checkpoint (--resume auto or --ckpt_path): to the same bits once what was "
    "there is restored, else with --data.allow_changed_images true, and --data.on_error skip for what cannot be read."
)


class FileImages:
    """Images in files, decoded when asked for.

    A file whose size or time of change is another than when it was read before is an error, and so is one that could be
    read before: whoever has begun to train on an image goes on with the same one.

    Args:
        name, side, labels, classes: as in ImageSet.
        paths: N image files; each is cropped to its central square and resized to `side`.
        fingerprint: a hash of their names, for a cache of decoded images; made from `paths` if not given.
        rules: how they are read.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        side: int,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
        fingerprint: str | None = None,
        rules: ReadingRules = RULES,
    ):
        self.name, self.side, self.labels, self.rules = name, side, labels, rules
        self.paths = paths if isinstance(paths, PackedPaths) else PackedPaths(paths)
        self.fingerprint = fingerprint
        # What each file was when it was read, 0 for those that were not; in memory that all workers share.
        self._was = torch.zeros(len(self.paths), dtype=torch.int64)
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        """Bytes that the decoded images take."""
        return len(self) * self.rules.pixel_bytes * self.side**2

    def images(
        self, index: Tensor | Sequence[int], threads: int = 1, begun: Callable[[int], None] | None = None
    ) -> Tensor:
        """As `ImageSet.images`.

        Args:
            index, threads: as there.
            begun: called with the place in `index` of each image before its file is opened.
        Raises:
            ImagesChangedError: naming a file that is not what it was.
            ValueError: naming the files that cannot be read.
        """
        numbers = [int(i) for i in index]
        was = self._was.numpy()  # asked for anew: sharing a tensor moves it

        def read(place: int, status: os.stat_result) -> None:
            i, mark = numbers[place], _mark(status)
            if was[i] not in (0, mark):
                what = "has changed since this run read it before: it has another size or another time of change"
                raise ImagesChangedError(f"{self.paths[i]} {what}. {_GO_ON}")
            was[i] = mark

        paths = [self.paths[i] for i in numbers]
        try:
            return read_images(paths, self.side, threads=threads, rules=self.rules, begun=begun, read=read)
        except UnreadableError as error:
            for place, line in error.lines.items():
                if was[numbers[place]]:
                    raise ImagesChangedError(f"{line} could be read earlier in this run. {_GO_ON}") from error
            raise

    def in_memory(self, threads: int) -> MemoryImages:
        """All images, decoded once."""
        return self._held(read_images(self.paths, self.side, threads=threads, rules=self.rules))

    def cached(self, cache_dir: str, threads: int) -> MemoryImages:
        """All images, decoded into `cache_dir` unless they are there already, and mapped from it."""
        name = expanded(self.name).resolve().name
        names = self.fingerprint or fingerprint_of(self.paths)
        return self._held(map_decoded(self.paths, names, self.side, cache_dir, threads, name, self.rules))

    def _held(self, pixels: Tensor) -> MemoryImages:
        return MemoryImages(self.name, pixels, self.labels, self.classes, self.paths)


def _mark(status: os.stat_result) -> int:
    """A file's size and time of change in a positive number."""
    return (status.st_size * 0x9E3779B97F4A7C15 + status.st_mtime_ns) % (2**63 - 1) + 1


class PackedPaths(Sequence[str]):
    """N paths that never change, one after the other in a tensor.

    A path of 53 characters takes 70 bytes in place of 124 as a Python object in a list; and torch puts tensors that are
    sent to a worker process into memory that both share, where a list would be copied to each worker.

    Args:
        paths: N paths.
    """

    def __init__(self, paths: Iterable[str]):
        joined, bounds = bytearray(), array("q", [0])
        for path in paths:
            joined += os.fsencode(path)
            bounds.append(len(joined))
        self._bytes = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8))
        self._bounds = torch.from_numpy(np.frombuffer(bounds, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        # The arrays are asked for anew: sharing a tensor moves it.
        content, bounds = self._bytes.numpy(), self._bounds.numpy()

        def path(i: int) -> str:
            return os.fsdecode(content[bounds[i] : bounds[i + 1]].tobytes())

        chosen = range(len(self))[i]
        return [path(i) for i in chosen] if isinstance(chosen, range) else path(chosen)


def fingerprint_of(names: Iterable[str]) -> str:
    """A hash of a list of names."""
    whole = hashlib.sha256()
    for i, name in enumerate(names):
        whole.update((f"\0{name}" if i else name).encode(errors="surrogateescape"))
    return whole.hexdigest()[:20]


@dataclass
class Folder:
    """What a folder of images holds.

    Attributes:
        root: the folder, as the user named it.
        paths: its image files at any depth, sorted by their path below `root`, whatever the operating system.
        classes: the names of its first-level folders, if every image lies in one and there are two or more; else None.
        labels: (N,) int64 into `classes`, or None.
        fingerprint: a hash of the paths below `root`: the same where the folder has moved, another where files were
            added, removed or renamed.
        left_out: how many files were passed over, by kind: an extension, or `hidden`, where a folder counts once.
        beside: how many images lie beside the first-level folders, which for their sake are no classes; 0 where those
            are, or are fewer than two.
    """

    root: str
    paths: PackedPaths
    classes: list[str] | None
    labels: Tensor | None
    fingerprint: str
    left_out: Counter[str]
    beside: int = 0

    def without(self, places: Collection[int]) -> "Folder":
        """The folder as if some of its images were not in it."""
        kept = [i for i in range(len(self.paths)) if i not in places]
        paths = PackedPaths(self.paths[i] for i in kept)
        labels = None if self.labels is None else self.labels[kept]
        fingerprint = fingerprint_of([self.fingerprint, *(self.paths[i] for i in sorted(places))])
        return replace(self, paths=paths, labels=labels, fingerprint=fingerprint)

    @property
    def left_out_text(self) -> str:
        """The files passed over, for people: `3 .txt, 2 .heic, 14 hidden`; empty if there are none."""
        kinds = sorted(self.left_out.items(), key=lambda kind: (kind[0] == "hidden", -kind[1], kind[0]))
        more = f" and {sum(count for _, count in kinds[6:]):,} of other kinds" if len(kinds) > 6 else ""
        return ", ".join(f"{count:,} {kind}" for kind, count in kinds[:6]) + more

    @property
    def notes(self) -> list[str]:
        """What someone who gave this folder may not expect: pictures that are not read, classes that are none."""
        found = []
        pictures = {kind: count for kind, count in self.left_out.items() if kind in PICTURES}
        if pictures:
            number, kinds = sum(pictures.values()), ", ".join(f"{n:,} {kind}" for kind, n in sorted(pictures.items()))
            found.append(
                f"{number:,} of {number + len(self.paths):,} pictures in {self.root} are not read: {kinds}. "
                f"Convert them to JPEG or PNG to train on them.{_ways_to_read(pictures)}"
            )
        if self.beside:
            images = "1 image lies" if self.beside == 1 else f"{self.beside:,} images lie"
            found.append(
                f"{images} beside the folders of {self.root}, so that these are not taken for classes and there are no "
                "labels. Move what is beside them into one of them, or away."
            )
        return found


def _ways_to_read(kinds: Collection[str]) -> str:
    """What to install so that more kinds of pictures are read, in sentences after others."""
    wanted = [(HEIF, "HEIC", GET_HEIF), (AVIF, "AVIF", GET_AVIF)]
    return "".join(f" To have {name} read: {command}." for ends, name, command in wanted if ends & set(kinds))


def names_in(file: str | os.PathLike) -> list[str]:
    """The lines of a list of files, without empty ones."""
    return [line for line in re.split(r"\r?\n", os.fsdecode(Path(file).read_bytes())) if line.strip()]


def places_of(names: Iterable[str], folder: Folder, below: str | None = None) -> dict[int, str]:
    """Where files are among those of a folder, and by which of the names.

    Args:
        names: paths, from the root or from the current folder.
        folder: the images.
        below: the folder itself, for names that are below it.
    """
    wanted = {}
    for name in names:
        wanted[stored(name)] = name
        if below is not None:
            wanted[os.path.join(below, *name.split("/"))] = name
    return {i: wanted[path] for i, path in enumerate(folder.paths) if path in wanted}


def list_folder(root: str, option: str, given: str | None = None) -> Folder:
    """Find the images in a folder: nested or flat, with or without class folders.

    Hidden files and folders and files without an image's extension are passed over, and counted; links to folders are
    followed.

    Args:
        root: the folder.
        option: the setting that named it, for messages.
        given: the name that the user gave it there; `root` if not given.
    Raises:
        ValueError: if it is missing, not a folder, without images, or holds splits (train/, test/) instead of classes.
    """
    top, given = Path(stored(root)), given or root
    if top.is_file():
        raise ValueError(f"{option}={given} is a file. Give the folder that holds the images.")
    if not top.is_dir():
        raise ValueError(f"{option}={given} does not exist. {_nearest(top)}")
    left_out: Counter[str] = Counter()
    found = sorted(_walk(top, (), frozenset((os.path.realpath(top),)), left_out))
    if not found:
        kinds = ", ".join(sorted(kind[1:] for kind in extensions()))
        other = Folder(given, PackedPaths(()), None, None, "", left_out).left_out_text
        there = f" There are {other}.{_ways_to_read(left_out)}" if other else ""
        raise ValueError(f"{option}={given} holds no images. Looked at every depth for {kinds}.{there}")
    paths = PackedPaths(os.path.join(top, *parts) for parts in found)
    fingerprint = fingerprint_of("/".join(parts) for parts in found)
    classes, beside = sorted({parts[0] for parts in found if len(parts) > 1}), sum(len(parts) == 1 for parts in found)
    if beside or len(classes) < 2:
        return Folder(given, paths, None, None, fingerprint, left_out, beside if len(classes) > 1 else 0)
    if {name.lower() for name in classes} <= _SPLITS:
        first = next((name for name in classes if name.lower().startswith("train")), classes[0])
        raise ValueError(
            f"{option}={given} holds the folders {', '.join(classes)}, which look like splits, not classes. "
            f"Give each to its own setting, for example data.train_dir={Path(given) / first}."
        )
    number = {name: i for i, name in enumerate(classes)}
    return Folder(given, paths, classes, torch.tensor([number[parts[0]] for parts in found]), fingerprint, left_out)


def _walk(folder: str | Path, parts: tuple[str, ...], seen: frozenset[str], left_out: Counter[str]):
    """Yield the path below the root, as a tuple of names, of every image file; `seen` breaks circles of links.

    What is passed over is counted in `left_out`.
    """
    read = extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
                continue
            kind = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                inside = seen
                if entry.is_symlink():
                    real = os.path.realpath(entry.path)
                    if real in seen:
                        continue
                    inside = seen | {real}
                yield from _walk(entry.path, (*parts, entry.name), inside, left_out)
            elif kind in read:
                yield (*parts, entry.name)
            else:
                left_out[kind or "without extension"] += 1


def _nearest(path: Path) -> str:
    """Where a missing path stops to exist, and what lies there with a similar name."""
    path = path.absolute()
    while not path.parent.is_dir():
        path = path.parent
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
    return f"{path.parent} exists and has no {path.name}.{hint}"


def may_be_skipped(bad: int, images: int) -> bool:
    """Whether `data.on_error=skip` leaves out so many of a folder's images: ten or 1 %, and never all."""
    return bad <= max(MOST_SKIPPED, images // 100) and bad < images


def refuse_shared(train: Folder, test: Folder) -> None:
    """Refuse test images that are training images: one folder given twice, however it is written, or one in the other.

    Raises:
        ValueError: naming both.
    """
    outer, inner = (expanded(folder.root).resolve() for folder in (train, test))
    if os.path.samefile(outer, inner):
        what = f"is the same folder as data.train_dir={train.root}"
        todo = "Leave data.test_dir out: data.holdout of each class's images then serve as test."
    elif _holds(outer, inner):
        what = f"lies inside data.train_dir={train.root}, which takes its images too"
        todo = "Move it out, or give the folder beside it as data.train_dir."
    elif _holds(inner, outer):
        what = f"holds data.train_dir={train.root}, and so takes its images too"
        todo = "Move that out, or give the folder beside it as data.test_dir."
    else:
        return
    raise ValueError(f"data.test_dir={test.root} {what}: test images must not be trained on. {todo}")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether a folder lies below another, by what they are on the disk: a name may be written in several ways."""
    return any(os.path.samefile(outer, parent) for parent in inner.parents)


def match_classes(train: Folder, test: Folder) -> Tensor | None:
    """The test labels as numbers of the training classes, matched by name; unchanged where one side has no labels.

    Raises:
        ValueError: listing the test classes that the training folder does not have.
    """
    if train.classes is None or test.classes is None:
        return test.labels
    unknown = [name for name in test.classes if name not in train.classes]
    if unknown:
        names = listed(unknown)
        raise ValueError(f"data.test_dir={test.root} has classes that data.train_dir={train.root} lacks: {names}.")
    return torch.tensor([train.classes.index(name) for name in test.classes])[test.labels]
