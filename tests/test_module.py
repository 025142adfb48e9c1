"""SimCLR: the loss of the right views, the learning rate that is used, runs that resume and divide exactly."""

import copy
import csv
import inspect
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Callback
from torch.utils.data import DataLoader, TensorDataset

from ranks import run_ranks
from simclr import LARS, ProjectionHead, SimCLR, SimCLRAugmentation, build_encoder
from simclr.cli.saving import newest_checkpoint
from simclr.cli.train import train
from simclr.contrast import agree
from simclr.data import ImageData, draw_shapes
from simclr.loggers import build_loggers
from simclr.seeding import epoch_order
from strict.sitecustomize import environment
from test_losses import reference
from tiny import BATCH, IMAGES, STEPS, Record, StopAt, fit, flags, tiny_data, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _signals_as_they_were():
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores it for good once a run was interrupted
    yield
    signal.signal(signal.SIGINT, before)


def defaults(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (build_encoder, {name: name for name in ("stem", "width", "shortcut", "zero_init", "norm")}),
        (
            ProjectionHead,
            {"kind": "head", "hidden_dim": "hidden_dim", "projection_dim": "projection_dim"}
            | {"layers": "head_layers", "batch_norm": "head_batch_norm"},
        ),
        (LARS, {"momentum": "momentum"}),
        (ImageData, {name: name for name in ("batch_size", "image_size", "seed")}),
    ],
)
def test_a_default_that_stands_in_two_places_is_the_same_in_both(part, names):
    there, here = defaults(part), defaults(SimCLR)
    assert {name: there[name] for name in names} == {name: here[ours] for name, ours in names.items()}


@pytest.mark.parametrize("documented", [SimCLR, ImageData, SimCLRAugmentation])
def test_every_setting_is_documented(documented):
    text = f"{inspect.getdoc(documented)}\n{inspect.cleandoc(documented.__init__.__doc__ or chr(32))}"
    section = text.split("Args:\n")[1].split("\nRaises:")[0]
    names = re.findall(r"^    ([\w*]+(?:, \w+)*):", section, re.MULTILINE)
    assert [n.strip("*") for line in names for n in line.split(", ")] == list(inspect.signature(documented).parameters)


@pytest.fixture
def seen(monkeypatch):
    """The views of every step, as the network gets them."""
    made, project = [], SimCLR.project
    monkeypatch.setattr(SimCLR, "project", lambda self, views: made.append(views) or project(self, views))
    return made


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_sees_the_views_of_its_epoch_seed_and_images(tmp_path, precision, seen):
    seed = 7
    fit(tmp_path, tiny_model(seed=seed), tiny_data(seed=seed), max_epochs=2, precision=precision)
    images, augment = draw_shapes(IMAGES, 16)[0], SimCLRAugmentation(16)
    assert len(seen) == 2 * STEPS
    for step, views in enumerate(seen):
        epoch, k = divmod(step, STEPS)
        index = epoch_order(seed, epoch, IMAGES)[k * BATCH : (k + 1) * BATCH]
        for view, expected in zip(views, augment(images[index], index, epoch=epoch, seed=seed), strict=True):
            assert view.dtype == torch.float32
            assert torch.equal(view, expected)


def test_the_loss_is_nt_xent_of_head_of_encoder_of_both_views(tmp_path):
    model, record = tiny_model(temperature=0.3), Record()
    start = copy.deepcopy(model)
    fit(tmp_path, model, callbacks=[record], max_steps=1)
    index = epoch_order(0, 0, IMAGES)[:BATCH]
    views = SimCLRAugmentation(16)(draw_shapes(IMAGES, 16)[0][index], index)
    z1, z2 = start.head(start.encoder(torch.cat(views))).double().chunk(2)
    assert record.steps[0]["train_loss"] == pytest.approx(reference("nt_xent", (z1, z2), 0.3).item(), rel=1e-5)


class Transfer(Callback):
    """What becomes of a training batch on its way to a device."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        batch = torch.zeros(2, 3, 4, 4), torch.arange(2)
        self.images, self.index = pl_module.transfer_batch_to_device(batch, torch.device("meta"), 0)


def test_the_images_go_to_the_device_and_their_numbers_stay_on_the_cpu(tmp_path):
    seen = Transfer()
    fit(tmp_path, callbacks=[seen], max_steps=1)
    assert (seen.images.device.type, seen.index.device.type) == ("meta", "cpu")


@pytest.mark.parametrize(
    ("precision", "weights", "loss"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_a_step_runs_in_every_precision_of_the_trainer(tmp_path, precision, weights, loss):
    model, losses = tiny_model(), []
    step = model.training_step
    model.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    fit(tmp_path, model, max_steps=1, precision=precision)
    assert [x.dtype for x in losses] == [loss]
    assert losses[0].isfinite()
    assert {p.dtype for p in model.parameters()} == {weights}


def test_batches_of_an_evaluation_are_not_augmented(tmp_path):
    model = tiny_model()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trainer = fit(tmp_path, model, max_steps=1)
    (h,) = trainer.predict(model, DataLoader(images, batch_size=5))
    assert torch.equal(h, model.encoder.eval()(images))
    assert h.shape == (5, model.encoder.feature_dim)


def plain(value: object) -> bool:
    if isinstance(value, list):
        return all(plain(item) for item in value)
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return value is None or type(value) in (str, int, float, bool)


def test_a_checkpoint_states_every_setting_in_plain_types(tmp_path):
    trainer = fit(tmp_path, tiny_model(crop_scale=(0.2, 0.9)), max_steps=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    model, data = content["hyper_parameters"], content["datamodule_hyper_parameters"]
    assert plain(model)
    assert plain(data)
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults(SimCLRAugmentation).items()}
    expected = expected | defaults(SimCLR) | {"image_size": 16, "crop_scale": [0.2, 0.9], "warmup_epochs": 1}
    expected |= {"encoder": "resnet8", "width": 0.25, "projection_dim": 16, "batch_size": BATCH}
    expected |= {"base_lr": 0.075, "lr_scaling": "sqrt", "weight_decay": 1e-4, "strength": 0.5, "blur_prob": 0.0}
    expected |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert model == expected
    assert data.keys() == defaults(ImageData).keys()
    assert SimCLR(**model).hparams == trainer.lightning_module.hparams


class UsedLr(Callback):
    """The learning rate of each optimiser step, as the optimiser holds it when it steps."""

    def __init__(self):
        self.lr = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        self.lr.append(lr)


@pytest.mark.parametrize(
    ("scaling", "accumulate", "warmup_steps", "peak"),
    [("linear", 1, 6, 2.0 * BATCH / 256), ("sqrt", 1, 6, 2.0 * math.sqrt(BATCH)), ("none", 2, 3, 2.0)],
)
def test_the_logged_learning_rate_is_the_one_used_warm_up_then_cosine(
    tmp_path, scaling, accumulate, warmup_steps, peak
):
    used, record, epochs = UsedLr(), Record(), 3
    model = tiny_model(base_lr=2.0, lr_scaling=scaling, warmup_epochs=1.5, optimizer="sgd")
    fit(tmp_path, model, callbacks=[used, record], max_epochs=epochs, accumulate_grad_batches=accumulate)
    total = epochs * STEPS // accumulate
    rising = [peak * (step + 1) / warmup_steps for step in range(warmup_steps)]
    falling = [math.cos(math.pi * k / (total - warmup_steps)) for k in range(total - warmup_steps)]
    assert used.lr == pytest.approx(rising + [peak * (1 + c) / 2 for c in falling], rel=1e-9)
    assert [step["lr"] for step in record.steps] == pytest.approx([lr for lr in used.lr for _ in range(accumulate)])


class Seen(Callback):
    """What callbacks are told after each batch, and the loss of that batch."""

    def __init__(self):
        self.told, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.told.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_metrics_are_told_and_written_at_the_steps_that_are_due(tmp_path, every, accumulate):
    seen, run_dir = Seen(), tmp_path / "run"
    settings = {"log_every_n_steps": every, "accumulate_grad_batches": accumulate}
    fit(tmp_path, callbacks=[seen], logger=build_loggers(run_dir), **settings)
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    ends = [batch for batch in range(3 * STEPS) if (batch % STEPS + 1) % accumulate == 0 or batch % STEPS == STEPS - 1]
    due = [(step, batch) for step, batch in enumerate(ends) if (step + 1) % every == 0]
    assert [int(row["step"]) for row in rows] == [step for step, _ in due]
    for row, (_, batch) in zip(rows, due, strict=True):
        assert float(row["train_loss"]) == seen.told[batch]["train_loss"] == pytest.approx(seen.losses[batch], rel=1e-6)
        assert float(row["lr"]) == pytest.approx(seen.told[batch]["lr"])
        assert {"contrast_top1", "positive_cosine", "negative_cosine"} <= seen.told[batch].keys()


def test_warm_up_counts_the_step_of_what_is_left_over_at_the_end_of_an_epoch(tmp_path):
    record = Record()  # 4 batches by threes are 2 steps
    model = tiny_model(warmup_epochs=2, lr_scaling="none", base_lr=0.1)
    fit(tmp_path, model, callbacks=[record], max_epochs=4, accumulate_grad_batches=3)
    assert [round(step["lr"], 6) for step in record.steps][: 2 * STEPS] == [*[0.025] * 3, 0.05, *[0.075] * 3, 0.1]


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a cosine needs an end: set trainer.max_epochs or trainer.max_steps"):
        fit(tmp_path, max_epochs=-1)


class Break(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            torch.nn.init.constant_(pl_module.head.layers[-1].linear.weight, math.nan)


@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
def test_projections_that_are_not_finite_stop_the_run(tmp_path, step):
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {step}: 32 of 32 .* Lower base_lr"):
        fit(tmp_path, callbacks=[Break(step)], log_every_n_steps=50)


@pytest.mark.parametrize(("step", "every", "seen"), [(0, 2, 1), (0, 50, STEPS - 1), (STEPS - 1, 50, STEPS - 1)])
def test_on_a_gpu_a_loss_that_is_not_finite_stops_the_run_where_it_is_logged(tmp_path, monkeypatch, step, every, seen):
    # And at the last step of an epoch: before anything is saved.
    monkeypatch.setattr(agree, "count_not_finite", lambda views: 0)
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {seen}. Lower base_lr"):
        fit(tmp_path, callbacks=[Break(step)], log_every_n_steps=every)


def test_labels_in_place_of_image_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"numbers repeat in the first batch. Are they labels"):
        fit(tmp_path, data=DataLoader(TensorDataset(*draw_shapes(IMAGES, 16)), batch_size=BATCH))


def test_any_loader_of_images_and_their_numbers_will_do(tmp_path):
    numbered = TensorDataset(draw_shapes(IMAGES, 16)[0], torch.arange(IMAGES))
    assert fit(tmp_path, data=DataLoader(numbered, batch_size=BATCH), max_epochs=1).global_step == STEPS


def test_a_data_module_with_another_batch_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SimCLR has batch_size=16, the data module 32. Give both the same."):
        fit(tmp_path, data=tiny_data(batch_size=32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0 is not positive"),
        ({"temperature": math.nan}, "temperature=nan is not positive"),
        ({"base_lr": -1, "momentum": 1}, r"base_lr=-1 is not positive; momentum=1 is not in \[0, 1\)"),
        ({"weight_decay": -0.1, "warmup_epochs": -1}, "weight_decay=-0.1 is negative; warmup_epochs=-1 is negative"),
        ({"blur_prob": 2}, "blur_prob"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**settings)


def final(trainer, path):
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def assert_same(a, b, where="checkpoint"):
    """Equal bit for bit, however deep."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole_run(request, tmp_path_factory):
    """(optimizer, what it logged, its last checkpoint) of an uninterrupted run."""
    root, record = tmp_path_factory.mktemp("whole"), Record()
    trainer = fit(root, tiny_model(optimizer=request.param), callbacks=[record])
    return request.param, record, final(trainer, root / "x.ckpt")


# In the first epoch, on the border of two epochs, in the middle of the second, at the very last step.
STOPS = [("lars", step) for step in (1, STEPS, STEPS + 2, 3 * STEPS - 1)] + [("adamw", STEPS + 2)]
SLOW = [pytest.param("adamw", step, marks=pytest.mark.slow) for step in (1, STEPS, 3 * STEPS - 1)]


@pytest.mark.parametrize(("whole_run", "step"), [*STOPS, *SLOW], indirect=["whole_run"])
def test_a_run_stopped_at_any_step_and_continued_is_the_whole_run_bit_for_bit(tmp_path, whole_run, step):
    optimizer, whole, expected = whole_run
    before, after = Record(), Record()
    stop, newest = StopAt(tmp_path, step), newest_checkpoint(tmp_path)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_model(optimizer=optimizer), callbacks=[before, stop, newest], enable_checkpointing=True)
    torch.manual_seed(99)  # nothing of the continued run may come from the global generator or the new weights
    model = tiny_model(optimizer=optimizer)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    callbacks = [after, newest_checkpoint(tmp_path)]
    trainer = fit(tmp_path, model, callbacks=callbacks, ckpt_path=stop.path, enable_checkpointing=True)
    assert len(before.steps) == step
    assert before.steps + after.steps == whole.steps
    assert before.epochs + after.epochs == whole.epochs
    content = final(trainer, tmp_path / "x.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(content[part], expected[part], part)


def test_a_checkpoint_without_what_ours_adds_is_continued(tmp_path):
    content = final(fit(tmp_path, max_epochs=1), tmp_path / "x.ckpt")
    for name in ("run", "epoch_loss", "method"):
        del content[name]
    torch.save(content, tmp_path / "x.ckpt")
    assert fit(tmp_path, max_epochs=2, ckpt_path=tmp_path / "x.ckpt").global_step == 2 * STEPS


WITHOUT_BN = {"norm": "none", "head_batch_norm": False, "optimizer": "sgd", "warmup_epochs": 0, "base_lr": 0.2}


FEW = "ignore:BatchNorm's statistics are those of a micro-batch"


class Gradients(Callback):
    """The gradient of every optimiser step, after clipping, and what the cache said of itself."""

    def __init__(self):
        self.steps, self.errors = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.errors.append(trainer.callback_metrics.get("gradient_cache_error"))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:  # a hook before the step would be before clipping
            self.steps.append(torch.cat([p.grad.flatten().clone() for p in pl_module.parameters()]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=["plain", "clipped", "accumulated", "bf16"],
)
def test_micro_batches_take_the_steps_of_the_whole_batch(tmp_path, settings):
    # With a gradient as small as rounding, a relative difference says nothing: one epoch, before anything is learned.
    runs = []
    for size in (None, BATCH // 4):
        seen, model = Gradients(), tiny_model(**WITHOUT_BN, micro_batch_size=size)
        runs.append((seen, fit(tmp_path, model, callbacks=[seen], max_epochs=1, **settings).lightning_module))
    (whole, model), (parts, other) = runs
    assert whole.errors == [None] * STEPS
    assert [error.item() for error in parts.errors] == [0.0] * STEPS
    assert len(whole.steps) == len(parts.steps) == STEPS // settings.get("accumulate_grad_batches", 1)
    # Sums over 32 views and four sums over 8 round differently, by 1.1e-5 on a CPU without AVX-512. A part left out or
    # weighed wrongly is off by a quarter.
    tolerance = 1e-4
    if settings.get("precision"):
        # bfloat16 gradients of weights are sums over 32 views in the one case and four sums over 8 in the other: they
        # may differ by as much as each does from float32, up to 7 % on a CPU with AMX.
        exact = Gradients()
        fit(tmp_path, tiny_model(**WITHOUT_BN), callbacks=[exact], max_epochs=1)
        pairs = zip(whole.steps, exact.steps, strict=True)
        tolerance = 2 * max(((grad - other).norm() / other.norm()).item() for grad, other in pairs)
        assert 0 < tolerance < 0.2
    for grad, expected in zip(parts.steps, whole.steps, strict=True):
        assert (grad - expected).norm() < tolerance * expected.norm()
    for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_micro_batches_see_the_views_of_the_run_in_every_precision(tmp_path, precision, monkeypatch):
    seen, augment = [], SimCLRAugmentation(16)
    project = SimCLR.project
    monkeypatch.setattr(SimCLR, "project", lambda self, views: seen.append(views) or project(self, views))
    fit(tmp_path, tiny_model(micro_batch_size=8), max_steps=1, precision=precision)
    index = epoch_order(0, 0, IMAGES)[:BATCH]
    expected = augment(draw_shapes(IMAGES, 16)[0][index], index)
    for views, rows in ((seen[0], slice(8, 16)), (seen[1], slice(0, 8)), (seen[2], slice(8, 16))):
        for view, other in zip(views, expected, strict=True):
            assert torch.equal(view, other[rows])


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_gradients_are_clipped_under_mixed_precision(tmp_path, optimizer):
    seen = Gradients()
    settings = {"gradient_clip_val": 0.05, "precision": "bf16-mixed", "max_steps": 2}
    fit(tmp_path, tiny_model(optimizer=optimizer), callbacks=[seen], **settings)
    assert [grad.norm().item() for grad in seen.steps] == pytest.approx([0.05, 0.05], rel=1e-4)


@pytest.mark.filterwarnings(FEW)
def test_running_statistics_move_once_for_each_micro_batch(tmp_path):
    model = fit(tmp_path, tiny_model(micro_batch_size=BATCH // 4), max_epochs=1).lightning_module
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {4 * STEPS}


@pytest.mark.filterwarnings(FEW)
def test_micro_batches_continue_exactly(tmp_path):
    """A run stopped in the middle ends in the bits of one that was not."""
    whole = fit(tmp_path, tiny_model(micro_batch_size=8), max_epochs=2).lightning_module.state_dict()
    stop = StopAt(tmp_path, 5)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_model(micro_batch_size=8), callbacks=[stop], max_epochs=2, enable_checkpointing=True)
    found = fit(tmp_path, tiny_model(micro_batch_size=8), max_epochs=2, ckpt_path=stop.path).lightning_module
    for name, value in found.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_micro_batch_that_does_not_divide_is_refused(tmp_path):
    message = r"model.micro_batch_size=5 does not divide the 16 images of a batch\. .* example 4 or 8"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny_model(micro_batch_size=5), max_steps=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "dcl"},
        {"loss": "nt_xent_unnormalized"},
        {"loss": "nt_logistic"},
        {"loss": "nt_logistic", "semi_hard": True},
        {"loss": "margin_triplet"},
        {"loss": "margin_triplet", "semi_hard": True},
        {"views": 3},
        {"views": 3, "micro_batch_size": 8},
    ],
    ids=str,
)
def test_the_loss_chosen_is_the_loss_of_the_views(tmp_path, settings):
    model, record = tiny_model(temperature=0.3, margin=0.4, head_batch_norm=False, norm="none", **settings), Record()
    start = copy.deepcopy(model)
    fit(tmp_path, model, callbacks=[record], max_steps=1)
    index, views = epoch_order(0, 0, IMAGES)[:BATCH], settings.get("views", 2)
    images, augment = draw_shapes(IMAGES, 16)[0][index], SimCLRAugmentation(16)
    z = [start.head(start.encoder(augment.view(images, index, view=v))).double() for v in range(views)]
    name = settings.get("loss", "views") + (" sh" if settings.get("semi_hard") else "")
    expected = reference(name, z, 0.4 if "margin" in name else 0.3)
    assert record.steps[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_views_grow_with_the_epochs_and_stay_pure_functions(tmp_path, seen):
    model = tiny_model(start_size=8, grow_epochs=2)
    assert [tiny_model(image_size=224, start_size=160, grow_epochs=4).views.size(e) for e in range(6)] == [
        160,
        160,
        192,
        192,
        224,
        224,
    ]
    fit(tmp_path, model, max_epochs=3)
    assert [views[0].shape[-1] for views in seen] == [8] * STEPS + [12] * STEPS + [16] * STEPS
    index = epoch_order(0, 1, IMAGES)[:BATCH]
    expected = SimCLRAugmentation(12)(draw_shapes(IMAGES, 16)[0][index], index, epoch=1)
    for view, other in zip(seen[STEPS], expected, strict=True):
        assert torch.equal(view, other)


@pytest.mark.slow
def test_a_compiled_encoder_takes_the_steps_of_the_plain_one(tmp_path):
    plain, compiled = Record(), Record()
    fit(tmp_path, tiny_model(**WITHOUT_BN), callbacks=[plain], max_epochs=1)
    fit(tmp_path, tiny_model(**WITHOUT_BN, compile_encoder=True), callbacks=[compiled], max_epochs=1)
    for step, other in zip(compiled.steps, plain.steps, strict=True):
        assert step["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="start_size=64 with grow_epochs=3: use a size up to image_size=16"):
        tiny_model(start_size=64, grow_epochs=3)
    with pytest.raises(ValueError, match="grow_epochs=3 needs a start_size"):
        tiny_model(grow_epochs=3)
    with pytest.raises(ValueError, match="semi_hard=True is for loss=nt_logistic and margin_triplet, not for nt_xent"):
        tiny_model(semi_hard=True)
    with pytest.raises(
        ValueError, match="loss=nt_xnet is none of nt_xent, dcl, nt_logistic, margin_triplet, nt_xent_unnorm"
    ):
        tiny_model(loss="nt_xnet")
    with pytest.raises(ValueError, match="views=3 works with loss=nt_xent only, not with dcl: use 2"):
        tiny_model(views=3, loss="dcl")
    with pytest.raises(ValueError, match="micro_batch_size=0 is not positive"):
        tiny_model(micro_batch_size=0)


def test_few_views_in_a_batch_norm_group_are_told(tmp_path):
    with pytest.warns(UserWarning, match="BatchNorm's statistics are those of a micro-batch, only 16 views"):
        fit(tmp_path, tiny_model(micro_batch_size=8), max_steps=1)


BN_FREE = flags(
    {"model.norm": "none", "model.head_batch_norm": "false", "model.optimizer": "sgd", "model.warmup_epochs": 0}
    # Gentle enough not to collapse: among projections that are nearly one, rounding is all that tells them apart.
    | {"model.base_lr": 0.2, "model.image_size": 32, "model.width": 0.5, "data.shapes_train": 512}
    | {
        "data.batch_size": 48,
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 1,
        "knn.every_n_epochs": 0,
        "quality.every_n_epochs": 0,
    }
)


def curve(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    train([*BN_FREE, "--trainer.devices", "1", "--run_dir", str(root / "one")])
    return root / "one"


def launched(folder: Path, *settings: str) -> subprocess.CompletedProcess:
    """The command on several ranks, which it starts itself."""
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    return subprocess.run(command, cwd=folder, env=environment(ROOT / "tests"), capture_output=True, text=True)


def on_ranks(number: int) -> list[str]:
    return [*BN_FREE, "--trainer.devices", str(number), "--trainer.strategy", "ddp"]


def train_as_a_rank(folder: str, arguments: list[str]) -> None:
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}  # as Lightning tells the ranks it launches
    os.chdir(folder)
    train(arguments)


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    run_ranks(train_as_a_rank, 2, str(root), [*on_ranks(2), "--run_dir", "more"])
    return root / "more"


def assert_the_run_of(one: Path, more: Path) -> None:
    assert [path.name for path in more.parent.iterdir()] == ["more"]
    losses, found = curve(one), curve(more)
    assert len(losses) == 20
    apart = max(abs(a - b) for a, b in zip(losses, found, strict=True))
    a, b = (torch.load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (one, more))
    weights = max((a[name] - b[name]).abs().max().item() for name in a)
    torch.manual_seed(0)
    start = SimCLR(**torch.load(one / "checkpoints" / "last.ckpt")["hyper_parameters"]).state_dict()
    moved = max((a[name] - start[name]).abs().max().item() for name in a)
    print(f"largest difference: loss {apart:.1e}, weight {weights:.1e}; training moved {moved:.1e}")
    assert apart < 1e-4
    assert weights < 1e-4
    assert moved > 1e-2  # so that an error in the gradient would show


def test_two_ranks_train_the_run_of_one(run_of_one, run_of_two):
    assert_the_run_of(run_of_one, run_of_two)


@pytest.mark.slow
def test_three_ranks_of_micro_batches_train_the_run_of_one(tmp_path, run_of_one):
    done = launched(tmp_path, *on_ranks(3), "--model.micro_batch_size", "4", "--run_dir", "more")
    assert done.returncode == 0, done.stderr
    assert_the_run_of(run_of_one, tmp_path / "more")


class Interrupt(Callback):
    """Ctrl-C on one of the ranks, in the middle of the second epoch."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.is_global_zero and trainer.global_step == 12:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow  # test_continue_ranks.py has it without the launcher
def test_two_ranks_stopped_by_one_signal_continue_to_the_same_bits(tmp_path, run_of_two):
    """Only one rank is told to stop, in the middle of an epoch; both save after the same step."""
    cut = launched(tmp_path, *on_ranks(2), "--trainer.callbacks", "test_module.Interrupt", "--run_dir", "cut")
    assert cut.returncode == 130, cut.stderr
    assert cut.stderr.count("finishing this step, then saving") == 1
    assert "continue with: python train.py --ckpt_path cut/checkpoints/last.ckpt" in cut.stderr
    assert 12 <= torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] < 20
    done = launched(tmp_path, "--ckpt_path", "cut/checkpoints/last.ckpt")
    assert done.returncode == 0, done.stderr
    expected, found = (
        torch.load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (run_of_two, tmp_path / "cut")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert curve(tmp_path / "cut") == curve(run_of_two)
