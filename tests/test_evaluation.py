"""The record of a linear evaluation: honest yardsticks, and test labels that decide nothing."""

import json

import pytest
import torch
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader, TensorDataset

from simclr.checkpoint import LAST, load_encoder, new_encoder, read_checkpoint
from simclr.cli.train import train
from simclr.data import EvalLoader, FileImages, MemoryImages, draw_shapes, sources
from simclr.eval import encoder_sha256, evaluation, extract_features, linear_probe, raw_pixels
from simclr.eval.evaluation import linear_evaluation, write_result
from simclr.eval.predictions import unpacked
from simclr.module import SimCLR
from test_eval_linear import of_views, plain_sgd
from tiny import fit, flags, tiny_data

pytestmark = pytest.mark.usefixtures("few_lambdas")
RATE = {"model.base_lr": 1.0}  # with so few images the features of a faster run are all alike


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose seed is not the default."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(flags({"seed_everything": 5, "run_dir": "run", "data.shapes_train": 96, "trainer.max_epochs": 3, **RATE}))
    return root / "run"


def data():
    return tiny_data(shapes_train=96, shapes_test=48, seed=5)


@pytest.fixture(scope="module")
def record(run):
    return linear_evaluation(run, data(), command="a command")


def test_the_random_encoder_is_the_runs_own_before_its_first_step(run, tmp_path, record, monkeypatch):
    read = read_checkpoint(run)
    assert read.model["seed"] == 5
    seed_everything(5)  # as the command line does before it builds the model
    begun = SimCLR(**read.model)
    torch.manual_seed(5)
    random = new_encoder(read)
    assert encoder_sha256(random) == encoder_sha256(begun.encoder)
    assert encoder_sha256(random) != record["encoder_sha256"]
    # And training began there: a run of the same settings whose learning rate is next to nothing ends there.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train(flags({"seed_everything": 5, "run_dir": "still", "trainer.max_epochs": 1, "model.base_lr": 1e-30}))
    weights = torch.load(tmp_path / "still" / "encoder.pt")
    for name, value in random.named_parameters():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12)
    # And the evaluation takes that encoder.
    taken = []
    monkeypatch.setattr(evaluation, "new_encoder", lambda read: taken.append(new_encoder(read)) or taken[0])
    measured = linear_evaluation(run, data())["random_encoder_top1"]
    assert [encoder_sha256(encoder) for encoder in taken] == [encoder_sha256(random)]
    train_set, test_set = data().eval_loader("train"), data().eval_loader("test")
    expected = linear_probe(*extract_features(random, train_set), *extract_features(random, test_set))
    assert measured == record["random_encoder_top1"] == expected.accuracy


def test_raw_pixels_go_through_the_same_probe(record):
    expected = linear_probe(*raw_pixels(data().eval_loader("train")), *raw_pixels(data().eval_loader("test")))
    assert record["raw_pixels_top1"] == expected.accuracy


def test_test_labels_decide_nothing(run, record):
    permuted = data()
    permuted.setup()
    labels = permuted.test.labels[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    permuted.test = MemoryImages("permuted", permuted.test.pixels, labels, permuted.test.classes)
    other = linear_evaluation(run, permuted)
    assert other["regularization"] == record["regularization"]
    # The same images are taken for the same classes: only the rows of the confusion matrix are dealt out anew.
    columns = [torch.tensor(r["confusion_matrix"]).sum(0).tolist() for r in (record, other)]
    assert columns[0] == columns[1]
    assert other["confusion_matrix"] != record["confusion_matrix"]


def test_predictions_are_those_of_the_record_and_name_the_images_they_are_of(run, record):
    kept = record["predictions"]
    labels = unpacked(kept["labels"])
    for name in ("linear", "knn"):
        assert (unpacked(kept[name]) == labels).double().mean().item() == pytest.approx(record[f"{name}_top1"])
    other = linear_evaluation(run, tiny_data(shapes_train=96, shapes_test=48, seed=5, load_size=20))["predictions"]
    assert other["labels"] == kept["labels"]
    assert other["images_sha256"] != kept["images_sha256"]  # of other pixels


def test_the_global_generator_changes_nothing(run, record):
    torch.manual_seed(123)
    again = linear_evaluation(run, data())
    changing = ("date", "seconds", "command")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in record.items() if k not in changing
    }


def test_the_record_is_json_and_says_what_it_came_from(run, record):
    assert json.loads(json.dumps(record)) == record
    assert record["checkpoint"] == str(run / LAST)
    assert (record["encoder"], record["epoch"], record["global_step"], record["protocol"]) == (
        "resnet8",
        3,
        18,
        "lbfgs",
    )
    assert record["command"] == "a command"
    matrix = torch.tensor(record["confusion_matrix"])
    assert matrix.shape == (10, 10)
    assert matrix.sum() == 48
    assert matrix.diag().sum() / 48 == pytest.approx(record["linear_top1"])


def test_the_papers_protocol_is_a_plain_loop_over_augmented_images_and_names_its_settings(run):
    settings = {"epochs": 5, "batch_size": 16, "base_lr": 20.0, "weight_decay": 0.01}
    record = linear_evaluation(run, data(), protocol="sgd", settings=settings)
    assert {"protocol": "sgd", **settings}.items() <= record.items()
    encoder, train_set, test_set = load_encoder(run), data().eval_loader("train"), data().eval_loader("test")
    of_epoch = of_views(encoder, train_set.source.pixels, train_set.labels)
    test_features, labels = extract_features(encoder, test_set)
    logits = plain_sgd(of_epoch, 10, **settings)(test_features.double())
    guesses = logits.argsort(1, descending=True)
    assert record["linear_top1"] == sum(guesses[:, 0] == labels).item() / 48
    assert record["linear_top5"] == sum((guesses[:, :5] == labels[:, None]).any(1)).item() / 48
    matrix = [[0] * 10 for _ in range(10)]
    for truth, guess in zip(labels, guesses[:, 0], strict=True):
        matrix[truth][guess] += 1
    assert record["confusion_matrix"] == matrix
    assert len(guesses[:, 0].unique()) > 1  # the classifier tells images apart, so that agreement means something


def test_an_encoder_that_changes_while_it_is_measured_is_an_error(run, monkeypatch):
    def load(path):
        encoder = new_encoder(read_checkpoint(path))
        encoder.register_buffer("count", torch.zeros(()))
        encoder.register_forward_pre_hook(lambda module, images: setattr(module, "count", module.count + 1))
        return encoder

    monkeypatch.setattr(evaluation, "load_encoder", load)
    with pytest.raises(RuntimeError, match="the encoder changed while it was evaluated"):
        linear_evaluation(run, data())


def test_settings_out_of_range_are_refused_by_name_before_anything_is_read():
    settings, votes = {"epochs": 0, "batch_size": 0, "base_lr": 0, "weight_decay": -1}, {"k": 0, "temperature": 0}
    with pytest.raises(ValueError, match="is not positive") as error:
        linear_evaluation("no/such/run", data(), protocol="sgd", settings=settings, knn=votes)
    assert str(error.value) == (
        "epochs=0 is not 1 or more; batch_size=0 is not 1 or more; knn_k=0 is not 1 or more; "
        "base_lr=0 is not positive; knn_temperature=0 is not positive; weight_decay=-1 is negative."
    )


def test_a_protocol_that_nobody_knows_and_a_setting_of_another_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^protocol=ridge is none of knn, logreg, linear, nor the path of a function"):
        linear_evaluation("no/such/run", data(), protocol="ridge")
    with pytest.raises(ValueError, match=r"^epochs: no setting of logreg, which has max_iterations"):
        linear_evaluation("no/such/run", data(), settings={"epochs": 3})


def test_a_protocol_of_ones_own_is_measured_beside_the_yardsticks(run, record):
    own = linear_evaluation(run, data(), protocol="toy_protocol.nearest_mean", settings={"shrink": 0.5})
    features, labels = extract_features(load_encoder(run), data().eval_loader("train"))
    means = torch.stack([features[labels == c].mean(0) for c in range(10)]) * 0.5
    test, test_labels = extract_features(load_encoder(run), data().eval_loader("test"))
    right = torch.cdist(test, means).argmin(1) == test_labels
    assert own["linear_top1"] == right.double().mean().item()
    assert (own["protocol"], own["shrink"], own["linear_top5"]) == ("toy_protocol.nearest_mean", 0.5, None)
    assert own["random_encoder_top1"] == record["random_encoder_top1"]


def test_test_classes_without_a_training_image_are_named(run):
    with pytest.raises(ValueError, match=r"no training image in shapes \(train\): [a-z ]+, [a-z ]+.*\."):
        linear_evaluation(run, tiny_data(shapes_train=3, shapes_test=48))


def test_a_yardstick_that_does_not_converge_is_no_number_and_the_encoder_keeps_its_own(run, record, monkeypatch):
    monkeypatch.setattr(evaluation, "_YARDSTICK_ITERATIONS", 1)
    said = []
    other = linear_evaluation(run, data(), say=said.append)
    assert (other["random_encoder_top1"], other["raw_pixels_top1"]) == (None, None)
    assert sum("no number for this yardstick: L-BFGS did not converge" in line for line in said) == 2
    assert other["linear_top1"] == record["linear_top1"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # of one core
def test_the_papers_protocol_decodes_files_in_as_many_threads_as_there_are_workers(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "read_images", lambda paths, side, threads, **_: asked.append((paths, side, threads)))
    files = FileImages("files", ["a", "b", "c"], 8, torch.tensor([0, 1, 1]), ["x", "y"])
    for workers in (0, 2):
        evaluation.LoadedImages(EvalLoader(files, torch.tensor([2, 0]), 2, workers)).images(torch.tensor([1, 0]))
    assert asked == [(["a", "c"], 8, 1), (["a", "c"], 8, 2)]


def test_earlier_results_are_kept_under_numbers(tmp_path):
    for number in range(3):
        assert write_result({"n": number}, tmp_path) == tmp_path / "linear_eval.json"
    held = {p.name: json.loads(p.read_text())["n"] for p in tmp_path.iterdir()}
    assert held == {"linear_eval.json": 2, "linear_eval.1.json": 0, "linear_eval.2.json": 1}


def test_a_module_trained_without_image_data_can_be_evaluated(tmp_path):
    loader = DataLoader(TensorDataset(draw_shapes(32, 16)[0], torch.arange(32)), batch_size=16)
    fit(tmp_path, data=loader, max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt").data == {}
    encoder = load_encoder(tmp_path / "x.ckpt")
    train_features, test_features = (extract_features(encoder, data().eval_loader(part)) for part in ("train", "test"))
    expected = linear_probe(*train_features, *test_features).accuracy
    assert linear_evaluation(tmp_path / "x.ckpt", data())["linear_top1"] == expected
