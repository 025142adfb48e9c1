"""LARS against the update written out by hand, parameter groups, learning-rate scaling and schedule."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simclr.optim import LARS, build_optimizer, parameter_groups, scale_lr, warmup_cosine


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_the_update_of_google_research_simclr(nesterov):
    net = network()
    optimizer = LARS(parameter_groups(net, 1e-2), lr=0.5, momentum=0.9, nesterov=nesterov)
    weights = [p.detach().clone() for p in net.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(6, 4, dtype=torch.float64)).pow(2).sum().backward()
        for i, p in enumerate(net.parameters()):
            g, w = p.grad, weights[i]
            trust = 1.0
            if w.ndim > 1:
                g = g + 1e-2 * w
                trust = 0.001 * w.norm() / g.norm()
            velocities[i] = 0.9 * velocities[i] + lr * trust * g
            weights[i] = w - ((0.9 * velocities[i] + lr * trust * g) if nesterov else velocities[i])
        optimizer.step()
        for p, w in zip(net.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_lars_takes_a_plain_step_where_a_norm_is_zero():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1, momentum=0.0).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.1))
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    LARS([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


class Calls(TorchDispatchMode):
    """The operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_calls_of_a_step_do_not_grow_with_the_weights_and_none_waits():
    counts = []
    for depth in (2, 9):
        weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(depth)]
        optimizer = LARS(weights, lr=0.1, weight_decay=0.1)
        for _ in range(2):  # the first step makes the velocities
            for weight in weights:
                weight.grad = torch.ones(2, 2)
            with Calls() as calls:
                optimizer.step()
        counts.append(sum(name not in ("detach", "alias") for name in calls.names))
        assert "_local_scalar_dense" not in calls.names
    assert counts[0] == counts[1]


def test_lars_leaves_the_gradients_as_they_were():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.full((2, 2), 3.0)
    LARS([weight], lr=0.1).step()
    assert torch.equal(weight.grad, torch.full((2, 2), 3.0))


def test_lars_skips_parameters_without_a_gradient_and_runs_a_closure():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert not torch.equal(used.detach(), torch.ones(2, 2))
    assert torch.equal(unused.detach(), torch.ones(2, 2))


def test_lars_goes_on_from_its_state():
    def run(steps, optimizer, net):
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.ones(6, 4, dtype=torch.float64).cumsum(0)).pow(2).sum().backward()
            optimizer.step()

    whole = network()
    optimizer = LARS(parameter_groups(whole, 0.1), lr=0.1)
    run(4, optimizer, whole)
    first = network()
    optimizer = LARS(parameter_groups(first, 0.1), lr=0.1)
    run(2, optimizer, first)
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = LARS(parameter_groups(second, 0.1), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    run(2, resumed, second)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [{"lr": -1}, {"momentum": 1.0}, {"weight_decay": -1}, {"eta": 0}])
def test_lars_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match="LARS needs"):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **bad})


def test_biases_and_normalisation_neither_decay_nor_adapt():
    weights, rest = parameter_groups(network(), 0.3)
    assert [tuple(p.shape) for p in weights["params"]] == [(5, 4), (2, 5)]
    assert (weights["weight_decay"], weights["trust"]) == (0.3, True)
    assert [tuple(p.shape) for p in rest["params"]] == [(5,), (5,), (5,), (2,)]
    assert (rest["weight_decay"], rest["trust"]) == (0.0, False)


def test_frozen_parameters_are_left_out():
    net = network()
    net[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, 0.1)) == 4


@pytest.mark.parametrize(("name", "kind"), [("lars", LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_build_optimizer(name, kind):
    optimizer = build_optimizer(name, network(), lr=0.1, weight_decay=0.2, momentum=0.8)
    assert isinstance(optimizer, kind)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    if name != "adamw":
        assert optimizer.param_groups[0]["momentum"] == 0.8
    with pytest.raises(ValueError, match="lars, sgd, adamw"):
        build_optimizer("lamb", network(), lr=0.1, weight_decay=0, momentum=0)


def test_sgd_is_nesterovs_where_there_is_momentum():
    for momentum, nesterov in ((0.9, True), (0.0, False)):
        optimizer = build_optimizer("sgd", network(), lr=0.1, weight_decay=0.0, momentum=momentum)
        assert [group["nesterov"] for group in optimizer.param_groups] == [nesterov, nesterov]


def test_scale_lr():
    assert scale_lr(0.3, 4096, "linear") == pytest.approx(4.8)  # the paper's 0.3 x batch / 256
    assert scale_lr(0.075, 4096, "sqrt") == pytest.approx(4.8)  # and its 0.075 x sqrt(batch)
    assert scale_lr(0.3, 4096, "none") == 0.3
    with pytest.raises(ValueError, match="linear, sqrt, none"):
        scale_lr(0.3, 1, "log")


def test_warmup_is_linear_and_cosine_ends_at_zero():
    factors = [warmup_cosine(step, 10, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert warmup_cosine(0, 0, 1) == 1
    assert warmup_cosine(4, 100, 5) == pytest.approx(0.05)
