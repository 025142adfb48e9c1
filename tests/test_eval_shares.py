"""Features that ranks share are those of one rank, in its order, and so are the numbers of a whole evaluation."""

import json
import math
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
from simclr.cli import main
from simclr.cli.train import train
from simclr.data import EvalLoader, MemoryImages
from simclr.eval.duplicates import HashedImages
from simclr.eval.features import extract_features
from simclr.eval.shares import features_on_ranks, hash_on_ranks
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


def by_hand(where: Path, ranks: int, *args: str) -> tuple[str, str]:
    """`simclr` on several ranks that are told of each other as a launcher does; what all of them print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = "import sys; from simclr.cli import main; main(sys.argv[1:])"
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()}
            process = forked.Forked(["-c", program, *args], where, environment(ROOT) | own)
            started.append(stack.enter_context(process))
        ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * ranks, ended
    out, err = ("".join(parts) for parts in zip(*ended, strict=True))
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
