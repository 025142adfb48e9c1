"""How fast images are read: from files and from the cache of decoded images, beside others, all in one run.

    python benchmarks/decoding.py                          # on JPEGs that it makes in a temporary folder
    python benchmarks/decoding.py --images DIR --workers 1 2 4 8

An epoch is every image once, in random order, as uint8 batches (B, 3, S, S) of central squares. All contenders take
turns, `--repeats` times, after an epoch each to warm up (files in the page cache, workers started); printed are the
median and the range of images per second, and of the ratio to torchvision's ImageFolder, DataLoader, Resize and
CenterCrop with as many workers in the same round. Then the same images ten times over: time of an epoch and memory.
Rivals that are not installed are named and left out.
"""

import argparse
import gc
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from simclr.container import processor
from simclr.data import FileImages
from simclr.data.loader import Batches
from simclr.data.sources import fingerprint_of, list_folder

BASE = "torchvision ImageFolder"


def main() -> None:
    """Read the options, choose or make the images, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder with class folders of images; made here if not given")
    parser.add_argument("--count", type=int, default=600, help="how many images: an even choice, or how many to make")
    parser.add_argument("--load_size", type=int, default=256, help="the side of the squares in pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes and building threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_growth", action="store_true", help="leave out the second table")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of this process: what decodes is counted in workers
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as were asked for
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.images).expanduser() if options.images else make_photographs(Path(scratch), options.count)
        paths = list_folder(str(folder), "--images").paths
        chosen = np.linspace(0, len(paths) - 1, min(options.count, len(paths))).round().astype(int).tolist()
        paths = [paths[i] for i in chosen]
        print_machine(folder if options.images else None, paths, options)
        compare(folder, chosen, paths, Path(scratch), options)
        if not options.no_growth:
            grow(paths, Path(scratch), options)


def make_photographs(scratch: Path, count: int) -> Path:
    """JPEGs of 500 x 375 with detail at every scale, as photographs have it, in two class folders."""
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((375, 500, 3), 127.5)
        for octave in range(8):
            cells = generator.normal(0, 40 * 0.75**octave, (3 << octave, 4 << octave, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(cells[..., channel]).resize((500, 375), Image.Resampling.BICUBIC)
                pixels[..., channel] += np.asarray(layer)
        file = scratch / "made" / "ab"[i % 2] / f"{i:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return scratch / "made"


def print_machine(folder: Path | None, paths: list[str], options: argparse.Namespace) -> None:
    """What was measured on: machine, versions, the number of images and their median size on disk in kB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "pillow", "numpy")]
    sizes = statistics.median(os.path.getsize(path) for path in paths) / 1e3
    with Image.open(paths[len(paths) // 2]) as image:
        size = f"{image.width} x {image.height}"
    print(f"{platform.system()} {platform.machine()}, {processor()}, {cores} cores usable; {', '.join(versions)}")
    where = f"images of {folder.name}" if folder else "JPEGs made here"
    print(
        f"{len(paths):,} {where}, {size} the middle one, {sizes:.0f} kB the median, squares of {options.load_size} px"
    )
    print(f"batches of {options.batch_size}, {options.repeats} rounds\n", flush=True)


# Contenders: each reads an epoch when it is called and returns how many images that were.


def files(paths: list[str], options: argparse.Namespace, workers: int) -> Callable[[], int]:
    """Decode every image in worker processes."""
    batches = Batches(FileImages("files", paths, options.load_size), workers)
    return lambda: count(images for images, _ in batches(shuffled(len(paths), options.batch_size)))


def cold(paths: list[str], options: argparse.Namespace, threads: int, scratch: Path) -> Callable[[], int]:
    """Decode all images into an empty cache."""

    def build() -> int:
        shutil.rmtree(scratch / "cold", ignore_errors=True)
        images = FileImages("files", paths, options.load_size, fingerprint=fingerprint_of(paths))
        return len(images.cached(str(scratch / "cold"), threads))

    return build


def warm(paths: list[str], options: argparse.Namespace, scratch: Path) -> Callable[[], int]:
    """Find the images in a filled cache and read them: what a second run does, from its start."""

    def read() -> int:
        images = FileImages("files", paths, options.load_size, fingerprint=fingerprint_of(paths))
        batches = Batches(images.cached(str(scratch / "warm"), 1))
        return count(images for images, _ in batches(shuffled(len(paths), options.batch_size)))

    return read


def rival(data, chosen: list[int], options: argparse.Namespace, workers: int) -> Callable[[], int]:
    """Read these numbers of a map-style data set of (image, label) through torch's DataLoader, workers kept."""
    loader = DataLoader(
        Subset(data, chosen),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    return lambda: count(batch[0] for batch in loader)


def native(path: str) -> Tensor:
    """(3, H, W) uint8 RGB of a file by torchvision's own decoder instead of Pillow's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in 0.29, without a successor in torchvision
        return torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)


def shuffled(size: int, batch_size: int) -> Tensor:
    """(steps, batch_size) int64: image numbers in random order, without the remainder."""
    steps = size // batch_size
    return torch.randperm(size)[: steps * batch_size].view(steps, batch_size)


def count(batches: Iterator[Tensor]) -> int:
    """How many images the batches (B, 3, S, S) hold, read to their end."""
    return sum(len(images) for images in batches)


def compare(folder: Path, chosen: list[int], paths: list[str], scratch: Path, options: argparse.Namespace) -> None:
    """Images per second of all contenders in turn, round after round, and the ratio within each round.

    Args:
        folder: with class folders, for the rivals; chosen: the numbers of its images, in sorted order.
        paths: the same images, for ours.
        scratch: where caches are built.
    """
    side = options.load_size
    squares = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    contenders, absent = {}, []
    for workers in options.workers:
        contenders[BASE, workers] = rival(ImageFolder(folder, squares), chosen, options, workers)
        own = ImageFolder(folder, v2.Compose(squares.transforms[:2]), loader=native)
        contenders["torchvision ImageFolder, its own decoder", workers] = rival(own, chosen, options, workers)
        try:
            os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # it would ask a server
            from lightly.data import LightlyDataset

            lightly = LightlyDataset(str(folder), transform=squares)
            contenders["lightly LightlyDataset", workers] = rival(lightly, chosen, options, workers)
        except ImportError:
            absent = ["lightly"]
        contenders["ours, from files", workers] = files(paths, options, workers)
        contenders["ours, building the cache", workers] = cold(paths, options, workers, scratch)
    contenders["ours, from the cache", 0] = warm(paths, options, scratch)
    rates = {key: [] for key in contenders}
    for turn in range(options.repeats + 1):
        for key, epoch in contenders.items():
            seconds, images = timed(epoch)
            if turn:
                rates[key].append(images / seconds)
    if absent:
        print(f"not installed, left out: {', '.join(absent)}\n")
    print("| | workers | images/s | beside torchvision with as many |")
    print("|---|---|---|---|")
    for (name, workers), values in rates.items():
        base = rates[BASE, workers or options.workers[0]]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        beside = f"{spread(ratios, '.2f')} x" + ("" if workers else f" (of {options.workers[0]})")
        print(f"| {name} | {workers or '-'} | {spread(values, ',.0f')} | {beside} |")
    print(flush=True)


def grow(paths: list[str], scratch: Path, options: argparse.Namespace) -> None:
    """The images once and ten times over: seconds of an epoch, and what it takes of memory beside the page cache."""
    workers = options.workers[-1]
    ways = {
        f"from files, {workers} workers": lambda some: files(some, options, workers),
        "from the cache": lambda some: warm(some, options, scratch),
    }
    print("| | once, s | ten times, s | ratio | memory once, MB | ten times, MB |")
    print("|---|---|---|---|---|---|")
    gc.collect()  # the contenders of the first table have workers
    whole = len(paths) // options.batch_size * options.batch_size  # no remainder, or ten times would be more than ten
    for name, way in ways.items():
        epochs = way(paths[:whole]), way(paths[:whole] * 10)
        # In turns, and each ratio within one round: a machine that slows down meanwhile slows both.
        rounds = [[(*timed(epoch), memory()) for epoch in epochs] for _ in range(min(3, options.repeats) + 1)][1:]
        once, ten = ([turn[i][0] for turn in rounds] for i in (0, 1))
        ratio = spread([b / a for a, b in zip(once, ten, strict=True)], ".2f")
        held = [f"{max(turn[i][2] for turn in rounds):.0f}" if memory() else "not measured" for i in (0, 1)]
        print(f"| ours, {name} | {spread(once, '.2f')} | {spread(ten, '.2f')} | {ratio} | {held[0]} | {held[1]} |")


def timed(epoch: Callable[[], int]) -> tuple[float, int]:
    """Seconds of an epoch and how many images it read."""
    start = time.perf_counter()
    images = epoch()
    return time.perf_counter() - start, images


def memory() -> float:
    """MB, backed by no file, that this process and those it started hold; 0 where there is no telling.

    What several share is counted once: each is given its part of it.
    """
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    held = 0.0
    for pid in filter(ours, parents):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        held += sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return held


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
