"""The gradient in parts is that of one graph over the same micro-batches, by itself, in a run, and on two ranks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ranks import mean_over_ranks, run_ranks
from simclr import distributed
from simclr.losses import nt_xent
from simclr.training import gradient_cache
from simclr.training.gradient_cache import backward_in_parts

PARTS = 4


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "plain": [nn.Tanh()],
        "dropout": [nn.Tanh(), nn.Dropout(0.3)],
        "batchnorm": [nn.BatchNorm1d(16), nn.ReLU()],
        "both": [nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)],
    }[kind]
    return nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 8))


def micro_batches(rank: int = 0) -> list[torch.Tensor]:
    """Each: view 1 of three images, then view 2."""
    return list(torch.randn(PARTS, 6, 6, generator=torch.Generator().manual_seed(rank)))


def whole(z: list[torch.Tensor]) -> torch.Tensor:
    views = [part.chunk(2) for part in z]
    return nt_xent(torch.cat([a for a, _ in views]), torch.cat([b for _, b in views]), 0.2)


def in_parts(model: nn.Module, batches: list[torch.Tensor]) -> tuple[float, float]:
    cached = backward_in_parts([lambda x=x: model(x) for x in batches], whole, torch.Tensor.backward, [model])
    cached.last.backward()
    return cached.last.item(), cached.error.item()


def in_one_graph(model: nn.Module, batches: list[torch.Tensor]) -> float:
    # The random numbers of the cache's first pass: parts 1, 2, 3, then 0; the statistics move as 0, 1, 2, 3.
    probe, z = copy.deepcopy(model), [None] * len(batches)
    for k in (*range(1, len(batches)), 0):
        z[k] = (probe, torch.get_rng_state())
        probe(batches[k])
    after = torch.get_rng_state()
    for k, x in enumerate(batches):
        torch.set_rng_state(z[k][1])
        z[k] = model(x)
    torch.set_rng_state(after)
    loss = whole(z)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("kind", ["plain", "dropout", "batchnorm", "both"])
def test_the_gradient_in_parts_is_that_of_one_graph(kind):
    model, batches = network(kind).double(), [x.double() for x in micro_batches()]
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    loss, error = in_parts(model, batches)
    left = torch.rand(3)
    torch.manual_seed(5)
    expected = in_one_graph(other, batches)
    assert torch.rand(3).equal(left)  # the generator stands where one pass would have left it
    assert loss == pytest.approx(expected, rel=1e-14)
    assert error == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    for b, c in zip(model.buffers(), other.buffers(), strict=True):
        assert b.equal(c)  # running statistics moved once, in the same order, to the bit


def test_autocast_rounds_the_parts_as_one_graph():
    """Autocast's cache of rounded weights must not carry the first pass, which has no gradient, into the second."""
    model = network("plain")
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        in_parts_loss = backward_in_parts(
            [lambda x=x: model(x) for x in micro_batches()], whole, torch.Tensor.backward, [model]
        ).last
        z = [other(x) for x in micro_batches()]
        loss = whole(z)
    in_parts_loss.backward()
    loss.backward()
    assert in_parts_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # Sums over a micro-batch are rounded to bfloat16 (2^-8) in either case, here in another order.
        assert (p.grad - q.grad).norm() < 1e-2 * q.grad.norm()


def test_projections_in_16_bits_have_a_gradient_in_32():
    """Unscaled, a part of a large batch's gradient is below what float16 can hold."""
    model, dtypes = network("plain").half(), []

    def loss_of(z):
        dtypes.extend(part.dtype for part in z)
        return whole(z) * 1e-7

    last = backward_in_parts(
        [lambda x=x: model(x.half()) for x in micro_batches()], loss_of, lambda s: (s * 2.0**20).backward(), [model]
    ).last
    (last * 2.0**20).backward()
    assert dtypes == [torch.float32] * PARTS
    other = network("plain")
    (whole([other(x) for x in micro_batches()]) * 1e-7 * 2.0**20).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad.float() - q.grad).norm() < 0.02 * q.grad.norm()


def test_a_part_that_changes_between_the_passes_is_told():
    model, calls = network("plain"), []

    def unsteady(x):
        calls.append(x)
        return model(x) + 0.5 * (len(calls) > PARTS)  # the second pass differs

    parts = [lambda x=x: unsteady(x) for x in micro_batches()]
    assert backward_in_parts(parts, whole, torch.Tensor.backward, [model]).error.item() == pytest.approx(0.5, rel=1e-5)


def test_one_part_alone_is_the_plain_step():
    model, (x, *_) = network("both"), micro_batches()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    loss, error = in_parts(model, [x])
    torch.manual_seed(1)
    expected = whole([other(x)])
    expected.backward()
    assert (loss, error) == (expected.item(), 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad.equal(q.grad)


def test_the_activations_of_one_part_live_at_a_time():
    model, alive, most = network("plain"), set(), [0]

    class Activation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.k = k
            if torch.is_grad_enabled() or x.requires_grad:
                alive.add(k)
                most[0] = max(most[0], len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.discard(ctx.k)
            return grad, None

    def part(k, x):
        z = model(x)
        return Activation.apply(z, k) if z.requires_grad else z

    parts = [lambda k=k, x=x: part(k, x) for k, x in enumerate(micro_batches())]
    backward_in_parts(parts, whole, torch.Tensor.backward, [model]).last.backward()
    assert most == [1]
    assert not alive


def allreduce(bucket):
    buffer = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def gradients_of_this_rank(kind: str) -> tuple[float, float, list[np.ndarray], list[np.ndarray], int]:
    model = network(kind).double()
    raw, told, reduced = model.forward, [], []

    def backward(surrogate):
        with ddp.no_sync():
            surrogate.backward()

    def step(parts):
        cached = backward_in_parts([lambda x=x: raw(x) for x in parts], whole, backward, [model])
        told.append(cached.error.item())
        return cached.last

    model.forward = step  # as in Lightning: the whole step is the forward of what DDP wraps
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(None, lambda state, bucket: reduced.append(1) or allreduce(bucket))
    torch.manual_seed(9)
    last = ddp([x.double() for x in micro_batches(distributed.rank())])
    last.backward()
    loss = mean_over_ranks(last).item()
    grads = [p.grad.numpy() for p in model.parameters()]
    return loss, told[0], grads, [b.numpy() for b in model.buffers()], len(reduced)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# With as many threads as a rank has: the running statistics are compared to the bit.
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_of_four_parts_give_the_gradient_of_one_graph_over_all_eight():
    results = run_ranks(gradients_of_this_rank, 2, "both")
    # One process, one graph, the random numbers of each rank: for each a copy, whose gradients are summed.
    models, views = [network("both").double() for _ in range(2)], [[], []]
    for rank, model in enumerate(models):
        batches, states = [x.double() for x in micro_batches(rank)], {}
        torch.manual_seed(9)
        for k in (1, 2, 3, 0):
            states[k] = torch.get_rng_state()
            copy.deepcopy(model)(batches[k])
        for k, x in enumerate(batches):
            torch.set_rng_state(states[k])
            for view, z in zip(views, model(x).chunk(2), strict=True):
                view.append(z)
    loss = nt_xent(*map(torch.cat, views), 0.2)
    loss.backward()
    expected = [sum(p.grad for p in both).numpy() for both in zip(*(m.parameters() for m in models), strict=True)]
    for model, (found, error, grads, buffers, reduced) in zip(models, results, strict=True):
        assert found == pytest.approx(loss.item(), rel=1e-12)
        assert error == 0
        assert reduced == 1  # one bucket, once: the other backwards stayed on their rank
        for grad, other in zip(grads, expected, strict=True):
            np.testing.assert_allclose(grad, other, rtol=1e-11, atol=1e-14)
        for buffer, other in zip(buffers, model.buffers(), strict=True):
            np.testing.assert_array_equal(buffer, other.numpy())


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_a_device_with_a_generator_of_its_own_gets_its_state_back(kind, monkeypatch):
    module, device, held = getattr(torch, kind), torch.device(kind, 0), [torch.tensor([7])]
    monkeypatch.setattr(module, "get_rng_state", lambda of: held[0] if of == device else None)
    monkeypatch.setattr(module, "set_rng_state", lambda state, of: held.__setitem__(0, state) if of == device else None)
    cpu = torch.get_rng_state()
    states = gradient_cache._random_states([device])
    held[0] = torch.tensor([8])
    torch.rand(1)
    gradient_cache._set_random_states(states)
    assert held[0].item() == 7
    assert torch.equal(torch.get_rng_state(), cpu)
