"""A contrastive loss of the global batch: its value on every rank, and the gradient of it with respect to this rank's.

Each rank gathers the projections of all, sums a term over the pairs of its own anchors, tile by tile, and gathers those
few numbers for each anchor: from them follow every anchor's loss and how much each pair pulls. No rank ever holds the
matrix of all pairs, and nothing is sent backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simclr.contrast import tiles
from simclr.contrast.agree import SMALLEST_IN_FLOAT32, GlobalBatch, Settings, agree
from simclr.precision import is_exact, rounding

_SMALLEST_NORM = 1e-8  # of a projection, which is divided by its norm
DENSE_ANCHORS = 256  # up to which one matrix is faster than tiles

# (sums (M, K), positive logits (M,), negatives of each) -> losses and their derivatives by sum and by positive, (M,).
Rule = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
# (z (2N, D), temperature) -> the loss; positive and largest negative logits (2N,).
DenseForm = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]


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


def loss_by_sums(
    views: Sequence[Tensor],
    temperature: float,
    settings: Settings,
    term: tiles.Term,
    rule: Rule,
    labels: Tensor | None = None,
    dense: DenseForm | None = None,
) -> Any:
    """A loss that follows, anchor by anchor, from the sums over its negatives and its positive logit.

    Args:
        views: V batches of projections, (N, D) each.
        temperature: tau.
        settings: see `Settings`.
        term: f of a logit, whose sums over an anchor's negatives are taken.
        rule: how an anchor's loss follows from them.
        labels: (N,) integer classes, or None: each image is a class of its own.
        dense: the same loss of two views by the matrix of all pairs, for a batch that is one tile.
    Returns:
        The loss, or (loss, ContrastStats) where the settings say so.
    """
    batch = agree(views, temperature, settings, labels)
    device = views[0].device.type
    # The products of the dense form's backward are autograd's: they round as the process, or its autocast, is set.
    as_one = is_exact() and not torch.is_autocast_enabled(device) and batch.counts == [2 * batch.n]
    # 16-bit logits cost 1-2.5 % of the gradient, so the loss runs in float32 whatever the precision around it.
    with torch.autocast(device, enabled=False):
        z = _normalised(views, temperature)  # (m, D)
        if sum(batch.counts) == batch.views:  # one image, whose positive is the only candidate: nothing to tell apart
            loss, unknown = z.sum() * 0, torch.full_like(z[0, 0], torch.nan)
            cosine = (z[0] * z[1]).sum()
            return _result(loss, (loss, unknown, cosine, unknown), views[0].dtype, settings)
        if dense is not None and as_one and len(z) <= DENSE_ANCHORS and batch.views == 2:
            loss, positive, largest = dense(z, temperature)
            stats = (loss, *_alignment(z.detach(), positive, largest, batch, batch.same_image))
            return _result(loss, stats, views[0].dtype, settings)
        if labels is None:
            positives = _same_image_logits(z, batch)  # (V - 1, m)
            positive, left_out = positives.mean(0), batch.same_image
            # More than two views: the other positives stand in the denominator beside the negatives.
            other_positives = positives.exp().sum(0) if batch.views > 2 else None
        else:
            positive, left_out, other_positives = _same_class_logit(z, labels, batch), (0,), None
        loss, *stats = _LossBySums.apply(z, positive, other_positives, batch, settings, term, rule, left_out)
    return _result(loss, stats, views[0].dtype, settings)


class _LossBySums(torch.autograd.Function):
    """(z (m, D), positive (m,), other_positives (m,) or None, ...) -> this rank's loss, and the parts of ContrastStats.

    Two collectives forward: every rank's z, then two to four numbers for each anchor. None backward: the sum of an
    anchor of another rank pulls on this rank's z with a weight that those numbers give (see `tiles.gradient`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        positive: Tensor,
        other_positives: Tensor | None,
        batch: GlobalBatch,
        settings: Settings,
        term: tiles.Term,
        rule: Callable,
        left_out: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        own = slice(batch.start, batch.start + len(z))
        # 16-bit operands on CUDA are made here; elsewhere, and for tf32, the libraries round as they are told.
        operand = torch.bfloat16 if settings.operands == "bfloat16" and z.is_cuda else z.dtype
        candidates = batch.gather(z.to(operand))  # (M, D)
        tile_arguments: dict[str, Any] = {
            "anchors": z.to(operand),
            "candidates": candidates,
            "start": batch.start,
            "temperature": batch.temperature,
            "term": term,
            "left_out": left_out,
        }
        thresholds = None
        if term.has_threshold:
            assert settings.margin is not None  # the losses with a threshold have one
            thresholds = z.new_zeros(len(candidates))
            thresholds[own] = positive - settings.margin
        with rounding(settings.operands):
            total, largest = tiles.sums(  # (m, K), (m,)
                **tile_arguments, thresholds=thresholds, with_largest=settings.return_stats
            )
        if other_positives is not None:
            total = total + other_positives[:, None]
        table = batch.gather(torch.cat((total, positive[:, None], largest[:, None]), dim=1))  # (M, K + 2)
        total, positive, largest = table[:, :-2], table[:, -2], table[:, -1]
        negatives = len(candidates) - batch.views
        losses, weights, slopes = rule(total, positive, negatives)  # (M,) each

        operands = tile_arguments.pop("anchors"), tile_arguments.pop("candidates")
        ctx.save_for_backward(*operands, weights, slopes[own], positive)
        ctx.tile_arguments, ctx.batch, ctx.settings, ctx.own = tile_arguments, batch, settings, own
        ctx.has_other_positives, ctx.dtype = other_positives is not None, z.dtype
        ctx.set_materialize_grads(False)
        loss = losses[own].sum() * batch.scale
        stats: tuple[Tensor, ...] = ()
        if settings.return_stats:
            stats = (losses.mean(), *_alignment(candidates, positive, largest, batch, left_out))
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        anchors, candidates, weights, slopes, positive = ctx.saved_tensors
        batch, settings, grad = ctx.batch, ctx.settings, grad * ctx.batch.scale
        d_z = d_other_positives = None
        if ctx.needs_input_grad[0]:
            thresholds = positive - settings.margin if ctx.tile_arguments["term"].has_threshold else None
            arguments = ctx.tile_arguments | {"anchors": anchors, "candidates": candidates}
            with torch.autocast(anchors.device.type, enabled=False), rounding(settings.operands):
                d_z = tiles.gradient(**arguments, weights=weights, thresholds=thresholds)
            d_z.mul_(grad / batch.temperature)
        if ctx.has_other_positives:
            d_other_positives = weights[ctx.own] * grad
        return d_z, slopes * grad, d_other_positives, None, None, None, None, None


def loss_towards(
    views: Sequence[Tensor], large: int, temperature: float, settings: Settings, term: tiles.Term, rule: Rule
) -> Any:
    """A loss of the later views of each image as anchors, whose candidates are the first ones alone.

    Args:
        views: V batches of projections, (N, D) each.
        large: L < V, how many of them, from the first on, are candidates: L positives for each anchor.
        temperature, settings, term, rule: as for `loss_by_sums`; the positive logit is the mean of L.
    Returns:
        The loss, or (loss, ContrastStats) where the settings say so.
    """
    batch = agree(views, temperature, settings, None)
    small = len(views) - large
    of_large = batch._replace(views=large, counts=[count // batch.views * large for count in batch.counts])
    of_small = batch._replace(views=small, counts=[count // batch.views * small for count in batch.counts])
    with torch.autocast(views[0].device.type, enabled=False):
        candidates, anchors = (_normalised(part, temperature) for part in (views[:large], views[large:]))
        by_view = anchors.unflatten(0, (small, batch.n))
        logits = [(by_view * view).sum(2).flatten() for view in candidates.unflatten(0, (large, batch.n))]
        positives = torch.stack(logits) / temperature  # (L, m)
        loss, *stats = _LossTowards.apply(
            anchors, candidates, positives.mean(0), positives.exp().sum(0), of_small, of_large, settings, term, rule
        )
    return _result(loss, stats, views[0].dtype, settings)


class _LossTowards(torch.autograd.Function):
    """(anchors (m, D), this rank's candidates (l, D), positive (m,), positives (m,), ...) -> as `_LossBySums`.

    Three collectives forward: every rank's candidates, its anchors, and four numbers for each anchor. None backward: an
    anchor's pull on the candidates of another rank is worked out there, from the anchor and its weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        positive: Tensor,
        positives: Tensor,
        of_anchors: GlobalBatch,
        of_candidates: GlobalBatch,
        settings: Settings,
        term: tiles.Term,
        rule: Rule,
    ) -> tuple[Tensor, ...]:
        operand = torch.bfloat16 if settings.operands == "bfloat16" and anchors.is_cuda else anchors.dtype
        own_anchors, own_candidates = anchors.to(operand), candidates.to(operand)
        all_candidates = of_candidates.gather(own_candidates)  # (L * images, D)
        all_anchors = of_anchors.gather(own_anchors)  # (S * images, D)
        # Candidate i + k is of the image of anchor i, for these k.
        same_image = tuple(k * of_anchors.n for k in range(1 - of_anchors.views, of_candidates.views))
        shared: dict[str, Any] = {"temperature": of_anchors.temperature, "term": term}
        with rounding(settings.operands):
            total, largest = tiles.sums(
                own_anchors,
                all_candidates,
                of_candidates.start,
                left_out=same_image,
                with_largest=settings.return_stats,
                own=len(candidates),
                **shared,
            )
        negatives = len(all_candidates) - of_candidates.views
        losses, weights, slopes = rule(total + positives[:, None], positive, negatives)  # (m,) each
        table = of_anchors.gather(torch.stack((losses, weights, positive, largest), dim=1))  # (S * images, 4)
        ctx.save_for_backward(own_anchors, own_candidates, all_anchors, all_candidates, weights, slopes, table[:, 1])
        ctx.shared, ctx.same_image, ctx.settings = shared, same_image, settings
        ctx.of_anchors, ctx.of_candidates = of_anchors, of_candidates
        ctx.set_materialize_grads(False)
        stats: tuple[Tensor, ...] = ()
        if settings.return_stats:
            at, best = table[:, 2], table[:, 3]
            cosine = at.mean() * of_anchors.temperature
            pairs = all_anchors.to(losses.dtype).sum(0) @ all_candidates.to(losses.dtype).sum(0)
            mean_of_all = pairs / len(all_anchors) / len(all_candidates)
            negative = (mean_of_all * len(all_candidates) - of_candidates.views * cosine) / max(1, negatives)
            stats = (table[:, 0].mean(), (at > best).to(losses.dtype).mean(), cosine, negative)
        ctx.mark_non_differentiable(*stats)
        return losses.sum() * of_anchors.scale, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        own_anchors, own_candidates, all_anchors, all_candidates, weights, slopes, all_weights = ctx.saved_tensors
        grad = grad * ctx.of_anchors.scale
        mirrored = tuple(-k for k in ctx.same_image)
        with torch.autocast(own_anchors.device.type, enabled=False), rounding(ctx.settings.operands):
            d_anchors = tiles.gradient(
                own_anchors,
                all_candidates,
                ctx.of_candidates.start,
                weights=weights.new_zeros(len(all_candidates)),
                left_out=ctx.same_image,
                own=len(own_candidates),
                anchor_weights=weights,
                **ctx.shared,
            )
            d_candidates = tiles.gradient(
                own_candidates,
                all_anchors,
                ctx.of_anchors.start,
                weights=all_weights.contiguous(),
                left_out=mirrored,
                own=len(own_anchors),
                anchor_weights=weights.new_zeros(len(own_candidates)),
                **ctx.shared,
            )
        for part in (d_anchors, d_candidates):
            part.mul_(grad / ctx.of_anchors.temperature)
        return d_anchors, d_candidates, slopes * grad, weights * grad, None, None, None, None, None


def loss_by_semi_hard(
    views: Sequence[Tensor],
    temperature: float,
    settings: Settings,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A loss of each anchor's positive logit and of the nearest negative that is farther than the positive.

    Not symmetric: an anchor pulls on its negative, not the other way round. So the gradient crosses ranks: one more
    collective, backward.
    """
    batch = agree(views, temperature, settings, None)
    with torch.autocast(views[0].device.type, enabled=False):
        z = _normalised(views, temperature)
        positive = _same_image_logits(z, batch)[0]  # (m,)
        candidates = batch.gather(z)  # (M, D)
        with torch.no_grad(), rounding(settings.operands):
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


def loss_of_dots(views: Sequence[Tensor], temperature: float, settings: Settings) -> Any:
    """NT-Xent of two views whose projections keep their lengths: logits are dot products, divided by the temperature.

    They have no bound, so that sums of their exponentials could overflow: each anchor's are taken relative to its
    largest, in the matrix of this rank's anchors and all candidates, (m, M). The gradient crosses ranks: one more
    collective, backward.
    """
    batch = agree(views, temperature, settings, None)
    with torch.autocast(views[0].device.type, enabled=False):
        z = torch.cat(tuple(views))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        positive = _same_image_logits(z, batch)[0]  # (m,)
        candidates = batch.gather(z)  # (M, D)
        logits = z @ candidates.T / temperature
        not_negative = torch.zeros_like(logits, requires_grad=False)
        for k in (0, batch.n, -batch.n):  # of this rank's own candidates: itself, the other view of its image
            not_negative[:, batch.start : batch.start + len(z)].diagonal(k).fill_(-torch.inf)
        negatives = logits + not_negative
        losses = F.softplus(negatives.logsumexp(1) - positive, threshold=40)
        loss = losses.sum() * batch.scale
        with torch.no_grad():
            units = F.normalize(z, dim=1, eps=_SMALLEST_NORM)
            of_cosines = batch._replace(temperature=1.0)
            own = (losses, positive, negatives.amax(1), _same_image_logits(units, of_cosines)[0])
            losses, positive, largest, cosine = batch.gather(torch.stack(own, dim=1)).unbind(1)
            units = F.normalize(candidates, dim=1, eps=_SMALLEST_NORM)
            accuracy = (positive > largest).to(losses.dtype).mean()
            _, *cosines = _alignment(units, cosine, cosine, of_cosines, batch.same_image)
    return _result(loss, (losses.mean(), accuracy, *cosines), views[0].dtype, settings)


def _result(loss: Tensor, stats: Sequence[Tensor], dtype: torch.dtype, settings: Settings) -> Any:
    dtype = torch.promote_types(dtype, torch.float32)
    loss = loss.to(dtype)
    return (loss, ContrastStats(*(s.detach().to(dtype) for s in stats))) if settings.return_stats else loss


def _normalised(views: Sequence[Tensor], temperature: float) -> Tensor:
    """All projections of this rank, view after view, at length 1 and in the precision of the loss: (m, D)."""
    small = temperature < SMALLEST_IN_FLOAT32
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


def _same_image_logits(z: Tensor, batch: GlobalBatch) -> Tensor:
    """Each anchor's logits with the other views of its image, (V - 1, m)."""
    by_view = z.unflatten(0, (batch.views, batch.n))
    if batch.views == 2:  # the logit of either end of a pair is the same
        return ((by_view[0] * by_view[1]).sum(1) / batch.temperature).repeat(2)[None]
    logits = [(by_view * by_view.roll(-k, 0)).sum(2) for k in range(1, batch.views)]
    return torch.stack(logits).flatten(1) / batch.temperature


def _same_class_logit(z: Tensor, labels: Tensor, batch: GlobalBatch) -> Tensor:
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
    candidates: Tensor, positive: Tensor, largest: Tensor, batch: GlobalBatch, left_out: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive top-1, mean cosine of the positives, mean cosine of the negatives, of the global batch."""
    cosine = positive.mean() * batch.temperature
    if len(left_out) < batch.views:  # the negatives were not told from the positives
        unknown = torch.full_like(cosine, torch.nan)
        return unknown, cosine, unknown
    m = len(candidates)
    total = candidates.to(positive.dtype).sum(0).square().sum()  # of the cosines of all pairs, each with itself too
    negative = (total / m - 1 - (batch.views - 1) * cosine) / (m - batch.views)
    return (positive > largest).to(positive.dtype).mean(), cosine, negative
