"""simclr.supervised: the same runs with labels, against a plain loop; the counterpart of a run at the command line."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ranks import run_ranks
from simclr import Supervised, load_encoder
from simclr.checkpoint import read_checkpoint
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.cli.refusals import LOGGED_WITH_LABELS
from simclr.cli.train import train
from simclr.data import ImageData
from simclr.eval.predictions import unpacked
from simclr.eval.suite import evaluate
from simclr.nonfinite.dump import Batch, Dump, read_dump, write_dump
from simclr.nonfinite.replay import compute
from simclr.seeding import epoch_order
from tiny import BATCH, IMAGES, STEPS, fit, flags, tiny_data

pytestmark = pytest.mark.usefixtures("few_lambdas")

OFF = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "dashboard.every_n_epochs": 0}
SMALL = {"model.warmup_epochs": 0, "trainer.log_every_n_steps": 1, "model.base_lr": 0.5, **OFF}


def tiny_supervised(**settings) -> Supervised:
    torch.manual_seed(0)
    small = {"encoder": "resnet8", "image_size": 16, "width": 0.25, "warmup_epochs": 0, "batch_size": BATCH}
    return Supervised(**{**small, **settings})


def answers(path, device="cpu"):
    """What a supervised run's own network says of the tiny test images, by hand."""
    read = read_checkpoint(path)
    encoder, loader = load_encoder(read.path), tiny_data(shapes_test=32).eval_loader("test")
    pixels = torch.cat([images for images, _ in loader])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    h = encoder((pixels / 255 - mean) / std)
    logits = h @ read.state_dict["classifier.weight"].T + read.state_dict["classifier.bias"]
    return logits.argmax(1), loader.labels


@pytest.mark.parametrize("views", [1, 2])
def test_a_run_is_a_plain_loop_with_labels(views, tmp_path):
    model = tiny_supervised(views=views, optimizer="sgd", base_lr=0.1, lr_scaling="none", weight_decay=0.0)
    data = tiny_data()
    fit(tmp_path, model, data, max_epochs=2)
    other = tiny_supervised(views=views, num_classes=10).train()
    weights = [*other.encoder.parameters(), *other.classifier.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True)
    total, step = 2 * STEPS, 0
    pixels, labels = data.train.pixels, data.train.labels
    for epoch in range(2):
        order = epoch_order(0, epoch, IMAGES)
        for index in order.view(STEPS, BATCH):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 + np.cos(np.pi * step / total)) / 2
            seen = [other.augment.view(pixels[index], index, epoch, 0, view) for view in range(views)]
            logits = other.classifier(other.encoder(torch.cat(seen)))
            logs = logits - logits.exp().sum(1, keepdim=True).log()
            loss = -logs[torch.arange(len(logs)), labels[index].repeat(views)].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    trained = dict(model.named_parameters())
    for name, p in other.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=2e-3, atol=2e-4)


def test_micro_batches_give_the_gradient_of_the_batch_and_their_labels(tmp_path):
    def gradients(**settings):
        model, found = tiny_supervised(norm="none", optimizer="sgd", base_lr=0.1, **settings), {}

        def keep(optimizer):
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

        model.on_before_optimizer_step = keep
        fit(tmp_path, model, max_epochs=1, max_steps=1)
        return found

    whole, parts = gradients(), gradients(micro_batch_size=4)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], atol=1e-6 * float(gradient.abs().max()) + 1e-8), name


def of_a_rank() -> tuple[float, float, list[float]]:
    """Loss, accuracy and gradient of this rank's share of a batch."""
    import torch.distributed as dist

    world, rank = dist.get_world_size(), dist.get_rank()
    model = tiny_supervised(num_classes=3, norm="none")
    own = torch.arange(8).chunk(world)[rank]
    model.targets = (torch.arange(8) % 3)[own]
    logits = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, stats = model.loss(logits[:, own].flatten(0, 1))
    loss.backward()
    gradient = logits.grad.clone()
    dist.all_reduce(gradient)
    return float(stats.loss), float(stats.accuracy), (gradient / world).flatten().tolist()


def test_ranks_give_loss_accuracy_and_gradient_of_the_whole_batch():
    [one] = run_ranks(of_a_rank, 1)
    for found in run_ranks(of_a_rank, 2):
        assert found[0] == pytest.approx(one[0], rel=1e-6)
        assert found[1] == pytest.approx(one[1])
        assert found[2] == pytest.approx(one[2], rel=1e-5, abs=1e-8)


def test_the_encoder_and_the_classifier_begin_by_the_seed_alone():
    a, b = tiny_supervised(seed=3), tiny_supervised(seed=3, num_classes=4)
    torch.rand(7)
    a.add_classifier(4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def photos(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            pixels = np.random.default_rng([number, image]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{image}.png")
    return root


def test_images_that_evaluation_tests_on_are_never_trained_on(tmp_path):
    root = str(photos(tmp_path / "photos", {"a": 20, "b": 30}))
    data = ImageData(train_dir=root, image_size=16, batch_size=8, workers=0, holdout=0.2)
    data.train_with_labels()
    data.setup()
    tested = set(data.eval_loader("test").index.tolist())
    assert len(tested) == data.kept_as_test == 10
    assert data.training_images == 40
    visited = {int(i) for epoch in range(3) for i in data.train_dataloader().sampler.global_batches(epoch).flatten()}
    assert visited == set(range(50)) - tested
    plain = ImageData(train_dir=root, image_size=16, batch_size=8, workers=0)
    plain.setup()
    assert plain.training_images == 50  # without labels all are trained on
    beside = ImageData(train_dir=root, test_dir=str(photos(tmp_path / "t", {"a": 2, "b": 2})), image_size=16)
    beside.train_with_labels()
    assert beside.kept_as_test == 0  # there is a test folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining run, and its counterpart by the command for it."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(flags({**SMALL, "run_dir": "run", "model.strength": 0.25, "seed_everything": 3}))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            main(["supervised", "run"])
        Path("said.txt").write_text(said.getvalue())
    return place


def test_the_end_of_a_counterpart_says_what_to_type_next(runs):
    last = (runs / "said.txt").read_text().splitlines()[-1]
    assert last.endswith("; next: simclr eval run --supervised run-supervised")


def test_the_counterpart_has_the_settings_of_the_run_and_no_others(runs):
    own, other = read_checkpoint(runs / "run"), read_checkpoint(runs / "run-supervised")
    assert other.method == "supervised"
    same = [name for name in own.model if name in other.model]
    assert {"encoder", "width", "strength", "base_lr", "optimizer", "batch_size", "seed", "views"} <= set(same)
    assert {name: own.model[name] for name in same} == {name: other.model[name] for name in same}
    assert own.data == other.data
    assert (own.global_step, own.run["total_steps"]) == (other.global_step, other.run["total_steps"])
    assert other.about["classes"] == list(tiny_data().train_with_labels())
    assert "temperature" not in other.model
    config = yaml.safe_load((runs / "run-supervised" / "config.yaml").read_text())
    assert config["method"] == "supervised"
    rows = (runs / "run-supervised" / "metrics.csv").read_text().splitlines()
    own = {"epoch", "step", "heldout_loss", "skipped_steps"}
    machine = (runs / "run-supervised" / "machine.csv").read_text().splitlines()[0]
    assert set(rows[0].split(",")) - own <= set(LOGGED_WITH_LABELS)
    assert "train_top1" in rows[0]
    assert "train_top1" not in machine


def test_it_goes_on_after_a_stop_to_the_same_bits(runs, monkeypatch):
    monkeypatch.chdir(runs)
    halt = "[{class_path: test_continue.Halt, init_args: {epoch: 1, batch: 1}}]"
    main(["supervised", "--checkpoint", "run", "--run_dir", "half", "--trainer.callbacks", halt])
    assert read_checkpoint("half").global_step == STEPS + 2
    main(["supervised", "--ckpt_path", "half", "--trainer.callbacks=null"])
    a, b = (
        torch.load(Path(name, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]
        for name in ("run-supervised", "half")
    )
    assert all(torch.equal(a[name], value) for name, value in b.items())


def test_its_number_stands_beside_the_probes(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    predictions, labels = answers("run-supervised")
    right = (predictions == labels).double().mean().item()
    main(["linear-eval", "run", "--supervised", "run-supervised"])
    record = json.loads(Path("run/linear_eval.json").read_text())
    assert record["supervised_top1"] == right
    assert torch.equal(unpacked(record["supervised"]["predictions"]), predictions)
    assert record["supervised"]["differs"] == {}
    assert "supervised network" in capsys.readouterr().out
    main(["eval", "run", "--protocols", "knn", "--supervised", "run-supervised", "--csv", "all.csv"])
    said = capsys.readouterr().out
    record = json.loads(Path("run/eval.json").read_text())
    assert record["supervised"]["top1"] == right
    assert record["supervised"]["id"] == "supervised@last/epoch2/split=test/n=32/res16"
    assert f"{record['supervised']['hash']}  {record['supervised']['id']}" in said
    assert "supervised, its own classifier" in Path("run/eval.md").read_text()
    of_knn, _ = evaluate("run-supervised", tiny_data(shapes_test=32), ["knn"], yardsticks=[])
    [result] = record["results"]
    assert result["yardsticks"]["supervised"]["top1"] == of_knn["results"][0]["top1"]  # its encoder, the same protocol
    assert ",supervised_top1," in Path("all.csv").read_text().splitlines()[0]
    main(["verify", "run"])
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
    main(["compare", "run", "run-supervised"])
    assert "supervised" in capsys.readouterr().out
    main(["report", "run"])
    assert "supervised network" in Path("run/report.html").read_text()


@pytest.mark.slow  # a run more
def test_a_counterpart_of_other_settings_is_said(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    main(["supervised", "run", "--run_dir", "short", "--trainer.max_epochs", "1"])
    capsys.readouterr()
    main(["linear-eval", "run", "--supervised", "short"])
    assert "note: the supervised run had other settings: epochs 1 (the run: 2)" in capsys.readouterr().out


def test_a_step_of_it_is_computed_again(runs, tmp_path):
    model = tiny_supervised(num_classes=10, base_lr=0.1)
    model.labels = torch.arange(IMAGES) % 10
    batch = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index = torch.arange(BATCH)
    settings = {name: value for name, value in model.hparams.items() if isinstance(value, int | float | str | list)}
    dump = Dump("supervised", settings, model.state_dict(), 0, 0, None, {}, {}, [], None, {})
    dump.batches = [Batch(0, index, batch, [], BATCH, 16, labels=model.labels[index])]
    write_dump(tmp_path / "step.pt", dump)
    found = compute(read_dump(tmp_path / "step.pt"), "32-true", "cpu")
    assert found.losses
    assert found.losses[0] == pytest.approx(np.log(10), rel=0.3)
    assert found.finite


REFUSED = {
    "supervised flat": "flat has no labels, which supervised training needs: give a folder with two or more class",
    "supervised one": "one has no labels, which supervised training needs",
    "supervised run-supervised": "run-supervised was trained with labels itself. To go on with it: --ckpt_path",
    "supervised bare": "bare has no config.yaml to train by. Give its settings: --config FILE.",
    "supervised --model.num_classes 3": "num_classes=3, but the training images have 10. Leave it out.",
    "supervised --model.views 0": "views=0 is not 1 or more.",
    "supervised run --run_dir n --trainer.callbacks EarlyStopping --trainer.callbacks.monitor contrast_top1": "trainer."
    "callbacks=EarlyStopping watches contrast_top1, which is not logged.",
    "supervised run --model.temperature 0.1": "unknown key model.temperature.",
    "linear-eval run --supervised run": "supervised=run is a run of method=simclr. Give one that was trained with",
    "eval run --supervised gone": "no checkpoint at gone",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_cannot_serve_is_one_line_and_leaves_nothing(typed, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "run-supervised"):
        (tmp_path / name).symlink_to(runs / name)
    photos(tmp_path / "one", {"a": 4})
    photos(tmp_path / "flat", {"": 4})
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare" / "checkpoints" / "last.ckpt").symlink_to(runs / "run" / "checkpoints" / "last.ckpt")
    before = sorted([*tmp_path.rglob("*"), *runs.rglob("*")])
    with pytest.raises(SystemExit) as stopped:
        main([*typed.split(), *([] if "eval" in typed else ["--trainer.accelerator=cpu"])])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT, said
    assert said.err.count("\n") == 1, said.err
    assert REFUSED[typed] in said.err
    assert sorted([*tmp_path.rglob("*"), *runs.rglob("*")]) == before


def test_a_network_that_learned_the_test_images_is_no_yardstick(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", {"a": 20, "b": 20})
    small = {**SMALL, "data.batch_size": 8, "trainer.max_epochs": 1, "data.train_dir": "photos", "data.workers": 0}
    small = [flag for flag in flags(small) if "shapes" not in flag]
    train([*small, "--run_dir=run"])
    main(["supervised", "run"])
    photos(tmp_path / "test", {"a": 2, "b": 2})
    main(["supervised", "run", "--run_dir", "leaky", "--data.test_dir", "test"])
    capsys.readouterr()
    main(["linear-eval", "run", "--supervised", "run-supervised"])
    assert 0 <= json.loads(Path("run/linear_eval.json").read_text())["supervised_top1"] <= 1
    with pytest.raises(SystemExit) as stopped:
        main(["linear-eval", "run", "--supervised", "leaky"])
    assert stopped.value.code == BAD_INPUT
    assert "8 images of the training folder are the test here, and the supervised run" in capsys.readouterr().err
    # Nor may the run go on with other images kept.
    with pytest.raises(SystemExit) as stopped:
        main(["supervised", "--ckpt_path", "run-supervised", "--trainer.max_epochs", "2", "--data.holdout", "0.5"])
    assert "are kept as test, the checkpoint kept 8" in capsys.readouterr().err
