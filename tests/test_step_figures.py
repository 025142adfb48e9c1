"""Norms, speed and the wait for images: against autograd's own numbers, a clock that is set by hand, and the CSV."""

import csv
import math
import time

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from torch.overrides import TorchFunctionMode

from simclr.progress import LogInterval
from simclr.step_figures import FIGURES, MACHINE, StepFigures, norms, parameters_of
from simclr.training.internals import gradient_scale
from tiny import BATCH, STEPS, fit, tiny_model


class Norms(Callback):
    """The norms by the definition, one number after the other, beside what was logged."""

    def __init__(self):
        self.expected, self.logged = [], []

    def on_before_optimizer_step(self, trainer, model, optimizer):
        parts = {"encoder": 0.0, "head": 0.0}
        for name, p in model.named_parameters():
            parts[name.split(".")[0]] += sum(value**2 for value in p.grad.double().flatten().tolist())
        weights = sum(value**2 for p in model.parameters() for value in p.double().flatten().tolist())
        self.expected.append(
            {
                "gradient_norm": math.sqrt(sum(parts.values())),
                "encoder_gradient_norm": math.sqrt(parts["encoder"]),
                "head_gradient_norm": math.sqrt(parts["head"]),
                "weight_norm": math.sqrt(weights),
            }
        )

    def on_train_batch_end(self, trainer, *args):
        self.logged.append({name: trainer.callback_metrics[name].item() for name in FIGURES})


@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch_size": 4, "norm": "none", "head_batch_norm": False}], ids=["whole", "micro-batches"]
)
def test_norms_are_those_of_all_numbers_before_clipping_and_chance_is_that_of_the_loss(tmp_path, settings):
    seen = Norms()
    fit(tmp_path, tiny_model(**settings), callbacks=[StepFigures(), seen], max_epochs=1, gradient_clip_val=0.01)
    assert len(seen.logged) == STEPS
    for step, (expected, found) in enumerate(zip(seen.expected, seen.logged, strict=True)):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert found["images_seen"] == BATCH * (step + 1)
        assert found["loss_chance"] == pytest.approx(math.log(2 * BATCH - 1))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_images_seen_are_counted_by_batches_however_many_make_a_step(tmp_path, accumulate):
    seen = []

    class Ask(Callback):
        def on_train_epoch_end(self, trainer, *args):
            seen.append(trainer.callback_metrics["images_seen"].item())

    fit(tmp_path, callbacks=[StepFigures(), Ask()], max_epochs=2, accumulate_grad_batches=accumulate)
    assert seen == [STEPS * BATCH, 2 * STEPS * BATCH]


def test_seconds_and_the_share_spent_waiting_are_those_of_the_clock(tmp_path, monkeypatch):
    clock, found = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Callback):
        """Before the figures in the list: a second to wait for images; three of work come with each step."""

        def on_train_batch_start(self, *args):
            clock[0] += 1

        def on_before_optimizer_step(self, *args):
            clock[0] += 3

        def on_train_epoch_end(self, trainer, *args):
            clock[0] += 1000  # what stands between two epochs is no step's

    class Ask(Callback):
        def on_train_batch_end(self, trainer, *args):
            names = ("step_seconds", "images_per_second", "data_wait")
            found.append([trainer.callback_metrics.get(name, torch.tensor(-1.0)).item() for name in names])

        def on_train_epoch_end(self, trainer, *args):
            found.append(trainer.callback_metrics["epoch_seconds"].item())

    fit(tmp_path, callbacks=[Slow(), StepFigures(), Ask()], max_epochs=2)
    assert found[0] == [-1, -1, -1], "the first step of a process pays for what is set up"
    assert found[1:STEPS] == [pytest.approx([4, BATCH / 4, 0.25])] * (STEPS - 1)
    assert found[STEPS] == 4 * STEPS
    # The first batch of an epoch waits for workers that begin.
    assert found[STEPS + 1] == pytest.approx([3, BATCH / 3, 0])
    assert found[STEPS + 2] == pytest.approx([4, BATCH / 4, 0.25])


class Rows(Logger):
    """Keeps what it is given."""

    name, version = "", ""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_logged_step_is_one_row_with_its_loss_and_callbacks_are_told_the_same(tmp_path, accumulate):
    rows, told = Rows(), []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, *args):
            told.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    model = tiny_model()
    settings = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    fit(tmp_path, model, callbacks=[StepFigures(), Ask()], logger=rows, **settings)
    ends = [batch for batch in range(STEPS) if (batch + 1) % accumulate == 0 or batch == STEPS - 1]
    of_steps, of_epoch = rows.rows[: len(ends)], rows.rows[len(ends) :]
    assert [step for step, _ in of_steps] == list(range(len(ends)))
    assert [sorted(row)[-2:] for _, row in of_epoch] == [["images_seen", "train_loss_epoch"]], "and no number of a step"
    for (_, row), batch in zip(of_steps, ends, strict=True):
        assert row.pop("epoch") == 0
        assert {"train_loss", "lr", "contrast_top1", *FIGURES} <= row.keys()
        assert row == {name: told[batch][name] for name in row}

    again = Rows()
    fit(tmp_path, model, logger=again, **settings)  # nobody is there to make the rows
    assert [(step, "train_loss" in row) for step, row in again.rows] == [(k, True) for k in range(len(ends))] + [
        (len(ends) - 1, False)
    ]


class Calls(TorchFunctionMode):
    """Counts what is asked of torch: whatever waits for a device is among it."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        Calls.count += 1
        return func(*args, **(kwargs or {}))


def test_in_a_step_that_is_not_logged_torch_is_not_asked_for_anything(tmp_path, monkeypatch):
    counts = []
    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        original = getattr(StepFigures, name)

        def counted(self, *args, hook=original, name=name):
            Calls.count = 0
            with Calls():
                hook(self, *args)
            counts.append((args[0].fit_loop.epoch_loop.batch_idx, name, Calls.count))

        monkeypatch.setattr(StepFigures, name, counted)
    fit(tmp_path, callbacks=[StepFigures()], max_epochs=1, log_every_n_steps=3)
    assert len(counts) == 3 * STEPS
    assert {batch for batch, _, count in counts if count} == {2}


def test_gradients_that_are_scaled_have_the_norms_of_those_that_are_not():
    model = tiny_model()
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 1e-3 * (number + 1))
    plain = norms(parameters_of(model))
    for p in model.parameters():
        p.grad *= 1024
    scaled = norms(parameters_of(model), 1024.0)
    assert plain["gradient_norm"] > 0
    assert {name: value.item() for name, value in scaled.items()} == pytest.approx(
        {name: value.item() for name, value in plain.items()}, rel=1e-6
    )


@pytest.mark.parametrize("marked", [False, True])
def test_gradients_in_float16_are_scaled_for_an_optimiser_that_divides_by_itself(marked):
    class Scaler:
        def get_scale(self):
            return 1024.0

    class Of:
        precision_plugin = type("Plugin", (), {"scaler": Scaler()})()

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=marked)
    assert gradient_scale(Of(), optimizer) == (1024.0 if marked else 1.0)
    Of.precision_plugin.scaler = None
    assert gradient_scale(Of(), optimizer) == 1.0


@pytest.mark.parametrize(("epochs", "logged"), [(1, [0, 1, 2, 3]), (13, [0, *range(4, 52, 5), 51])])
def test_the_first_step_and_the_last_are_logged_and_some_between(tmp_path, epochs, logged):
    rows = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, model, *args):
            if model.step_log.logged and model.step_log.logged is not self.seen:
                rows.append(trainer.global_step - 1)
                self.seen = model.step_log.logged

    ask = Ask()
    ask.seen = None
    fit(tmp_path, callbacks=[LogInterval(), ask], max_epochs=epochs)
    assert rows == logged


def test_nothing_of_the_machine_stands_in_the_metrics_and_nothing_of_the_run_is_missing(tmp_path):
    from simclr.loggers import build_loggers

    fit(tmp_path, callbacks=[StepFigures()], max_epochs=2, logger=build_loggers(tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        header = set(next(csv.reader(file)))
    assert set(FIGURES) <= header
    assert not set(MACHINE) & header
    with (tmp_path / "machine.csv").open() as file:
        assert set(next(csv.reader(file))) == {"step", "epoch", *MACHINE} - {"device_memory_gib"}
