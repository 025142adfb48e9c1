"""A run that does not learn is told so, with what to change; one that learns is told nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Callback

from simclr import diagnosis as diagnosis_of_runs
from simclr.cli import main
from simclr.diagnosis import Diagnosis, Signs, verdict
from simclr.progress import LogInterval
from tiny import BATCH, fit, flags, tiny_data, tiny_model

SETTINGS = {"batch_size": 128, "views": 2, "loss": "nt_xent", "temperature": 0.2}
# Measured early in runs that learn: shapes with AdamW, with LARS, at temperature 0.05, in batches of 32.
HEALTHY = {
    "shapes": (Signs(5.71, 5.91, 0.016, 0.119, -0.002, 0.1), {}),
    "LARS": (Signs(6.45, 6.46, 0.016, 0.054, 0.004, 0.1), {}),
    "sharp": (Signs(9.02, 12.6, 0.016, 0.284, -0.003, 0.1), {"temperature": 0.05}),
    "SGD": (Signs(4.62, 6.82, 0.062, 0.548, -0.005, 0.1, steps=200, growth=1.45), {}),
    "small batches": (Signs(4.41, 4.61, 0.078, 0.087, -0.014, 0.1), {"batch_size": 32}),
    "much learned": (Signs(1.2, 5.5, 0.8, 0.8, 0.0, 0.4), {}),
    "warm-up": (Signs(5.6, 5.9, 0.004, 0.01, 0.0, 0.1, warming=True), {}),
    "hardly begun": (Signs(5.6, 5.9, 0.004, 0.01, 0.0, 0.1, steps=24), {}),
    "a margin": (Signs(0.2, 0.5, 0.3, 0.5, 0.0, 0.1), {"loss": "margin_triplet", "temperature": 10}),
}
WELL = HEALTHY["shapes"][0]
ILL = {
    "temperature": (
        WELL,
        {"temperature": 10},
        r"of 10, cosines hardly differ.* by 2 % at most.*0\.1 to 0\.5",
    ),
    "zero": (WELL._replace(positive_cosine=0.0, negative_cosine=-0.004), {}, "all projections are zero"),
    "collapse": (WELL._replace(negative_cosine=0.98), {}, r"collapsed: the mean cosine of two images is 0\.980"),
    "divergence": (
        WELL._replace(loss=9.0, steps=200),
        {},
        r"the loss rises, from 5\.91 to 9: .*a lower --model\.base_lr",
    ),
    "too fast": (
        WELL._replace(growth=40.0, steps=50),
        {},
        r"the weights have grown to 40 times their size in 50 steps.*a lower --model\.base_lr",
    ),
    "too fast, though learning": (
        WELL._replace(growth=3.4, steps=200),
        {},
        r"the weights have grown to 3\.4 times their size in 200 steps.*a lower --model\.base_lr",
    ),
    "nothing learned": (
        WELL._replace(positive_cosine=0.01, top1=0.004, steps=200),
        {},
        "no nearer to each other than to other",
    ),
    "weak views": (WELL._replace(top1=0.97), {}, r"97 % of the images are told .*too alike.*--model\.strength 1"),
    "slow images": (WELL._replace(waiting=0.7), {}, r"70 % of the time is spent waiting for images.*--data\.workers"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_learns_is_told_nothing(name):
    signs, settings = HEALTHY[name]
    assert verdict(signs, {**SETTINGS, **settings}) == []


@pytest.mark.parametrize("name", ILL)
def test_one_that_does_not_is_told_the_cause_and_the_setting(name):
    signs, settings, said = ILL[name]
    (text,) = verdict(signs, {**SETTINGS, **settings})
    assert re.search(said, text)


def heard(tmp_path, **settings):
    """What a run of 24 steps is told, and after which step."""
    said = []
    diagnosis = Diagnosis(lambda trainer, text: said.append((trainer.global_step, text)))
    fit(tmp_path, tiny_model(**settings), callbacks=[diagnosis], max_epochs=6)
    return said


def test_the_verdict_is_given_once_after_the_early_steps(tmp_path):
    ((step, text),) = heard(tmp_path, temperature=20.0)
    assert step == 20
    assert text.startswith("divided by a temperature of 20")


def test_the_steps_that_are_looked_at_are_the_later_half_of_the_early_ones(tmp_path):
    rows = []
    diagnosis = Diagnosis(lambda *args: None)
    diagnosis._signs = lambda *args: rows.extend(diagnosis._rows) or None
    fit(tmp_path, callbacks=[diagnosis], max_epochs=6)
    assert [step for step, _ in rows] == list(range(1, 21))
    del diagnosis._signs
    signs = diagnosis._signs(highest=0.0, growth=1.0)
    assert signs.loss == pytest.approx(sum(row["train_loss"] for step, row in rows if step > 10) / 10)
    assert signs.first_loss == rows[0][1]["train_loss"]
    assert 0 <= signs.waiting < 0.5
    assert not signs.warming


class Stop(Callback):
    """Ends a run when nothing more can be said of it."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= next(c for c in trainer.callbacks if isinstance(c, Diagnosis))._done


def looked_at(tmp_path, steps: int = 2000, images: int = 128, batch: int = BATCH, prepare=None, **settings):
    """What a run of so many steps is told, each with the step; logged as the command line does."""
    said = []
    diagnosis = Diagnosis(lambda trainer, text: said.append((trainer.global_step, text)))
    data, model = tiny_data(shapes_train=images, batch_size=batch), tiny_model(batch_size=batch, **settings)
    if prepare is not None:
        data.setup()
        prepare(model, data)
    fit(tmp_path, model, data, [LogInterval(), diagnosis, Stop()], max_epochs=-1, max_steps=steps)
    assert diagnosis._done
    return said


def without_a_head(model, data):
    with torch.no_grad():
        for layer in model.head.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.zero_()


WEAK = {"strength": 0.0, "crop_scale": (1.0, 1.0), "images": 256, "batch": 32}
FAILING = {
    "temperature 10": (
        {"temperature": 10.0, "steps": 200},
        "divided by a temperature of 10",
        "--model.temperature of 0.1",
    ),
    "a head of zeros": (
        {"prepare": without_a_head, "steps": 200},
        "all projections are zero",
        "--model.head_batch_norm",
    ),
    "100 x LARS's rate": (
        {"base_lr": 7.5, "lr_scaling": "sqrt"},
        "too large to learn by|diverges",
        "a lower --model.base_lr",
    ),
    "100 x SGD's rate": (
        {"base_lr": 0.5, "optimizer": "sgd", "lr_scaling": "sqrt", "images": 256, "batch": 64},
        "too large to learn by|diverges",
        "a lower --model.base_lr",
    ),
    "100 x LARS's rate in its warm-up": (
        {"base_lr": 7.5, "lr_scaling": "sqrt", "warmup_epochs": 100, "images": 256, "batch": 64},
        "too large to learn by|diverges",
        "a lower --model.base_lr",
    ),
    "100 x AdamW's rate": (
        {"base_lr": 0.4, "optimizer": "adamw"},
        "too large to learn by|diverges|collapsed",
        "a lower --model.base_lr",
    ),
    "views alike": (WEAK, "the views are too alike", "--model.strength 1"),
}


QUICK = ("a head of zeros", "100 x LARS's rate", "temperature 10")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAILING])
def test_a_run_that_fails_is_told_so_once_within_a_tenth_of_it_or_200_steps(tmp_path, name):
    settings, cause, remedy = FAILING[name]
    ((step, text),) = looked_at(tmp_path, **settings)
    assert step <= 200
    assert re.search(cause, text), text
    assert remedy in text


def test_images_that_come_from_a_slow_disk_are_told(tmp_path, monkeypatch):
    now = [0.0]

    def look() -> float:
        now[0] += 0.01
        return now[0]

    def slowly(model, data):
        images = data.train.images
        data.train.images = lambda index: now.__setitem__(0, now[0] + 0.1) or images(index)

    monkeypatch.setattr(diagnosis_of_runs, "time", SimpleNamespace(perf_counter=look))
    ((step, text),) = looked_at(tmp_path, steps=200, prepare=slowly)
    assert step == 20
    assert re.match(r"\d\d % of the time is spent waiting for images\. Try more --data\.workers", text)


def test_batch_norm_over_a_handful_of_views_is_told_before_the_first_step(tmp_path):
    with pytest.warns(UserWarning, match="only 4 views.*a larger model.micro_batch_size") as warned:
        fit(tmp_path, tiny_model(micro_batch_size=2), callbacks=[Diagnosis(lambda *args: None)], max_steps=2)
    assert len([w for w in warned if "BatchNorm's statistics" in str(w.message)]) == 1


KINDS = {
    "LARS": {},
    "AdamW": {"optimizer": "adamw", "images": 256, "batch": 32},
    "SGD": {"optimizer": "sgd"},
    "decoupled": {"loss": "dcl"},
    "logistic": {"loss": "nt_logistic"},
    "triplet": {"loss": "margin_triplet", "semi_hard": True},
    "sharp": {"temperature": 0.05},
    "four views": {"views": 4, "batch": 8},
    "a few images": {"images": 32},
    "micro-batches": {"images": 256, "batch": 64, "micro_batch_size": 32},
    "strong views": {"strength": 1.0, "crop_scale": (0.08, 1.0), "images": 256, "batch": 64},
}


@pytest.mark.parametrize("name", ["LARS", "AdamW", "decoupled", "triplet"])
def test_a_run_of_any_kind_that_learns_hears_nothing_after_its_first_steps(tmp_path, name):
    assert looked_at(tmp_path, steps=60, **KINDS[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_nor_does_it_after_200(tmp_path, name):
    assert looked_at(tmp_path, **KINDS[name]) == []


def test_the_command_line_says_it_as_a_warning_and_says_nothing_of_a_run_that_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    learns = {"model.optimizer": "adamw", "model.base_lr": 4e-3, "data.shapes_train": 512, "data.batch_size": 64}
    main(["train", *flags({**learns, "trainer.max_epochs": 4, "run_dir": "well"})])
    assert "warning" not in "".join(capsys.readouterr())
    main(["train", *flags({"trainer.max_epochs": 6, "run_dir": "ill", "model.temperature": 20})])
    assert capsys.readouterr().out.count("warning: divided by a temperature of 20, cosines hardly differ") == 1
