"""Multi-crop: small crops beside the views of SimCLR, in the loss, the views, the network and what is told of them."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Callback

from ranks import mean_over_ranks, run_ranks
from simclr import BYOL, SimCLRAugmentation, memory
from simclr.callbacks import view_grid
from simclr.contrast import tiles
from simclr.data import draw_shapes
from simclr.losses import nt_xent_to_large, sup_con
from simclr.profile import count_operations
from simclr.training.objective import objective_of
from simclr.views import compiled
from tiny import STEPS, fit, tiny_model

# The loss: against float64, one pair at a time.


def to_large_by_double_loop(large, small, temperature) -> torch.Tensor:
    """The mean over all views as anchors of the mean over their large positives, among large candidates alone."""
    rows = [(v, k, row / row.norm()) for v, view in enumerate([*large, *small]) for k, row in enumerate(view)]
    total = torch.zeros((), dtype=torch.float64)
    for v, k, z in rows:
        others = [(m == k, z @ other / temperature) for w, m, other in rows if w < len(large) and (w, m) != (v, k)]
        among = sum(logit.exp() for _, logit in others).log()
        positives = [among - logit for same, logit in others if same]
        total = total + sum(positives) / len(positives)
    return total / len(rows)


def projections(views: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, 5, generator=draw, dtype=torch.float64) for _ in range(views)]


def leaves(views: list[torch.Tensor]) -> list[torch.Tensor]:
    return [view.detach().clone().requires_grad_() for view in views]


@pytest.mark.parametrize("tile", [None, (3, 5), (4, 4)])
@pytest.mark.parametrize(("large", "small", "n"), [(2, 1, 2), (2, 3, 5), (3, 2, 4), (2, 6, 3)])
def test_loss_towards_large_views_is_the_double_loops_in_value_and_gradient(large, small, n, tile, monkeypatch):
    if tile:
        monkeypatch.setattr(tiles, "tile_shape", lambda device: tile)
    ours, loop = leaves(projections(large + small, n)), leaves(projections(large + small, n))
    loss, stats = nt_xent_to_large(ours[:large], ours[large:], 0.3, return_stats=True)
    expected = to_large_by_double_loop(loop[:large], loop[large:], 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert stats.loss.item() == pytest.approx(loss.item(), rel=1e-14)
    for grad, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, loop), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-14)
    found = _stats_by_double_loop(loop[:large], loop[large:])
    assert [value.item() for value in stats[1:]] == pytest.approx(found, rel=1e-12)
    assert nt_xent_to_large(ours[:large], ours[large:], 0.3).item() == loss.item()
    float32 = [view.detach().float() for view in ours]
    assert nt_xent_to_large(float32[:large], float32[large:], 0.3).item() == pytest.approx(expected.item(), rel=1e-6)


def _stats_by_double_loop(large, small) -> list[float]:
    """How many anchors have their positives, in the mean, nearer than any negative; mean cosines of both kinds."""
    views = [(view / view.norm(dim=1, keepdim=True)).detach() for view in (*large, *small)]
    best, near, far = [], [], []
    for v, view in enumerate(views):
        for k, z in enumerate(view):
            others = [(m == k, float(z @ views[w][m])) for w in range(len(large)) for m in range(len(view))
                      if (w, m) != (v, k)]  # fmt: skip
            positives, negatives = ([c for same, c in others if same is kind] for kind in (True, False))
            best.append(sum(positives) / len(positives) > max(negatives))
            near.append(sum(positives) / len(positives))
            far.append(sum(negatives) / len(negatives))
    return [sum(best) / len(best), sum(near) / len(near), sum(far) / len(far)]


def test_without_small_crops_it_would_be_nt_xent_of_the_large_views():
    large = projections(2, 6)
    far = to_large_by_double_loop(large, [], 0.3)
    assert sup_con(large, 0.3).item() == pytest.approx(far.item(), rel=1e-13)


COUNTS = [[3, 3], [2, 4]]


def of_rank() -> list[tuple[float, list[np.ndarray]]]:
    return [of_share(counts) for counts in COUNTS]


def of_share(counts: list[int]) -> tuple[float, list[np.ndarray]]:
    """Of this rank's share of five views: the mean loss of the ranks, and its gradient with respect to the share."""
    start = sum(counts[: dist.get_rank()])
    views = leaves([view[start : start + counts[dist.get_rank()]] for view in projections(5, sum(counts))])
    loss = nt_xent_to_large(views[:2], views[2:], 0.3, uneven=True)
    grads = torch.autograd.grad(loss, views)
    return mean_over_ranks(loss).item(), [grad.numpy() / len(counts) for grad in grads]


def test_two_ranks_have_the_loss_and_the_gradient_of_the_global_batch():
    results = run_ranks(of_rank, 2)
    for number, counts in enumerate(COUNTS):
        views = leaves(projections(5, sum(counts)))
        expected = to_large_by_double_loop(views[:2], views[2:], 0.3)
        for k, grad in enumerate(torch.autograd.grad(expected, views)):
            found = np.concatenate([rank[number][1][k] for rank in results])
            np.testing.assert_allclose(found, grad.numpy(), rtol=1e-11, atol=1e-14)
        assert all(rank[number][0] == pytest.approx(expected.item(), rel=1e-13) for rank in results)


# The views


def test_small_crops_follow_the_views_and_are_pure_functions_of_their_own_numbers():
    images, index = draw_shapes(4, 16)[0], torch.tensor([7, 3, 5, 0])
    plain, model = tiny_model(), tiny_model(small_crops=2, small_crop_scale=(0.1, 0.3), seed=0)
    large = plain.views.make(images, index, 1)
    views = model.views.make(images, index, 1)
    assert [view.shape[-1] for view in views] == [16, 16, 8, 8]
    assert all(torch.equal(a, b) for a, b in zip(large, views[:2], strict=True))
    alone = SimCLRAugmentation(8, crop_scale=(0.1, 0.3), strength=0.5, blur_prob=0.0)
    for number in (2, 3):
        assert torch.equal(views[number], alone.view(images, index, 1, 0, number))
    again = model.views.make(images[2:], index[2:], 1)
    assert all(torch.equal(a[2:], b) for a, b in zip(views, again, strict=True))


def test_small_crops_are_compiled_as_the_views_are(monkeypatch):
    made = []
    monkeypatch.setattr(compiled, "_uncompiled", set())
    monkeypatch.setattr(
        compiled, "crop_and_color", lambda images, draws, norm, out: made.append(out.shape[-1]) or out.fill_(0)
    )
    model = tiny_model(small_crops=1)
    model.augment.compile_views = True  # as the command line settles it, after the method was built
    model.views.make(draw_shapes(2, 16)[0], torch.arange(2), 0)
    assert set(made) == {16, 8}


def test_what_is_left_open_is_stated():
    hparams = tiny_model(small_crops=2).hparams
    assert (hparams.small_crop_size, hparams.small_crop_scale) == (8, [0.05, 0.2])
    assert tiny_model().hparams.small_crop_size is None


# The network


def test_each_size_goes_through_the_network_once_with_statistics_of_its_own():
    model = tiny_model(small_crops=3).train()
    views = model.views.make(draw_shapes(6, 16)[0], torch.arange(6), 0)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    z = model.project(views)
    assert seen == [(12, 3, 16, 16), (18, 3, 8, 8)]
    other = tiny_model(small_crops=3).train()
    assert torch.equal(z[:12], other.head(other.encoder(torch.cat(views[:2]))))
    assert torch.equal(z[12:], other.head(other.encoder(torch.cat(views[2:]))))
    # The running statistics have moved for both, large views first.
    for buffer, alone in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, alone)


def test_a_compiled_network_is_one_program_for_each_size(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    for small_crops in (0, 2):
        model = tiny_model(small_crops=small_crops, compile_encoder=True)
        model.project(model.views.make(draw_shapes(4, 16)[0], torch.arange(4), 0))
    assert asked == [{"mode": None}, {"mode": None, "dynamic": False}]


PLAIN = {"norm": "none", "head_batch_norm": False, "optimizer": "sgd", "base_lr": 0.1, "warmup_epochs": 0}


@pytest.mark.parametrize("pairs", ["all", "large"])
def test_micro_batches_take_the_steps_of_the_whole_batch(tmp_path, pairs):
    ends = []
    for size in (None, 4):
        model = tiny_model(**PLAIN, small_crops=3, pairs=pairs, micro_batch_size=size)
        fit(tmp_path, model, max_steps=2, precision="64-true")
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-12)


class Halt(Callback):
    """Asks the Trainer to stop in the middle of the first epoch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= trainer.global_step == 3


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    settings = {"small_crops": 2, "pairs": "large"}
    whole = fit(tmp_path, tiny_model(**settings), max_epochs=2)
    half = fit(tmp_path, tiny_model(**settings), max_epochs=2, callbacks=[Halt()])
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert half.global_step == 3
    torch.manual_seed(99)  # nothing of the continued run comes from the global generator
    on = fit(tmp_path, tiny_model(**settings), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    a, b = whole.lightning_module.state_dict(), on.lightning_module.state_dict()
    assert on.global_step == whole.global_step == 2 * STEPS
    assert all(torch.equal(a[name], value) for name, value in b.items())


# What is told


def test_the_loss_of_projections_that_are_alike_is_the_chance_that_is_told():
    z = torch.ones(4, 5, dtype=torch.float64)
    settings = {"loss": "nt_xent", "temperature": 0.5, "views": 2, "small_crops": 3, "batch_size": 4}
    for pairs, loss in (("all", sup_con([z] * 5, 0.5)), ("large", nt_xent_to_large([z] * 2, [z] * 3, 0.5))):
        told = objective_of({**settings, "pairs": pairs})
        assert told.chance == pytest.approx(loss.item(), rel=1e-12)
    assert told.text == "NT-Xent, temperature 0.5, 3 small crops, each view against the large ones"
    assert objective_of({**settings, "small_crops": 0, "pairs": "all"}).chance == math.log(7)


def test_memory_and_operations_know_small_crops():
    plain, model = tiny_model(), tiny_model(small_crops=4)
    small = tiny_model(image_size=8, views=4)
    for of in (lambda m: count_operations(m, 3)[0], lambda m: memory.estimate(m, 16).views):
        assert of(model) == of(plain) + of(small)
    assert memory.estimate(model, 16).activations > memory.estimate(plain, 16).activations
    assert model.views.groups(0) == [(2, 16), (4, 8)]
    assert model.views.pixels() == 3 * model.hparams.image_size**2


def test_the_picture_shows_small_crops_at_their_own_size():
    model = tiny_model(small_crops=1)
    images, index = draw_shapes(3, 16)[0], torch.arange(3)
    picture = np.asarray(view_grid(model, images, index, epochs=1))
    cell, zoom, gap = 96, 6, 2  # 16 px, six times
    crop = model.views.make(images, index, 0)[2]
    expected = (crop[1] * 0.25 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    expected = expected.repeat(zoom, 0).repeat(zoom, 1)  # 48 px, in the middle of the cell
    top = 3 * (cell + gap) + 8 + (54 - 48) // 2  # below image and views, in a row as tall as its label
    left = 72 + (cell + gap) + (cell - 48) // 2
    rows = [y for y in range(top - 4, top + 5) if np.abs(
        picture[y : y + 48, left : left + 48].astype(int) - expected.astype(int)).max() <= 1]  # fmt: skip
    assert len(rows) == 1
    assert (picture[rows[0] - 1, left : left + 48] == 255).all()  # white around it
    assert (picture[rows[0] : rows[0] + 48, left - 1] == 255).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"small_crops": -1}, "small_crops=-1 is not 0 or more"),
        ({"small_crop_size": 8}, "small_crop_size=8 is of small crops, and there are none: give small_crops"),
        ({"pairs": "large"}, "pairs=large is of small crops, and there are none"),
        ({"small_crops": 2, "loss": "dcl"}, "small_crops=2 works with loss=nt_xent only, not with dcl"),
        ({"small_crops": 2, "small_crop_size": 17}, "small_crop_size=17 is not from 1 to image_size=16"),
        ({"small_crops": 2, "small_crop_scale": (0.3, 0.2)}, r"small_crop_scale=\(0.3, 0.2\) is not a range of area"),
        ({"small_crops": 2, "start_size": 8, "grow_epochs": 1}, "small_crops=2 with start_size: views that grow"),
        ({"small_crops": 2, "compile_encoder": "reduce-overhead"}, "replays CUDA graphs, of one size of views"),
        ({"small_crops": 2, "pairs": "anchors"}, "pairs=anchors is none of all, large"),
        (
            {"small_crops": 2, "encoder": "squeezenet1_1", "width": 1.0, "image_size": 32, "small_crop_size": 2},
            "small_crop_size=2: encoder squeezenet1_1 cannot take images of that size",
        ),
    ],
)
def test_what_does_not_go_with_small_crops_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings)


def test_byol_has_none():
    with pytest.raises(TypeError, match="unexpected keyword argument 'small_crops'"):
        BYOL("resnet8", image_size=16, small_crops=2)
