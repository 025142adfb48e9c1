"""Features that ranks share are those of one rank, in its order, and so are the numbers of a whole evaluation."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import forked
from ranks import run_ranks
from simclr import distributed
from simclr.cli import COMMANDS, SHARED, main
from simclr.cli.messages import BAD_INPUT
from simclr.cli.train import train
from simclr.data import EvalLoader, MemoryImages
from simclr.eval.duplicates import HashedImages
from simclr.eval.features import extract_features
from simclr.eval.shares import features_on_ranks, hash_on_ranks
from simclr.use import embed
from simclr.use.classify import features_of
from simclr.use.embed import embed_folder
from simclr.use.embedded import read_embedded
from simclr.use.source import open_source
from strict.sitecustomize import environment
from test_ranks_fail import STANDALONE, said
from test_use_embed import picture
from tiny import fit, flags, tiny_model

ROOT = Path(__file__).parents[1]


def loader(images: int = 23, batch_size: int = 4) -> EvalLoader:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=draw, dtype=torch.uint8)
    index = torch.randperm(40, generator=draw)[:images]
    return EvalLoader(MemoryImages("noise", pixels, torch.arange(40) % 3, ["a", "b", "c"]), index, batch_size)


class Counting(nn.Module):
    """An encoder that counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = nn.Linear(3 * 8 * 8, 5), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return self.layer(images.flatten(1))


def shared(images: int) -> tuple:
    encoder, hashed = Counting(), HashedImages(loader(images))
    features, labels = features_on_ranks(encoder, hashed)
    again = HashedImages(loader(images))
    hash_on_ranks(again)
    assert again.digests == hashed.digests
    assert torch.equal(features_on_ranks(Counting(), loader(images))[0], features)
    return features.numpy(), labels.numpy(), bytes(hashed.digests), encoder.seen


@pytest.mark.parametrize(("ranks", "images"), [(2, 23), (3, 23), (3, 7)])
def test_ranks_have_the_features_of_one_in_its_order_and_compute_none_twice(ranks, images):
    encoder, hashed = Counting(), HashedImages(loader(images))
    features, labels = extract_features(encoder, hashed)
    found = run_ranks(shared, ranks, images)
    for mine, names, digests, _ in found:
        np.testing.assert_array_equal(mine, features)
        np.testing.assert_array_equal(names, labels)
        assert digests == bytes(hashed.digests)
    assert sum(seen for *_, seen in found) == images
    batches = math.ceil(images / 4)
    assert max(seen for *_, seen in found) <= 4 * math.ceil(batches / ranks)  # shared evenly, by whole batches


class OfOneRank(Counting):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * (float("nan") if distributed.rank() == 1 else 1.0)


def failing() -> str:
    with pytest.raises(ValueError, match="NaN or infinite") as failed:
        features_on_ranks(OfOneRank(), loader())
    return str(failed.value)


def test_what_one_rank_meets_is_an_error_on_all():
    first, second = run_ranks(failing, 2)
    assert first == second


def embedded(photos: str, run: str, out: str, stop: int | None) -> None:
    done = []

    def advance(files: int, _: int) -> None:
        done.append(files)
        if stop is not None and files >= stop:
            raise KeyboardInterrupt

    embed_folder(photos, open_source(run), out, batch_size=3, advance=advance)


def test_a_folder_embedded_by_ranks_is_that_of_one_rank_bit_for_bit(tmp_path):
    for seed in range(20):
        picture(tmp_path / "photos" / f"{seed:02}.png", seed)
    run = tmp_path / "run"
    fit(run, tiny_model(), max_epochs=1).save_checkpoint(run / "checkpoints" / "last.ckpt")
    where = str(tmp_path / "photos"), str(run)
    embedded(*where, str(tmp_path / "1"), None)
    alone = read_embedded(tmp_path / "1")
    with pytest.raises(KeyboardInterrupt):  # begun by one, and gone on with by three
        embedded(*where, str(tmp_path / "3"), 6)
    run_ranks(embedded, 3, *where, str(tmp_path / "3"), None)
    run_ranks(embedded, 2, *where, str(tmp_path / "2"), None)
    run_ranks(embedded, 2, *where, str(tmp_path / "2"), None)  # whole already
    for ranks in ("2", "3"):
        found = read_embedded(tmp_path / ranks)
        assert (tmp_path / ranks / "features.npy").read_bytes() == (tmp_path / "1" / "features.npy").read_bytes()
        assert found.names == alone.names


# For rows in batches of 16, so that few images are several.
SMALL_BATCHES = "import simclr.use.embed; simclr.use.embed._PIXELS = 1; "


def ended_by_hand(where: Path, ranks: int, *args: str) -> tuple[list[int | None], str, str]:
    """`simclr` on several ranks that are told of each other as a launcher does; exit codes, and what all print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = f"{SMALL_BATCHES}import sys; from simclr.cli import main; main(sys.argv[1:])"
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()}
            process = forked.Forked(["-c", program, *args], where, environment(ROOT) | own)
            started.append(stack.enter_context(process))
        ended = [process.communicate(timeout=300) for process in started]
    out, err = ("".join(parts) for parts in zip(*ended, strict=True))
    return [process.returncode for process in started], out, err


def by_hand(where: Path, ranks: int, *args: str) -> tuple[str, str]:
    """The same for a command that does what it was asked to; what all of them print."""
    codes, out, err = ended_by_hand(where, ranks, *args)
    assert codes == [0] * ranks, err
    return out, err


def by_torchrun(where: Path, ranks: int, *args: str) -> subprocess.CompletedProcess:
    """`simclr` by torchrun, as one types it."""
    command = [*STANDALONE[:-1], f"--nproc_per_node={ranks}", "-m", "simclr", *args]
    return subprocess.run(
        command, cwd=where, env=environment(ROOT), capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run, and a copy of it."""
    monkeypatch.chdir(tmp_path)
    off = {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "trainer.max_epochs": 1}
    train(flags({"run_dir": "run", "data.shapes_train": 48, **off}))
    shutil.copytree("run", "other")
    return tmp_path


NUMBERS = ("id", "hash", "top1", "top5", "mean_per_class", "predictions", "top1_without_duplicates", "yardsticks")
OPTIONS = ["--protocols", "knn,logreg", "--yardsticks", "random_encoder,raw_pixels", "--device", "cpu"]


def test_an_evaluation_by_two_ranks_has_the_numbers_of_one_and_speaks_once(runs, capsys):
    capsys.readouterr()
    main(["eval", "run", *OPTIONS])
    alone = capsys.readouterr().out
    out, err = by_hand(runs, 2, "eval", "other", *OPTIONS)
    assert (re.sub("other/", "run/", out), err) == (alone, "")
    one, two = (json.loads(Path(name, "eval.json").read_text()) for name in ("run", "other"))
    assert [[r[name] for name in NUMBERS] for r in one["results"]] == [
        [r[name] for name in NUMBERS] for r in two["results"]
    ]
    assert one["duplicates"] == two["duplicates"]
    names = [sorted(path.name for path in Path(name, "features").iterdir()) for name in ("run", "other")]
    assert names[0] == names[1]
    assert names[0]
    for name in names[0]:
        assert Path("run/features", name).read_bytes() == Path("other/features", name).read_bytes()


@pytest.fixture
def labelled(tmp_path, monkeypatch) -> Path:
    """A run, and 21 images in three class folders, two of them the same."""
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "run", tiny_model(), max_epochs=1).save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for seed in range(21):
        (tmp_path / "labelled" / "abc"[seed % 3]).mkdir(parents=True, exist_ok=True)
        picture(tmp_path / "labelled" / "abc"[seed % 3] / f"{seed:02}.png", min(seed, 19))
    return tmp_path


FIT = ["fit", "run", "--data.train_dir", "labelled", "--batch_size", "4", "--device", "cpu", "--out"]
PREDICT = ["predict", "labelled", "--classifier", "1.safetensors", "--device", "cpu", "--csv"]
DUPLICATES = ["duplicates", "labelled", "--encoder", "run", "--device", "cpu", "--json"]


def test_a_classifier_its_predictions_and_groups_are_those_of_one_rank_byte_for_byte(labelled, monkeypatch, capsys):
    monkeypatch.setattr("simclr.use.embed._PIXELS", 1)  # batches of 16, of which the second is the other rank's
    for args, ending in ((FIT, "safetensors"), (PREDICT, "csv"), (DUPLICATES, "json")):
        one, two = Path(f"1.{ending}"), Path(f"2.{ending}")
        capsys.readouterr()
        main([*args, str(one)])
        alone = capsys.readouterr().out
        out, err = by_hand(labelled, 2, *args, str(two))
        assert (out.replace(str(two), str(one)), err) == (alone, "")
        assert two.read_bytes() == one.read_bytes()


def test_what_ends_a_fit_on_two_ranks_is_said_once_and_leaves_nothing(labelled):
    (labelled / "labelled" / "b" / "04.png").write_bytes(b"no image")
    before = sorted(labelled.rglob("*"))
    for args, wanted in ((FIT, "cannot read "), (["fit", "nowhere", *FIT[2:]], "no checkpoint at nowhere")):
        codes, out, err = ended_by_hand(labelled, 2, *args, "c.safetensors")
        assert BAD_INPUT in codes
        assert 0 not in codes
        [line] = said(err)
        assert wanted in line
        assert out == ""
    assert sorted(labelled.rglob("*")) == before


def images_encoded(files: list[str], run: str) -> tuple[int, int]:
    """How many images this rank has encoded, and how many rows it has got."""
    embed._PIXELS = 1  # batches of 16
    source, seen = open_source(run), []
    source.encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    features, kept, skipped = features_of(files, source, on_error="skip")
    assert len(skipped) == (distributed.rank() == 0)
    assert 18 not in kept
    return sum(seen), len(features)


def test_ranks_that_predict_encode_no_image_twice(labelled):
    files = sorted(str(path) for path in (labelled / "labelled").rglob("*.png"))
    Path(files[18]).write_bytes(b"no image")
    assert run_ranks(images_encoded, 2, files, str(labelled / "run")) == [(16, 20), (4, 0)]


def of_other_files(files: list[str], run: str) -> str:
    own = files[: len(files) - distributed.rank()]
    with pytest.raises(ValueError, match="rank 1 has other images than rank 0") as failed:
        features_of(own, open_source(run))
    return str(failed.value)


def test_ranks_that_see_other_files_are_refused(labelled):
    files = sorted(str(path) for path in (labelled / "labelled").rglob("*.png"))
    first, second = run_ranks(of_other_files, 2, files, str(labelled / "run"))
    assert first == second


def test_a_command_that_ranks_do_not_share_is_rank_0s_alone(labelled):
    out, err = by_hand(labelled, 2, "check-data", "labelled", "--json", "found.json")
    assert (out.count("bit depths"), err) == (1, "")
    codes, out, err = ended_by_hand(labelled, 2, "search", "labelled/a/00.png", "--in", "nowhere")
    assert (codes, out, len(said(err))) == ([BAD_INPUT, 0], "", 1)


@pytest.mark.parametrize("command", ["train", "profile"])
def test_launched_ranks_that_would_each_train_alone_are_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stopped:
        main([command, *flags({"run_dir": "both", "trainer.devices": 1})])
    [line] = said(capsys.readouterr().err)
    assert "2 ranks were launched, and these settings train on 1. Add --trainer.devices 2." in line
    assert (stopped.value.code, list(tmp_path.iterdir())) == (BAD_INPUT, [])


def test_every_command_is_shared_or_rank_0s_and_what_it_starts_knows_of_no_launcher(monkeypatch):
    shared = {name for name in COMMANDS if name in SHARED}
    assert shared == SHARED
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    told |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert not distributed.left_to_this_rank()
    monkeypatch.setenv("RANK", "0")
    assert distributed.left_to_this_rank()
    assert not told.keys() & os.environ.keys()
    assert (distributed.launched_ranks(), distributed.launcher_has_store()) == (1, False)


@pytest.mark.slow
def test_by_torchrun_linear_evaluation_and_embedding_are_those_of_one_and_an_error_is_said_once(runs, capsys):
    main(["linear-eval", "run", "--device", "cpu"])
    done = by_torchrun(runs, 3, "linear-eval", "other", "--device", "cpu")
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    one, two = (json.loads(Path(name, "linear_eval.json").read_text()) for name in ("run", "other"))
    for name in ("linear_top1", "knn_top1", "random_encoder_top1", "raw_pixels_top1", "predictions", "duplicates"):
        assert one[name] == two[name]
    done = by_torchrun(runs, 2, "linear-eval", "other", "--device", "cpu", "--knn_k", "1000")
    assert done.returncode != 0
    [line] = said(done.stderr)
    assert "knn_k=1000 is more than" in line
    for seed in range(20):
        picture(runs / "photos" / f"{seed:02}.png", seed)
    options = ["photos", "--encoder", "run", "--batch_size", "3", "--device", "cpu"]
    main(["embed", *options, "--out", "alone"])
    done = by_torchrun(runs, 2, "embed", *options, "--out", "shared")
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    assert done.stdout.count("features of 20 images") == 1
    assert Path("alone/features.npy").read_bytes() == Path("shared/features.npy").read_bytes()
    (runs / "photos" / "19.png").write_bytes(b"no image")
    done = by_torchrun(runs, 2, "embed", *options, "--out", "broken")
    assert done.returncode != 0
    [line] = said(done.stderr)
    assert "19.png" in line
    assert "--on_error skip" in line


@pytest.mark.slow
def test_by_torchrun_a_classifier_is_that_of_one_and_ranks_that_would_train_alone_are_refused(labelled):
    main([*FIT, "1.safetensors"])
    done = by_torchrun(labelled, 3, *FIT, "2.safetensors")
    assert (done.returncode, said(done.stderr)) == (0, []), done.stderr
    assert done.stdout.count("3 classes, 21 images") == 1
    assert Path("2.safetensors").read_bytes() == Path("1.safetensors").read_bytes()
    done = by_torchrun(labelled, 2, *FIT, "2.safetensors")
    [line] = said(done.stderr)
    assert "out=2.safetensors is there already" in line
    for args, wanted in (
        (["train", *flags({"run_dir": "both", "trainer.devices": 1})], "2 ranks were launched"),
        (["supervised", "run", "--run_dir", "both"], "has no config.yaml to train by"),
    ):
        done = by_torchrun(labelled, 2, *args)
        [line] = said(done.stderr)
        assert wanted in line
        assert done.returncode != 0
        assert not Path("both").exists()
