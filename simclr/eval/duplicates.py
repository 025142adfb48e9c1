"""Test images that are training images too, pixel for pixel, found by a hash of each image while it passes by."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from simclr.data import EvalLoader
from simclr.data.fingerprint import DIGEST_BYTES, pixel_digest
from simclr.eval.metrics import wilson_interval
from simclr.paths import shown

_NAMED, _PRINTED = 10, 3  # duplicates in a record, and in a line for people


class HashedImages:
    """Hands on the batches of a loader and keeps a hash of every image, so that none is decoded twice for it.

    A thread computes the hashes while the caller works on the batch. They take 16 bytes an image.

    Args:
        loader: of images and labels.

    Attributes:
        digests: those of the images of the last pass, in the loader's order, one after the other.
    """

    def __init__(self, loader: EvalLoader):
        self.loader = loader
        self.digests = bytearray()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.digests = bytearray()
        coming: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for images, labels in self.loader:
                coming.append(thread.submit(_digests, images))
                if len(coming) > 1:  # two batches held at most, however slow hashing is
                    self.digests += coming.popleft().result()
                yield images, labels
            for batch in coming:
                self.digests += batch.result()


def _digests(images: Tensor) -> bytes:
    rows = images.cpu().contiguous().flatten(1).numpy()
    return b"".join(map(pixel_digest, rows))


def copies(train: bytes | bytearray, test: bytes | bytearray) -> Tensor:
    """For each of M test images the place of the first training image that equals it, or -1: (M,) int64.

    Args:
        train, test: digests of the images, one after the other.
    """
    wanted = set(_each(test))
    places: dict[bytes, int] = {}
    for place, digest in enumerate(_each(train)):
        if digest in wanted:
            places.setdefault(digest, place)
    return torch.tensor([places.get(digest, -1) for digest in _each(test)])


def _each(digests: bytes | bytearray) -> Iterator[bytes]:
    return (bytes(digests[start : start + DIGEST_BYTES]) for start in range(0, len(digests), DIGEST_BYTES))


def duplicates_record(train: HashedImages, test: HashedImages, linear: Tensor, knn: Tensor) -> dict[str, Any]:
    """How many test images the classifiers were trained on, which (some), and what is right of the others.

    Args:
        train, test: the images, after a pass.
        linear, knn: (M,) integer, the class that the linear classifier and kNN give to each test image.
    Returns:
        For JSON. Accuracies are fractions of the other test images, None if there are no others.
    """
    copy_of = copies(train.digests, test.digests)
    own = copy_of < 0
    named = (~own).nonzero().flatten()[:_NAMED].tolist()
    right = {name: (found == test.loader.labels)[own] for name, found in (("linear", linear), ("knn", knn))}
    count = int(own.sum())
    share = {name: int(found.sum()) / count if count else None for name, found in right.items()}
    return {
        "test_images": len(own) - count,
        "examples": [
            {"test": _named(test.loader, place), "train": _named(train.loader, int(copy_of[place]))} for place in named
        ],
        "linear_top1_without": share["linear"],
        "ci95_without": list(wilson_interval(int(right["linear"].sum()), count)) if count else None,
        "knn_top1_without": share["knn"],
    }


def _named(loader: EvalLoader, place: int) -> str:
    """An image of a loader by its file, or by its number where it is from none."""
    number = int(loader.index[place])
    return shown(loader.source.paths[number]) if loader.source.paths is not None else f"{loader.source.name} {number}"


def duplicates_in_words(record: dict[str, Any]) -> str | None:
    """What the record of an evaluation says of test images that are training images; None where it has none."""
    found = record.get("duplicates")
    if not found or not found["test_images"]:
        return None
    count, whole = found["test_images"], record["data"]["test_images"]
    pairs = "; ".join(f"{pair['test']} is {pair['train']}" for pair in found["examples"][:_PRINTED])
    more = " ..." if count > _PRINTED else ""
    without = "no test image is left without them"
    if found["linear_top1_without"] is not None:
        linear, knn = (100 * found[key] for key in ("linear_top1_without", "knn_top1_without"))
        without = f"without them: linear classifier {linear:.1f} %, kNN {knn:.1f} %"
    are = "is" if count == 1 else "are"
    return (
        f"{count:,} of the {whole:,} test images {are} among the training images, pixel for pixel ({pairs}{more}); "
        f"{without}"
    )
