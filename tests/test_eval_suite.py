"""`simclr eval` and `simclr verify`: features once, numbers of independent oracles, and what is wrong is named."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.train import train
from simclr.data import MemoryImages
from simclr.eval import encoder_sha256, extract_features, feature_cache, raw_pixels
from simclr.eval.evaluation import LoadedImages
from simclr.eval.few_labels import labelled_part
from simclr.eval.finetune import finetune
from simclr.eval.logreg import linear_probe
from simclr.eval.predictions import unpacked
from simclr.eval.protocol import REVISIONS, FrozenFeatures, Outcome
from simclr.eval.suite import STARTING, RawPixels, evaluate, identity
from simclr.eval.tables import COLUMNS
from simclr.eval.verify import differing, records_of, verify_record
from simclr.seeding import epoch_order
from tiny import flags, tiny_data

pytestmark = pytest.mark.usefixtures("few_lambdas")
RATE = {"model.base_lr": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs, of different seeds."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in (5, 6):
            off = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "trainer.max_epochs": 1, **RATE}
            train(flags({"seed_everything": seed, "run_dir": f"seed{seed}", "data.shapes_train": 96, **off}))
    return root


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "seed5", tmp_path / "run")
    return tmp_path / "run"


def data(**settings):
    return tiny_data(**{"shapes_train": 96, "shapes_test": 48, "seed": 5, **settings})


def by_name(record):
    return {" ".join(filter(None, (r["protocol"], r["variant"]))): r for r in record["results"]}


@pytest.fixture(scope="module")
def measured(trained):
    found = evaluate(
        trained / "seed5",
        data(),
        ["knn", "logreg", "heads", "semi"],
        settings={"knn": {"k": [1, 5]}, "heads": {"epochs": 2}, "semi": {"fractions": [0.25], "draws": 2}},
    )
    return trained / "seed5", *found


def test_knn_and_logreg_agree_with_scikit_learn_on_the_same_features(measured):
    run, record, _ = measured
    encoder, results = load_encoder(run), by_name(record)
    x, y = extract_features(encoder, data().eval_loader("train"))
    queries, labels = extract_features(encoder, data().eval_loader("test"))
    for k in (1, 5):
        # Cosine by hand, in float64.
        a, b = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (x, queries))
        other = KNeighborsClassifier(k, algorithm="brute", metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
        predicted = torch.from_numpy(other.fit(a.numpy(), y.numpy()).predict(b.numpy()))
        assert torch.equal(unpacked(results[f"knn k={k}"]["predictions"]), predicted)
        assert results[f"knn k={k}"]["top1"] == (predicted == labels).double().mean().item()
    scale, mean = x.std(0, correction=0), x.mean(0)
    fitted = LogisticRegression(C=1 / results["logreg"]["about"]["regularization"], max_iter=5000, tol=1e-8)
    fitted.fit(((x - mean) / scale).numpy(), y.numpy())
    predicted = torch.from_numpy(fitted.predict(((queries - mean) / scale).numpy()))
    assert torch.equal(unpacked(results["logreg"]["predictions"]), predicted)


def test_yardsticks_go_through_every_protocol(measured):
    _, record, _ = measured
    assert record["yardsticks"] == ["random_encoder", "raw_pixels"]  # the run began with no weights of its own
    assert all(r["yardsticks"].keys() == {"random_encoder", "raw_pixels"} for r in record["results"])
    pixels = [*raw_pixels(data().eval_loader("train")), *raw_pixels(data().eval_loader("test"))]
    assert by_name(record)["logreg"]["yardsticks"]["raw_pixels"]["top1"] == linear_probe(*pixels).accuracy


def test_raw_pixels_are_the_values_themselves_which_knn_tells_from_shifted_ones():
    features, _ = extract_features(RawPixels(16), data().eval_loader("test"))
    assert torch.equal(features, raw_pixels(data().eval_loader("test"))[0])


def test_starting_weights_are_a_yardstick_where_the_run_has_them(run):
    shutil.copy(run / "encoder.safetensors", run / STARTING)
    record, _ = evaluate(run, data(), ["knn"], yardsticks=["starting_weights"])
    [result] = record["results"]
    assert result["yardsticks"]["starting_weights"]["top1"] == result["top1"]  # the same weights


def test_few_labels_are_balanced_drawn_anew_contained_in_more_and_written_out(measured):
    _, record, lists = measured
    labels = data().eval_loader("train").labels
    sizes = labels.bincount()
    parts = [labelled_part(labels, 3, seed=0, draw=draw) for draw in range(2)]
    assert all(labels[part].bincount().tolist() == sizes.clamp(max=3).tolist() for part in parts)
    assert not torch.equal(*parts)
    assert set(parts[0].tolist()) <= set(labelled_part(labels, 4, seed=0, draw=0).tolist())
    assert torch.equal(parts[0], labelled_part(labels, 3, seed=0, draw=0))
    drawn = [r for r in record["results"] if r["protocol"] == "semi"]
    [summary] = record["summaries"]
    assert summary["top1_mean"] == pytest.approx(np.mean([r["top1"] for r in drawn]))
    assert summary["top1_std"] == pytest.approx(np.std([r["top1"] for r in drawn], ddof=1))
    count = max(1, round(0.25 * 96 / len(sizes)))
    for draw, result in enumerate(drawn):
        part = labelled_part(labels, count, seed=0, draw=draw)
        assert lists[result["labelled"]] == [str(number) for number in part.tolist()]
        assert result["about"]["labels"] == len(part)


def test_another_revision_of_a_protocol_has_another_hash(monkeypatch, trained):
    about, of = {"protocol": "semi_finetune", "variant": "", "settings": {}}, read_checkpoint(trained / "seed5")
    data = {"split": "test", "test_images": 1, "train_sha256": "a", "test_sha256": "b"}
    hashes, others = set(), set()
    for revision in (1, 2):
        monkeypatch.setitem(REVISIONS, "semi_finetune", revision)
        hashes.add(identity(about, of, data, "c")["hash"])
        others.add(identity({**about, "protocol": "knn"}, of, data, "c")["hash"])
    assert (len(hashes), len(others)) == (2, 1)


def test_every_number_has_an_id_and_a_hash_of_all_that_it_is_of(measured, trained):
    run, record, _ = measured
    results = by_name(record)
    assert results["knn k=5"]["id"] == "knn@last/epoch1/split=test/n=48/res16/k=5/temperature=0.1"
    hashes = {r["hash"] for r in record["results"]}
    assert len(hashes) == len(record["results"])

    def of_knn(run=run, images=None, **settings):
        return evaluate(run, images or data(), ["knn"], settings={"knn": {"k": 5, **settings}}, yardsticks=[])[0]

    assert of_knn()["results"][0]["hash"] == results["knn k=5"]["hash"]  # also alone
    others = [of_knn(trained / "seed6"), of_knn(temperature=0.2), of_knn(images=data(shapes_test=40))]
    shuffled = data()
    shuffled.setup()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    shuffled.train = shuffled.labelled_train = MemoryImages(
        "shuffled", shuffled.train.pixels, shuffled.train.labels[order], shuffled.train.classes
    )
    others.append(of_knn(images=shuffled))
    assert len({results["knn k=5"]["hash"], *(other["results"][0]["hash"] for other in others)}) == 5
    assert others[-1]["data"]["train_sha256"] != record["data"]["train_sha256"]


def test_features_are_computed_once_and_stale_or_damaged_ones_again(trained, tmp_path, monkeypatch):
    said = []

    def numbers(images=None, run="seed5"):
        record, _ = evaluate(
            trained / run, images or data(), ["knn"], yardsticks=[], cache_dir=tmp_path, say=said.append
        )
        return record["results"][0]["predictions"], record["data"]["train_sha256"]

    alone = evaluate(trained / "seed5", data(), ["knn"], yardsticks=[])[0]["results"][0]["predictions"]
    first = numbers()
    assert first[0] == alone
    passes = []
    original = feature_cache.features_on_ranks
    monkeypatch.setattr(feature_cache, "features_on_ranks", lambda *a, **k: passes.append(0) or original(*a, **k))
    assert numbers() == first
    assert passes == []  # nothing goes through the encoder
    # Another encoder is never taken for this one, and its features are another file.
    assert numbers(run="seed6") != first
    assert len(passes) == 2
    # Images of the same number that have changed in one pixel.
    changed = data()
    changed.setup()
    pixels = changed.train.pixels.clone()
    pixels[7, 0, 0, 0] ^= 1
    changed.train = changed.labelled_train = MemoryImages("x", pixels, changed.train.labels, changed.train.classes)
    said.clear()
    numbers(changed)
    assert any("are of other train images: computed again" in line for line in said)
    assert len(passes) == 3  # those of the test images stand
    for file in tmp_path.glob("test-*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    said.clear()
    assert numbers() == first
    assert any("is damaged (its content is not what was written)" in line for line in said)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert numbers() == first
    said.clear()
    assert numbers() == first
    assert not any("damaged" in line for line in said)


def test_test_images_among_the_training_images_are_counted_and_left_out(trained):
    images = data()
    images.setup()
    pixels = images.test.pixels.clone()
    pixels[[3, 30]] = images.train.pixels[[0, 50]]
    images.test = MemoryImages("leaky", pixels, images.test.labels, images.test.classes)
    record, _ = evaluate(trained / "seed5", images, ["knn"], yardsticks=[])
    [result] = record["results"]
    right = unpacked(result["predictions"]) == images.test.labels
    kept = torch.ones(48, dtype=torch.bool)
    kept[[3, 30]] = False
    assert record["duplicates"]["test_images"] == 2
    assert result["top1_without_duplicates"] == right[kept].double().mean().item()


def trains_the_encoder(frozen: FrozenFeatures) -> Outcome:
    """A protocol that does what none may."""
    with torch.no_grad():
        next(frozen.encoder.parameters()).add_(1e-3)
    return Outcome(torch.zeros(len(frozen.test[0]), dtype=torch.int64))


def test_an_encoder_that_a_protocol_changes_is_found_out(trained):
    with pytest.raises(RuntimeError, match="the encoder changed during its evaluation"):
        evaluate(trained / "seed5", data(), [f"{__name__}.trains_the_encoder"], yardsticks=[])


def test_fine_tuning_trains_every_weight_of_a_copy_and_is_the_plain_loop(trained):
    images = data()
    images.setup()
    encoder = load_encoder(trained / "seed5")
    loaders = images.eval_loader("train"), images.eval_loader("test")
    train_set, test_set = (extract_features(encoder, loader) for loader in loaders)
    before = encoder_sha256(encoder)
    frozen = FrozenFeatures(encoder, train_set, test_set, LoadedImages(loaders[0]), test_images=loaders[1])
    settings = {"epochs": 2, "batch_size": 32, "base_lr": 0.4, "weight_decay": 0.1, "seed": 1}
    done = finetune(frozen, **settings)
    assert encoder_sha256(encoder) == before
    assert torch.equal(finetune(frozen, **settings).predictions, done.predictions)
    # By hand, with torch's schedule.
    network = load_encoder(trained / "seed5").requires_grad_().train()
    layer = torch.nn.Linear(network.feature_dim, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    weights = [*network.parameters(), *layer.parameters()]
    groups = [{"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1}]
    groups.append({"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.4 * 32 / 256, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    crops = SimCLRAugmentation(
        16,
        crop_scale=(0.08, 1.0),
        strength=0.0,
        jitter_prob=0.0,
        gray_prob=0.0,
        blur_prob=0.0,
        mean=network.mean,
        std=network.std,
    )
    for epoch in range(2):
        for index in epoch_order(1, epoch, 96).split(32):
            view = crops.view(images.train.pixels[index], index, epoch, 1, 2)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(network(view)), train_set[1][index]).backward()
            optimizer.step()
            schedule.step()
    features, _ = extract_features(network, loaders[1])
    assert (layer(features).argmax(1) == done.predictions).double().mean() > 0.95  # but for rounding
    untrained = load_encoder(trained / "seed5").parameters()
    assert all(not torch.equal(a, b) for a, b in zip(network.parameters(), untrained, strict=True))
    with pytest.raises(RuntimeError, match="fine-tuning diverged in epoch 0: lower"):
        finetune(frozen, **{**settings, "base_lr": 1e30})


# The command line


def test_eval_writes_its_files_and_verify_finds_them_equal(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = [
        "eval",
        "run",
        "--protocols",
        "knn,semi",
        "--knn.k",
        "[1,5]",
        "--semi.fractions",
        "[0.3]",
        "--semi.draws",
        "1",
    ]
    main([*typed, "--yardsticks", "[raw_pixels]", "--csv", "all.csv"])
    said = capsys.readouterr().out
    record = json.loads((run / "eval.json").read_text())
    assert record["protocols"]["knn"] == {"k": [1, 5], "temperature": 0.1}
    for result in record["results"]:
        if result["protocol"] != "semi":
            assert f"{result['hash']}  {result['id']}" in said
            assert f"- `{result['hash']}` {result['id']}" in (run / "eval.md").read_text()
        else:
            assert (run / result["labelled"]).read_text().count("\n") == result["about"]["labels"]
    main(["eval", "run", "--protocols", "knn", "--yardsticks", "none", "--csv", "all.csv"])
    assert json.loads((run / "eval.1.json").read_text()) == record  # an earlier result stays
    with open("all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["hash"] for row in rows[:-1]] == [result["hash"] for result in record["results"]]
    assert [float(row["top1"]) for row in rows[:-1]] == [result["top1"] for result in record["results"]]
    assert rows[-1]["raw_pixels"] == ""
    (run / "eval.json").write_text(json.dumps(record))
    main(["linear-eval", "run"])
    capsys.readouterr()
    main(["verify", "run"])
    assert capsys.readouterr().out.splitlines()[-1] == "equal"


def edit_a_number(record, run, trained):
    record["results"][0]["top1"] += 0.01


def take_another_encoder(record, run, trained):
    shutil.copy(trained / "seed6" / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")


def take_another_normalisation(record, run, trained):
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["mean"] = [0.1, 0.2, 0.3]
    torch.save(content, path)


def take_fewer_images(record, run, trained):
    record["data"]["settings"]["shapes_train"] = 80


def edit_a_prediction(record, run, trained):
    record["results"][0]["predictions"] = record["labels"]


def edit_a_yardstick(record, run, trained):
    record["results"][0]["yardsticks"]["raw_pixels"]["top1"] = 0.0


@pytest.mark.parametrize(
    ("wrong", "named", "right"),
    [
        (edit_a_number, {"content of the file", "knn k=1, top1"}, {"encoder", "knn k=1, mean_per_class"}),
        (take_another_encoder, {"encoder", "knn k=1, hash"}, {"content of the file", "train images and labels"}),
        (take_another_normalisation, {"preprocessing", "knn k=1, hash"}, {"encoder", "test images and labels"}),
        (take_fewer_images, {"train images and labels", "content of the file"}, {"test images and labels", "encoder"}),
        (edit_a_prediction, {"content of the file", "knn k=1, predictions"}, {"knn k=1, top1"}),
        (edit_a_yardstick, {"content of the file", "knn k=1, raw pixels"}, {"knn k=1, top1"}),
    ],
)
def test_verify_names_what_differs(wrong, named, right, run, trained, capsys):
    record, _ = evaluate(run, data(), ["knn"], settings={"knn": {"k": 1}}, yardsticks=["raw_pixels"])
    (run / "eval.json").write_text(json.dumps(record))
    wrong(record, run, trained)
    (run / "eval.json").write_text(json.dumps(record))
    compared = verify_record("eval.json", records_of(run)["eval.json"], run)
    assert named <= {each.what for each in differing(compared)}
    assert right <= {each.what for each in compared if each.equal}
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(run)])
    said = capsys.readouterr().out
    assert stopped.value.code == FAILED
    assert said.splitlines()[-1] == "NOT EQUAL"
    assert all(f"  {what}: recorded " in said for what in named)


def photos(root, counts):
    for number, count in enumerate(counts):
        (root / f"class{number}").mkdir(parents=True)
        for image in range(count):
            pixels = np.random.default_rng([number, image]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{number}" / f"{image}.png")


BAD = {
    "--protocols knm": "protocol=knm is none of knn, logreg, linear, heads, semi, label_efficiency, finetune",
    "--protocols knn,knn": "protocols name knn more than once.",
    "--protocols ,": "no protocol is named. Use some of knn",
    "--knn.k 97": "knn.k=97 is more than the 96 training images. Use fewer",
    "--knn.k [5,0]": "knn.k=0 is not 1 or more.",
    "--knn.k []": "k is an empty list.",
    "--knn.temperature 0": "knn.temperature=0.0 is not positive.",
    "--protocols heads --heads.epochs 0": "heads.epochs=0 is not 1 or more.",
    "--protocols heads --heads.lrs [-1.0]": "needed learning rates > 0",
    "--protocols semi --semi.fractions [2.0]": "needed fractions in (0, 1]",
    "--protocols label_efficiency --label_efficiency.per_class [0]": "needed 1 label or more",
    "--yardsticks random": "yardsticks: random is none of random_encoder, raw_pixels, starting_weights, supervised.",
    "--csv other.csv": "csv=other.csv has other columns than an evaluation. Give another file.",
    "--csv .": "csv=. is a folder.",
    "--csv gone/all.csv": "there is no folder gone. Make it first.",
    "--data.train_dir flat": "flat has no labels: evaluation needs",
    "--data.train_dir two --data.test_dir flat": "flat has no labels: evaluation needs",
    "--data.train_dir one": "one",
    "--data.train_dir single": "no class of single has two images: none can be held out as test.",
    "--data.train_dir two --data.test_dir three": "class2",
    "--data.train_dir alone --data.test_dir two --protocols heads": "every class has a single training image",
    "--data.train_dir alone --data.test_dir two --protocols logreg": "every class has a single training image",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(typed, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained / "seed5")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    photos(tmp_path / "two", [3, 3])
    photos(tmp_path / "three", [2, 2, 2])
    photos(tmp_path / "alone", [1, 1])
    photos(tmp_path / "single", [1, 1])
    photos(tmp_path / "one", [4])
    (tmp_path / "flat").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(tmp_path / "two" / "class0" / name, tmp_path / "flat" / name)
    before = sorted((trained / "seed5").rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "run", "--cache", "false", *typed.split()])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT, said
    assert said.err.count("\n") == 1, said.err
    assert BAD[typed] in said.err
    assert sorted((trained / "seed5").rglob("*")) == before


def test_features_that_are_not_finite_are_refused(trained, monkeypatch, capsys):
    def broken(path):
        encoder = load_encoder(path)
        next(iter(encoder.parameters())).data[0] = float("nan")
        return encoder

    monkeypatch.setattr("simclr.eval.suite.load_encoder", broken)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(trained / "seed5"), "--cache", "false"])
    assert stopped.value.code == BAD_INPUT
    assert "features are NaN or infinite in 96 of 96 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "eval.json cannot be read as JSON"),
        ('{"schema": "simclr.eval/9"}', "has schema simclr.eval/9, this version reads simclr.eval/1."),
        ('{"schema": "simclr.eval/1"}', "is no record of an evaluation: it lacks results"),
        ("[]", "is no record of an evaluation"),
    ],
)
def test_verify_refuses_what_is_no_record(content, message, run, capsys):
    (run / "eval.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(run)])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT
    assert message in said.err
    assert said.err.count("\n") == 1
