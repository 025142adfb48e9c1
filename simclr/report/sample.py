"""Some of the images, and how the encoder sees them: their features, their neighbours, their places on a map."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.container import cores
from simclr.data import FileImages, ImageData, ImageSet
from simclr.eval import extract_features
from simclr.paths import stored
from simclr.seeding import epoch_order

_CHOICE = 20210312  # seed of the images shown, the same for every run on the same data


@dataclass(frozen=True)
class Sample:
    """Some images of a set, and what the encoder makes of them.

    Attributes:
        name: of the set.
        index: (n,) int64, the images' numbers in the set.
        pixels: (n, C, S, S) uint8 or uint16.
        features: (n, F) float32.
        labels: (n,) int64 into `classes`, or None.
        classes: names, or None.
        whole: images in the set that these were chosen from.
        paths: the n files that they are from, or None.
        source: the set.
        pool: (whole,) int64, the numbers of all images that these were chosen from, in the order of an evaluation.
        places: (n,) int64, where in `pool` these stand.
    """

    name: str
    index: Tensor
    pixels: Tensor
    features: Tensor
    labels: Tensor | None
    classes: list[str] | None
    whole: int
    paths: list[str] | None = None
    source: ImageSet | None = None
    pool: Tensor | None = None
    places: Tensor | None = None


def take_samples(
    encoder: nn.Module,
    data: ImageData,
    *,
    bank_images: int,
    test_images: int,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Sample, Sample]:
    """A fixed pseudo-random choice of test and of training images, with their features.

    Test images are those that an evaluation tests on. Without labels they are of the test folder, or else a fifth of
    the training images, which are then kept out of the other sample.

    Returns:
        The test sample and the training sample (the bank).
    Raises:
        ValueError: if the images cannot be read.
    """
    data.setup()
    assert data.train is not None
    if data.has_labels:
        loaders = data.eval_loader("test"), data.eval_loader("train")
        chosen = [(loader.source, loader.index) for loader in loaders]
    elif data.test is not None:
        chosen = [(data.test, torch.arange(len(data.test))), (data.train, torch.arange(len(data.train)))]
    else:
        order = epoch_order(_CHOICE, 1, len(data.train))
        fifth = max(1, len(order) // 5)
        chosen = [(data.train, order[:fifth]), (data.train, order[fifth:])]
    samples = []
    for (source, index), limit in zip(chosen, (test_images, bank_images), strict=True):
        say(f"features of {min(limit, len(index)):,} images of {source.name}")
        samples.append(_sample(encoder, source, index, limit, device))
    return samples[0], samples[1]


def _sample(encoder: nn.Module, source: ImageSet, pool: Tensor, limit: int, device: torch.device | str) -> Sample:
    places = epoch_order(_CHOICE, 0, len(pool))[:limit].sort().values
    index = pool[places]
    pixels = pixels_of(source, index)
    # extract_features hands back each image's label; their numbers do where there are no labels.
    batches = zip(pixels.split(256), index.split(256), strict=True)
    features, _ = extract_features(encoder, batches, device=device)
    labels = None if source.labels is None else source.labels[index]
    paths = None if source.paths is None else [stored(source.paths[i]) for i in index.tolist()]
    return Sample(source.name, index, pixels, features, labels, source.classes, len(pool), paths, source, pool, places)


def pixels_of(source: ImageSet, index: Tensor) -> Tensor:
    """Images of a set by their numbers, (n,) int64: (n, C, S, S) on the CPU.

    Raises:
        ValueError: naming a file that cannot be read.
    """
    return source.images(index, threads=cores() if isinstance(source, FileImages) else 1).cpu()


def choose_queries(sample: Sample, count: int) -> Tensor:
    """Places in a sample of images to show: one of each class as far as they go, in the order of the classes."""
    order = epoch_order(_CHOICE, 2, len(sample.index))
    if sample.labels is None:
        return order[:count]
    first: dict[int, int] = {}
    for place in order.tolist():
        first.setdefault(int(sample.labels[place]), place)
    rest = [place for place in order.tolist() if place not in first.values()]
    one_each = [first[label] for label in sorted(first)]
    step = max(1.0, len(one_each) / count)  # of many classes, some from all along the alphabet
    shown = [one_each[int(i * step)] for i in range(min(count, len(one_each)))]
    return torch.tensor((shown + rest)[:count])


def tsne(features: Tensor, *, perplexity: float = 30.0) -> Tensor:
    """A map of features in two dimensions (van der Maaten & Hinton 2008, by scikit-learn), by cosine distance.

    Starts from the two principal components, so that it is the same every time. Near images are near on the map;
    distances between groups, and their sizes, say little.

    Args:
        features: (N, F), N >= 4, F >= 2.
        perplexity: about how many neighbours each image keeps near; at most (N - 1) / 3.
    Returns:
        (N, 2) float32, centred.
    Raises:
        ModuleNotFoundError: without scikit-learn, with how to install it.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ModuleNotFoundError("a report's map needs scikit-learn: pip install scikit-learn.") from error
    x = F.normalize(features.float().cpu(), dim=1)
    centred = x - x.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    start = centred @ (axes * axes.sum(0).sign())  # an eigenvector's sign is arbitrary
    # Not init="pca", which divides by the spread: there is none in the features of a collapsed encoder.
    start = start / start.std(0).clamp(min=1e-12)[0] * 1e-4
    method = TSNE(
        metric="cosine",
        init=start.numpy(),
        perplexity=min(perplexity, (len(x) - 1) / 3),
        max_iter=500,  # 1 000 double the time; as many of the nearest on the map were of the same class
        random_state=0,
    )
    places = torch.from_numpy(method.fit_transform(x.numpy()))
    return places - places.mean(0)
