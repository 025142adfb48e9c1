"""What an encoder is worth where there are no labels: figures of two views of images that it was not trained on.

None of them replaces an accuracy. They tell a run that learns from one that does not, and two runs on the same images
from each other, best beside the same figures of the network before its first step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # of a matrix of cosines, at once


def alignment(z1: Tensor, z2: Tensor) -> float:
    """How far apart the two views of an image are: the mean squared distance of their directions, 0 (the same) to 4.

    Wang & Isola 2020, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", eq. 3, alpha = 2.

    Args:
        z1, z2: (N, D) float, any scale: normalised here. Row i of both is of image i.
    Raises:
        ValueError: if the shapes are not (N, D) twice, N < 2.
    """
    _check(z1, z2)
    return float((_directions(z1) - _directions(z2)).pow(2).sum(1).mean())


def uniformity(z: Tensor) -> float:
    """How evenly directions fill the sphere: the log of the mean of exp(-2 d^2) over all pairs, d their distance.

    0 where all directions are the same; the lower, the more even, down to about -4 (Wang & Isola 2020, eq. 4, t = 2).

    Args:
        z: (N, D) float, any scale: normalised here.
    Raises:
        ValueError: if the shape is not (N, D), N < 2.
    """
    _check(z)
    x = _directions(z)
    # exp(-2 d^2) = exp(-2 |a|^2) exp(4 a'b) exp(-2 |b|^2): the matrix is written once and gone over twice. |a| is 1,
    # or 0 of a projection that is zero, which no scale turns into a direction.
    shares = (-2 * x.square().sum(1)).exp()
    total = 0.0
    for start in range(0, len(x), _ROWS):  # rows with themselves, each pair twice, and with those after them
        stop = min(start + _ROWS, len(x))
        rows = shares[start:stop]
        near = (4 * x[start:stop] @ x[start:].T).exp_()
        own = rows @ near[:, : stop - start] @ rows
        total += float(rows @ near @ shares[start:]) - float(own + (stop - start)) / 2
    return math.log(total / (len(x) * (len(x) - 1) / 2))


def spread(z: Tensor) -> float:
    """The standard deviation of a coordinate of a direction, times sqrt(D), mean over coordinates.

    1 where directions fill the sphere, 0 where they have collapsed to one (Chen & He 2021, "Exploring simple siamese
    representation learning", figure 2).

    Args:
        z: (N, D) float, any scale: normalised here.
    Raises:
        ValueError: if the shape is not (N, D), N < 2.
    """
    _check(z)
    return float(_directions(z).std(0, correction=0).mean() * z.shape[1] ** 0.5)


def rank_me(h: Tensor) -> float:
    """In how many dimensions features vary: the exponential of the entropy of their singular values, 1 to min(N, F).

    Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised representations by
    their rank", eq. 1, with its epsilon of 1e-7.

    Args:
        h: (N, F) float, as they are.
    Raises:
        ValueError: if the shape is not (N, F), N < 2.
    """
    _check(h)
    values = torch.linalg.svdvals(h.double())
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return float((-share * share.log()).sum().exp())


def instance_retrieval(h1: Tensor, h2: Tensor) -> float:
    """How often the other view of an image is nearer than any view of another image: a fraction in [0, 1].

    View 1 is looked for among all of view 2, by cosine similarity, and view 2 among view 1; chance is 1 / N. As near is
    not nearer: features that are all the same find nothing.

    Args:
        h1, h2: (N, F) float, any scale: normalised here. Row i of both is of image i.
    Raises:
        ValueError: if the shapes are not (N, F) twice, N < 2.
    """
    _check(h1, h2)
    a, b = F.normalize(h1.float(), dim=1), F.normalize(h2.float(), dim=1)
    own, best_of_row = a.new_empty(len(a)), a.new_empty(len(a))
    best_of_column = a.new_full((len(a),), -torch.inf)
    for start in range(0, len(a), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(a)), device=a.device)
        cosines = a[rows] @ b.T  # (rows, N): of view 1 of some images, of view 2 of all
        own[rows] = cosines[rows - start, rows]  # not by another sum: among equal features it would round otherwise
        cosines[rows - start, rows] = -torch.inf
        best_of_row[rows] = cosines.amax(1)
        best_of_column = best_of_column.maximum(cosines.amax(0))
    return float((torch.cat((best_of_row, best_of_column)) < own.repeat(2)).double().mean())


def _directions(z: Tensor) -> Tensor:
    return F.normalize(z.double(), dim=1)


def _check(*views: Tensor) -> None:
    shapes = [tuple(view.shape) for view in views]
    if any(len(shape) != 2 or shape[0] < 2 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"features {' and '.join(map(str, shapes))}: needed (N, D), N >= 2, of one shape.")
