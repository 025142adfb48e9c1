"""Features whose images several ranks share: each takes whole batches in a row, and all have the rows of all.

So a batch has the images that it has on one rank, and no image is computed twice or to fill a batch up: the features
are those of one rank, bit for bit where all compute alike.
"""

import torch
from torch import Tensor, nn

from simclr.data import EvalLoader
from simclr.distributed import exchange_objects, gather, on_every_rank, rank, world_size
from simclr.eval.duplicates import HashedImages
from simclr.eval.features import extract_features


def features_on_ranks(
    encoder: nn.Module, images: EvalLoader | HashedImages, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """As `extract_features`, by all ranks together; each calls it.

    Args:
        encoder: as there, the same on every rank.
        images: the same on every rank. Of hashed ones the hashes are those of all images afterwards.
        device: where this rank computes.
    Returns:
        features (N, F) float32 and labels (N,) int64, on the CPU of every rank.
    Raises:
        ValueError, RuntimeError: as there; on all ranks what one of them meets.
    """
    if world_size() == 1:
        return extract_features(encoder, images, device=device)
    loader = images.loader if isinstance(images, HashedImages) else images
    if len(loader.index) == 0:
        raise ValueError("the loader gave no images.")
    own = loader.share(rank(), world_size())
    hashed = HashedImages(own)

    def work() -> Tensor | None:  # None on a rank without a batch, which does not know how wide features are
        if len(own.index) == 0:
            return None
        return extract_features(encoder, hashed if isinstance(images, HashedImages) else own, device=device)[0]

    features = on_every_rank(work)
    shapes = exchange_objects(None if features is None else tuple(features.shape))
    width = next(shape[1] for shape in shapes if shape is not None)
    rows = gather(
        torch.empty(0, width) if features is None else features, [0 if shape is None else shape[0] for shape in shapes]
    )
    if isinstance(images, HashedImages):
        images.digests = bytearray(b"".join(exchange_objects(bytes(hashed.digests))))
    return rows, loader.labels


def hash_on_ranks(images: HashedImages) -> None:
    """A pass over images for their hashes alone, which are those of all images afterwards, on every rank."""
    own = HashedImages(images.loader.share(rank(), world_size())) if world_size() > 1 else images

    def work() -> None:
        if len(own.loader.index):
            for _ in own:
                pass

    on_every_rank(work)
    if own is not images:
        images.digests = bytearray(b"".join(exchange_objects(bytes(own.digests))))
