"""simclr.byol: the paper's formulae, term by term; a target that nothing trains; the same runs as SimCLR's."""

import math
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from torch import Tensor

from ranks import run_ranks
from simclr import BYOL, load_encoder
from simclr.byol import _stats, move_average, regression_loss, target_decay
from simclr.checkpoint import read_checkpoint
from simclr.cli.linear_eval import linear_eval
from simclr.cli.report import report
from simclr.cli.train import train
from simclr.nonfinite.watch import FiniteSteps
from tiny import BATCH, STEPS, fit, flags

pytestmark = pytest.mark.usefixtures("few_lambdas")

SMALL = {"method": "byol", "model.projection_dim": 8, "model.warmup_epochs": 0, "trainer.log_every_n_steps": 1}


def tiny_byol(**settings) -> BYOL:
    torch.manual_seed(0)
    small = {"encoder": "resnet8", "image_size": 16, "width": 0.25, "projection_dim": 8}
    return BYOL(**{**small, "warmup_epochs": 0, "batch_size": BATCH, **settings})


def dumb_loss(online: list[Tensor], target: list[Tensor]) -> Tensor:
    """Equation 2 of the paper, image by image: online[v][i] is a prediction, target[v][i] a projection, of view v."""
    total = online[0].new_zeros(())
    for i in range(len(online[0])):
        for v, w in ((0, 1), (1, 0)):
            q, z = online[v][i], target[w][i]
            total = total + 2 - 2 * (q * z).sum() / (q.norm() * z.norm())
    return total / len(online[0])


def test_loss_and_gradient_are_the_papers():
    draw = torch.Generator().manual_seed(0)
    online = [torch.randn(5, 7, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2)]
    target = [torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2)]
    predicted = torch.cat(online)
    loss = regression_loss(predicted, torch.cat(target[::-1]))
    wanted = dumb_loss(online, target)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(loss, online), torch.autograd.grad(wanted, online), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)
    assert regression_loss(predicted.float(), torch.cat(target[::-1]).float()).dtype == torch.float32
    assert regression_loss(predicted.bfloat16(), torch.cat(target).bfloat16()).dtype == torch.float32


def test_no_gradient_goes_into_the_target():
    model = tiny_byol()
    model.trainer = None
    images = torch.rand(4, 3, 16, 16)
    views = model.views.make(images, torch.arange(4), 0)
    projected = model.project(views)
    projected.retain_grad()
    regression_loss(projected[:, :8], projected[:, 8:]).backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert projected.grad[:, 8:].abs().max() == 0
    # Nor by way of the online network, whose weights the target has: the gradient is that of constants in its place.
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    predicted = model.project(views)[:, :8]
    regression_loss(predicted, projected[:, 8:].detach().clone()).backward()
    assert mine.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in mine.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, atol=1e-6), name


def test_the_step_predicts_each_view_from_the_other(tmp_path):
    model = tiny_byol()
    seen = {}

    def loss(both):
        seen["both"] = both.detach().clone()
        return BYOL.loss(model, both)

    model.loss = loss
    trainer = fit(tmp_path, model, max_epochs=1, max_steps=1)
    online, target = seen["both"].chunk(2, dim=1)
    wanted = dumb_loss([*online.double().chunk(2)], [*target.double().chunk(2)])
    assert trainer.callback_metrics["train_loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(("step", "wanted"), [(0, 0.99), (50, 0.995), (100, 1.0), (25, 1 - 0.01 * (0.5**0.5 + 1) / 2)])
def test_the_decay_rises_to_one_by_a_cosine(step, wanted):
    assert target_decay(0.99, step, 100) == pytest.approx(wanted, abs=1e-15)
    assert target_decay(0.99, step, 100) == 1 - (1 - 0.99) * (math.cos(math.pi * step / 100) + 1) / 2
    assert target_decay(0.0, step, 100) == 0  # without a target, to the end
    assert target_decay(1.0, step, 100) == 1


def test_the_target_is_the_average_of_the_online_weights(tmp_path):
    model, steps = tiny_byol(target_decay=0.9), []
    target = {name: p.detach().clone() for name, p in model.target.named_parameters()}
    step = BYOL.optimizer_step

    def optimizer_step(*args):
        step(model, *args)
        steps.append({name: model.get_parameter(name).detach().clone() for name in target})

    model.optimizer_step = optimizer_step
    fit(tmp_path, model, max_epochs=1)
    assert len(steps) == STEPS
    for k, online in enumerate(steps):
        decay = 1 - 0.1 * (math.cos(math.pi * k / STEPS) + 1) / 2
        target = {name: decay * slow + (1 - decay) * online[name] for name, slow in target.items()}
    for name, p in model.target.named_parameters():
        assert torch.allclose(p, target[name], atol=1e-6), name
        assert not torch.equal(p, model.get_parameter(name))


def test_a_decay_of_zero_is_the_online_network():
    online = torch.nn.Linear(3, 2)
    target = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 2)})
    move_average(target, {"encoder": online}, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))


@pytest.mark.parametrize("size", [4, 8])
def test_micro_batches_give_the_gradient_of_the_batch(size, tmp_path):
    def gradients(**settings):
        model = tiny_byol(norm="none", head_batch_norm=False, optimizer="sgd", base_lr=0.1, **settings)
        found = {}

        def keep(optimizer):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

        model.on_before_optimizer_step = keep
        fit(tmp_path, model, max_epochs=1, max_steps=1)
        return found

    whole, parts = gradients(), gradients(micro_batch_size=size)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], atol=1e-6 * float(gradient.abs().max()) + 1e-8), name


def of_a_rank(root: str) -> list[float]:
    """The weights after two steps of this rank's share."""
    import torch.distributed as dist

    model = tiny_byol(norm="none", head_batch_norm=False, optimizer="sgd", base_lr=0.1)
    share = BATCH // dist.get_world_size()
    rank, images = dist.get_rank(), torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    part = slice(rank * share, (rank + 1) * share)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        views = model.views.make(images[part], torch.arange(BATCH)[part], step)
        loss, stats = model.loss(model.project(views))
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
        move_average(model.target, {"encoder": model.encoder, "head": model.head}, 0.9)
    numbers = [float(x) for x in stats]
    return [*numbers[:1], *numbers[2:], *(float(p.detach().double().sum()) for p in model.parameters())]


def test_two_ranks_train_the_network_of_one(tmp_path):
    one, (first, second) = run_ranks(of_a_rank, 1, str(tmp_path))[0], run_ranks(of_a_rank, 2, str(tmp_path))
    assert first == second
    # All but the cosine of two images, of which a rank knows its own.
    assert [first[0], first[1], *first[3:]] == pytest.approx([one[0], one[1], *one[3:]], rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a whole run."""
    place = tmp_path_factory.mktemp("byol")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(flags({**SMALL, "run_dir": "whole"}))
    return place


def test_a_stopped_run_ends_in_the_bits_of_a_whole_one(runs, monkeypatch):
    monkeypatch.chdir(runs)
    halt = "[{class_path: test_continue.Halt, init_args: {epoch: 1, batch: 1}}]"
    train(flags({**SMALL, "run_dir": "half", "trainer.callbacks": halt}))
    assert read_checkpoint("half").global_step == STEPS + 2
    train(["--ckpt_path", "half", "--trainer.callbacks=null"])
    a, b = (
        torch.load(Path(name, "checkpoints/last.ckpt"), weights_only=True)["state_dict"] for name in ("whole", "half")
    )
    assert any(name.startswith("target.") for name in a)
    assert all(torch.equal(a[name], value) for name, value in b.items())


class Begun(Callback):
    """Keeps what a run begins with."""

    def on_train_start(self, trainer, pl_module):
        self.state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}


def test_both_networks_begin_with_given_weights_and_a_continued_run_keeps_its_own(tmp_path):
    drawn = torch.Generator().manual_seed(3)
    weights = {
        name: torch.rand(value.shape, generator=drawn) if value.is_floating_point() else value + 7
        for name, value in tiny_byol().encoder.state_dict().items()
    }
    file = tmp_path / "w.pt"
    torch.save(weights, file)
    first, again = Begun(), Begun()
    model = tiny_byol(weights=str(file))
    trainer = fit(tmp_path, model, max_epochs=2, callbacks=[first])
    for name, value in weights.items():
        assert torch.equal(first.state[f"encoder.{name}"], value), name
        assert torch.equal(first.state[f"target.encoder.{name}"], value), name
    heads = {name.removeprefix("target."): v for name, v in first.state.items() if name.startswith("target.head.")}
    assert all(torch.equal(first.state[name], value) for name, value in heads.items())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    file.unlink()
    fit(tmp_path, tiny_byol(weights=str(file)), max_epochs=3, callbacks=[again], ckpt_path=tmp_path / "x.ckpt")
    assert not torch.equal(model.target["encoder"].conv1.weight, model.encoder.conv1.weight)
    assert all(torch.equal(again.state[name], value) for name, value in model.state_dict().items())


def test_it_is_evaluated_reported_and_taken_out_like_simclr(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    linear_eval(["--checkpoint", "whole"])
    report(["--run_dir", "whole"])
    assert "BYOL, target decay 0.99" in Path("whole/report.html").read_text()
    assert read_checkpoint("whole").method == "byol"
    x = torch.randn(2, 3, 16, 16)
    online, target = load_encoder("whole"), load_encoder("whole", network="target")
    state = read_checkpoint("whole").state_dict
    for encoder, prefix in ((online, "encoder."), (target, "target.encoder.")):
        assert all(torch.equal(value, state[prefix + name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(online(x), target(x))


def test_simclr_has_no_target(tmp_path):
    from tiny import tiny_model

    fit(tmp_path, tiny_model(), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="has no target network: it is a run of simclr"):
        load_encoder(tmp_path / "x.ckpt", network="target")
    with pytest.raises(ValueError, match="network=slow is none of online, target"):
        load_encoder(tmp_path / "x.ckpt", network="slow")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_decay": 1.5}, "target_decay=1.5 is not in"),
        ({"target_decay": -0.1}, "target_decay=-0.1 is not in"),
        ({"base_lr": -1.0}, "base_lr"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        tiny_byol(**settings)


def test_views_are_those_of_the_paper_unless_others_are_given():
    small, large = tiny_byol(), tiny_byol(image_size=96, stem="small")
    assert small.hparams.solarize_prob == [0.0, 0.2]
    assert small.hparams.blur_prob == 0.0
    assert (large.hparams.blur_prob, large.hparams.solarize_prob) == ([1.0, 0.1], [0.0, 0.2])
    # DeepMind's brightness, contrast and hue: .4, .4 and .1, where SimCLR's are .8, .8 and .2 at this size.
    jitter = large.augment.strength * torch.tensor([0.8, 0.8, 0.2])
    torch.testing.assert_close(jitter, torch.tensor([0.4, 0.4, 0.1]))
    assert tiny_byol(image_size=96, stem="small", strength=1.0).augment.strength == 1.0
    assert tiny_byol(solarize_prob=0.0, blur_prob=0.5).hparams.blur_prob == 0.5
    images, index = torch.rand(3, 3, 16, 16), torch.arange(3)
    again = BYOL(**{**small.hparams})
    for mine, theirs in zip(small.views.make(images, index, 1), again.views.make(images, index, 1), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_predictor_it_is_said_and_nothing_stands_in_its_place():
    model = tiny_byol(predictor="none")
    assert "without a predictor" in model.objective(model.hparams).text
    assert not any(name.startswith("predictor") for name, _ in model.named_parameters())
    online, target = model.project((torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16))).chunk(2, dim=1)
    assert torch.allclose(online, target, atol=1e-5)  # as long as nothing is trained


def test_what_people_are_told_is_counted_pair_by_pair():
    draw = torch.Generator().manual_seed(4)
    predicted, target = (torch.randn(8, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    target[:3] = predicted[:3]  # some find their own
    unit = [x / x.norm(dim=1, keepdim=True) for x in (predicted, target)]
    own, others, found = [], [], 0
    for i in range(8):  # rows i and i + 4 are of one image
        of_others = [float(unit[0][i] @ unit[1][j]) for j in range(8) if j % 4 != i % 4]
        own.append(float(unit[0][i] @ unit[1][i]))
        others += of_others
        found += own[-1] > max(of_others)
    told = _stats(torch.tensor(1.5), predicted, target)
    wanted = (1.5, found / 8, sum(own) / 8, sum(others) / len(others))
    assert [float(x) for x in told] == pytest.approx(wanted, abs=1e-6)
    assert 3 <= found < 8


def test_a_skipped_step_leaves_the_target_too(tmp_path):
    model = tiny_byol()
    finite = FiniteSteps(on_nonfinite="skip", say=lambda *args: None)
    seen, step = [], BYOL.optimizer_step

    def optimizer_step(*args):
        before = [p.clone() for p in model.target.parameters()]
        step(model, *args)
        seen.append(any(not torch.equal(a, b) for a, b in zip(before, model.target.parameters(), strict=True)))

    def loss(both):
        found, stats = BYOL.loss(model, both)
        return (found * float("nan"), stats) if model.trainer.global_step == 2 else (found, stats)

    model.optimizer_step, model.loss = optimizer_step, loss
    fit(tmp_path, model, callbacks=[finite], max_epochs=1)
    assert finite.skipped == 1
    assert seen == [True, True, False, True]
