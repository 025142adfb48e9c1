"""Parallel linear heads against torch's own SGD, one head at a time; the choice sees no test label."""

import pytest
import torch
import torch.nn.functional as F

from simclr.data.splits import stratified_split
from simclr.eval.heads import LEARNING_RATES, heads, train_heads
from simclr.eval.protocol import FrozenFeatures
from simclr.seeding import epoch_order


def clusters(size, seed, classes=4, width=6, noise=1.5):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(size) % classes
    return centres[labels] + noise * torch.randn(size, width, generator=draw), labels


def frozen(train=None, test=None):
    return FrozenFeatures(torch.nn.Identity(), train or clusters(240, 0), test or clusters(120, 1), None)


def alone(features, labels, lr, epochs, batch_size, decay):
    """One head by torch.optim and torch.nn."""
    layer = torch.nn.Linear(features.shape[1], 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr * batch_size / 256, momentum=0.9, nesterov=True)
    steps = epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for index in epoch_order(3, epoch, len(features)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_each_head_is_what_it_would_be_alone(decay):
    features, labels = clusters(100, 0)
    lrs = [0.01, 0.3, 2.0]
    weight, bias = train_heads(
        features, labels, lrs, num_classes=4, epochs=3, batch_size=32, weight_decay=decay, seed=3
    )
    for number, lr in enumerate(lrs):
        expected = alone(features, labels, lr, 3, 32, decay)
        torch.testing.assert_close((weight[number], bias[number]), expected, rtol=1e-4, atol=1e-5)


def test_the_head_with_the_best_accuracy_on_the_part_kept_back_is_taken():
    data = frozen()
    done = heads(data, lrs=[1e-6, 0.5, 3.0], epochs=4, batch_size=32)
    features, labels = data.train
    kept, held = stratified_split(labels, 0.1, seed=0)
    z = (features - features.mean(0)) / features.std(0, correction=0)
    found = {}
    for lr in (1e-6, 0.5, 3.0):
        weight, bias = train_heads(z[kept], labels[kept], [lr], num_classes=4, epochs=4, batch_size=32)
        found[lr] = (F.linear(z[held], weight[0], bias[0]).argmax(1) == labels[held]).double().mean().item(), weight
    assert done.about["validation_top1"] == pytest.approx({f"{lr:g}": score for lr, (score, _) in found.items()})
    assert done.about["lr"] == max(found, key=lambda lr: (found[lr][0], -lr))
    test = (data.test[0] - features.mean(0)) / features.std(0, correction=0)
    weight, bias = train_heads(z[kept], labels[kept], [done.about["lr"]], num_classes=4, epochs=4, batch_size=32)
    assert torch.equal(done.predictions, F.linear(test, weight[0], bias[0]).argmax(1))


def test_test_labels_decide_nothing_and_the_end_of_the_grid_is_told():
    features, labels = clusters(120, 1)
    done, other = heads(frozen(), epochs=2), heads(frozen(test=(features, labels.flip(0))), epochs=2)
    assert torch.equal(done.predictions, other.predictions)
    assert done.about == other.about
    assert len(done.about["validation_top1"]) == len(LEARNING_RATES) == 13
    two = heads(frozen(), lrs=[0.01, 0.5], epochs=4, batch_size=32).about
    assert two["lr_end"] == {0.01: "least", 0.5: "greatest"}[two["lr"]]


def test_a_head_that_diverges_is_left_out_and_none_left_is_an_error():
    train = clusters(240, 0)
    done = heads(frozen(train=train), lrs=[0.1, 1e39], epochs=4, batch_size=32)
    assert done.about["lr"] == 0.1
    assert list(done.about["validation_top1"]) == ["0.1"]
    with pytest.raises(RuntimeError, match="every linear head diverged"):
        heads(frozen(train=train), lrs=[1e39], epochs=4, batch_size=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrs": []}, "needed learning rates > 0"),
        ({"lrs": [0.1, float("nan")]}, "needed learning rates > 0"),
        ({"epochs": 0}, "counts >= 1"),
        ({"weight_decay": -1.0}, "a decay >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        heads(frozen(), **settings)


def test_classes_of_one_image_leave_nothing_to_choose_by():
    train = torch.eye(4), torch.arange(4)
    with pytest.raises(ValueError, match="every class has a single training image"):
        heads(frozen(train=train, test=train))
