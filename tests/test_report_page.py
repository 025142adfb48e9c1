"""The page: its numbers are those of the run, its neighbours those of a double loop, and it needs nothing else."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from page import Page
from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.data import ImageData
from simclr.eval import encoder_sha256
from simclr.files import hold
from simclr.module import SimCLR
from simclr.report import write_report
from simclr.report.page import render
from simclr.report.sections import usage
from suite_record import result, suite_record

CLASSES = ["<script>alert('1')", "a & b", 'say "c"']


def fill(folder: Path, names: list[str], seed: int) -> None:
    """Noise of 8 pixels a side, one image per name."""
    generator = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)


def make_run(run_dir: Path, data: ImageData) -> Path:
    """A run folder as training leaves it, but for the training."""
    torch.manual_seed(0)
    model = SimCLR("resnet8", image_size=8, stem="small", batch_size=4)
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "datamodule_hyper_parameters": dict(data.hparams),
        "epoch": 1,
        "global_step": 20,
    }
    (run_dir / "checkpoints").mkdir(parents=True)
    torch.save(content, run_dir / "checkpoints" / "last.ckpt")
    (run_dir / "config.yaml").write_text("trainer: {max_epochs: 2, precision: bf16-mixed, devices: 3}\n")
    (run_dir / "metrics.csv").write_text(
        "epoch,knn_top1,lr,step,train_loss,train_loss_epoch\n"
        "0,,0.1,4,2.5,\n0,,,9,,2.25\n1,,0.2,14,2.0,\n1,0.4375,,19,,1.75\n"
    )
    Image.new("RGB", (20, 20), "red").save(run_dir / "views.png")
    return run_dir


@pytest.fixture
def labelled(tmp_path):
    """A run on three classes with names that HTML would take for its own."""
    fill(tmp_path / "train", [f"{c}/{i}.png" for c in CLASSES for i in range(12)], 0)
    fill(tmp_path / "test", [f"{c}/{i}.png" for c in CLASSES for i in range(11)], 1)
    data = ImageData(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path / "test"), image_size=8, batch_size=4)
    return make_run(tmp_path / "run <i>", data)


def result_of(run_dir: Path, **changes) -> dict:
    """A record as linear evaluation writes it."""
    return {
        "linear_top1": 0.8312,
        "linear_top5": 0.99,
        "ci95": [0.8141, 0.8467],
        "knn_top1": 0.7777,
        "knn_k": 36,
        "random_encoder_top1": 0.4102,
        "raw_pixels_top1": 0.1915,
        "encoder_sha256": encoder_sha256(load_encoder(run_dir)),
        "epoch": 2,
        "protocol": "lbfgs",
        "confusion_matrix": [[10, 1, 0], [0, 7, 4], [0, 0, 11]],
        "data": {"train": "train", "test": "test", "train_images": 36, "test_images": 33, "classes": CLASSES},
        "command": "python linear_eval.py --checkpoint 'run <i>'",
        "versions": {"torch": "9.9.9"},
        "date": "2026-01-02T03:04:05+00:00",
        **changes,
    }


class ReportPage(Page):
    """And its rows of neighbours: (query, [(neighbour, whether it is of another class)])."""

    def __init__(self, path: Path):
        self.rows = []
        super().__init__(path.read_text())

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "figure":
            attributes = dict(attrs)
            number, kind = int(attributes["data-number"]), (attributes.get("class") or "").split()
            if "query" in kind:
                self.rows.append((number, []))
            else:
                self.rows[-1][1].append((number, "wrong" in kind))


def test_the_first_sentence_holds_the_numbers_of_the_evaluation(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled)))
    path = write_report(labelled)
    assert path == labelled / "report.html"
    text = ReportPage(path).text
    sentence = (
        "A linear classifier on the frozen features reaches 83.1 % (95 % interval 81.4 to 84.7), "
        "64.0 points above raw pixels and 42.1 points above a random encoder."
    )
    assert sentence in text
    for shown in ("77.8 %", "41.0 %", "19.1 %", "guessing 33.3 %", "torch 9.9.9", "2026-01-02 03:04:05"):
        assert shown in text
    assert 'a & b taken for say "c": 36.4 % (4 of 11)' in text
    assert f'a & b63.6 %else mostly say "c"{CLASSES[0]}' in text.replace(" a & b 63.6", "a & b63.6").replace(
        "% else", "%else"
    ).replace(f'"c" {CLASSES[0]}', f'"c"{CLASSES[0]}')
    assert "another encoder" not in text
    assert result_of(labelled)["encoder_sha256"] in text


def test_a_result_below_a_yardstick_is_said_to_be_below(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled, raw_pixels_top1=0.9)))
    assert "6.9 points below raw pixels" in ReportPage(write_report(labelled)).text


def test_a_yardstick_without_a_number_is_left_out(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled, raw_pixels_top1=None)))
    page = write_report(labelled).read_text()
    assert "raw pixels" not in page
    assert "a random encoder." in page


def test_the_page_needs_nothing_beside_it(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled)))
    path = write_report(labelled)
    resources = ReportPage(path).resources
    assert len(resources) > 20
    assert all(resource.startswith(("data:image/", "#")) for resource in resources)
    assert not re.search(r"https?://|@import|<link|\bimport\(|fetch\(|XMLHttpRequest", path.read_text())
    assert "default-src 'none'" in path.read_text()  # and the browser would not ask anyone
    for name in ("curves.png", "neighbours.png", "map.png"):
        Image.open(labelled / name).verify()


def test_names_of_classes_folders_and_settings_are_text_not_markup(labelled):
    hostile = "</dd><script>alert('2')</script>"
    data = {**result_of(labelled)["data"], "test": hostile, "note": hostile}
    result = result_of(labelled, command=hostile, data=data, versions={hostile: hostile}, date=hostile)
    (labelled / "linear_eval.json").write_text(json.dumps(result))
    (labelled / "linear_eval.1.json").write_text(json.dumps({**result, "protocol": hostile, "epoch": hostile}))
    (labelled / "config.yaml").write_text(f'trainer: {{precision: "{hostile}"}}')
    path = write_report(labelled)
    page = ReportPage(path)
    assert "run <i>" in page.text
    assert all(page.text.count(name) > 5 for name in CLASSES)
    assert page.text.count(hostile) == 11
    assert page.scripts == 1
    assert path.read_text().count("<script") == 1 + len(page.data)
    assert page.data["atlas-data"]["classes"] == CLASSES


def test_what_is_put_into_a_page_is_escaped_wherever_it_stands():
    """A page of nothing but hostile text: every place of every template that takes a word."""
    hostile = "\"><script>'</script>"
    headline = {"run": hostile, "stands": hostile, "how_to_measure": hostile, "epochs": 1, "result": None}
    headline |= {"advice": hostile}
    headline |= {"encoder": hostile, "knn": None, "has_labels": True}
    provenance = {"rows": {hostile: hostile}, "earlier": []}
    headline |= {"evaluated": None}
    left_out = dict.fromkeys(("protocols", "curves", "quality", "atlas", "neighbours", "alike", "confusion", "views"))
    row = {"name": hostile, "value": hostile, "default": hostile}
    settings = {"rows": {hostile: hostile}, "differ": [row], "left_open": [row], "has_config": False}
    usage = {"path": hostile, "feature_dim": hostile, "image": hostile}
    words = {"title": hostile, "headline": headline, "missing": hostile, "settings": settings, "usage": usage}
    words |= {"with_labels": False}
    page = render(**words, provenance=provenance, **left_out)
    assert page.count("<script") == Page(page).scripts == 1
    assert page.count("&lt;script") == 19
    tile = {"kind": hostile, "number": hostile, "name": hostile, "is_small": True, "source": hostile}
    one = SimpleNamespace(name=hostile, index=[0], whole=2)
    neighbours = {"k": hostile, "tiles": [tile], "test": one, "bank": one, "share_of_own_class": None}
    worst = {"true": hostile, "taken_for": hostile, "share": 0.5, "count": 1, "of": 2}
    picture = {"is_small": True, "source": hostile, "label": hostile, "short": hostile}
    class_row = {"name": hostile, "share": 0.5, "taken_for": hostile}
    confusion = {"picture": hostile, "classes": [], "worst": [worst | {"tiles": [picture]}], "accuracies": [class_row]}
    confusion |= {"classes_left_out": False}
    headline |= {"result": {"linear_top1": 0.5, "epoch": hostile}, "interval": [0, 1], "ahead": [(1, hostile)]}
    headline |= {"of_another_encoder": True, "copies": hostile, "bars": [(hostile, 0.5, hostile)], "guessing": 0.1}
    headline |= {"data": {}, "top5": None, "protocol": hostile, "notes": [hostile]}
    headline |= {"began_with": hostile}
    pair = {"a": picture, "b": picture, "same": False, "cosine": 1, "across": True, "differ": hostile}
    alike = {"pairs": [pair], "images": 2, "same": 0, "near": 1, "same_across": 0, "cosine": 1, "correlation": 1}
    figure = {"name": hostile, "value": hostile, "before": hostile, "says": hostile}
    numbers = {"loss": hostile, "first": 1, "last": 1, "heldout": None, "knn": None, "data": {"names": [hostile]}}
    numbers |= {"probe": None}
    protocols = {"head": [hostile], "rows": [[hostile, hostile]], "ids": [{"hash": hostile, "id": hostile}]}
    protocols |= {"notes": [hostile], "data": {"test_images": 1, "test": hostile, "train_images": 1}, "epoch": hostile}
    protocols |= {"of_another_encoder": True, "began_with": False, "earlier": 0}
    atlas = {
        "data": {hostile: hostile},
        "sprite": hostile,
        "count": 1,
        "whole": 1,
        "name": hostile,
        "classes": [hostile],
    }
    shown = {"neighbours": neighbours, "confusion": confusion, "views": {"source": hostile}, "alike": alike}
    shown |= {"protocols": protocols, "quality": {"figures": [figure], "epoch": hostile}, "curves": numbers}
    page = render(**words, provenance=provenance, **shown, atlas=atlas | {"has_predictions": True})
    assert Page(page).scripts == 1
    assert page.count("<script") == 3
    assert Page(page).data == {"curves-data": {"names": [hostile]}, "atlas-data": {hostile: hostile}}
    assert page.count("&lt;script") == 70
    headline |= {"result": None, "evaluated": {"name": hostile, "top1": 0.5, "interval": None, "draws": 3, "ahead": []}}
    page = render(**words, provenance=provenance, **shown, atlas=atlas | {"has_predictions": True})
    assert Page(page).scripts == 1


def test_neighbours_are_those_of_a_double_loop_and_other_classes_are_marked(labelled):
    page = ReportPage(write_report(labelled))
    data = ImageData(train_dir=str(labelled.parent / "train"), test_dir=str(labelled.parent / "test"), image_size=8)
    data.setup()
    encoder = load_encoder(labelled)
    features = {}
    for part, images in (("train", data.train), ("test", data.test)):
        pixels = images.images(range(len(images))).double() / 255
        features[part] = encoder.double()((pixels - 0.5) / 0.25)  # the default mean and std
    assert len(page.rows) == 10
    assert {int(data.test.labels[query]) for query, _ in page.rows} == {0, 1, 2}
    for query, shown in page.rows:
        similarity = []
        for number in range(len(data.train)):
            a, b = features["test"][query], features["train"][number]
            similarity.append(float((a * b).sum() / (a.norm() * b.norm())))
        nearest = sorted(range(len(similarity)), key=lambda number: -similarity[number])[:8]
        assert [number for number, _ in shown] == nearest
        own = data.test.labels[query]
        assert [wrong for _, wrong in shown] == [bool(data.train.labels[number] != own) for number in nearest]


def test_without_an_evaluation_the_page_says_how_to_make_one(labelled):
    text = ReportPage(write_report(labelled)).text
    assert "online kNN 43.8 % on training images, not yet measured" in text
    assert f"simclr linear-eval '{labelled}'" in text
    assert "What it confuses" not in text


def test_without_labels_there_are_neighbours_and_curves_and_no_query_is_in_its_own_bank(tmp_path):
    fill(tmp_path / "flat", [f"{i}.png" for i in range(60)], 0)
    run_dir = make_run(tmp_path / "run", ImageData(train_dir=str(tmp_path / "flat"), image_size=8, batch_size=4))
    page = ReportPage(write_report(run_dir, map_images=50))
    assert "no labels" in page.text
    assert "linear-eval" not in page.text
    assert "How it learned" in page.text
    assert len(page.rows) == 10
    queries = {query for query, _ in page.rows}
    assert not queries & {number for _, shown in page.rows for number, _ in shown}
    assert not any(wrong for _, shown in page.rows for _, wrong in shown)


def test_an_evaluation_of_another_encoder_is_called_that(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled, encoder_sha256="0" * 64, epoch=1)))
    text = ReportPage(write_report(labelled)).text
    assert "These numbers are of another encoder (epoch 1) than the checkpoint now holds (epoch 2)" in text


def test_the_settings_of_built_in_images_are_not_those_of_a_folder(labelled):
    text = ReportPage(write_report(labelled)).text
    assert "train_dir=" in text
    assert "shapes_train" not in text


def test_an_encoder_of_four_channels_is_not_shown_a_jpeg(labelled):
    checkpoint = read_checkpoint(labelled)
    assert usage(checkpoint, load_encoder(labelled))["image"] == "photo.jpg"
    checkpoint.model["channels"] = 4
    assert usage(checkpoint, load_encoder(labelled))["image"] == "image.tif"


def test_a_run_that_goes_on_is_said_to(labelled):
    let_go = hold(labelled)
    try:
        assert "The checkpoint stands at epoch 2, and the run goes on." in ReportPage(write_report(labelled)).text
    finally:
        let_go()
    assert "The checkpoint stands" not in ReportPage(write_report(labelled)).text


def test_images_that_are_gone_leave_the_rest_of_the_page(labelled):
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled)))
    (labelled.parent / "train").rename(labelled.parent / "moved")
    said = []
    page = ReportPage(write_report(labelled, say=said.append))
    assert "83.1 %" in page.text
    assert "No images to show: the run's own data.train_dir=" in page.text
    assert not page.rows
    assert any("does not exist" in line for line in said)


def test_a_short_run_is_given_one_sentence_of_advice_and_a_long_one_that_is_below_a_yardstick_another(labelled):
    assert (
        "20 steps are few: fewer than 300 seldom lead far from an untrained network. Train longer "
        "(--trainer.max_epochs) before" in ReportPage(write_report(labelled)).text
    )
    path = labelled / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path) | {"global_step": 3000}, path)
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled, raw_pixels_top1=0.9)))
    page = write_report(labelled)
    assert "The encoder is not above raw pixels: look at the loss above" in ReportPage(page).text
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled)))
    assert 'class="advice"' not in write_report(labelled).read_text()


def test_figures_without_labels_and_settings_other_than_the_defaults_are_told(labelled):
    (labelled / "metrics.csv").write_text(
        "epoch,heldout_loss,rankme,retrieval_top1,retrieval_top1_before,step,train_loss_epoch\n"
        "0,2.4,7,0.25,0.125,9,2.25\n1,1.875,8.25,0.5,0.125,19,1.75\n"
    )
    (labelled / "config.yaml").write_text("trainer: {max_epochs: 2, accumulate_grad_batches: 3}\nknn: {k: 20}\n")
    page = ReportPage(write_report(labelled))
    assert "retrieval 50.0 % untrained 12.5 %" in page.text
    assert "held-out loss 1.88 The NT-Xent loss of batches. On training images 1.75." in page.text
    assert "effective rank 8.2 In about how many of 64 dimensions h varies" in page.text
    assert "On images that it never trains on it ends at 1.88." in page.text
    titles = [panel["title"] for panel in page.data["curves-data"]["panels"]]
    assert titles == ["NT-Xent loss", "retrieval of the other view, %", "effective rank of h"]
    assert "trainer.accumulate_grad_batches31" in page.text.replace(" ", "")
    assert "knn.k" not in page.text  # as by default


def test_a_run_that_learned_classes_is_told_as_one(labelled):
    (labelled / "metrics.csv").write_text(
        "epoch,retrieval_top1,retrieval_top1_before,step,train_loss_epoch,uniformity\n1,0.1,0.125,19,1.75,-0.001\n"
    )
    path = labelled / "checkpoints" / "last.ckpt"
    saved = torch.load(path) | {"global_step": 3000}
    torch.save(saved, path)
    text = ReportPage(write_report(labelled)).text
    assert "is found no more often than by the untrained network" in text
    assert "views below each other are of one image" in text
    assert "Frames are the classes, which training never saw." in text
    assert "uniformity 0.00 How" in text
    assert "z stands for" not in text
    saved["hyper_parameters"] = {**saved["hyper_parameters"], "num_classes": 3, "head": None}
    torch.save(saved, path)
    text = ReportPage(write_report(labelled)).text
    assert "the untrained network:" not in text, "advice by what it was not trained for"
    assert "It learns the class of each view." in text
    assert "Frames are the classes, which training learned on its own images." in text
    assert "z stands for its class scores" in text
    assert "projection head" not in text


def test_an_evaluation_by_protocol_is_a_table_and_the_first_sentence_where_there_is_no_other(labelled):
    few = [result("semi", f"fraction=0.1/draw={i}", [True] * (10 + 10 * i) + [False] * (30 - 10 * i)) for i in range(2)]
    results = [result("knn", "k=5", [True] * 20 + [False] * 20), result("logreg", "", [True] * 30 + [False] * 10), *few]
    record = suite_record(results, encoder_sha256=encoder_sha256(load_encoder(labelled)))
    (labelled / "eval.json").write_text(json.dumps(record))
    page = ReportPage(write_report(labelled))
    low, high = (100 * bound for bound in results[1]["ci95"])
    sentence = (
        f"logreg on the frozen features reaches 75.0 % (95 % interval {low:.1f} to {high:.1f}), 50.0 points above"
    )
    assert f"{sentence} a random encoder." in page.text
    assert "not yet measured" not in page.text
    low, high = (100 * bound for bound in results[0]["ci95"])
    assert re.search(rf"knn k=5\s*50\.0\s*{low:.1f}-{high:.1f}\s*50\.0\s*40\.0-60\.0\s*25\.0\s*-", page.text)
    assert "semi fraction=0.1" in page.text
    assert "sd 17.7, 2 draws" in page.text
    assert "logreg@last/epoch2/split=test/n=40/res16" in page.text
    assert "another encoder" not in page.text
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled)))
    (labelled / "eval.json").write_text(json.dumps(record | {"encoder_sha256": "1" * 64, "epoch": 1}))
    text = ReportPage(write_report(labelled)).text
    assert "A linear classifier on the frozen features reaches 83.1 %" in text
    assert "These numbers are of another encoder (epoch 1) than the checkpoint now holds." in text


def test_the_online_probe_is_drawn_beside_knn(labelled):
    rows = "epoch,knn_top1,probe_top1,step,train_loss_epoch\n0,0.4,0.625,9,2.25\n1,0.5,0.5,19,1.75\n"
    (labelled / "metrics.csv").write_text(rows)
    page = ReportPage(write_report(labelled))
    [panel] = [panel for panel in page.data["curves-data"]["panels"] if panel["title"] == "online accuracy, %"]
    assert [line["name"] for line in panel["series"]] == ["kNN", "linear probe"]
    assert "The online linear probe ends at 50.0 % (highest 62.5 %)." in page.text


def test_a_hundred_classes_are_drawn_as_a_picture(labelled):
    matrix = (torch.eye(100, dtype=torch.int64) * 3 + torch.eye(100, dtype=torch.int64).roll(1, 1)).tolist()
    data = {**result_of(labelled)["data"], "classes": [f"class {i}" for i in range(100)]}
    (labelled / "linear_eval.json").write_text(json.dumps(result_of(labelled, confusion_matrix=matrix, data=data)))
    page = ReportPage(write_report(labelled))
    assert "confusion matrix" not in page.labels  # of a table
    assert "The 20 lowest of 100 classes." in page.text
    assert "class 0 taken for class 1: 25.0 % (1 of 4)" in page.text


def test_what_is_damaged_or_missing_is_named(labelled, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Give a run folder that training has filled"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="map_images=0"):
        write_report(labelled, map_images=0)
    (labelled / "linear_eval.json").write_text('{"linear_top1": 0.5, "ci95": [0, 1]}')
    with pytest.raises(ValueError, match=r"linear_eval\.json.*no random_encoder_top1 and no raw_pixels_top1"):
        write_report(labelled)
    (labelled / "linear_eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"linear_eval\.json cannot be read"):
        write_report(labelled)
    (labelled / "linear_eval.json").unlink()
    (labelled / "metrics.csv").write_text("epoch,step,train_loss_epoch\n0,9,much\n")
    with pytest.raises(ValueError, match=r"metrics\.csv cannot be read"):
        write_report(labelled)
    assert not (labelled / "report.html").exists()
