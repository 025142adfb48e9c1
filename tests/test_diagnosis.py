"""A run that does not learn is told so, with what to change; one that learns is told nothing."""

import re

import pytest

from simclr.cli import main
from simclr.diagnosis import Diagnosis, Signs, verdict
from tiny import fit, flags, tiny_model

SETTINGS = {"batch_size": 128, "views": 2, "loss": "nt_xent", "temperature": 0.2}
# Measured early in runs that learn: shapes with AdamW, with LARS, at temperature 0.05, in batches of 32.
HEALTHY = {
    "shapes": (Signs(5.71, 5.91, 0.016, 0.119, -0.002, 0.1), {}),
    "LARS": (Signs(6.45, 6.46, 0.016, 0.054, 0.004, 0.1), {}),
    "sharp": (Signs(9.02, 12.6, 0.016, 0.284, -0.003, 0.1), {"temperature": 0.05}),
    "small batches": (Signs(4.41, 4.61, 0.078, 0.087, -0.014, 0.1), {"batch_size": 32}),
    "much learned": (Signs(1.2, 5.5, 0.8, 0.8, 0.0, 0.4), {}),
    "warm-up": (Signs(5.6, 5.9, 0.004, 0.01, 0.0, 0.1, warming=True), {}),
    "a margin": (Signs(0.2, 0.5, 0.3, 0.5, 0.0, 0.1), {"loss": "margin_triplet", "temperature": 10}),
}
WELL = HEALTHY["shapes"][0]
ILL = {
    "temperature": (
        WELL,
        {"temperature": 10},
        r"of 10, cosines hardly differ.* by 2 % at most.*0\.1 to 0\.5",
    ),
    "zero": (WELL._replace(positive_cosine=0.0, negative_cosine=0.0), {}, "all projections are zero"),
    "collapse": (WELL._replace(negative_cosine=0.98), {}, r"collapsed: the mean cosine of two images is 0\.980"),
    "divergence": (WELL._replace(loss=9.0), {}, r"the loss rises, from 5\.91 to 9: .*a lower --model\.base_lr"),
    "nothing learned": (WELL._replace(positive_cosine=0.01, top1=0.004), {}, "no nearer to each other than to other"),
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
    diagnosis._signs = lambda: rows.extend(diagnosis._rows) or None
    fit(tmp_path, callbacks=[diagnosis], max_epochs=6)
    assert [step for step, _ in rows] == list(range(1, 21))
    del diagnosis._signs
    signs = diagnosis._signs()
    assert signs.loss == pytest.approx(sum(row["train_loss"] for step, row in rows if step > 10) / 10)
    assert signs.first_loss == rows[0][1]["train_loss"]
    assert 0 <= signs.waiting < 0.5
    assert not signs.warming


def test_the_command_line_says_it_as_a_warning_and_says_nothing_of_a_run_that_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    learns = {"model.optimizer": "adamw", "model.base_lr": 4e-3, "data.shapes_train": 512, "data.batch_size": 64}
    main(["train", *flags({**learns, "trainer.max_epochs": 4, "run_dir": "well"})])
    assert "warning" not in "".join(capsys.readouterr())
    main(["train", *flags({"trainer.max_epochs": 6, "run_dir": "ill", "model.temperature": 20})])
    assert capsys.readouterr().out.count("warning: divided by a temperature of 20, cosines hardly differ") == 1
