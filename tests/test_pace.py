"""What a run leaves unset: chosen by the images, the machine and the time there is, recorded, and without a trace."""

import re
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pytorch_lightning import Callback
from torch import nn

from simclr import pace
from simclr.cli import unset
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.data import ImageData
from simclr.data.module import default_batch_size
from simclr.module import SimCLR
from simclr.optim import RATES, default_rates, default_warmup
from simclr.pace import Pace, duration, epochs_within, measure_pace, parse_duration, step_seconds, usual_pace
from tiny import BATCH, STEPS, fit, flags, tiny_data, tiny_model

CPU = torch.device("cpu")


class Seen(Callback):
    """The rates that an optimiser began with."""

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.rates = {name: optimizer.param_groups[0].get(name) for name in ("initial_lr", "weight_decay")}


def without(arguments, *names):
    return [flag for flag in arguments if flag.lstrip("-").split("=")[0] not in names]


def config(run):
    return yaml.safe_load((Path(run) / "config.yaml").read_text())


# Rates, warm-up and batch


@pytest.mark.parametrize(("optimizer", "lr"), [("lars", 0.075 * 4), ("sgd", 0.005 * 4), ("adamw", 4e-3)])
def test_every_optimiser_has_its_own_rates(tmp_path, optimizer, lr):
    seen = Seen()
    trainer = fit(tmp_path, tiny_model(optimizer=optimizer), callbacks=[seen], max_epochs=1)
    assert seen.rates == {"initial_lr": pytest.approx(lr), "weight_decay": RATES[optimizer].weight_decay}
    hparams = trainer.lightning_module.hparams
    assert (hparams.base_lr, hparams.lr_scaling) == RATES[optimizer][:2]


@pytest.mark.parametrize(("optimizer", "lr"), [("lars", 0.5 * 16 / 256), ("sgd", 0.5 * 16 / 256), ("adamw", 0.5)])
def test_a_rate_that_is_given_is_per_256_images_and_adamws_as_it_is(tmp_path, optimizer, lr):
    seen = Seen()
    fit(tmp_path, tiny_model(optimizer=optimizer, base_lr=0.5), callbacks=[seen], max_epochs=1)
    assert seen.rates["initial_lr"] == pytest.approx(lr)


def test_a_scaling_that_is_given_is_taken(tmp_path):
    seen = Seen()
    fit(tmp_path, tiny_model(base_lr=0.5, lr_scaling="sqrt"), callbacks=[seen], max_epochs=1)
    assert seen.rates["initial_lr"] == pytest.approx(2.0)
    assert default_rates("lars") == RATES["lars"]


def test_warm_up_is_ten_epochs_and_at_most_a_tenth_of_the_run(tmp_path):
    assert [default_warmup(epochs) for epochs in (1, 50, 100, 800)] == [0.1, 5, 10, 10]
    model = tiny_model(warmup_epochs=None)
    fit(tmp_path, model, max_epochs=20)
    assert model.hparams.warmup_epochs == 2
    model = tiny_model(warmup_epochs=None)
    fit(tmp_path, model, max_steps=2 * STEPS, max_epochs=-1)  # as long as max_steps says
    assert model.hparams.warmup_epochs == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("images", "devices", "batch"),
    [
        (20, 1, 20),
        (999, 1, 32),
        (1000, 1, 32),
        (2000, 1, 64),
        (4000, 2, 128),
        (10**4, 3, 255),
        (10**4, 8, 256),
        (10**6, 1, 256),
    ],
)
def test_the_batch_follows_from_the_number_of_images(images, devices, batch):
    assert default_batch_size(images, devices) == batch


def test_a_batch_that_is_not_given_is_the_same_for_data_and_model(tmp_path):
    model, data = tiny_model(batch_size=None), tiny_data(batch_size=None, shapes_train=70)
    fit(tmp_path, model, data, max_epochs=1)
    assert model.hparams.batch_size == data.batch_size == data.hparams.batch_size == 32


def test_a_loader_that_does_not_tell_its_batch_needs_one(tmp_path):
    data = ImageData(shapes_train=32, batch_size=BATCH, image_size=16)
    with pytest.raises(ValueError, match="batch_size, the global batch, is needed"):
        fit(tmp_path, tiny_model(batch_size=None), data.train_dataloader(), max_epochs=1)


def test_what_was_left_out_is_said_and_stands_in_config_yaml_and_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    left_out = ("model.warmup_epochs", "data.batch_size", "model.encoder", "model.width")
    train(without(flags({"run_dir": "run", "data.shapes_train": 70}), *left_out))
    out = capsys.readouterr().out
    assert "32 images, 2 steps an epoch" in out
    assert "6 of the 70 images sit out each epoch" in out
    assert re.search(r"note: 4 steps are few: .* Train longer", out)
    settings = config("run")
    assert (settings["model"]["encoder"], settings["model"]["stem"]) == ("resnet8", "small_stride2")
    assert (settings["data"]["batch_size"], settings["model"]["warmup_epochs"]) == (32, 0.2)
    assert (settings["model"]["base_lr"], settings["trainer"]["precision"]) == (0.075, "32-true")
    hparams = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    of_channels = {"mean": [0.5] * 3, "std": [0.25] * 3}  # by their number, which a continuation may be asked to change
    assert {name: hparams[name] for name in settings["model"]} == settings["model"] | of_channels
    assert None not in {hparams[name] for name in ("base_lr", "lr_scaling", "weight_decay", "strength", "blur_prob")}


# Precision and compiling


def times(monkeypatch, seconds):
    """Measurements that come out as said, by (precision, compiled); what was measured, in order.

    A list: (median, fastest) of the first measurement of this way, of the second, and so on.
    """
    asked = []

    def measured(model, data, device, how):
        asked.append((how.precision, bool(how.compile_encoder)))
        found = seconds[asked[-1]]
        return found[asked.count(asked[-1]) - 1] if isinstance(found, list) else (found, found)

    monkeypatch.setattr(pace, "step_seconds", measured)
    return asked


def choose(monkeypatch, seconds, bf16=True, compiler=False, precision=None, lasts=1000, **settings):
    asked = times(monkeypatch, seconds)
    monkeypatch.setattr(pace, "has_fast_bf16", lambda device: bf16)
    monkeypatch.setattr(pace, "has_compiler", lambda: compiler)
    model = tiny_model(**settings)
    return measure_pace(model, tiny_data(), CPU, precision=precision, lasts=lambda s: lasts), asked


PLAIN, MIXED = ("32-true", False), ("bf16-mixed", False)


@pytest.mark.parametrize(("mixed", "precision"), [(0.5, "bf16-mixed"), (0.97, "32-true"), (3.0, "32-true")])
def test_a_cpu_with_bf16_in_hardware_trains_in_what_is_faster(monkeypatch, mixed, precision):
    chosen, asked = choose(monkeypatch, {PLAIN: 1.0, MIXED: mixed})
    assert (chosen.precision, asked) == (precision, [PLAIN, MIXED])


def test_a_cpu_without_it_trains_in_float32_and_tries_nothing_else(monkeypatch):
    chosen, asked = choose(monkeypatch, {PLAIN: 1.0}, bf16=False)
    assert (chosen.precision, chosen.seconds, asked) == ("32-true", 1.0, [PLAIN])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_precision_that_is_slower_here_is_kept_and_told_so(monkeypatch, precision):
    chosen, _ = choose(monkeypatch, {PLAIN: 1.0, (precision, False): 3.1}, bf16=False, precision=precision)
    assert chosen.precision == precision
    assert chosen.notes == (
        f"precision {precision} takes 3.1 x the time of float32 on this machine: leave --trainer.precision out.",
    )
    chosen, _ = choose(monkeypatch, {PLAIN: 1.0, (precision, False): 0.6}, bf16=False, precision=precision)
    assert not chosen.notes


@pytest.mark.parametrize(
    ("compiled", "lasts", "settings", "chosen"),
    [
        (0.7, 1000, {}, True),
        (0.7, 200, {}, False),  # a short run
        (0.98, 1000, {}, False),
        (0.7, 1000, {"compile_encoder": False, "compile_views": False}, False),
    ],
)
def test_a_long_run_is_compiled_where_that_is_faster(monkeypatch, compiled, lasts, settings, chosen):
    seconds = {PLAIN: 1.0, ("32-true", True): compiled}
    found, _ = choose(monkeypatch, seconds, bf16=False, compiler=True, lasts=lasts, **settings)
    assert (bool(found.compile_encoder), bool(found.compile_views)) == (chosen, chosen)
    found, asked = choose(monkeypatch, seconds, bf16=False, compiler=False, lasts=lasts, **settings)
    assert (found.compile_encoder, asked) == (False, [PLAIN])


COMPILED = ("32-true", True)


@pytest.mark.parametrize(
    ("plain", "compiled", "chosen", "times_measured"),
    [
        ([(1.3, 1.0), (1.0, 1.0)], [(1.3, 1.0), (0.8, 0.8)], True, 4),  # the compiled one was disturbed, not slow
        ([(1.3, 1.3), (1.0, 1.0)], [(1.5, 1.2), (1.2, 1.2)], False, 4),  # the other one was, and is the faster
        ([(1.0, 1.0)], [(0.8, 0.8)], True, 2),  # a quiet machine is believed at once
        ([(1.3, 1.0)], [(0.5, 0.4)], True, 2),  # no disturbance makes that much
    ],
)
def test_what_other_work_on_the_machine_may_have_decided_is_measured_again(
    monkeypatch, plain, compiled, chosen, times_measured
):
    seconds = {PLAIN: plain, COMPILED: compiled}
    found, asked = choose(monkeypatch, seconds, bf16=False, compiler=True, lasts=1000)
    assert (bool(found.compile_encoder), len(asked)) == (chosen, times_measured)
    assert found.fastest == min(fastest for _, fastest in (compiled if chosen else plain))


def test_precisions_too_are_measured_again_where_other_work_disturbs(monkeypatch):
    seconds = {PLAIN: [(1.2, 1.0), (1.0, 1.0)], MIXED: [(1.4, 1.1), (0.7, 0.7)]}
    chosen, asked = choose(monkeypatch, seconds)
    assert (chosen.precision, chosen.fastest, len(asked)) == ("bf16-mixed", 0.7, 4)


@pytest.mark.parametrize(("steps", "until"), [([0.5] * 50, 8), ([0.5, 1.0] * 25, 16)])
def test_a_measurement_of_steps_that_differ_goes_on_for_longer(monkeypatch, steps, until):
    clock, trainer, now = pace._Clock(compiles=False), SimpleNamespace(should_stop=False), iter(accumulate(steps))
    monkeypatch.setattr(pace._Clock, "_now", staticmethod(lambda trainer: next(now)))
    clock.on_train_start(trainer, None)
    count = 0
    while not trainer.should_stop:
        clock.on_train_batch_end(trainer)
        count += 1
    assert count == until


def test_a_compiler_that_fails_leaves_the_run_as_it_was(monkeypatch):
    said = []
    times(monkeypatch, {PLAIN: 1.0})  # a KeyError for the compiled one
    monkeypatch.setattr(pace, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(pace, "has_compiler", lambda: True)
    chosen = measure_pace(tiny_model(), tiny_data(), CPU, precision=None, lasts=lambda s: 1e6, say=said.append)
    assert (chosen.compile_encoder, chosen.seconds) == (False, 1.0)
    assert said[-1].startswith("not compiled:")


def test_measuring_changes_neither_the_model_nor_the_random_state():
    model, data = tiny_model(), tiny_data()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    seconds, fastest = step_seconds(model, data, CPU, Pace("32-true", False, False))
    assert 0 < fastest <= seconds
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.hparams.compile_encoder is None


def test_a_run_that_was_measured_ends_in_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(flags({"run_dir": "plain"}))
    monkeypatch.setattr(unset, "is_long", lambda *_: True)
    monkeypatch.setattr(pace, "has_fast_bf16", lambda device: False)
    measured = []
    real = step_seconds
    monkeypatch.setattr(pace, "step_seconds", lambda *args: measured.append(1) or real(*args))
    train(flags({"run_dir": "measured"}))
    assert measured
    plain, other = (torch.load(f"{run}/encoder.pt", weights_only=True) for run in ("plain", "measured"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert config("plain") == config("measured")


def test_short_runs_are_not_measured_and_long_ones_are():
    model = SimCLR("resnet8", image_size=32, batch_size=128, stem="small_stride2")
    assert not pace.is_long(model, 128, 64 * 30)  # the demo
    wide = SimCLR("resnet8", image_size=32, batch_size=128, stem="small_stride2", width=2)
    assert pace.is_long(wide, 128, 390 * 15)  # the CIFAR-10 recipe


@pytest.mark.parametrize("encoder", ["resnet8", "resnet18", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_a_run_that_is_short_by_its_weights_is_short_by_its_operations(encoder, monkeypatch):
    pytest.importorskip("timm")
    model = SimCLR(encoder, image_size=32, batch_size=8)
    counted = pace.operations(model, 8)
    assert 0 < counted < pace.most_operations(model, 8)
    monkeypatch.setattr(pace, "operations", lambda *_: pytest.fail("counted"))
    assert not pace.is_long(model, 8, pace._LONG_RUN / pace.most_operations(model, 8))
    with pytest.raises(pytest.fail.Exception, match="counted"):
        pace.is_long(model, 8, 1.01 * pace._LONG_RUN / pace.most_operations(model, 8))


def test_more_operations_than_a_step_makes_are_hardly_more_where_every_pixel_meets_every_weight():
    """Backward is twice forward, but for the images, which need no gradient."""
    model = SimCLR("resnet8", image_size=16, batch_size=8)
    network = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model.encoder, model.head = network, nn.Identity()
    assert 0.98 * pace.most_operations(model, 8) < pace.operations(model, 8) <= pace.most_operations(model, 8)


# A budget of time


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("2d", 172800), ("90s", 90), ("1.5h", 5400), ("1h 5m", 3900)]
)
def test_times_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 minutes", "1h30", "-5m"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r"is no time\. Write 30m, 1h30m, 2d or DD:HH:MM:SS"):
        parse_duration(text)


def test_durations_for_people():
    assert [duration(s) for s in (40, 1560, 19200, 259200)] == ["40 s", "26 min", "5 h 20 min", "3 days"]


def test_the_epochs_of_a_budget_end_within_it():
    found = Pace("32-true", True, True, seconds=0.5, starting=40)
    epochs = epochs_within(600, found, steps_per_epoch=31, between=1.0)
    whole = 40 + int(epochs) * (31 * 0.5 + 1.0)
    assert 0.9 * 600 < whole < 600


def test_growing_views_are_counted_in_a_budget():
    """By hand: sides of 16, 20, 24 and 28 pixels for two epochs each, then 32."""
    views = SimCLR("resnet8", image_size=32, start_size=16, grow_epochs=8).views
    sides = [16, 16, 20, 20, 24, 24, 28, 28, 32, 32]
    assert views.work(10) == pytest.approx(sum(side**2 for side in sides) / 16**2)
    assert views.work(2.5) == pytest.approx(2 + 0.5 * 20**2 / 16**2)
    assert SimCLR("resnet8", image_size=32).views.work(2.5) == 2.5
    pace = Pace("32-true", False, False, seconds=0.1)
    epochs = epochs_within(1000, pace, steps_per_epoch=100, between=1.0, work=views.work)
    of_epochs = [10 * side**2 / 16**2 + 1.15 for side in (*sides, *[32] * 90)]
    taken = sum(of_epochs[: int(epochs)]) + (epochs % 1) * of_epochs[int(epochs)]
    assert taken == pytest.approx(960, abs=0.1)


def test_a_run_whose_views_grow_is_said_to_last_as_long_as_they_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 10.0, MIXED: 20.0})
    growing = ["--model.image_size=32", "--model.start_size=16", "--model.grow_epochs=2"]
    train([*without(flags({"run_dir": "run", "minutes": 3}), "trainer.max_epochs"), *growing])
    # Four steps of 16 px, and four of 24 that have 2.25 times as many pixels; of 32 px four would take 160 s.
    assert config("run")["trainer"]["max_epochs"] == 2
    assert "10 s a step as measured at 16 px, about 2 min in all" in capsys.readouterr().out


def test_minutes_set_the_epochs_and_the_config_repeats_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 1.0, MIXED: 2.0})
    arguments = without(flags({"run_dir": "run", "minutes": 0.5}), "trainer.max_epochs", "model.warmup_epochs")
    train(arguments)
    settings = config("run")
    epochs = settings["trainer"]["max_epochs"]
    assert 4 <= epochs <= 6  # of four steps of a second
    assert settings["model"]["warmup_epochs"] == pytest.approx(epochs / 10)
    assert settings["minutes"] is None
    assert "1.0 s a step as measured, about" in capsys.readouterr().out
    train(["--config", "run/config.yaml", "--run_dir", "again"])
    first, again = (torch.load(f"{run}/encoder.pt", weights_only=True) for run in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == epochs * STEPS  # the whole cosine


def test_minutes_for_less_than_two_epochs_are_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 5.0, MIXED: 9.0})
    train(without(flags({"run_dir": "run", "minutes": 0.5}), "trainer.max_epochs"))
    assert config("run")["trainer"]["max_epochs"] == -1
    assert 3 <= config("run")["trainer"]["max_steps"] <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=0"], "minutes=0 is not positive"),
        (["--minutes=5", "--trainer.max_epochs=3"], "leave trainer.max_epochs and trainer.max_steps out"),
        (["--minutes=5", "--trainer.max_steps=3"], "leave trainer.max_epochs and trainer.max_steps out"),
        (["--minutes=0.1"], "leaves no time for a step of 16 images, which takes 2 min here"),
        (["--minutes=5", "--trainer.devices=2"], "measures steps on one device, not on 2"),
        (["--trainer.max_time=soon"], "soon is no time. Write 30m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_length_that_cannot_be_is_refused_in_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 100.0, MIXED: 100.0})
    given = without(flags({}), "trainer.max_epochs") + arguments
    with pytest.raises(SystemExit) as stopped:
        train(given)
    error = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT, error
    assert message in error
    assert error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


def test_max_time_takes_what_people_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(flags({"run_dir": "run", "trainer.max_time": "30m", "trainer.max_epochs": 1}))
    assert config("run")["trainer"]["max_time"] == "00:00:30:00"


GROWING = {"model.image_size": 32, "model.start_size": 16, "model.grow_epochs": 2}  # 16, 24, then 32 px


@pytest.mark.parametrize(
    ("settings", "measured", "days"),
    [({}, "measured", 3), (GROWING, "measured at 16 px", 12)],  # nearly all of them of four times the pixels
    ids=["", "growing"],
)
def test_a_run_of_days_on_a_cpu_is_told_so(tmp_path, monkeypatch, capsys, settings, measured, days):
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 130.0, MIXED: 260.0})
    monkeypatch.setattr(unset, "is_long", lambda *_: True)
    monkeypatch.setattr(pace, "has_compiler", lambda: False)
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: None)
    train(flags({"run_dir": "run", "trainer.max_epochs": 500, **settings}))
    out = capsys.readouterr().out
    assert re.search(rf"time +2 min a step as {measured}, about {days} days in all", out)
    assert f"note: this run takes about {days} days on this CPU. A smaller network (--model.encoder auto)" in out


def test_what_a_run_lasts_is_asked_with_the_pixels_of_all_its_epochs(tmp_path, monkeypatch):
    """Whether it is worth measuring, and worth compiling: three epochs of four steps, of 1, 2.25 and 4 x the pixels."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(unset, "is_long", lambda model, batch, work: asked.append(work) or True)

    def measure_pace(model, data, device, *, precision, lasts, say):
        asked.append(lasts(0.5))
        return usual_pace(model, device, precision)

    monkeypatch.setattr(unset, "measure_pace", measure_pace)
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: None)
    train(flags({"run_dir": "run", "trainer.max_epochs": 3, **GROWING}))
    assert asked == [pytest.approx(4 * 7.25), pytest.approx(2 * 7.25)]


def test_what_is_measured_between_epochs_has_images_of_full_size(tmp_path, monkeypatch):
    """Steps are measured at 16 px, online accuracies look at 32: four times the pixels for each step's second."""
    monkeypatch.chdir(tmp_path)
    times(monkeypatch, {PLAIN: 1.0, MIXED: 2.0})
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: None)
    between = []
    monkeypatch.setattr(unset, "epochs_within", lambda *given: between.append(given[3]) or 2.0)
    for number, settings in enumerate(({"model.image_size": 32}, GROWING)):
        train(without(flags({"run_dir": f"run{number}", "minutes": 1, **settings}), "trainer.max_epochs"))
    assert between[0] > 0
    assert between[1] == pytest.approx(4 * between[0])


@pytest.mark.parametrize(
    ("durations", "compiles", "steps", "seconds"),
    [
        ([0.01] * 60, False, 42, 0.01),  # all that there are
        ([9.0, 0.1, *[1.0] * 60], False, 1, 9.0),  # of a large network the first step will do
        ([40.0, 3.0, *[0.5] * 60], True, 8, 0.5),  # the first one compiled
        ([40.0, 20.0, *[20.0] * 60], True, 2, 20.0),
        ([1.0, 1.0, *[0.48, 0.52] * 30], False, 8, 0.5),
        ([1.0, 1.0, *[0.4, 0.6] * 30], False, 9, 0.4),  # more, for the fastest to be undisturbed
        ([3.0] * 60, False, 6, 3.0),
    ],
)
def test_a_measurement_takes_as_many_steps_as_it_needs(durations, compiles, steps, seconds, monkeypatch):
    clock, now = pace._Clock(compiles), [0.0]
    monkeypatch.setattr(pace._Clock, "_now", staticmethod(lambda trainer: now[0]))
    trainer = SimpleNamespace(should_stop=False)
    clock.on_train_start(trainer, None)
    taken = 0
    while not trainer.should_stop and taken < pace._WARM_UP + pace._MANY:
        now[0] += durations[taken]
        taken += 1
        clock.on_train_batch_end(trainer)
    assert (taken, clock.seconds[0]) == (steps, pytest.approx(seconds))
