import pytest
import torch
from torch import nn

from simclr.heads import ProjectionHead


def names(layer):
    return [name for name, _ in layer.named_children()]


@pytest.mark.parametrize(
    ("options", "layer_count", "out_dim"),
    [
        ({"kind": "identity"}, 0, 12),
        ({"kind": "linear", "projection_dim": 5}, 1, 5),
        ({"kind": "nonlinear", "projection_dim": 5}, 2, 5),
        ({"kind": "nonlinear", "projection_dim": 5, "hidden_dim": 20}, 2, 5),
        ({"kind": "deep", "projection_dim": 5, "layers": 2}, 2, 5),
        ({"kind": "deep", "projection_dim": 5, "layers": 4, "hidden_dim": 20}, 4, 5),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, "hidden", False])
def test_shapes_and_layers(options, layer_count, out_dim, batch_norm):
    head = ProjectionHead(12, batch_norm=batch_norm, **options)
    assert head.out_dim == out_dim
    assert head(torch.randn(6, 12)).shape == (6, out_dim)
    assert len(head.layers) == layer_count
    for layer in head.layers[:-1]:
        assert layer.linear.out_features == options.get("hidden_dim", 12)


def test_default_is_the_head_of_the_paper():
    head = ProjectionHead(2048)
    assert [(layer.linear.in_features, layer.linear.out_features) for layer in head.layers] == [
        (2048, 2048),
        (2048, 128),
    ]


def test_identity_returns_h_itself_and_has_no_parameters():
    head = ProjectionHead(12, kind="identity")
    h = torch.randn(6, 12)
    assert torch.equal(head(h), h)
    assert not list(head.parameters())


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "deep"])
def test_placement_of_batch_norm_and_bias(kind):
    for batch_norm in (True, "hidden", False):
        *hidden, last = ProjectionHead(12, kind=kind, batch_norm=batch_norm).layers
        for layer in hidden:
            assert names(layer) == (["linear", "relu"] if batch_norm is False else ["linear", "bn", "relu"])
            assert (layer.linear.bias is None) == (batch_norm is not False)
        assert names(last) == (["linear", "bn"] if batch_norm is True else ["linear"])
        assert (last.linear.bias is None) == (batch_norm is True)


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "deep"])
def test_only_the_last_batch_norm_has_a_scale_and_no_shift(kind):
    *hidden, last = ProjectionHead(12, kind=kind).layers
    assert all(layer.bn.bias is not None for layer in hidden)
    assert last.bn.bias is None
    assert last.bn.weight.requires_grad
    assert "bn.bias" not in last.state_dict()


def test_projections_keep_mean_zero_and_unit_variance_scaled_after_training_steps():
    torch.manual_seed(0)
    head = ProjectionHead(12, projection_dim=5)
    h, target = torch.randn(64, 12), torch.randn(64, 5) + 3
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (head(h) - target).square().mean().backward()
        optimizer.step()
    z = head(h)
    scale = head.layers[-1].bn.weight
    assert not torch.allclose(scale, torch.ones(5))
    torch.testing.assert_close(z.mean(0), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(0, unbiased=False), scale.abs(), rtol=1e-3, atol=0)


def normalise(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def test_nonlinear_equals_the_composition_written_out():
    torch.manual_seed(0)
    head = ProjectionHead(12, hidden_dim=20, projection_dim=5).double()
    first, last = head.layers
    for parameter in (first.bn.weight, first.bn.bias, last.bn.weight):
        nn.init.normal_(parameter)
    h = torch.randn(16, 12, dtype=torch.float64)
    hidden = normalise(h @ first.linear.weight.T) * first.bn.weight + first.bn.bias
    expected = normalise(hidden.clamp(min=0) @ last.linear.weight.T) * last.bn.weight
    torch.testing.assert_close(head(h), expected)


def test_deep_without_batch_norm_equals_the_composition_written_out():
    torch.manual_seed(0)
    head = ProjectionHead(12, kind="deep", layers=3, hidden_dim=20, projection_dim=5, batch_norm=False)
    h = torch.randn(16, 12)
    (w1, b1), (w2, b2), (w3, b3) = [(layer.linear.weight, layer.linear.bias) for layer in head.layers]
    expected = ((h @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T + b3
    torch.testing.assert_close(head(h), expected)


def test_evaluation_uses_running_statistics_without_a_shift():
    torch.manual_seed(0)
    head = ProjectionHead(12, kind="linear", projection_dim=5)
    head.layers[0].bn.running_mean.normal_()
    head.layers[0].bn.running_var.uniform_(0.5, 2)
    nn.init.normal_(head.layers[0].bn.weight)
    bn = head.layers[0].bn
    h = torch.randn(1, 12)
    expected = (h @ head.layers[0].linear.weight.T - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight
    torch.testing.assert_close(head.eval()(h), expected)


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "deep"])
@pytest.mark.parametrize("batch_norm", [True, "hidden", False])
def test_gradient_reaches_h_and_every_parameter(kind, batch_norm):
    torch.manual_seed(0)
    head = ProjectionHead(12, kind=kind, projection_dim=5, batch_norm=batch_norm)
    h = torch.randn(16, 12, requires_grad=True)
    (head(h) * torch.randn(16, 5)).sum().backward()
    for tensor in (h, *head.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_first_layers_of_a_deep_head_can_be_taken_off_for_fine_tuning():
    torch.manual_seed(0)
    head = ProjectionHead(12, kind="deep", layers=3, hidden_dim=20).eval()
    h = torch.randn(4, 12)
    middle = head.layers[:1](h)
    assert middle.shape == (4, 20)
    assert bool((middle >= 0).all())
    torch.testing.assert_close(head.layers[1:](middle), head(h))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mlp"}, "kind='mlp' is not one of identity, linear, nonlinear, deep"),
        ({"in_dim": 0}, "in_dim=0 must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim=0 must be at least 1"),
        ({"projection_dim": -1}, "projection_dim=-1 must be at least 1"),
        ({"kind": "deep", "layers": 1}, "layers=1: a deep head has at least 2"),
        ({"kind": "linear", "hidden_dim": 8}, "kind='linear' has no hidden layer for hidden_dim=8"),
        ({"kind": "identity", "hidden_dim": 8}, "kind='identity' has no hidden layer for hidden_dim=8"),
        ({"batch_norm": "last"}, "batch_norm='last' is not one of True, False, 'hidden'"),
    ],
)
def test_what_makes_no_head_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ProjectionHead(**{"in_dim": 12, **options})
