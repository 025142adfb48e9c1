"""The contrastive loss, a pure function of the projections."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import distributed


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, *, gather: bool = True) -> Tensor:
    """NT-Xent loss between two batches of projections (Chen et al. 2020, eq. 1).

    Every projection is an anchor: its positive is the other view of its image, its negatives are all other projections
    of the global batch. With a process group, each rank passes its part of the batch, of the same size on every rank.
    The gradient through the gather is summed over ranks, so that the mean over ranks (which DDP takes) is exactly the
    gradient of the loss of the global batch.

    Args:
        z1, z2: projections of view 1 and view 2 of the same N images, (N, D), any scale: normalised here.
        temperature: tau > 0, divides the cosine similarities.
        gather: take the negatives from all ranks; otherwise from this rank only, a different, smaller problem.
    Returns:
        Scalar, float32 (float64 for float64 input): mean over the 2N local anchors. Its mean over ranks is the loss of
        the global batch. (The loss in google-research/simclr is twice this mean.)
    Raises:
        ValueError: if the shapes differ or are not (N, D), N < 1, the batch that gives the negatives is one image, or
            temperature <= 0.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 1:
        raise ValueError(
            f"nt_xent got projections of shapes {tuple(z1.shape)} and {tuple(z2.shape)}. Both need one shape (N, D)."
        )
    if len(z1) * (distributed.world_size() if gather else 1) < 2:
        raise ValueError(
            "nt_xent got a batch of one image, which has no negatives: its loss is 0. It needs 2 at least."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive. Values from 0.05 to 1 are usual.")
    # 16-bit logits cost 1-2.5 % of the gradient, so the loss runs in float32 whatever the precision around it.
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat((z1, z2))
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1, eps=1e-8)  # (2N, D)
        return _dense_nt_xent(
            z, distributed.gather(z) if gather else z, temperature, distributed.rank() if gather else 0
        )


def _dense_nt_xent(anchors: Tensor, candidates: Tensor, temperature: float, rank: int) -> Tensor:
    """NT-Xent from all logits at once: anchors (2N, D) are rows rank * 2N ... of candidates (2N * world_size, D)."""
    logits = anchors @ candidates.T / temperature  # (2N, 2N * world_size)
    rows = torch.arange(len(anchors), device=anchors.device)
    start = rank * len(anchors)
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself[rows, start + rows] = True
    positive = start + rows.roll(len(anchors) // 2)  # view 2 of an anchor's image stands N rows below view 1
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positive)
