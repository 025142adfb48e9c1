"""Every loss against a double loop written from its paper, value and gradient, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import mean_over_ranks, run_ranks
from simclr import distributed, precision
from simclr.contrast import engine, tiles
from simclr.losses import dcl, margin_triplet, nt_logistic, nt_xent, nt_xent_unnormalized, sup_con

# The references: float64, one pair at a time. Rows are (view, image); classes default to the images.


def double_loop(views, anchor_loss, classes=None, normalised=True) -> torch.Tensor:
    """The mean over all anchors of anchor_loss(positive cosines, negative cosines, all other cosines)."""
    rows = [
        (v, k, row / row.norm() if normalised else row) for v, view in enumerate(views) for k, row in enumerate(view)
    ]
    classes = classes or list(range(len(views[0])))
    total = torch.zeros((), dtype=torch.float64)
    for v, k, z in rows:
        others = [(classes[m] == classes[k], z @ other) for w, m, other in rows if (w, m) != (v, k)]
        positives = torch.stack([cosine for same, cosine in others if same])
        negatives = [cosine for same, cosine in others if not same]
        negatives = torch.stack(negatives) if negatives else positives[:0]
        total = total + anchor_loss(positives, negatives, torch.stack([cosine for _, cosine in others]))
    return total / len(rows)


def semi_hard(positive, negatives):
    """The nearest of the negatives that are farther than the positive; infinitely far if there is none."""
    farther = [s for s in negatives if s < positive]
    return max(farther) if farther else torch.tensor(-math.inf, dtype=torch.float64)


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def reference(name, views, temperature, classes=None):
    """The loss of this name by the double loop; `temperature` is the margin of the margin losses."""

    def xent(positives, negatives, others):
        return (-(positives / temperature).exp().log() + (others / temperature).exp().sum().log()).mean()

    def decoupled(positives, negatives, others):
        return -positives[0] / temperature + (negatives / temperature).exp().sum().log()

    def logistic(positives, negatives, others):
        return softplus(-positives[0] / temperature) + softplus(negatives / temperature).mean()

    def logistic_semi_hard(positives, negatives, others):
        return softplus(-positives[0] / temperature) + softplus(semi_hard(positives[0], negatives) / temperature)

    def margin(positives, negatives, others):
        return torch.relu(negatives - positives[0] + temperature).mean()

    def margin_semi_hard(positives, negatives, others):
        return torch.relu(semi_hard(positives[0], negatives) - positives[0] + temperature)

    rules = {"nt_xent": xent, "sup_con": xent, "views": xent, "dcl": decoupled}
    rules |= {"nt_logistic": logistic, "nt_logistic sh": logistic_semi_hard}
    rules |= {"margin_triplet": margin, "margin_triplet sh": margin_semi_hard, "nt_xent_unnormalized": xent}
    return double_loop(views, rules[name], classes, normalised=name != "nt_xent_unnormalized")


def ours(name, views, temperature, labels=None, **kwargs):
    """The loss of this name by simclr.losses."""
    if name in ("sup_con", "views"):
        return sup_con(views, temperature, None if name == "views" else torch.tensor(labels), **kwargs)
    function = {"nt_xent": nt_xent, "dcl": dcl, "nt_logistic": nt_logistic, "margin_triplet": margin_triplet}
    function |= {"nt_xent_unnormalized": nt_xent_unnormalized}
    kind = name.split()[0]
    more = {"semi_hard": name.endswith("sh")} if kind in ("nt_logistic", "margin_triplet") else {}
    return function[kind](*views[:2], temperature, **more, **kwargs)


TILED = ["nt_xent", "dcl", "nt_logistic", "nt_logistic sh", "margin_triplet", "margin_triplet sh", "views", "sup_con"]
ALL = [*TILED, "nt_xent_unnormalized"]


@pytest.fixture(params=[None, (3, 5), (4, 4)], ids=["dense", "3x5", "4x4"])
def tile(request, monkeypatch):
    """Both forms of the loss, the tiled one with tiles that do not divide."""
    if request.param:
        monkeypatch.setattr(engine, "DENSE_ANCHORS", 0)
        monkeypatch.setattr(tiles, "tile_shape", lambda device: request.param)
    return request.param


def projections(n: int, d: int = 5, dtype: torch.dtype = torch.float64, views: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(views, n, d, generator=generator, dtype=torch.float64) * 3
    return [view.to(dtype).requires_grad_() for view in z]


def matrix_form(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent for batches too large for the double loop."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    return F.cross_entropy((z @ z.T / temperature).masked_fill(itself, -torch.inf), torch.arange(len(z)).roll(len(z1)))


def test_the_matrix_form_is_the_double_loop():
    views = projections(6)
    assert matrix_form(*views, 0.2).item() == pytest.approx(reference("nt_xent", views, 0.2).item(), rel=1e-13)


def relative(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_value_and_gradient_are_the_double_loops(n, temperature, dtype, tolerance, tile):
    if n > 7 and tile:
        tiles.tile_shape = lambda device: (61, 127)  # small tiles would take minutes; the fixture puts it back
    views = projections(n, d=5 if n < 64 else 128, dtype=dtype)
    loss = nt_xent(*views, temperature)
    grads = torch.autograd.grad(loss, views)
    exact = [z.detach().double().requires_grad_() for z in views]
    expected = matrix_form(*exact, temperature) if n > 7 else reference("nt_xent", exact, temperature)
    expected_grads = torch.autograd.grad(expected, exact)
    assert loss.dtype == dtype
    assert relative(loss, expected) < tolerance
    for grad, other in zip(grads, expected_grads, strict=True):
        assert relative(grad, other) < tolerance


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_siblings_are_their_double_loops(name, n, tile):
    views = projections(n, views=3 if name in ("views", "sup_con") else 2)
    classes = [k % 3 for k in range(n)] if name == "sup_con" else None
    loss = ours(name, views, 0.3, classes)
    expected = reference(name, views, 0.3, classes)
    assert relative(loss, expected) < 1e-12
    for grad, other in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name, tile):
    views = projections(4, views=3 if name == "views" else 2)
    assert torch.autograd.gradcheck(lambda *v: ours(name, v, 0.4, [0, 1, 0, 2]), views)


def test_two_views_without_labels_make_sup_con_nt_xent():
    views = projections(8)
    assert sup_con(views, 0.2).item() == pytest.approx(nt_xent(*views, 0.2).item(), rel=1e-13)
    own_class = sup_con(views, 0.2, torch.arange(8))
    assert own_class.item() == pytest.approx(nt_xent(*views, 0.2).item(), rel=1e-13)


def test_identical_projections_give_log_of_the_candidates(tile):
    z = torch.ones(6, 3)
    assert nt_xent(z, z, 0.2).item() == pytest.approx(math.log(11), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.002, 0.015])
def test_the_lowest_temperatures_are_finite_and_exact(temperature, tile):
    """e^(1 / temperature) is beyond float32, and 1 / temperature alone would cost float32 1e-5 of the gradient."""
    views = projections(7, dtype=torch.float32)
    with torch.no_grad():
        views[0][0] = views[1][1]  # a cosine of 1 that is no positive
    loss = nt_xent(*views, temperature)
    exact = [z.detach().double().requires_grad_() for z in views]
    expected = matrix_form(*exact, temperature)
    assert relative(loss, expected) < 1e-6
    for grad, other in zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, exact), strict=True):
        assert relative(grad, other) < 1e-6


def test_a_loss_near_zero_keeps_its_digits(tile):
    """Positives at cosine 1 and negatives at 0: log(1 + (2N - 2) e^(-1 / temperature)), 1e-12 here."""
    z = torch.eye(8).requires_grad_()
    loss = nt_xent(z, z, 1 / 30)
    assert loss.item() == pytest.approx(14 * math.exp(-30), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.abs().max().item() > 1e-15


def test_autocast_changes_nothing(tile):
    views = projections(16, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(*views, 0.1)
        inside_grads = torch.autograd.grad(inside, views)
    outside = nt_xent(*views, 0.1)
    # Not the same bits: inside autocast tiles stand in for the dense form, whose backward autocast would reach.
    assert relative(inside, outside) < 1e-6
    for grad, other in zip(inside_grads, torch.autograd.grad(outside, views), strict=True):
        assert relative(grad, other) < 1e-6


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_unnormalized])
def test_16_bit_projections_give_a_float32_loss(tile, loss):
    views = projections(8, 16, torch.bfloat16)
    found, exact = loss(*views, 4.0), loss(*(view.detach().float() for view in views), 4.0)
    assert found.dtype == torch.float32
    assert found.item() == exact.item()  # only the projections are rounded
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*(view.detach().float() for view in views), 4.0).item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_runs_precision_of_matrix_products_does_not_count():
    views = projections(300, 64, torch.float32)
    expected = [nt_xent(*views, 0.1), *torch.autograd.grad(nt_xent(*views, 0.1), views)]
    small = [view[:20] for view in views]
    expected_small = nt_xent(*small, 0.1)
    torch.set_float32_matmul_precision("medium")  # bfloat16 products on CPUs that have them
    try:
        assert not precision.is_exact()
        found = [nt_xent(*views, 0.1), *torch.autograd.grad(nt_xent(*views, 0.1), views)]
        found_small = nt_xent(*small, 0.1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precision.is_exact()
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)
    torch.testing.assert_close(found_small, expected_small, rtol=1e-6, atol=0)  # tiles in place of the matrix


@pytest.mark.parametrize("operands", ["tf32", "bfloat16"])
def test_rounded_operands_stay_within_their_error(operands):
    """0.5 % at most, as documented; a CPU without such arithmetic computes exactly."""
    views = projections(300, 128, torch.float32)
    expected = torch.autograd.grad(nt_xent(*views, 0.1), views)
    for grad, other in zip(torch.autograd.grad(nt_xent(*views, 0.1, operands=operands), views), expected, strict=True):
        assert relative(grad, other.double()) < 5e-3


def test_a_zero_projection_has_a_finite_gradient(tile):
    z1, z2 = projections(4, dtype=torch.float32)
    with torch.no_grad():
        z1[0] = 0
    nt_xent(z1, z2, 0.1).backward()
    assert z1.grad.isfinite().all()
    assert z2.grad.isfinite().all()


def test_the_gradient_scales_with_what_reaches_the_loss(tile):
    views = projections(6)
    once = torch.autograd.grad(nt_xent(*views, 0.2), views)
    for grad, other in zip(torch.autograd.grad(nt_xent(*views, 0.2) * 1024, views), once, strict=True):
        torch.testing.assert_close(grad, other * 1024, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in ALL if name != "sup_con"])
def test_stats_are_those_of_the_matrix(name, tile):
    views = projections(9, views=3 if name == "views" else 2)
    loss, stats = ours(name, views, 0.3, return_stats=True)
    z = F.normalize(torch.cat([view.detach() for view in views]), dim=1)
    cosines, image = z @ z.T, torch.arange(9).repeat(len(views))
    same = image[:, None] == image
    of_pair = same & ~torch.eye(len(z), dtype=torch.bool)
    positive = (cosines * of_pair).sum(1) / (len(views) - 1)
    dots = torch.cat(views).detach() if name == "nt_xent_unnormalized" else z  # whose products the loss compares
    logits = dots @ dots.T
    nearest = logits.masked_fill(same, -torch.inf).amax(1)
    told_apart = (logits * of_pair).sum(1) / (len(views) - 1) > nearest
    assert stats.loss.item() == pytest.approx(loss.item(), rel=1e-13)
    assert stats.positive_cosine.item() == pytest.approx(positive.mean().item(), rel=1e-12)
    assert stats.negative_cosine.item() == pytest.approx(cosines[~same].mean().item(), rel=1e-10)
    assert stats.accuracy.item() == pytest.approx(told_apart.double().mean().item())
    assert not any(s.requires_grad for s in stats)


def test_with_labels_negatives_are_not_told_apart():
    stats = sup_con(projections(6), 0.2, torch.tensor([0, 0, 1, 1, 2, 2]), return_stats=True)[1]
    assert stats.accuracy.isnan()
    assert stats.negative_cosine.isnan()
    assert stats.loss.isfinite()


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
        return result


def test_dot_products_beyond_what_an_exponential_holds():
    """Logits of hundreds, whose exponentials float32 does not have. The reference is in logarithms, and float64."""
    views = [view.detach().mul(6).requires_grad_() for view in projections(9, 8, torch.float32)]
    loss, stats = nt_xent_unnormalized(*views, 10.0, return_stats=True)
    z = torch.cat(views).double()
    logits = (z @ z.T / 10).masked_fill(torch.eye(18, dtype=torch.bool), -torch.inf)
    assert 100 < logits.amax() < 1000  # of which float32 keeps five digits behind the point
    expected = F.cross_entropy(logits, torch.arange(18).roll(9))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert stats.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = zip(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views), strict=True)
    assert all(relative(grad, other.double()) < 1e-5 for grad, other in pairs)


def test_only_the_unnormalized_loss_minds_the_lengths():
    views = projections(6)
    longer = [2 * view for view in views]
    assert nt_xent(*longer, 0.5).item() == pytest.approx(nt_xent(*views, 0.5).item(), rel=1e-12)
    scaled = nt_xent_unnormalized(*longer, 4.0).item()  # four times the dot products
    assert scaled == pytest.approx(nt_xent_unnormalized(*views, 1.0).item(), rel=1e-12)
    units = [F.normalize(view, dim=1) for view in views]
    assert nt_xent_unnormalized(*units, 0.5).item() == pytest.approx(nt_xent(*views, 0.5).item(), rel=1e-12)


@pytest.mark.parametrize("name", TILED)
def test_no_tensor_grows_with_the_square_of_the_batch(name, monkeypatch):
    monkeypatch.setattr(tiles, "tile_shape", lambda device: (32, 64))
    views = projections(300, 8, torch.float32)
    with LargestTensor() as largest:
        ours(name, views, 0.2, [0] * 150 + [1] * 150).backward()
    assert largest.numel <= 600 * 8  # all projections; the matrix of all pairs would have 360 000
    with LargestTensor() as largest:
        matrix_form(*views, 0.2)
    assert largest.numel == 600 * 600  # this test can see one


# Bad input.


def test_one_image_has_nothing_to_tell_apart():
    """Its positive is the only candidate: the double loop gives 0, and so does its gradient."""
    views = projections(1)
    loss, stats = nt_xent(*views, 0.1, return_stats=True)
    assert loss.item() == pytest.approx(reference("nt_xent", views, 0.1).item(), abs=1e-15) == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, views))
    assert stats.positive_cosine.item() == pytest.approx(F.cosine_similarity(*views).item())
    for name in ("dcl", "nt_logistic", "margin_triplet", "nt_xent_unnormalized"):
        with pytest.raises(ValueError, match=rf"{name} got .* one image, which has no negatives.* needs 2 at least"):
            ours(name, views, 0.1)


def test_bad_input_is_refused():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\) do not fit"):
        nt_xent(z, z[:3], 0.1)
    with pytest.raises(ValueError, match=r"of one shape \(N, D\)"):
        nt_xent(z[:0], z[:0], 0.1)
    with pytest.raises(ValueError, match=r"of one shape \(N, D\)"):
        nt_xent(z[0], z[0], 0.1)
    with pytest.raises(ValueError, match="Two views or more"):
        sup_con([z], 0.1)
    with pytest.raises(ValueError, match=r"labels of shape \(3,\)"):
        sup_con([z, z], 0.1, torch.arange(3))
    for temperature in (0, -1, 0.001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"temperature=.* is not 0.0015 or more"):
            nt_xent(z, z, temperature)
    for temperature in ("0.1", torch.tensor(0.1, requires_grad=True)):
        with pytest.raises(ValueError, match="Pass a plain number: its gradient is not given"):
            nt_xent(z, z, temperature)
    with pytest.raises(ValueError, match="must be tensors of floating point"):
        nt_xent(z, z.long(), 0.1)
    with pytest.raises(ValueError, match=r"labels of type list .* a tensor of one an image"):
        sup_con([z, z], 0.1, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="margin=0 is not positive"):
        margin_triplet(z, z, 0)
    with pytest.raises(ValueError, match="operands='fp8' is none of float32, tf32, bfloat16"):
        nt_xent(z, z, 0.1, operands="fp8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_projections_that_are_not_finite_are_refused(bad):
    z1, z2 = torch.randn(2, 4, 3)
    z2[1, 2] = bad
    with pytest.raises(FloatingPointError, match="1 of 8 projections are NaN or infinite"):
        nt_xent(z1, z2, 0.1)


# Several ranks: the gradient of an encoder's weights, as DDP averages it, is that of one process with all images.


def small_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def images(n: int, views: int) -> torch.Tensor:
    return torch.randn(views, n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SHARES = {2: [[4, 4], [5, 2]], 3: [[3, 3, 3], [2, 4, 1]], 4: [[2, 2, 2, 2], [1, 3, 2, 1]]}
CLASSES = [0, 1, 2, 0, 1, 0, 3, 3, 1]


def views_of(name: str) -> int:
    return 3 if name in ("views", "sup_con") else 2


def step_of_this_rank(name: str, share: list[int]) -> tuple[float, float, list[np.ndarray], dict[str, int]]:
    """The mean of the ranks' losses, the global loss told here, the encoder's gradients and the collectives used."""
    rank = distributed.rank()
    rows = slice(sum(share[:rank]), sum(share[: rank + 1]))
    calls = {"forward": 0, "backward": 0}
    stage = "outside"

    def counted(function):
        def call(*args, **kwargs):
            if stage in calls:
                calls[stage] += 1
            return function(*args, **kwargs)

        return call

    places = ((distributed, "_all_gather"), (dist, "all_reduce"), (dist, "broadcast"))
    originals = [(place, key, getattr(place, key)) for place, key in places]
    for place, key, function in originals:
        setattr(place, key, counted(function))
    try:
        encoder = small_encoder()
        z = encoder(images(sum(share), views_of(name))[:, rows].flatten(0, 1))
        leaf = z.detach().requires_grad_()
        stage = "forward"
        loss, stats = ours(
            name,
            leaf.chunk(views_of(name)),
            0.3,
            CLASSES[rows],
            uneven=len(set(share)) > 1,
            return_stats=True,
        )
        stage = "backward"
        loss.backward()
        stage = "outside"
        z.backward(leaf.grad)
        grads = [mean_over_ranks(p.grad).numpy() for p in encoder.parameters()]
        return mean_over_ranks(loss).item(), stats.loss.item(), grads, calls
    finally:
        for place, key, function in originals:
            setattr(place, key, function)


def all_steps_of_this_rank() -> dict:
    # Dense forms and tiles, tiles that do not divide.
    tiles.tile_shape = lambda device: (3, 5)
    shares = SHARES[distributed.world_size()]
    return {(name, str(share)): step_of_this_rank(name, share) for name in ALL for share in shares}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_give_the_gradient_of_the_whole_batch(world_size):
    results = run_ranks(all_steps_of_this_rank, world_size)
    for name in ALL:
        for share in SHARES[world_size]:
            n = sum(share)
            encoder = small_encoder()
            expected = reference(name, [encoder(v) for v in images(n, views_of(name))], 0.3, reference_classes(name, n))
            expected.backward()
            for result in results:
                loss, told, grads, calls = result[name, str(share)]
                assert loss == pytest.approx(expected.item(), rel=1e-12)
                assert told == pytest.approx(expected.item(), rel=1e-12)
                for grad, parameter in zip(grads, encoder.parameters(), strict=True):
                    np.testing.assert_allclose(grad, parameter.grad.numpy(), rtol=1e-11, atol=1e-13)
                if name in ("nt_xent", "dcl", "nt_logistic", "margin_triplet", "views"):
                    # The check between hosts, the projections, two numbers or three an anchor.
                    assert calls == {"forward": 3, "backward": 0}


def reference_classes(name: str, n: int) -> list[int] | None:
    return CLASSES[:n] if name == "sup_con" else None


def no_matrix_of_this_rank() -> int:
    tiles.tile_shape = lambda device: (16, 32)
    views = projections(60 + distributed.rank(), 8, torch.float32)
    with LargestTensor() as largest:
        nt_xent(*views, 0.2, uneven=True).backward()
    return largest.numel


def refusals_of_this_rank() -> list[str]:
    """What a rank is told in a row of calls with something wrong on one rank or between two."""
    rank = distributed.rank()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    nan = z.clone()
    nan[0, 0] = float("nan")
    calls = [
        lambda: nt_xent(z[: 4 - rank], z[: 4 - rank], 0.1),
        lambda: nt_xent(z, z, 0.1 + 0.1 * rank),
        lambda: nt_xent(z, z if rank else z[:3], 0.1),
        lambda: nt_xent(z, z, 0.1 if rank else -1.0),
        lambda: nt_xent(z, nan if rank else z, 0.1),
        lambda: nt_xent(z[:, : 3 - rank], z[:, : 3 - rank], 0.1),
        lambda: nt_xent(*(x.double() if rank else x for x in (z, z)), 0.1),
        lambda: dcl(z[:1], z[:1], 0.1, gather=False),
        lambda: margin_triplet(z, z, 0.1 + 0.1 * rank),
        lambda: (nt_xent, dcl)[rank](z, z, 0.1),
        lambda: nt_logistic(z, z, 0.1, semi_hard=rank == 1),
        lambda: sup_con([z, z], 0.1, torch.arange(4) if rank else None),
        lambda: nt_xent(z, z, "0.1" if rank else 0.1),
        lambda: nt_xent(z, z, 0.1).item(),  # all is well again
    ]
    told = []
    for call in calls:
        try:
            told.append(str(call() > 0))
        except (ValueError, FloatingPointError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def gather_off() -> float:
    view1, view2 = images(4, 2)
    start = 2 * distributed.rank()
    return nt_xent(view1[start : start + 2], view2[start : start + 2], 0.2, gather=False).item()


def other_matters_of_this_rank() -> tuple[int, list[str], float]:
    return no_matrix_of_this_rank(), refusals_of_this_rank(), gather_off()


def test_two_ranks_in_other_matters():
    """No matrix of own rows and all columns; every rank refuses what one got wrong; `gather=False` stays at home."""
    (largest, first, alone), (other_largest, second, other_alone) = run_ranks(other_matters_of_this_rank, 2)
    # All projections, padded to equal shares; own rows times all columns would be 120 * 242.
    assert max(largest, other_largest) <= 2 * 122 * 8

    for told in (first, second):
        assert "the ranks disagree about the number of images: 4, 3 on ranks 0 to 1." in told[0]
        assert "uneven=True" in told[0]
        assert "disagree about the temperature: 0.1, 0.2 on" in told[1]
        assert "disagree about the width of a projection: 3, 2" in told[5]
        assert "disagree about the bytes of a number: 4, 8" in told[6]
        assert "one image, which has no negatives" in told[7]
        assert "disagree about the margin: 0.1, 0.2" in told[8]
        assert "disagree about the loss: nt_xent, dcl on" in told[9]
        assert "disagree about the semi_hard: 0, 1" in told[10]
        assert "disagree about the labels: 0, 1" in told[11]
        assert told[13] == "True"
    assert "rank 1 got a setting out of its range" in first[12]
    assert "temperature is a str. Pass a plain number" in second[12]
    assert "(4, 3) and (3, 3) do not fit" in first[2]
    assert "rank 0 got projections or labels that do not fit" in second[2]
    assert "temperature=-1.0" in first[3]
    assert "rank 0 got a setting out of its range" in second[3]
    assert first[4] == "FloatingPointError: rank 1 got projections that are not finite; its own error says which."
    assert second[4] == "FloatingPointError: 1 of 8 projections are NaN or infinite."

    view1, view2 = images(4, 2)
    expected = [reference("nt_xent", (view1[i : i + 2], view2[i : i + 2]), 0.2).item() for i in (0, 2)]
    assert [alone, other_alone] == pytest.approx(expected, rel=1e-12)
