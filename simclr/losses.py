"""The contrastive losses, pure functions of the projections: NT-Xent and its siblings.

All of them compare every projection of the global batch, whatever the number of ranks, with all others, and cost memory
that grows with the batch, not with its square: the pairs are visited in tiles (`simclr.tiles`), forward and, once more,
backward. With a process group, each rank passes its part of the batch and gets a value whose mean over ranks is the
loss of the global batch, and whose gradient, averaged over ranks as DDP does, is exactly the gradient of that loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr import distributed, tiles
from simclr.precision import Operands, is_exact, products

# Below it e^(1 / temperature) leaves the range where float32 sums of it are safe, and rounding costs 1e-5 of a logit.
_SMALLEST_IN_FLOAT32 = 1 / 64
_SMALLEST_NORM = 1e-8  # of a projection, which is divided by its norm
_DENSE = 256  # anchors up to which one matrix is faster than tiles
SMALLEST_TEMPERATURE = 0.0015  # e^(1 / temperature) is near the end of float64's range


class ContrastStats(NamedTuple):
    """What a loss says about the global batch, on every rank; detached scalars.

    Attributes:
        loss: of the global batch.
        accuracy: contrastive top-1: the part of the anchors whose positive is nearer than any negative.
        positive_cosine: mean cosine of an anchor and its positive.
        negative_cosine: mean cosine of an anchor and a negative.
    """

    loss: Tensor
    accuracy: Tensor
    positive_cosine: Tensor
    negative_cosine: Tensor


class Description(NamedTuple):
    """What people are told of a loss.

    Attributes:
        title: its name in a text.
        settings: those of SimCLR's settings that it depends on.
        chance: (candidates for an anchor's partner, margin) -> its value where all cosines are the same, so that no
            image is told from another; None where it depends on what that cosine is.
    """

    title: str
    settings: tuple[str, ...]
    chance: Callable[[int, float], float] | None


DESCRIPTIONS = {
    "nt_xent": Description("NT-Xent", ("temperature",), lambda candidates, margin: math.log(candidates)),
    "dcl": Description("DCL", ("temperature",), lambda candidates, margin: math.log(candidates - 1)),
    "nt_logistic": Description("NT-Logistic", ("temperature",), None),
    "margin_triplet": Description("margin triplet", ("margin",), lambda candidates, margin: margin),
}


def title(settings: Mapping[str, Any]) -> str:
    """The name of the loss of a SimCLR with these settings, for people; an unknown one's as it stands."""
    name = settings.get("loss", "nt_xent")
    return DESCRIPTIONS[name].title if name in DESCRIPTIONS else str(name)


def describe(settings: Mapping[str, Any]) -> str:
    """The loss of a SimCLR with the settings that matter to it, for people: "NT-Xent, temperature 0.2"."""
    parts = [title(settings), *(["semi-hard"] if settings.get("semi_hard") else [])]
    known = DESCRIPTIONS.get(settings.get("loss", "nt_xent"))
    parts += [f"{name} {settings[name]:g}" for name in (known.settings if known else ()) if name in settings]
    return ", ".join(parts + ([f"{settings['views']} views"] if settings.get("views", 2) > 2 else []))


def chance_level(settings: Mapping[str, Any]) -> float | None:
    """About what a SimCLR's loss is before it has learned: that of projections which tell no image from another.

    Args:
        settings: SimCLR's, with the global batch_size.
    Returns:
        None for a loss that has no such value, and for an unknown one.
    """
    known = DESCRIPTIONS.get(settings.get("loss", "nt_xent"))
    candidates = settings.get("views", 2) * settings.get("batch_size", 0) - 1
    if known is None or known.chance is None or candidates < 2:
        return None
    return known.chance(candidates, settings.get("margin", 0.0))


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
    settings = _Settings(gather, uneven, operands, return_stats, "nt_xent")
    return _by_sums((z1, z2), temperature, settings, tiles.EXP, _nt_xent_of_sums)


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
    settings = _Settings(gather, uneven, operands, return_stats, "dcl")
    return _by_sums((z1, z2), temperature, settings, tiles.EXP, _log_sum_minus_positive)


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
    settings = _Settings(gather, uneven, operands, return_stats, "nt_logistic", semi_hard=semi_hard)
    if semi_hard:
        return _by_semi_hard((z1, z2), temperature, settings, lambda p, s: F.softplus(-p) + F.softplus(s))
    return _by_sums((z1, z2), temperature, settings, tiles.SOFTPLUS, _logistic_of_sums)


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
    settings = _Settings(gather, uneven, operands, return_stats, "margin_triplet", margin, semi_hard)
    if semi_hard:
        return _by_semi_hard((z1, z2), 1.0, settings, lambda p, s: (s - p + margin).clamp(min=0))
    return _by_sums((z1, z2), 1.0, settings, tiles.HINGE, _margin_of_sums)


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
    settings = _Settings(gather, uneven, operands, return_stats, "sup_con")
    if labels is None:
        return _by_sums(views, temperature, settings, tiles.EXP, _nt_xent_of_sums)
    return _by_sums(views, temperature, settings, tiles.EXP, _log_sum_minus_positive, labels)


# How the loss of an anchor follows from the sums over its negatives. Each returns the loss (M,), its derivatives with
# respect to the sum, (M,), and to the anchor's positive logit, (M,); `total` is sums (M, K), `positive` is (M,).


def _nt_xent_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    # The positive is not among the summed: so a loss near 0 keeps its digits.
    excess = total[:, 0].log() - positive
    return _softplus(excess), excess.sigmoid() / total[:, 0], -excess.sigmoid()


def _log_sum_minus_positive(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    return total[:, 0].log() - positive, 1 / total[:, 0], -torch.ones_like(positive)


def _logistic_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.full_like(positive, 1 / negatives)
    return _softplus(-positive) + total[:, 0] / negatives, weight, -(-positive).sigmoid()


def _margin_of_sums(total: Tensor, positive: Tensor, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.full_like(positive, 1 / negatives)
    return total[:, 0] / negatives, weight, -total[:, 1] / negatives


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # torch's own threshold of 20 costs float64 half its digits


# What all losses share.


class _Settings(NamedTuple):
    gather: bool
    uneven: bool
    operands: Operands
    return_stats: bool
    name: str
    margin: float | None = None
    semi_hard: bool = False


class _Batch(NamedTuple):
    """The global batch, as this rank sees it.

    Attributes:
        views: V, of each image.
        n: images of this rank.
        counts: anchors of each rank, this one alone without gathering.
        rank: this rank's place in `counts`.
        temperature: tau.
    """

    views: int
    n: int
    counts: list[int]
    rank: int
    temperature: float

    @property
    def start(self) -> int:
        """Where this rank's anchors begin among the candidates."""
        return sum(self.counts[: self.rank])

    @property
    def scale(self) -> float:
        """What an anchor's loss counts in this rank's value, so that the mean over ranks is that over all anchors."""
        return len(self.counts) / sum(self.counts)

    @property
    def same_image(self) -> tuple[int, ...]:
        """0 and the distances, among this rank's anchors, from one view of an image to the others."""
        return tuple(range(0, self.views * self.n, self.n))

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows: (m, ...) -> (M, ...)."""
        return distributed.gather(x, self.counts) if len(self.counts) > 1 else x


def _by_sums(
    views: Sequence[Tensor],
    temperature: float,
    settings: _Settings,
    term: tiles.Term,
    rule: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]],
    labels: Tensor | None = None,
) -> Any:
    """A loss that follows, anchor by anchor, from the sums over its negatives and its positive logit."""
    batch = _agree(views, temperature, settings, labels)
    device = views[0].device.type
    # The products of the dense form's backward are autograd's: they round as the process, or its autocast, is set.
    dense = is_exact() and not torch.is_autocast_enabled(device) and batch.counts == [2 * batch.n]
    # 16-bit logits cost 1-2.5 % of the gradient, so the loss runs in float32 whatever the precision around it.
    with torch.autocast(device, enabled=False):
        z = _normalised(views, temperature)  # (m, D)
        if sum(batch.counts) == batch.views:  # one image, whose positive is the only candidate: nothing to tell apart
            loss, unknown = z.sum() * 0, torch.full_like(z[0, 0], torch.nan)
            cosine = (z[0] * z[1]).sum()
            return _result(loss, (loss, unknown, cosine, unknown), views[0].dtype, settings)
        if dense and len(z) <= _DENSE and rule is _nt_xent_of_sums:
            loss, positive, largest = _dense_nt_xent(z, temperature)
            stats = (loss, *_alignment(z.detach(), positive, largest, batch, batch.same_image))
            return _result(loss, stats, views[0].dtype, settings)
        if labels is None:
            positives = _same_image_logits(z, batch)  # (V - 1, m)
            positive, excluded = positives.mean(0), batch.same_image
            # More than two views: the other positives stand in the denominator beside the negatives.
            extra = positives.exp().sum(0) if batch.views > 2 else None
            rule = _log_sum_minus_positive if batch.views > 2 else rule
        else:
            positive, excluded, extra = _same_class_logit(z, labels, batch), (0,), None
        loss, *stats = _LossBySums.apply(z, positive, extra, batch, settings, term, rule, excluded)
    return _result(loss, stats, views[0].dtype, settings)


def _dense_nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """NT-Xent by the matrix of all pairs, the readable form, faster for a batch that is one tile.

    Args:
        z: (2N, D), normalised: view 1 of N images, then view 2.
        temperature: tau.
    Returns:
        The loss; without a gradient each anchor's positive logit and its largest negative one, (2N,).
    """
    logits = z @ z.T / temperature  # (2N, 2N)
    n = len(z) // 2
    positive = logits.diagonal(n).repeat(2)  # view 2 of an anchor's image stands N columns right of view 1
    not_negative = torch.zeros_like(logits, requires_grad=False)
    for k in (0, n, -n):
        not_negative.diagonal(k).fill_(-torch.inf)
    negatives = logits + not_negative
    # log(e^p + sum of e^s) - p, which keeps its digits where it is near 0.
    loss = _softplus(negatives.logsumexp(1) - positive).mean()
    return loss, positive.detach(), negatives.detach().amax(1)


class _LossBySums(torch.autograd.Function):
    """(z (m, D), positive (m,), extra (m,) or None, ...) -> this rank's loss, and what makes up ContrastStats.

    Two collectives forward: every rank's z, then two to four numbers for each anchor. None backward: the sum of an
    anchor of another rank pulls on this rank's z with a weight that those numbers give (see `tiles.gradient`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        positive: Tensor,
        extra: Tensor | None,
        batch: _Batch,
        settings: _Settings,
        term: tiles.Term,
        rule: Callable,
        excluded: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        own = slice(batch.start, batch.start + len(z))
        # 16-bit operands on CUDA are made here; elsewhere, and for tf32, the libraries round as they are told.
        operand = torch.bfloat16 if settings.operands == "bfloat16" and z.is_cuda else z.dtype
        candidates = batch.gather(z.to(operand))  # (M, D)
        tile_arguments = {
            "anchors": z.to(operand),
            "candidates": candidates,
            "start": batch.start,
            "temperature": batch.temperature,
            "term": term,
            "excluded": excluded,
        }
        thresholds = None
        if term.has_threshold:
            thresholds = z.new_zeros(len(candidates))
            thresholds[own] = positive - settings.margin
        with products(settings.operands):
            total, largest = tiles.sums(  # (m, K), (m,)
                **tile_arguments, thresholds=thresholds, with_largest=settings.return_stats
            )
        if extra is not None:
            total = total + extra[:, None]
        table = batch.gather(torch.cat((total, positive[:, None], largest[:, None]), dim=1))  # (M, K + 2)
        total, positive, largest = table[:, :-2], table[:, -2], table[:, -1]
        negatives = len(candidates) - batch.views
        losses, weights, slopes = rule(total, positive, negatives)  # (M,) each

        operands = tile_arguments.pop("anchors"), tile_arguments.pop("candidates")
        ctx.save_for_backward(*operands, weights, slopes[own], positive)
        ctx.tile_arguments, ctx.batch, ctx.settings, ctx.own = tile_arguments, batch, settings, own
        ctx.extra, ctx.dtype = extra is not None, z.dtype
        ctx.set_materialize_grads(False)
        loss = losses[own].sum() * batch.scale
        stats = ()
        if settings.return_stats:
            stats = (losses.mean(), *_alignment(candidates, positive, largest, batch, excluded))
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        anchors, candidates, weights, slopes, positive = ctx.saved_tensors
        batch, settings, grad = ctx.batch, ctx.settings, grad * ctx.batch.scale
        d_z = d_extra = None
        if ctx.needs_input_grad[0]:
            thresholds = positive - settings.margin if ctx.tile_arguments["term"].has_threshold else None
            arguments = ctx.tile_arguments | {"anchors": anchors, "candidates": candidates}
            with torch.autocast(anchors.device.type, enabled=False), products(settings.operands):
                d_z = tiles.gradient(**arguments, weights=weights, thresholds=thresholds)
            d_z.mul_(grad / batch.temperature)
        if ctx.extra:
            d_extra = weights[ctx.own] * grad
        return d_z, slopes * grad, d_extra, None, None, None, None, None


def _by_semi_hard(
    views: Sequence[Tensor],
    temperature: float,
    settings: _Settings,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A loss of each anchor's positive logit and of the nearest negative that is farther than the positive.

    Not symmetric: an anchor pulls on its negative, not the other way round. So the gradient crosses ranks: one more
    collective, backward.
    """
    batch = _agree(views, temperature, settings, None)
    with torch.autocast(views[0].device.type, enabled=False):
        z = _normalised(views, temperature)
        positive = _same_image_logits(z, batch)[0]  # (m,)
        candidates = batch.gather(z)  # (M, D)
        with torch.no_grad(), products(settings.operands):
            logit, number, largest = tiles.closest_below(
                z, candidates, batch.start, temperature, positive, batch.same_image
            )
        negative = (z * candidates[number]).sum(1) / temperature
        # Without a negative, one infinitely far: no loss and no gradient from it.
        losses = loss_of(positive, negative.where(logit > -torch.inf, -torch.inf))
        loss = losses.sum() * batch.scale
        with torch.no_grad():
            table = batch.gather(torch.stack((losses, positive, largest), dim=1))
            stats = (table[:, 0].mean(), *_alignment(candidates, table[:, 1], table[:, 2], batch, batch.same_image))
    return _result(loss, stats, views[0].dtype, settings)


def _result(loss: Tensor, stats: Sequence[Tensor], dtype: torch.dtype, settings: _Settings) -> Any:
    dtype = torch.promote_types(dtype, torch.float32)
    loss = loss.to(dtype)
    return (loss, ContrastStats(*(s.detach().to(dtype) for s in stats))) if settings.return_stats else loss


def _normalised(views: Sequence[Tensor], temperature: float) -> Tensor:
    """All projections of this rank, view after view, at length 1 and in the precision of the loss: (m, D)."""
    small = temperature < _SMALLEST_IN_FLOAT32
    dtype = torch.float64 if small or views[0].dtype == torch.float64 else torch.float32
    return _Normalise.apply(torch.cat(tuple(views)).to(dtype))


class _Normalise(torch.autograd.Function):
    """`F.normalize` of rows, whose backward makes two tensors of the size of z in place of seven."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True).clamp_(min=_SMALLEST_NORM)
        z = x / norm
        ctx.save_for_backward(z, norm)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, norm = ctx.saved_tensors
        along = (grad * z).sum(1, keepdim=True).masked_fill_(norm <= _SMALLEST_NORM, 0)
        return torch.addcmul(grad, z, along, value=-1).div_(norm)


def _same_image_logits(z: Tensor, batch: _Batch) -> Tensor:
    """Each anchor's logits with the other views of its image, (V - 1, m)."""
    by_view = z.unflatten(0, (batch.views, batch.n))
    if batch.views == 2:  # the logit of either end of a pair is the same
        return ((by_view[0] * by_view[1]).sum(1) / batch.temperature).repeat(2)[None]
    logits = [(by_view * by_view.roll(-k, 0)).sum(2) for k in range(1, batch.views)]
    return torch.stack(logits).flatten(1) / batch.temperature


def _same_class_logit(z: Tensor, labels: Tensor, batch: _Batch) -> Tensor:
    """Each anchor's mean logit with all others of its class, on any rank, (m,)."""
    labels = batch.gather(labels.to(z.device).repeat(batch.views))  # (M,)
    classes, place, count = labels.unique(return_inverse=True, return_counts=True)
    candidates = batch.gather(z.detach())
    sums = candidates.new_zeros(len(classes), z.shape[1]).index_add_(0, place, candidates)
    place = place[batch.start : batch.start + len(z)]
    others = (sums[place] - z.detach()) / (count[place, None] - 1)
    logit = (z * others).sum(1) / batch.temperature
    # Every pair counts twice, once from either end. To double the gradient spares sending it to the other end's rank.
    return 2 * logit - logit.detach()


def _alignment(
    candidates: Tensor, positive: Tensor, largest: Tensor, batch: _Batch, excluded: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive top-1, mean cosine of the positives, mean cosine of the negatives, of the global batch."""
    cosine = positive.mean() * batch.temperature
    if len(excluded) < batch.views:  # the negatives were not told from the positives
        unknown = torch.full_like(cosine, torch.nan)
        return unknown, cosine, unknown
    m = len(candidates)
    total = candidates.to(positive.dtype).sum(0).square().sum()  # of the cosines of all pairs, each with itself too
    negative = (total / m - 1 - (batch.views - 1) * cosine) / (m - batch.views)
    return (positive > largest).to(positive.dtype).mean(), cosine, negative


_NAMES = ("nt_xent", "dcl", "nt_logistic", "margin_triplet", "sup_con")

# What one rank alone may find wrong: the error, and how the other ranks put it.
_WRONG = {
    1: (ValueError, "projections or labels that do not fit"),
    2: (ValueError, "a setting out of its range"),
    3: (FloatingPointError, "projections that are not finite"),
}


def _agree(views: Sequence[Tensor], temperature: float, settings: _Settings, labels: Tensor | None) -> _Batch:
    """Checks the input, on all ranks together, so that either all of them go on or all of them raise."""
    wrong, message = _first_problem(views, temperature, settings, labels)
    n, width = views[0].shape if wrong != 1 else (0, 0)
    if not (settings.gather and distributed.world_size() > 1):
        if wrong:
            raise _WRONG[wrong][0](message)
        counts, rank = [len(views) * n], 0
    else:
        told = {
            "number of images": n,
            "width of a projection": width,
            "number of views": len(views),
            "temperature": temperature if wrong != 2 else 0,
            "margin": (settings.margin or 0) if wrong != 2 else 0,
            "bytes of a number": views[0].element_size() if wrong != 1 else 0,
            "operands": get_args(Operands).index(settings.operands) if wrong != 2 else 0,
            "loss": _NAMES.index(settings.name),
            "semi_hard": settings.semi_hard,
            "uneven": settings.uneven,
            "labels": labels is not None,
        }
        # On the host: a look at numbers on a device would wait for all that is queued there.
        everyone = distributed.exchange([wrong, *told.values()])
        if wrong:
            raise _WRONG[wrong][0](message)
        for other, row in enumerate(everyone):
            if row[0]:
                error, what = _WRONG[row[0]]
                raise error(f"rank {other} got {what}; its own error says which.")
        for column, name in enumerate(told, start=1):
            values = [row[column] for row in everyone]
            if len(set(values)) > 1 and not (column == 1 and settings.uneven):
                hint = ". Give all of them the same number, or pass uneven=True" if column == 1 else ""
                shown = ", ".join(_NAMES[int(value)] if name == "loss" else f"{value:g}" for value in values)
                raise ValueError(f"the ranks disagree about the {name}: {shown} on ranks 0 to {len(values) - 1}{hint}.")
        counts, rank = [len(views) * int(row[1]) for row in everyone], distributed.rank()
    if sum(counts) == len(views) and settings.name != "nt_xent":
        raise ValueError(f"{settings.name} got a batch of one image, which has no negatives. It needs 2 at least.")
    return _Batch(len(views), n, counts, rank, temperature)


def _first_problem(
    views: Sequence[Tensor], temperature: float, settings: _Settings, labels: Tensor | None
) -> tuple[int, str]:
    """Its key in _WRONG and the message of this rank; 0 if nothing is wrong here."""
    if not all(isinstance(view, Tensor) and view.is_floating_point() for view in views):
        return 1, "projections must be tensors of floating point."
    shapes = [tuple(view.shape) for view in views]
    if len(shapes) < 2 or len(shapes[0]) != 2 or len(set(shapes)) > 1 or shapes[0][0] < 1:
        listed = " and ".join(map(str, shapes)) or "()"
        return 1, f"projections of shapes {listed} do not fit. Two views or more, all of one shape (N, D), are needed."
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != shapes[0][:1]):
        got = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"of type {type(labels).__name__}"
        return 1, f"labels {got} do not fit projections of shape {shapes[0]}: a tensor of one an image is needed."
    if not isinstance(temperature, Real):
        return 2, f"temperature is a {type(temperature).__name__}. Pass a plain number: its gradient is not given."
    if not temperature >= SMALLEST_TEMPERATURE or temperature == float("inf"):
        return 2, f"temperature={temperature} is not {SMALLEST_TEMPERATURE} or more. Values from 0.05 to 1 are usual."
    if settings.margin is not None and not 0 < settings.margin < float("inf"):
        return 2, f"margin={settings.margin} is not positive. Cosines lie between -1 and 1."
    if settings.operands not in get_args(Operands):
        return 2, f"operands={settings.operands!r} is none of {', '.join(get_args(Operands))}."
    if views[0].device.type == "mps" and (temperature < _SMALLEST_IN_FLOAT32):
        return 2, f"temperature={temperature} needs float64, which this device lacks. Use {_SMALLEST_IN_FLOAT32}."
    if bad := _not_finite(views):
        return 3, f"{bad} of {len(views) * len(views[0])} projections are NaN or infinite."
    return 0, ""


def _not_finite(views: Sequence[Tensor]) -> int:
    """How many projections are not finite, on a CPU: a look at another device's would wait for it."""
    if views[0].device.type != "cpu":
        return 0
    # Their sum costs a tenth of a look at each, and is finite only if all of them are.
    if all(view.detach().sum(dtype=torch.float64).isfinite() for view in views):
        return 0
    return sum(int((~view.detach().isfinite()).any(1).sum()) for view in views)
