"""Fine-tuning from the head's layers, with few labels, and distillation: against plain loops; yardsticks for all."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

import simclr.eval.distill as eval_distill
import simclr.eval.finetune as eval_finetune
from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.encoders import build_encoder
from simclr.eval import encoder_sha256, extract_features
from simclr.eval.distill import distill, distillation_loss
from simclr.eval.evaluation import LoadedImages
from simclr.eval.few_labels import labelled_part
from simclr.eval.finetune import finetune, semi_finetune, tune, usual_epochs
from simclr.eval.linear import TRAINING_VIEW, crop_and_flip
from simclr.eval.protocol import OF_EVAL, FrozenFeatures
from simclr.eval.suite import STARTING, evaluate
from simclr.module import SimCLR
from simclr.optim import LARS
from simclr.seeding import epoch_order
from tiny import flags, tiny_data

pytestmark = pytest.mark.usefixtures("few_lambdas")
SHORT = {"epochs": 2, "batch_size": 32, "base_lr": 0.4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with a deep head, and its supervised counterpart."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        off = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "trainer.max_epochs": 1, "model.base_lr": 1.0}
        train(flags({**off, "run_dir": "run", "model.head": "deep", "model.hidden_dim": 24}))
        main(["supervised", "run"])
    return root


@pytest.fixture(scope="module")
def whole(place) -> SimCLR:
    read = read_checkpoint(place / "run")
    model = SimCLR(**read.model)
    model.load_state_dict(read.state_dict)
    return model.eval().requires_grad_(False)


@pytest.fixture
def frozen(whole, place) -> FrozenFeatures:
    images = tiny_data(shapes_train=64, shapes_test=32)
    loaders = images.eval_loader("train"), images.eval_loader("test")
    encoder = load_encoder(place / "run")
    train_set, test_set = (extract_features(encoder, loader) for loader in loaders)
    return FrozenFeatures(
        encoder, train_set, test_set, LoadedImages(loaders[0]), test_images=loaders[1], head=copy.deepcopy(whole.head)
    )


def by_hand(frozen, layers, part, optimizer_of, *, epochs, batch_size, seed=0):
    """A plain loop with torch's own schedule; returns the network."""
    body = nn.Sequential(copy.deepcopy(frozen.encoder), *copy.deepcopy(layers)).requires_grad_().train()
    width = 24 if len(layers) else frozen.encoder.feature_dim
    classifier = nn.Linear(width, 10)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = optimizer_of([*body.parameters(), *classifier.parameters()])
    batches = -(-len(part) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    crops = crop_and_flip(frozen.encoder)
    labels = frozen.train[1]
    for epoch in range(epochs):
        for index in part[epoch_order(seed, epoch, len(part))].split(batch_size):
            view = crops.view(frozen.train_images.images(index), index, epoch, seed, TRAINING_VIEW)
            logits = classifier(body(view))
            loss = -logits.log_softmax(1)[torch.arange(len(index)), labels[index]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return body, classifier


def sgd(lr):
    def build(weights):
        return torch.optim.SGD([p for p in weights if p.requires_grad], lr=lr, momentum=0.9, nesterov=True)

    return build


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_fine_tuning_from_a_layer_of_the_head_trains_it_and_all_below(layer, frozen):
    before = encoder_sha256(frozen.encoder), encoder_sha256(frozen.head)
    tuned = tune(frozen, torch.arange(64), **SHORT, from_layer=layer)
    assert (encoder_sha256(frozen.encoder), encoder_sha256(frozen.head)) == before
    layers = frozen.head.layers[:layer]
    body, classifier = by_hand(frozen, layers, torch.arange(64), sgd(0.4 * 32 / 256), epochs=2, batch_size=32)
    mine = [*tuned.body.parameters(), *tuned.classifier.parameters()]
    theirs = [*body.parameters(), *classifier.parameters()]
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    moved = [*tuned.body.layers.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(moved, layers.parameters(), strict=True))
    assert tuned.about == {"steps": 4, **({"from_layer": layer} if layer else {})}
    of_layer = finetune(frozen, **SHORT, from_layer=layer)
    assert torch.equal(of_layer.predictions, tuned.score(frozen).predictions)


def test_a_layer_that_the_head_has_not_is_refused(frozen):
    with pytest.raises(ValueError, match=r"^from_layer=4: the run's projection head has 3 layers. Use fewer.$"):
        finetune(frozen, **SHORT, from_layer=4)
    with pytest.raises(ValueError, match="a layer >= 0"):
        finetune(frozen, **SHORT, from_layer=-1)


def test_fine_tuning_on_few_labels_is_simclrv2s_on_the_labels_of_semi(frozen):
    given = {"fractions": [0.5], "draws": 2, "epochs": 2, "batch_size": 16, "base_lr": 0.1, "from_layer": 1}
    found = semi_finetune(frozen, **given)
    labels = frozen.train[1]
    assert list(found) == ["labels=50%/draw=0", "labels=50%/draw=1"]
    for draw, outcome in enumerate(found.values()):
        part = labelled_part(labels, 3, seed=0, draw=draw)
        assert torch.equal(outcome.labelled, part)

        def lars(weights):
            *below, last, bias = weights  # of which LARS adapts only the layers below the classifier
            groups = [{"params": [p for p in below if p.ndim > 1]}]
            groups.append({"params": [p for p in below if p.ndim == 1] + [last, bias], "trust": False})
            return LARS(groups, lr=0.1 * 16**0.5, momentum=0.9)

        body, classifier = by_hand(frozen, frozen.head.layers[:1], part, lars, epochs=2, batch_size=16)
        loader = frozen.test_images
        body.image_size, body.mean, body.std = (getattr(frozen.encoder, n) for n in ("image_size", "mean", "std"))
        with torch.no_grad():
            guess = classifier(extract_features(body, loader)[0]).argmax(1)
        assert (guess == outcome.predictions).double().mean() > 0.9  # but for rounding
        *_, last, bias = by_hand(frozen, frozen.head.layers[:1], part, lars, epochs=2, batch_size=16)[1].parameters()
        tuned = tune(frozen, part, epochs=2, batch_size=16, base_lr=0.1, from_layer=1, optimizer="lars")
        torch.testing.assert_close(tuned.classifier.weight, last, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(tuned.classifier.bias, bias, rtol=1e-3, atol=1e-5)
    curve = semi_finetune(frozen, per_class=[1, 2], draws=1, epochs=1)
    assert {name: len(outcome.labelled) for name, outcome in curve.items()} == {
        "labels_per_class=1/draw=0": 10,
        "labels_per_class=2/draw=0": 20,
    }


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (0.3, 0.7), (2.0, 0.0)])
def test_the_loss_of_distillation_is_equation_3(temperature, alpha):
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(6, 4, generator=draw, dtype=torch.float64).requires_grad_()
    t = torch.randn(6, 4, generator=draw, dtype=torch.float64).requires_grad_()
    labels, known = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([True, False, True, False, False, True])
    loss = distillation_loss(s, t, labels, known, temperature=temperature, alpha=alpha)
    total = s.new_zeros(())
    for i in range(6):
        p_t = [torch.exp(v / temperature) for v in t[i].detach()]
        p_s = [torch.exp(v / temperature) for v in s[i]]
        for y in range(4):
            total = total - alpha * p_t[y] / sum(p_t) * torch.log(p_s[y] / sum(p_s))
        if known[i]:
            plain = [torch.exp(v) for v in s[i]]
            total = total - (1 - alpha) * torch.log(plain[labels[i]] / sum(plain))
    assert torch.allclose(loss, total / 6, rtol=1e-12)
    [mine], [theirs] = torch.autograd.grad(loss, s), torch.autograd.grad(total / 6, s)
    assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(distillation_loss(s, t, labels, known, temperature=temperature, alpha=alpha), t)


LITTLE = {"student": "resnet8", "width": 0.25, "fraction": 0.5, "epochs": 2, "teacher_epochs": 2, "batch_size": 16}


def test_fine_tuning_has_the_steps_of_simclrv2_however_few_labels_there_are(frozen, monkeypatch):
    """60 epochs of ten labels are 60 steps, in which LARS moves a weight by half a hundredth of its length."""
    asked = []
    tuned = tune(frozen, torch.arange(16), epochs=1, batch_size=16, base_lr=0.1, optimizer="lars")
    for place in (eval_finetune, eval_distill):
        monkeypatch.setattr(place, "tune", lambda frozen, part, **given: asked.append(given["epochs"]) or tuned)
    semi_finetune(frozen, per_class=[1], draws=1)  # a step an epoch
    semi_finetune(frozen, fractions=[0.5], draws=1, batch_size=15)  # two of 30 images
    semi_finetune(frozen, fractions=[0.5], draws=1, batch_size=1)  # 30
    semi_finetune(frozen, fractions=[0.5], draws=1, epochs=3)
    distill(frozen, **{**LITTLE, "teacher_epochs": None, "batch_size": 15, "epochs": 1})
    assert asked == [750, 375, 30, 3, 375]
    assert usual_epochs(12_811, 1_281_167, 1024) == 60  # 1 % of ImageNet
    assert usual_epochs(128_116, 1_281_167, 1024) == 30
    assert usual_epochs(500, 50_000, 256) == 375


def test_the_student_learns_from_its_teacher_and_from_no_label_but_the_teachers(frozen):
    found = distill(frozen, **LITTLE)
    assert list(found) == ["teacher", "student=resnet8"]
    options = {"fractions": [0.5], "draws": 1, "epochs": 2, "batch_size": 16}
    assert torch.equal(found["teacher"].predictions, semi_finetune(frozen, **options)["labels=50%/draw=0"].predictions)
    features, labels = frozen.train
    part = found["teacher"].labelled
    others = torch.ones(len(labels), dtype=torch.bool)
    others[part] = False

    def taught(labels, **more):
        # The teacher is given by its part: other labels of the rest must not move the student.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("simclr.eval.distill.labelled_part", lambda *args, **kwargs: part)
            other = FrozenFeatures(
                frozen.encoder, (features, labels), frozen.test, frozen.train_images, "cpu", frozen.test_images
            )
            return distill(other, **{**LITTLE, **more})["student=resnet8"].predictions

    shuffled = labels.clone()
    shuffled[others] = labels[others].roll(1)
    assert not torch.equal(shuffled, labels)
    assert torch.equal(taught(shuffled), found["student=resnet8"].predictions)
    assert torch.equal(taught(shuffled, alpha=0.5), taught(labels, alpha=0.5))
    assert found["student=resnet8"].about["parameters"] > 0
    wrong = {"fraction": 0.0}, {"temperature": 0.0}, {"alpha": 1.5}
    for given in wrong:
        with pytest.raises(ValueError, match="needed a fraction in"):
            distill(frozen, **{**LITTLE, **given})


def test_the_student_is_scaled_as_build_encoder_scales(frozen):
    short = {"epochs": 1, "teacher_epochs": 1, "batch_size": 32}
    for given in (
        {"student": "resnet8", "width": 0.25, "depth": 2.0},
        {"student": "efficientnet", "phi": 1},
        {"student": "efficientnet", "width": 0.25, "depth": 0.5, "stem": "small"},
    ):
        [found] = [outcome for name, outcome in distill(frozen, **short, **given).items() if name != "teacher"]
        options = {name: value for name, value in given.items() if name != "student"}
        plain = build_encoder(given["student"], image_size=frozen.encoder.image_size, **options)
        assert found.about["parameters"] == sum(p.numel() for p in plain.parameters())


def test_every_protocol_has_every_yardstick(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    shutil.copy(run / "encoder.safetensors", run / STARTING)
    few = {"epochs": 1, "batch_size": 32}
    settings = {
        "knn": {"k": 3},
        "linear": {**few},
        "heads": {**few},
        "semi": {"fractions": [0.5], "draws": 1},
        "label_efficiency": {"per_class": [2], "draws": 1},
        "finetune": {**few, "from_layer": 1},
        "semi_finetune": {**few, "fractions": [0.5], "draws": 1, "from_layer": 2},
        "distill": {**LITTLE, "epochs": 1, "teacher_epochs": 1},
    }
    record, lists = evaluate(
        run,
        tiny_data(shapes_train=64, shapes_test=32),
        list(OF_EVAL),
        settings=settings,
        supervised=place / "run-supervised",
    )
    assert record["yardsticks"] == ["random_encoder", "raw_pixels", "starting_weights", "supervised"]
    assert {result["protocol"] for result in record["results"]} == set(OF_EVAL)
    for result in record["results"]:
        lacking = [name for name in record["yardsticks"] if result["yardsticks"].get(name) is None]
        assert not lacking, (result["id"], lacking)
        assert result.get("labelled") is None or lists[result["labelled"]]
    assert json.loads(json.dumps(record)) == record


def test_a_run_without_a_head_has_no_layer_to_begin_from(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "run-supervised", "--cache", "false", "--protocols", "finetune", "--finetune.from_layer", "1"])
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert said == (
        "error: from_layer: a run of method=supervised has no projection head to train from. Leave it out.\n"
    )
    assert sorted(place.rglob("*")) == before
