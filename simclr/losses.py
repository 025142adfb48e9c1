"""The contrastive losses, pure functions of the projections: NT-Xent as its paper writes it, and its siblings.

They are small where projections of the same image lie close together and far from all others. Each projection is an
anchor in turn: its positive is the other view of its image, its negatives are all others of the global batch, which is
that of all ranks (processes) together. `dense_nt_xent` says all of it in a few lines, with the matrix of all pairs. The
functions below it need no room for that: `simclr.contrast.engine` sums a term of the logits of an anchor's negatives
(e^s for NT-Xent), tile by tile; a rule, at the end of this page, makes the anchor's loss of that sum and its positive.
On several ranks, the mean of what they return, and the mean of the gradients, as DDP takes it, are those of the whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.contrast import tiles
from simclr.contrast.agree import Settings
from simclr.contrast.engine import ContrastStats, loss_by_semi_hard, loss_by_sums, loss_of_dots, loss_towards
from simclr.precision import Operands


def dense_nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """NT-Xent (Chen et al. 2020, eq. 1) of a whole batch at once: the readable form, and the fastest for a small one.

    The loss of an anchor i, whose positive is the other view j of its image, is the cross-entropy of finding j among
    all projections but i itself: -log(exp(s_ij) / sum of exp(s_ik) over all k other than i). A logit s is a cosine
    divided by the temperature: the lower that is, the more the nearest negatives count.

    Args:
        z: (2N, D) projections of length 1: view 1 of N images, then view 2.
        temperature: tau.
    Returns:
        The mean over the 2N anchors; without a gradient, for statistics, each anchor's positive logit and its largest
        negative one, (2N,).
    """
    logits = z @ z.T / temperature  # (2N, 2N)
    n = len(z) // 2
    # View 2 of an image stands N columns right of view 1; the logits of the two ends of a pair are the same.
    positive = logits.diagonal(n).repeat(2)  # (2N,)
    not_negative = torch.zeros_like(logits, requires_grad=False)
    for k in (0, n, -n):  # the anchor itself, its positive if that is view 2, if it is view 1
        not_negative.diagonal(k).fill_(-torch.inf)
    negatives = logits + not_negative
    # With p the positive logit, log(e^p + sum of e^s) - p = log(1 + sum of e^s / e^p), which keeps its digits near 0.
    loss = _softplus(negatives.logsumexp(1) - positive).mean()
    return loss, positive.detach(), negatives.detach().amax(1)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    *,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """NT-Xent loss between two batches of projections (Chen et al. 2020, eq. 1).

    Every projection is an anchor: its positive is the other view of its image, its negatives are all other projections
    of the global batch.

    Args:
        z1, z2: projections of view 1 and view 2 of the same N images, (N, D), of lengths from 1e-8 to 1e18: normalised
            here.
        temperature: tau, divides the cosine similarities; 0.0015 at least.
        gather: take the negatives from all ranks; otherwise from this rank only, a different, smaller problem. All
            ranks must say the same.
        uneven: let ranks hold different N; each image then counts the same, on whatever rank it is.
        operands: how matrix products round what they multiply: tf32 and bfloat16 are faster where a device has them and
            cost about 0.05 % and 0.05 to 0.5 % of the gradient. The positive pairs are float32 in any case.
        return_stats: return (loss, ContrastStats).
    Returns:
        Scalar, float32 (float64 for float64 input), also under autocast: mean over the 2N local anchors; 0 for a batch
            of one image. Its mean over ranks is the loss of the global batch. (The loss in google-research/simclr is
            twice this mean.) With `uneven` it is that mean times N * world_size / (N of all ranks), so that the mean
            over ranks stays the global loss.
    Raises:
        ValueError: on every rank, if the shapes differ or are not (N, D), N < 1, the temperature is out of range or not
            a plain number (its gradient is not given), or ranks disagree about N (without `uneven`), D, the temperature
            or the loss.
        FloatingPointError: on every rank, if CPU projections are not finite. (On other devices the loss is NaN instead:
            looking would wait for the device.)
    """
    settings = Settings(gather, uneven, operands, return_stats, "nt_xent")
    return loss_by_sums((z1, z2), temperature, settings, tiles.EXP, _nt_xent_of_sums, dense=dense_nt_xent)


def nt_xent_unnormalized(
    z1: Tensor, z2: Tensor, temperature: float, *, gather: bool = True, uneven: bool = False, return_stats: bool = False
) -> Tensor | tuple[Tensor, ContrastStats]:
    """NT-Xent without l2 norm (Chen et al. 2020, table 5): logits are dot products divided by the temperature, there 10
    and 100. To compare with: it holds a matrix of 2N x (2N of all ranks), whose products round as torch is set.

    Arguments, result and errors are those of `nt_xent`, for projections of any length, two images at least; statistics
    are of cosines, but for the accuracy.
    """
    settings = Settings(gather, uneven, "float32", return_stats, "nt_xent_unnormalized")
    return loss_of_dots((z1, z2), temperature, settings)


def dcl(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    *,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """Decoupled contrastive loss (Yeh et al. 2022, eq. 6): NT-Xent whose denominator leaves out the positive pair.

    It is stronger than NT-Xent in small batches. Arguments, result and errors are those of `nt_xent`; like all siblings
    it refuses a batch of one image.
    """
    settings = Settings(gather, uneven, operands, return_stats, "dcl")
    return loss_by_sums((z1, z2), temperature, settings, tiles.EXP, _log_sum_minus_positive)


def nt_logistic(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    *,
    semi_hard: bool = False,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """NT-Logistic loss (Chen et al. 2020, table 2): -log sigmoid(s+) - mean over negatives of log sigmoid(-s-).

    The paper leaves open how the negatives are weighed; here their mean weighs as much as the positive.

    Args:
        semi_hard: one negative for each anchor, the nearest of those that are farther than the positive (Schroff et al.
            2015); an anchor without one has its positive's term only.
        z1, z2, temperature, gather, uneven, operands, return_stats: as for `nt_xent`, as are result and errors.
    """
    settings = Settings(gather, uneven, operands, return_stats, "nt_logistic", semi_hard=semi_hard)
    if semi_hard:
        return loss_by_semi_hard((z1, z2), temperature, settings, lambda p, s: F.softplus(-p) + F.softplus(s))
    return loss_by_sums((z1, z2), temperature, settings, tiles.SOFTPLUS, _logistic_of_sums)


def margin_triplet(
    z1: Tensor,
    z2: Tensor,
    margin: float,
    *,
    semi_hard: bool = False,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """Margin triplet loss (Chen et al. 2020, table 2): mean over negatives of max(cos- - cos+ + margin, 0).

    Args:
        margin: in cosines, > 0.
        semi_hard: as for `nt_logistic`; an anchor without a semi-hard negative has no loss.
        z1, z2, gather, uneven, operands, return_stats: as for `nt_xent`, as are result and errors.
    """
    settings = Settings(gather, uneven, operands, return_stats, "margin_triplet", margin, semi_hard)
    if semi_hard:
        return loss_by_semi_hard((z1, z2), 1.0, settings, lambda p, s: (s - p + margin).clamp(min=0))
    return loss_by_sums((z1, z2), 1.0, settings, tiles.HINGE, _margin_of_sums)


def sup_con(
    views: Sequence[Tensor],
    temperature: float,
    labels: Tensor | None = None,
    *,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """NT-Xent for any number of views, and supervised: all views of an image, or of a class, attract each other.

    The loss of an anchor is the mean over its positives p of -log(e^(s_p) / sum of e^(s_a) over all other a)
    (Khosla et al. 2020, eq. 2). With two views and no labels that is `nt_xent`.

    Args:
        views: V >= 2 batches of projections of the same N images, (N, D) each.
        labels: (N,) integer classes; if not given, each image is a class of its own.
        temperature, gather, uneven, operands: as for `nt_xent`, as are result and errors.
        return_stats: as for `nt_xent`; with labels, accuracy and negative_cosine are NaN.
    """
    settings = Settings(gather, uneven, operands, return_stats, "sup_con")
    if labels is None and len(views) == 2:
        return loss_by_sums(views, temperature, settings, tiles.EXP, _nt_xent_of_sums, dense=dense_nt_xent)
    return loss_by_sums(views, temperature, settings, tiles.EXP, _log_sum_minus_positive, labels)


def nt_xent_to_large(
    large: Sequence[Tensor],
    small: Sequence[Tensor],
    temperature: float,
    *,
    gather: bool = True,
    uneven: bool = False,
    operands: Operands = "float32",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastStats]:
    """NT-Xent of multi-crop, every view compared with large ones alone: small crops are not, among one another.

    All views are anchors: L + S of each image. An anchor's positives are the large views of its image, but itself, its
    negatives those of all others, and its loss is that of `sup_con` (with S = 0 it is `sup_con`). SwAV (Caron et al.
    2020, section 3.2) pairs views so, for another loss.

    Args:
        large, small: L >= 2 and S >= 1 batches of projections of the same N images, (N, D) each.
        temperature, gather, uneven, operands, return_stats: as for `nt_xent`, as are result and errors.
    """
    among = sup_con(large, temperature, gather=gather, uneven=uneven, operands=operands, return_stats=True)
    settings = Settings(gather, uneven, operands, True, f"to_large_{len(large)}")
    views = (*large, *small)
    towards = loss_towards(views, len(large), temperature, settings, tiles.EXP, _log_sum_minus_positive)
    part = len(large) / len(views)  # of the anchors
    loss, *stats = (
        part * a + (1 - part) * b for a, b in zip((among[0], *among[1]), (towards[0], *towards[1]), strict=True)
    )
    return (loss, ContrastStats(*stats)) if return_stats else loss


# The rules: from the sums of the term over an anchor's negatives (M, K), its positive logit (M,) and how many negatives
# it has, the anchor's loss and what the backward pass needs, its derivatives by the sum and by the positive logit.


def _nt_xent_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    # The positive is not among the summed: so a loss near 0 keeps its digits.
    excess = total[:, 0].log() - positive
    return _softplus(excess), excess.sigmoid() / total[:, 0], -excess.sigmoid()


def _log_sum_minus_positive(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    return total[:, 0].log() - positive, 1 / total[:, 0], -torch.ones_like(positive)


def _logistic_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = _softplus(-positive) + total[:, 0] / negatives
    return loss, torch.full_like(positive, 1 / negatives), -(-positive).sigmoid()


def _margin_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    return total[:, 0] / negatives, torch.full_like(positive, 1 / negatives), -total[:, 1] / negatives


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # torch's own threshold of 20 costs float64 half its digits
