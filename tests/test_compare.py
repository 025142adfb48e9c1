"""Runs beside each other: what differs, what each reached, which are seeds of one another, and what is no run."""

import base64
import csv
import io
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from scipy.stats import binomtest

from page import Page
from simclr.cli.compare import compare
from simclr.cli.linear_eval import linear_eval
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.compare import as_csv, as_markdown, compare_runs, print_comparison, write_page
from simclr.compare.page import curve_data, draw_curves, draw_settings, row_colours
from simclr.compare.paired import holm, mcnemar
from simclr.compare.rows import figures_of
from simclr.eval import wilson_interval
from simclr.eval.predictions import packed, unpacked
from simclr.files import hold
from suite_record import result, suite_record
from tiny import flags

pytestmark = pytest.mark.usefixtures("few_lambdas")

METRICS = (
    "epoch,knn_top1,lr,rankme,retrieval_top1,step,train_loss,train_loss_epoch\n"
    "0,,0.1,,,4,2.5,\n0,,,,,9,,2.25\n1,,0.2,,,14,2.0,\n1,0.4375,,7.5,0.5,19,,1.75\n"
)


def hand_made(folder: Path, *, seed=0, result=None, step=20, metrics=METRICS, run_dir=None, **model) -> Path:
    """A run folder as training leaves it: 20 steps long, of which `step` are done."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "run_dir": run_dir,
        "model": {"encoder": "resnet8", "temperature": 0.2, **model},
        "data": {"source": "shapes", "shapes_test": 40, "batch_size": 16},
        "quality": {"images": 2000},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text(metrics)
    settings = {"encoder": "resnet8", "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "seed": seed}
    checkpoint = {
        "state_dict": {"encoder.weight": torch.zeros(1)},
        "hyper_parameters": settings,
        "epoch": 1,
        "global_step": step,
        "run": {"total_steps": 20, "epochs": 2},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    if result is not None:
        (folder / "linear_eval.json").write_text(json.dumps(result))
    return folder


def evaluated(top1: float, right: list[bool] | None = None, images: str = "these", protocol: str = "lbfgs") -> dict:
    """A record of a linear evaluation, with predictions if it is told which of them are right."""
    n = 40 if right is None else len(right)
    record = {
        "linear_top1": top1,
        "ci95": [top1 - 0.05, top1 + 0.05],
        "knn_top1": 0.5,
        "knn_k": 8,
        "random_encoder_top1": None,
        "raw_pixels_top1": None,
        "protocol": protocol,
        "data": {"test": "shapes", "test_images": n, "settings": {"source": "shapes", "shapes_test": 40}},
    }
    if right is not None:
        labels = torch.arange(n) % 3
        said = torch.where(torch.tensor(right), labels, labels + 1)
        record["predictions"] = {"linear": packed(said), "labels": packed(labels), "images_sha256": images}
    return record


def figure(row, title):
    [found] = [value for column, value in row.figures.items() if column.title.startswith(title)]
    return found


# What differs


def test_only_settings_that_differ_are_named_with_their_dots(tmp_path):
    a = hand_made(tmp_path / "a", run_dir="x", temperature=0.2, width=1)
    b = hand_made(tmp_path / "b", run_dir="y", temperature=0.5, width=1.0, seed=3)
    found = compare_runs([a, b])
    assert found.differing == ["model.temperature"]  # not the seed, not run_dir, and 1 is 1.0
    assert [row.setting("model.temperature") for row in found.rows] == ["0.2", "0.5"]
    assert found.same["model.encoder"] == "resnet8"
    assert any("losses do not compare: the runs differ in model.temperature" in note for note in found.notes)


def test_a_setting_that_another_version_lacks_is_told_and_not_taken_for_a_difference(tmp_path):
    found = compare_runs([hand_made(tmp_path / "a", seed=0, blur_prob=0.5), hand_made(tmp_path / "b", seed=1)])
    assert found.differing == []
    assert len(found.rows) == 2  # nor for the same
    assert "b: of another version, it does not record model.blur_prob" in found.notes


def test_a_run_of_another_method_is_not_one_of_another_version_and_its_loss_does_not_compare(tmp_path):
    runs = [hand_made(tmp_path / name, **model) for name, model in {"a": {"blur_prob": 0.5}, "b": {"decay": 1}}.items()]
    for folder, method in zip(runs, ("simclr", "byol"), strict=True):
        path = folder / "config.yaml"
        path.write_text(path.read_text() + f"\nmethod: {method}\n")
    found = compare_runs(runs)
    assert not any("of another version" in note for note in found.notes)
    assert "losses do not compare: the runs differ in method, on which their level depends" in found.notes


def test_a_narrow_table_breaks_between_the_settings_of_a_protocol(tmp_path):
    runs = [hand_made(tmp_path / name, temperature=0.1 + seed) for seed, name in enumerate("ab")]
    record = suite_record([result("linear", "epochs=100,batch_size=512,weight_decay=0", [True, False] * 20)])
    for folder in runs:
        (folder / "eval.json").write_text(json.dumps(record))
    said = io.StringIO()
    print_comparison(compare_runs(runs), Console(file=said, width=60))
    assert "batch_size=512," in said.getvalue()
    assert "weight_decay=0" in said.getvalue()


def test_settings_are_those_that_a_run_went_on_with(tmp_path):
    a, b = hand_made(tmp_path / "a"), hand_made(tmp_path / "b")
    changed = yaml.safe_load((b / "config.yaml").read_text()) | {"minutes": 3}
    (b / "config.continued-1.yaml").write_text(yaml.safe_dump(changed))
    (b / "continuations.json").write_text(json.dumps([{"changed": {}}]))
    (a / "config.yaml").write_text(yaml.safe_dump(changed | {"minutes": None}))
    assert compare_runs([a, b]).differing == ["minutes"]


# Seeds


def test_runs_that_differ_in_their_seed_alone_are_one_row(tmp_path):
    top1 = [0.5, 0.6, 0.55]
    runs = [hand_made(tmp_path / f"s{i}", seed=i, result=evaluated(value)) for i, value in enumerate(top1)]
    other = hand_made(tmp_path / "other", temperature=0.5, seed=9, result=evaluated(0.4))
    found = compare_runs([runs[0], other, *runs[1:]])
    assert [(row.name, row.seeds) for row in found.rows] == [("s0 and 2 more", "0, 1, 2"), ("other", "9")]
    mean = figure(found.rows[0], "linear")
    assert (mean.value, mean.sd, mean.n) == (pytest.approx(0.55), pytest.approx(statistics.stdev(top1)), 3)
    assert mean.interval is None
    assert figure(found.rows[1], "linear").interval == pytest.approx((0.35, 0.45))


def test_what_is_no_other_sample_is_not_counted_as_one(tmp_path):
    runs = [hand_made(tmp_path / "a", seed=0), hand_made(tmp_path / "copy", seed=0)]
    runs += [hand_made(tmp_path / "unfinished", seed=1, step=10)]
    found = compare_runs(runs)
    assert [row.name for row in found.rows] == ["a", "copy", "unfinished"]
    assert "copy: the same settings and seed as a, so not another sample" in found.notes
    assert "unfinished: not finished, stands at step 10 of 20" in found.notes


def test_runs_without_a_checkpoint_are_not_joined(tmp_path):
    runs = [hand_made(tmp_path / f"s{i}", seed=i) for i in range(2)]
    for run in runs:
        (run / "checkpoints" / "last.ckpt").unlink()
    found = compare_runs(runs)
    assert [row.stands for row in found.rows] == ["epoch 2, no checkpoint"] * 2


def test_a_run_that_another_process_holds_is_said_to_go_on(tmp_path):
    a, b = hand_made(tmp_path / "a"), hand_made(tmp_path / "b")
    let_go = hold(b)
    try:
        assert compare_runs([a, b]).rows[1].stands == "epoch 2, still going on"
    finally:
        let_go()
    assert compare_runs([a, b]).rows[1].stands == "epoch 2"


# Figures


def test_final_figures_are_the_last_ones_with_their_intervals(tmp_path):
    found = compare_runs([hand_made(tmp_path / "a", result=evaluated(0.6)), hand_made(tmp_path / "b")])
    first, second = found.rows
    assert figure(first, "loss").value == 1.75
    assert figure(first, "effective rank").value == 7.5
    assert figure(first, "kNN").interval == wilson_interval(20, 40)
    assert figure(first, "retrieval").interval == wilson_interval(20, 40)  # of the 40 test images there are
    assert figure(second, "retrieval").interval is None  # nobody knows on how many
    assert not [column for column in second.figures if column.title.startswith("linear")]


def test_two_protocols_never_share_a_column(tmp_path):
    runs = [hand_made(tmp_path / p, result=evaluated(0.6, protocol=p)) for p in ("lbfgs", "sgd")]
    found = compare_runs(runs)
    titles = [column.title for column in found.columns if column.title.startswith("linear")]
    assert titles == ["linear (lbfgs, 40 of shapes)", "linear (sgd, 40 of shapes)"]
    assert any("columns of their own" in note for note in found.notes)


# The same test images


@pytest.mark.parametrize("only_a", [0, 1, 7, 30])
@pytest.mark.parametrize("only_b", [0, 3, 30, 400])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_holm_multiplies_by_how_many_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_runs_on_the_same_test_images_are_compared_image_by_image(tmp_path):
    best = [True] * 30 + [False] * 10
    other = [True] * 18 + [False] * 12 + [True] * 2 + [False] * 8
    runs = [
        hand_made(tmp_path / "other", result=evaluated(20 / 40, other), temperature=0.3),
        hand_made(tmp_path / "best", result=evaluated(30 / 40, best)),
        hand_made(tmp_path / "elsewhere", result=evaluated(30 / 40, best, images="those"), temperature=0.4),
        hand_made(tmp_path / "old", result=evaluated(0.5), temperature=0.5),
    ]
    found = compare_runs(runs)
    [pair] = found.pairs
    assert (pair.by, pair.best, pair.other, pair.images) == ("linear classifier", "best", "other", 40)
    assert (pair.only_best, pair.only_other) == (12, 2)
    assert pair.difference == pytest.approx(0.25)
    assert pair.interval == pytest.approx((0.25 - 1.96 * (14 - 2.5) ** 0.5 / 40, 0.25 + 1.96 * (14 - 2.5) ** 0.5 / 40))
    assert pair.p == pytest.approx(binomtest(2, 14).pvalue)
    assert any(note.startswith("no paired test for elsewhere, old: ") for note in found.notes)


def test_each_protocol_has_a_column_with_intervals_and_its_own_paired_tests(tmp_path):
    right = {"a": [True] * 30 + [False] * 10, "b": [True] * 18 + [False] * 12 + [True] * 2 + [False] * 8}
    for number, (name, of_knn) in enumerate(right.items()):
        draws = [result("semi", f"fraction=0.1/draw={i}", of_knn[i:] + of_knn[:i]) for i in range(3)]
        linear = result("logreg", "", of_knn[::-1], settings="seed=0")
        record = suite_record([result("knn", "k=5", of_knn, settings="temperature=0.1"), linear, *draws])
        hand_made(tmp_path / name, seed=0, temperature=0.1 + number)
        (tmp_path / name / "eval.json").write_text(json.dumps(record))
    hand_made(tmp_path / "elsewhere", temperature=7)
    other = suite_record([result("knn", "k=5", right["a"], settings="temperature=0.1")], train="b")
    (tmp_path / "elsewhere" / "eval.json").write_text(json.dumps(other))
    found = compare_runs([tmp_path])
    a, b, elsewhere = found.rows
    knn = "knn k=5 (temperature=0.1; 40 of shapes)"
    assert figure(a, "knn k=5").value == 0.75
    assert figure(a, "knn k=5").interval == pytest.approx(wilson_interval(30, 40))
    assert (figure(a, "semi").n, figure(a, "semi").sd) == (3, 0)
    assert "75.0 ± 0.0 %, n 3" in as_markdown(found)
    assert [column.title for column in found.columns if column.place == 12].count(knn) == 2
    assert any(f"{knn} stands there more than once" in note for note in found.notes)
    assert len(elsewhere.figures.keys() & b.figures.keys()) == len(elsewhere.figures) - 1, "all but the accuracy"
    assert [(pair.by, pair.best, pair.other) for pair in found.pairs] == [
        (knn, "a", "b"),
        ("logreg (seed=0; 40 of shapes)", "a", "b"),
    ]
    assert found.pairs[0].p == pytest.approx(binomtest(2, 14).pvalue)
    page = Page(write_page(found, tmp_path / "out.html").read_text())
    assert re.search(re.escape(knn) + r"\s*a\s*b\s*25\.0", page.text)


def test_an_evaluation_of_another_version_is_a_note(tmp_path):
    a, b = hand_made(tmp_path / "a"), hand_made(tmp_path / "b", temperature=0.3)
    (a / "eval.json").write_text('{"schema": "simclr.eval/9"}')
    assert any("eval.json is not an evaluation that this version reads" in n for n in compare_runs([a, b]).notes)


def test_predictions_survive_as_text_and_what_is_damaged_is_refused():
    numbers = torch.tensor([0, 9, 70_000, 3])
    assert unpacked(packed(numbers)).tolist() == numbers.tolist()
    for text in ("!", packed(numbers)[:-8], "AAAA"):
        with pytest.raises(ValueError, match="not packed predictions"):
            unpacked(text)


# What is no run, or not a whole one


def test_what_is_no_run_is_named_and_the_others_are_compared(tmp_path):
    hand_made(tmp_path / "runs" / "a")
    hand_made(tmp_path / "runs" / "b", temperature=0.3)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.yaml").write_text("services: {web: {}}\n")
    found = compare_runs([tmp_path / "runs", tmp_path / "gone", tmp_path / "foreign", tmp_path / "runs" / "a"])
    assert [run.name for run in found.runs] == ["a", "b"]  # a once
    left_out = dict(found.left_out)
    assert left_out[str(tmp_path / "gone")] == "is not there"
    assert "is not the config of a run" in left_out[str(tmp_path / "foreign")]


def test_a_damaged_run_is_shown_as_far_as_it_can_be_read(tmp_path):
    whole, broken = hand_made(tmp_path / "whole"), hand_made(tmp_path / "broken", temperature=0.3)
    (broken / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 half")
    (broken / "linear_eval.json").write_text('{"linear_top1": 0.')
    (broken / "config.yaml").write_text("model: {temperature: [")
    found = compare_runs([whole, broken])
    row = found.rows[1]
    assert figure(row, "loss").value == 1.75
    assert row.stands == "epoch 2, no readable checkpoint"
    assert not row.runs[0].complete
    said = " ".join(note for note in found.notes if note.startswith("broken: "))
    for name in ("last.ckpt", "linear_eval.json", "config.yaml"):
        assert f"{name} cannot be read" in said
    assert "of another version" not in said


def test_a_row_that_is_half_written_is_not_read(tmp_path):
    a = hand_made(tmp_path / "a")
    b = hand_made(tmp_path / "b", metrics=METRICS + "2,,0.2,,,2", temperature=0.3)
    found = compare_runs([a, b])
    assert found.runs[1].history["lr"] == found.runs[0].history["lr"] == [(0.5, 0.1), (1.5, 0.2)]


@pytest.mark.parametrize(
    "text",
    ["", "epoch,knn_t", METRICS.split("\n")[0] + "\n", "\0" * 512, "epoch,lr,step,train_loss\n0,0.1,4,2.5\n"],
    ids=["empty", "half a header", "header", "zeros", "first epoch"],
)
def test_metrics_without_an_epoch_are_a_note_and_no_damage(tmp_path, text):
    a, b = hand_made(tmp_path / "a"), hand_made(tmp_path / "b", metrics=text, temperature=0.3)
    found = compare_runs([a, b])
    assert [note for note in found.notes if note.startswith("b:")] == [
        "b: no curves: its metrics.csv has no whole epoch"
    ]
    assert found.rows[1].stands == "epoch 2"
    (b / "metrics.csv").unlink()
    assert "b: no curves: it has no metrics.csv" in compare_runs([a, b]).notes


def damaged_evaluation(folder: Path) -> None:
    record = suite_record([result("knn", "k=5", [True, False])])
    del record["results"][0]["protocol"]
    (folder / "eval.json").write_text(json.dumps(record))


def damaged_linear_evaluation(folder: Path) -> None:
    (folder / "linear_eval.json").write_text(json.dumps(evaluated(0.5) | {"ci95": [0.4, 0.5, 0.6]}))


def damaged_settings(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {temperature: 0.2, 1: 2}\ndata: {batch_size: many}\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "metrics.csv").write_text(METRICS.replace("0.5", "half")), "in line 5: could not"),
        (lambda folder: (folder / "metrics.csv").write_text("epoch,lr\n0,0.1\n"), "in line 2: it has no step"),
        (lambda folder: (folder / "eval.json").write_bytes(bytes(300)), "eval.json cannot be read: Expecting value"),
        (damaged_evaluation, "eval.json is not a whole evaluation: it has no protocol"),
        (damaged_linear_evaluation, "not a linear evaluation: its ci95 is [0.4, 0.5, 0.6]"),
        (damaged_settings, "of another version, it does not record"),
    ],
)
def test_of_fifty_runs_a_damaged_one_costs_no_other_its_place(tmp_path, monkeypatch, capsys, damage, words):
    monkeypatch.chdir(tmp_path)
    for i in range(50):
        hand_made(Path("runs", f"r{i:02}"), seed=i, temperature=0.2, result=evaluated(0.4 + 0.001 * i))
    damage(Path("runs", "r07"))
    compare(["runs", "--text", "--csv", "all.csv"])
    said = capsys.readouterr()
    assert said.err == ""
    assert [words in line for line in said.out.splitlines() if line.startswith("note: r07:")].count(True) == 1
    rows = list(csv.DictReader(Path("all.csv").read_text().splitlines()))
    assert sorted(row["run"] for row in rows) == [f"r{i:02}" for i in range(50)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("linear_top1", value) for value in (None, "a lot", True, [0.5])),
        *(("ci95", value) for value in (None, 0.5, [0.5], ["a", "b"])),
        *(("data", value) for value in ("shapes", {"test_images": "many"})),
        *(("confusion_matrix", value) for value in ("x", [[1, 2], [3]], [1])),
        *((name, "x") for name in ("knn_top1", "supervised_top1", "predictions")),
    ],
)
def test_a_linear_evaluation_of_other_kinds_of_values_is_named_with_the_value(tmp_path, name, value):
    a = hand_made(tmp_path / "a", result=evaluated(0.5))
    b = hand_made(tmp_path / "b", temperature=0.3, result=evaluated(0.5) | {name: value})
    found = compare_runs([a, b])
    said = f"linear_eval.json is not a linear evaluation: its {name} is {json.dumps(value)}"
    assert [note.endswith(said) for note in found.notes if note.startswith("b:")] == [True]
    assert found.runs[1].result is None


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b = hand_made(tmp_path / "x" / "run"), hand_made(tmp_path / "y" / "run", temperature=0.3)
    assert [run.name for run in compare_runs([a, b]).runs] == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "it takes two runs or more, and there is one (a)"),
        (["gone", "notes.txt"], "there is none; gone: is not there; notes.txt: is not a run"),
        (["a", "b", "--csv", "a/metrics.csv"], "csv=a/metrics.csv lies in the folder of a run"),
        (["a", "b", "--neighbours=-1"], "neighbours=-1 is negative. Use 0 for none."),
        (["a", "b", "--csv", "compare.html"], "html, markdown and csv name the same file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    hand_made(tmp_path / "a"), hand_made(tmp_path / "b")
    (tmp_path / "notes.txt").touch()
    before = (tmp_path / "a" / "metrics.csv").read_text()
    with pytest.raises(SystemExit) as stopped:
        compare(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert words in said
    assert said.count("\n") == 1
    assert (tmp_path / "a" / "metrics.csv").read_text() == before
    assert not (tmp_path / "compare.html").exists()


# How it is shown


def test_the_page_needs_nothing_and_takes_no_name_for_its_own_marks(tmp_path):
    runs = [hand_made(tmp_path / "<b> & |x|", temperature=0.3), hand_made(tmp_path / "plain", seed=1)]
    found = compare_runs([*runs, hand_made(tmp_path / "more", seed=2), tmp_path / "<i>"])
    path = write_page(found, tmp_path / "out.html")
    page = Page(path.read_text())
    assert "<b> & |x|" in page.text
    assert str(tmp_path / "<i>") in page.text
    assert all(re.match(r"#|data:", resource) for resource in page.resources), page.resources
    assert len(set(page.ids)) == len(page.ids)
    assert page.scripts == 1
    [rank] = [panel for panel in page.data["curves-data"]["panels"] if panel["title"] == "effective rank"]
    assert [(line["name"], line["row"]) for line in rank["series"]] == [("<b> & |x|", 0), ("plain", 1), ("more", 1)]
    assert (tmp_path / "out.png").stat().st_size > 5000


def numbers(data: dict, place: int) -> list[float]:
    """An array of a page's data."""
    return np.frombuffer(base64.b64decode(data["arrays"][place]), "<f4").tolist()


def first_words(page: Page) -> str:
    return page.text.partition("What they reached")[0]


def test_the_page_says_first_which_run_is_the_best_and_how_sure_that_is(tmp_path):
    right = [i % 4 != 0 for i in range(400)]  # 300 of 400
    few, many = ([r and i >= less for i, r in enumerate(right)] for less in (5, 100))
    runs = [hand_made(tmp_path / "best", result=evaluated(0.75, right))]
    for name, other, temperature in (("near", few, 0.3), ("far", many, 0.4)):
        run = hand_made(tmp_path / name, temperature=temperature, result=evaluated(sum(other) / 400, other))
        page = Page(write_page(compare_runs([*runs, run]), tmp_path / "out.html").read_text())
        points = f"{75 - sum(other) / 4:.1f}"
        assert f"best reaches 75.0 % (70.0 to 80.0), {points} points above {name}" in first_words(page)
        assert "By linear (lbfgs, 400 of shapes). 2 runs, 1 setting differs." in first_words(page)
        chance = f"a lead that these test images cannot tell from chance (p {binomtest(0, 3).pvalue:.2g})"
        assert (chance in first_words(page)) == (name == "near")
    same = hand_made(tmp_path / "same", temperature=0.5, result=evaluated(0.75, right))
    for others in ([same], [hand_made(tmp_path / "no result", temperature=0.6)]):
        page = Page(write_page(compare_runs([*runs, *others]), tmp_path / "out.html").read_text())
        assert "reaches" not in first_words(page)
        assert "2 runs, 1 setting differs" in first_words(page)


def test_the_first_figure_stands_beside_the_name_of_its_run(tmp_path):
    runs = [hand_made(tmp_path / name, temperature=t, result=evaluated(t)) for name, t in (("a", 0.1), ("b", 0.2))]
    page = Page(write_page(compare_runs(runs), tmp_path / "out.html").read_text())
    assert re.search(r"run\s*linear \(lbfgs, 40 of shapes\)\s*seed\s*stands at\s*model.temperature\s*kNN", page.text)
    assert re.search(r"b\s*20.0 % \(15.0 to 25.0\)\s*0\s*epoch 2\s*0.2\s*50.0 %", page.text)


def test_the_page_has_every_curve_and_what_places_it_in_time(tmp_path):
    longer = METRICS.replace(",19,", ",39,").replace(",9,", ",19,")
    found = compare_runs([hand_made(tmp_path / "a"), hand_made(tmp_path / "b", metrics=longer, temperature=0.3)])
    data = curve_data(found, row_colours(2))
    assert data["axes"] == ["epochs", "steps", "images"]  # no clock
    assert [(run["name"], run["steps"], run["images"]) for run in data["runs"]] == [("a", 10, 160), ("b", 20, 320)]
    [knn] = [panel for panel in data["panels"] if "kNN" in panel["title"]]
    for line in knn["series"]:
        assert (numbers(data, line["x"]), numbers(data, line["y"])) == ([2], [43.75])
    [knn] = [axis for axis in draw_curves(found, row_colours(2)).axes if "kNN" in axis.get_title("left")]
    assert [line.get_xdata().tolist() for line in knn.lines] == [[2], [2]]


def test_a_run_that_ends_inside_its_first_epoch_is_not_drawn_as_a_whole_one(tmp_path):
    whole, part = hand_made(tmp_path / "whole"), hand_made(tmp_path / "part", step=5, temperature=0.3)
    (part / "metrics.csv").write_text("epoch,step,train_loss,train_loss_epoch\n0,4,2.5,\n0,4,,2.5\n")
    path = part / "checkpoints" / "last.ckpt"
    content = torch.load(path)
    content["run"] |= {"steps_per_epoch": 10, "epochs": 0, "steps_inside": 5}
    torch.save(content, path)
    first, second = compare_runs([whole, part]).runs
    assert (first.history["train_loss_epoch"][0], second.history["train_loss_epoch"]) == ((1, 2.25), [(0.5, 2.5)])
    assert second.per_epoch == {"steps": 10, "images": 160}


def test_where_nobody_knows_how_long_an_epoch_is_the_reader_is_told(tmp_path):
    whole, part = hand_made(tmp_path / "whole"), hand_made(tmp_path / "part", step=5, temperature=0.3)
    (part / "metrics.csv").write_text("epoch,step,train_loss,train_loss_epoch\n0,4,2.5,\n0,4,,2.5\n")
    config = yaml.safe_load((part / "config.yaml").read_text()) | {"trainer": {"max_steps": 5}}
    (part / "config.yaml").write_text(yaml.safe_dump(config))  # and a checkpoint that does not say it
    said = "it ended by trainer.max_steps=5 within its first epoch, of unknown length: drawn as a whole one"
    assert [note for note in compare_runs([whole, part]).notes if said in note] == [f"part: {said}"]


def test_a_setting_of_three_values_is_drawn_against_the_first_figure_that_all_have(tmp_path):
    runs = [hand_made(tmp_path / f"_{t}$", temperature=t, result=evaluated(0.5 + t)) for t in (0.1, 0.2, 0.3)]
    found = compare_runs(runs)
    [axis] = draw_settings(found, row_colours(3)).axes
    assert axis.get_xlabel() == "model.temperature"
    points = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [[pytest.approx([t, 100 * (0.5 + t)])] for t in (0.1, 0.2, 0.3)]
    assert draw_settings(compare_runs(runs[:2]), row_colours(2)) is None  # two points are no trend
    page = Page(write_page(found, tmp_path / "out.html").read_text())
    dots = page.data["scatter-data"]
    title = dots["first"]
    shown = [(row["settings"]["model.temperature"], row["figures"][title]["numbers"]) for row in dots["rows"]]
    assert shown == [(t, pytest.approx([50 + 100 * t, 45 + 100 * t, 55 + 100 * t])) for t in (0.1, 0.2, 0.3)]


def test_fifty_runs_of_2000_points_are_a_page_of_five_megabytes_at_most(tmp_path):
    for i in range(50):
        noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(i)).tolist()
        rows = [f"{n},{0.3 + 0.01 * b},{n},{5 - 0.001 * n + 0.1 * a}" for n, (a, b) in enumerate(noise)]
        metrics = "epoch,knn_top1,step,train_loss_epoch\n" + "\n".join(rows) + "\n"
        hand_made(tmp_path / "runs" / f"r{i}", temperature=0.01 * (i + 1), metrics=metrics)
    found = compare_runs([tmp_path / "runs"])
    page = write_page(found, tmp_path / "out.html")
    assert page.stat().st_size <= 5e6
    lines = [line for axis in draw_curves(found, row_colours(50)).axes for line in axis.lines]
    assert len(lines) == 100
    assert all(len(line.get_xdata()) <= 401 and line.get_xdata()[-1] == 2000 for line in lines)
    data = Page(page.read_text()).data["curves-data"]
    assert len(data["arrays"]) == 101  # of all runs the same times
    assert {len(numbers(data, line["y"])) for panel in data["panels"] for line in panel["series"]} == {2000}
    assert len(set(row_colours(50))) == 50


def test_markdown_has_as_many_cells_in_every_row_of_a_table(tmp_path):
    runs = [hand_made(tmp_path / "a|b", temperature=0.3), hand_made(tmp_path / "c_d", seed=1, result=evaluated(0.6))]
    text = as_markdown(compare_runs(runs))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"a\|b" in text
    assert "60.0 % (55.0 to 65.0)" in text


def test_csv_has_a_row_for_every_run_and_whole_numbers(tmp_path):
    runs = [hand_made(tmp_path / f"s{i}", seed=i, result=evaluated(0.6 + i / 30)) for i in range(2)]
    found = compare_runs([*runs, hand_made(tmp_path / "other", temperature=0.3)])
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [(row["run"], row["group"], row["seed"]) for row in rows] == [
        ("s0", "0", "0"),
        ("s1", "0", "1"),
        ("other", "1", "0"),
    ]
    title = next(column.title for column in found.columns)
    assert float(rows[1][title]) == 0.6 + 1 / 30
    assert rows[2][title] == ""
    assert rows[2]["model.temperature"] == "0.3"


def test_more_runs_than_stand_beside_each_other_stand_below_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        hand_made(tmp_path / "runs" / f"r{i}", temperature=0.1 * (i + 1))
    compare(["runs", "--text"])
    said = capsys.readouterr().out
    for i in range(8):
        assert len(re.findall(rf"^r{i} ", said, re.MULTILINE)) == 2  # its settings, and its figures
    assert not (tmp_path / "compare.html").exists()


def test_a_log_in_ascii_shows_every_number(tmp_path):
    runs = [hand_made(tmp_path / f"\u00fc{i}", seed=i, result=evaluated(0.5 + i / 10)) for i in range(2)]
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_comparison(compare_runs([*runs, hand_made(tmp_path / "b", blur_prob=0.5)]), Console(file=file, width=200))
    file.flush()
    said = file.buffer.getvalue().decode("ascii")
    assert "55.0 +- 7.1 %, n 2" in said
    assert "?0 and 1 more" in said


# Real runs


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two seeds and another temperature, trained and measured."""
    root = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, settings in (
            ("s0", {"seed_everything": 0}),
            ("s1", {"seed_everything": 1}),
            ("hot", {"model.temperature": 0.9}),
        ):
            train(flags({**settings, "trainer.max_epochs": 1, "run_dir": f"runs/{name}"}))
            linear_eval(["--checkpoint", f"runs/{name}"])
    return root


def test_real_runs_are_compared_to_the_last_figure(real, monkeypatch, capsys):
    monkeypatch.chdir(real)
    capsys.readouterr()
    compare(["runs", "--csv", "out/all.csv", "--markdown", "out/all.md", "--html", "out/all.html", "--device", "cpu"])
    said = capsys.readouterr()
    assert said.err == ""
    page = Page((real / "out" / "all.html").read_text())
    assert "minutes" in page.data["curves-data"]["axes"]
    assert "The same images, as each encoder sees them" in page.text
    assert "hot: features of 96 images" in said.out
    assert "model.temperature" in said.out
    assert "note" not in said.out.replace("note: losses do not compare", "")
    found = compare_runs(["runs"])
    assert found.differing == ["model.temperature"]
    assert [(row.name, row.seeds) for row in found.rows] == [("hot", "0"), ("s0 and 1 more", "0, 1")]
    for run in found.runs:
        titles = " ".join(column.title for column in figures_of(run))
        for word in ("linear", "kNN", "online kNN", "retrieval", "effective rank", "loss", "images/s", "minutes"):
            assert word in titles
        record = json.loads((run.path / "linear_eval.json").read_text())
        assert figure(found.rows[0 if run.name == "hot" else 1], "linear").n == (1 if run.name == "hot" else 2)
        said_of = unpacked(record["predictions"]["linear"]), unpacked(record["predictions"]["labels"])
        assert (said_of[0] == said_of[1]).float().mean().item() == pytest.approx(record["linear_top1"])
    assert len(found.pairs) == 2
    assert len({pair.best for pair in found.pairs}) == 1
    hot = json.loads((real / "runs" / "hot" / "linear_eval.json").read_text())
    shown = figure(found.rows[0], "linear")
    assert (shown.value, list(shown.interval)) == (hot["linear_top1"], hot["ci95"])
    assert figure(found.rows[0], "retrieval").interval is not None
    assert {path.name for path in (real / "out").iterdir()} == {"all.csv", "all.md", "all.html", "all.png"}
