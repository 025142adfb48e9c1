"""NT-Xent against a float64 double loop written from the paper, value and gradient, on one rank and on several."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ranks import run_ranks
from simclr import distributed
from simclr.losses import nt_xent


def double_loop(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """Chen et al. 2020, algorithm 1, one similarity at a time."""
    z = torch.stack((z1, z2), dim=1).flatten(0, 1)  # rows 2k and 2k + 1 are the views of image k
    z = [row / row.norm() for row in z]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        denominator = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(len(z)) if k != i)
        total = total - torch.log(torch.exp(z[i] @ z[j] / temperature) / denominator)
    return total / len(z)


def projections(n: int, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(2, n, d, generator=generator, dtype=torch.float64) * 3
    return z[0].to(dtype).requires_grad_(), z[1].to(dtype).requires_grad_()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 3, 7, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradient_are_the_double_loops(n, temperature, dtype, tolerance):
    z1, z2 = projections(n, dtype=dtype)
    loss = nt_xent(z1, z2, temperature)
    grads = torch.autograd.grad(loss, (z1, z2))
    r1, r2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    expected = double_loop(r1, r2, temperature)
    expected_grads = torch.autograd.grad(expected, (r1, r2))
    assert loss.dtype == dtype
    # Absolute: with a tiny loss float32 resolves the logits (up to 1 / temperature) and not the loss.
    assert abs(loss.item() - expected.item()) < tolerance / temperature
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=tolerance / temperature, atol=tolerance)


def test_gradcheck():
    z1, z2 = projections(4)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z1, z2))


def test_identical_projections_give_log_of_the_candidates():
    z = torch.ones(6, 3)
    assert nt_xent(z, z, 0.2).item() == pytest.approx(math.log(11), abs=1e-6)


def test_one_image_has_no_negatives_and_is_refused():
    with pytest.raises(ValueError, match=r"one image, which has no negatives.* needs 2 at least"):
        nt_xent(*projections(1), 0.1)


def test_autocast_changes_nothing():
    z1, z2 = projections(16, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(z1, z2, 0.1)
    assert inside.item() == nt_xent(z1, z2, 0.1).item()


def test_16_bit_projections_give_a_float32_loss():
    z1, z2 = projections(8, 16, torch.bfloat16)
    assert nt_xent(z1, z2, 0.1).dtype == torch.float32


def test_a_zero_projection_has_a_finite_gradient():
    z1, z2 = projections(4, dtype=torch.float32)
    with torch.no_grad():
        z1[0] = 0
    nt_xent(z1, z2, 0.1).backward()
    assert z1.grad.isfinite().all()
    assert z2.grad.isfinite().all()


def test_bad_input_is_refused():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\)"):
        nt_xent(z, z[:3], 0.1)
    with pytest.raises(ValueError, match="Both need one shape"):
        nt_xent(z[:0], z[:0], 0.1)
    for temperature in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="is not positive"):
            nt_xent(z, z, temperature)


def small_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, 6, generator=generator, dtype=torch.float64))


def step_of_this_rank(n: int, temperature: float) -> tuple[float, list[np.ndarray]]:
    """Loss averaged over ranks and the encoder's gradients as DDP gives them, from this rank's rows of one batch."""
    encoder = small_encoder()
    ddp = nn.parallel.DistributedDataParallel(encoder)
    share = n // distributed.world_size()
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    view1, view2 = batch(n)
    z = ddp(torch.cat((view1[rows], view2[rows])))
    loss = nt_xent(*z.chunk(2), temperature)
    loss.backward()
    return distributed.mean_over_ranks(loss).item(), [p.grad.numpy() for p in encoder.parameters()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_gradient_of_the_whole_batch(world_size):
    n, temperature = 8, 0.2
    encoder = small_encoder()
    view1, view2 = batch(n)
    expected = double_loop(encoder(view1), encoder(view2), temperature)
    expected.backward()
    for loss, grads in run_ranks(step_of_this_rank, world_size, n, temperature):
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        for grad, parameter in zip(grads, encoder.parameters(), strict=True):
            np.testing.assert_allclose(grad, parameter.grad.numpy(), rtol=1e-12, atol=1e-14)


def test_a_rank_may_hold_one_image():
    encoder = small_encoder()
    expected = double_loop(*map(encoder, batch(2)), 0.2).item()
    for loss, _ in run_ranks(step_of_this_rank, 2, 2, 0.2):
        assert loss == pytest.approx(expected, rel=1e-12)


def gather_off() -> float:
    view1, view2 = batch(4)
    with pytest.raises(ValueError, match="one image"):
        nt_xent(view1[:1], view2[:1], 0.2, gather=False)
    start = 2 * distributed.rank()
    return nt_xent(view1[start : start + 2], view2[start : start + 2], 0.2, gather=False).item()


def test_without_gather_a_rank_sees_its_own_images_only():
    view1, view2 = batch(4)
    expected = [double_loop(view1[i : i + 2], view2[i : i + 2], 0.2).item() for i in (0, 2)]
    assert run_ranks(gather_off, 2) == pytest.approx(expected, rel=1e-12)
