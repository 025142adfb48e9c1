"""Some of the images, and how the encoder sees them: their features, their neighbours, their places on a map."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.data import FileImages, ImageData, ImageSet
from simclr.data.decode import read_images
from simclr.eval import extract_features
from simclr.seeding import epoch_order

_CHOICE = 20210312  # seed of the images shown, the same for every run on the same data


@dataclass(frozen=True)
class Sample:
    """Some images of a set, and what the encoder makes of them.

    Attributes:
        name: of the set.
        index: (n,) int64, the images' numbers in the set.
        pixels: (n, 3, S, S) uint8.
        features: (n, F) float32.
        labels: (n,) int64 into `classes`, or None.
        classes: names, or None.
        whole: images in the set that these were chosen from.
    """

    name: str
    index: Tensor
    pixels: Tensor
    features: Tensor
    labels: Tensor | None
    classes: list[str] | None
    whole: int


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
    index = pool[epoch_order(_CHOICE, 0, len(pool))[:limit].sort().values]
    if isinstance(source, FileImages):
        pixels = read_images([source.paths[i] for i in index.tolist()], source.side, threads=os.cpu_count() or 1)
    else:
        pixels = source.images(index).cpu()
    # extract_features hands back each image's label; their numbers do where there are no labels.
    batches = zip(pixels.split(256), index.split(256), strict=True)
    features, _ = extract_features(encoder, batches, device=device)
    labels = None if source.labels is None else source.labels[index]
    return Sample(source.name, index, pixels, features, labels, source.classes, len(pool))


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """The k rows of `bank` (N, F) of highest cosine similarity to each of `queries` (n, F), nearest first: (n, k).

    Of equally near rows the earlier comes first.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # (n, N)
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]


def choose_queries(sample: Sample, count: int) -> Tensor:
    """Places in a sample of images to show: one of each class as far as they go, in the order of the classes."""
    order = epoch_order(_CHOICE, 2, len(sample.index))
    if sample.labels is None:
        return order[:count]
    first = {}
    for place in order.tolist():
        first.setdefault(int(sample.labels[place]), place)
    rest = [place for place in order.tolist() if place not in first.values()]
    one_each = [first[label] for label in sorted(first)]
    step = max(1.0, len(one_each) / count)  # of many classes, some from all along the alphabet
    shown = [one_each[int(i * step)] for i in range(min(count, len(one_each)))]
    return torch.tensor((shown + rest)[:count])


def tsne(features: Tensor, *, perplexity: float = 30.0, iterations: int = 500) -> Tensor:
    """A map of features in two dimensions (van der Maaten & Hinton 2008, exact), by cosine distance.

    Starts from the two principal components, so that it is the same every time. Near images are near on the map;
    distances between groups, and their sizes, say little.

    Args:
        features: (N, F), N >= 4; time and memory grow with N squared.
        perplexity: about how many neighbours each image keeps near; at most (N - 1) / 3.
        iterations: steps of gradient descent.
    Returns:
        (N, 2) float32, centred.
    """
    count = len(features)
    x = F.normalize(features.float(), dim=1)
    p = _affinities((2 - 2 * x @ x.T).clamp_(min=0), min(perplexity, (count - 1) / 3))
    centred = x - x.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    y = centred @ (axes * axes.sum(0).sign())  # an eigenvector's sign is arbitrary
    y = y / y.std(0).clamp(min=1e-12)[0] * 1e-4
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    early, rate = 12.0, max(count / 12 / 4, 50.0)  # as scikit-learn's "auto"
    for step in range(iterations):
        exaggerated = step < iterations // 4
        affinity = 1 / (1 + torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square_())
        affinity.fill_diagonal_(0)
        force = (p * (early if exaggerated else 1.0) - affinity / affinity.sum()) * affinity
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_(min=0.01)
        velocity = (0.5 if exaggerated else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
    return y - y.mean(0)


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric joint probabilities whose rows have the perplexity asked for, by bisection: (N, N) -> (N, N)."""
    squared = squared.clone().fill_diagonal_(math.inf)
    low, high = torch.zeros(len(squared), 1), torch.full((len(squared), 1), math.inf)
    beta = torch.ones(len(squared), 1)
    for _ in range(50):
        p = torch.softmax(-squared * beta, dim=1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return (p + p.T) / (2 * len(p))
