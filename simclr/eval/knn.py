"""Weighted kNN classification of frozen features (Wu et al. 2018, "Unsupervised feature learning via non-parametric
instance discrimination", section 3.4): no training, so it says what the features are worth as they are."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.eval.features import check_split
from simclr.eval.protocol import FrozenFeatures, Outcome

# Votes are counted in units of 2^-40 of the nearest neighbour's: integer sums do not depend on their order, so the
# result is the same on every device, and a tie is a tie.
_VOTE_UNIT = 2.0**40
_K = 200  # Wu et al. 2018, whose classes have 1 300 images (ImageNet) and 5 000 (CIFAR-10)
_SIMILARITY_UNIT = 2.0**22  # similarities that float32 can barely tell apart are ties


def default_k(train_labels: Tensor) -> int:
    """Neighbours that vote unless told otherwise: 200 (Wu et al. 2018), or as many as a class has images if fewer.

    Of more than its class has, neighbours of other classes take part even where the features are perfect. What counts
    is the median class: a single class of two images must not set k for all the others.

    Args:
        train_labels: (N,) integer.
    """
    sizes = train_labels.bincount()
    return min(_K, int(sizes[sizes > 0].median()))


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """The k rows of the bank of highest cosine similarity to each query, nearest first; of equal ones the earlier.

    Args:
        queries: (M, F) float, any scale: normalised here.
        bank: (N, F) float, likewise. It says on which device to compute.
        k: 1 .. N.
    Returns:
        (M, k) int64, rows of the bank, on its device.
    """
    return torch.cat([near for _, near in _nearest_in_chunks(queries, bank, k)])


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    *,
    num_classes: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Class of each test image by the weighted vote of its k nearest training images.

    Nearness is cosine similarity s, a neighbour's vote weighs exp(s / temperature). Of equally near training images
    the one with the lower number is taken, of classes with equal votes the lower.

    Args:
        train_features: (N, F) float, any scale: normalised here. It says on which device to compute.
        train_labels: (N,) integer.
        test_features: (M, F) float.
        k: number of neighbours, 1 .. N. More than N is refused, not capped: the result would carry the name of
            another protocol.
        temperature: > 0.
        num_classes: C; by default one more than the largest training label.
        chunk_size: test images compared at once; by default as many as keep the similarities at 2^22 numbers. Beyond
            the rounding of float32 the result does not depend on it.
    Returns:
        (M,) int64 on the CPU.
    Raises:
        ValueError: if features and labels do not belong together, k or temperature is out of range.
    """
    return knn_predictions(
        train_features, train_labels, test_features, [k], temperature, num_classes=num_classes, chunk_size=chunk_size
    )[k]


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    temperature: float = 0.1,
    *,
    num_classes: int | None = None,
    chunk_size: int | None = None,
) -> dict[int, Tensor]:
    """What `knn_predict` gives for each of several k, from one search for the nearest.

    Args:
        ks: numbers of neighbours, each 1 .. N.
        train_features, train_labels, test_features, temperature, num_classes, chunk_size: as for `knn_predict`.
    Returns:
        (M,) int64 on the CPU for each k.
    Raises:
        ValueError: if features and labels do not belong together, a k or temperature is out of range.
    """
    # The test labels play no part; the first training label stands in to be checked.
    num_classes = check_split(
        train_features, train_labels, test_features, train_labels[:1].expand(len(test_features)), num_classes
    )
    for k in ks:
        _check_vote(k, temperature, len(train_features))
    bank_labels = train_labels.to(train_features.device, torch.int64)
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for similarity, near in _nearest_in_chunks(test_features, train_features, max(ks), chunk_size):
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = (votes * _VOTE_UNIT).round().to(torch.int64)
        classes = bank_labels[near]  # (m, k)
        for k, found in predictions.items():
            tally = torch.zeros(len(near), num_classes, dtype=torch.int64, device=near.device)
            tally.scatter_add_(1, classes[:, :k], votes[:, :k])  # (m, C)
            found.append(tally.argmax(1).cpu())
    return {k: torch.cat(found) for k, found in predictions.items()}


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 200,
    temperature: float = 0.1,
    *,
    num_classes: int | None = None,
    chunk_size: int | None = None,
) -> float:
    """Fraction of test images that `knn_predict` classifies correctly.

    Args:
        train_features, train_labels, test_features, k, temperature, num_classes, chunk_size: as for `knn_predict`.
        test_labels: (M,) integer; a class that training lacks is refused.
    Returns:
        A fraction in [0, 1].
    Raises:
        ValueError: if features and labels do not belong together, k or temperature is out of range.
    """
    check_split(train_features, train_labels, test_features, test_labels, num_classes)
    predictions = knn_predict(
        train_features, train_labels, test_features, k, temperature, num_classes=num_classes, chunk_size=chunk_size
    )
    return int((predictions == test_labels.cpu()).sum()) / len(test_labels)


def knn(frozen: FrozenFeatures, *, k: int | None = None, temperature: float = 0.1) -> Outcome:
    """The protocol: the weighted vote of the k nearest training images.

    Args:
        frozen: the encoder and its features.
        k: neighbours that vote in kNN. If not given: 200, or the training images of the median class if fewer.
        temperature: of the kNN vote, exp(similarity / temperature).
    """
    k = default_k(frozen.train[1]) if k is None else k
    predictions = knn_predict(*frozen.train, frozen.test[0], k=k, temperature=temperature)
    return Outcome(predictions, about={"k": k, "temperature": temperature})


def knn_of_several(
    frozen: FrozenFeatures, *, k: int | list[int] | None = None, temperature: float = 0.1
) -> dict[str, Outcome]:
    """The protocol `knn` with several k, from one search.

    Args:
        frozen: the encoder and its features.
        k: neighbours that vote; a list of numbers for a result of each. If not given: 200, or the training images of
            the median class if fewer.
        temperature: of the vote, exp(similarity / temperature).
    """
    ks = [default_k(frozen.train[1])] if k is None else [k] if isinstance(k, int) else sorted(set(k))
    if not ks:
        raise ValueError("k is an empty list. Give one number at least.")
    train = frozen.train[0].to(frozen.device), frozen.train[1]
    found = knn_predictions(*train, frozen.test[0], ks, temperature)
    about = {"temperature": temperature}
    return {f"k={k}": Outcome(found[k], about={"k": k, **about}, settings=about) for k in ks}


def _nearest_in_chunks(
    queries: Tensor, bank: Tensor, k: int, chunk_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarity (m, k) float64, descending, in steps of 2^-22, and rows of the bank (m, k), some queries at a time."""
    size, device = len(bank), bank.device
    bank = F.normalize(bank.float(), dim=1)
    later = size - 1 - torch.arange(size, device=device)  # (N,): larger for lower numbers, so that these win
    for chunk in queries.split(chunk_size or max(1, 2**22 // size)):
        similarity = F.normalize(chunk.to(device).float(), dim=1) @ bank.T  # (m, N)
        # One integer per pair that orders by similarity, then by number: topk alone breaks ties as it likes.
        key = similarity.mul_(_SIMILARITY_UNIT).round_().to(torch.int64).mul_(size).add_(later)
        key = key.topk(k, dim=1).values  # (m, k), descending
        yield (key // size).double() / _SIMILARITY_UNIT, size - 1 - key % size


def _check_vote(k: int, temperature: float, size: int) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"k={k} with {size} training images: needed 1 to {size}, for example k={min(200, size)}.")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: needed > 0.")
