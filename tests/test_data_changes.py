"""A file that changes while a run goes on is named, and the run can be continued as is documented."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback

from simclr.cli.train import train
from simclr.data import FileImages, ImageData
from simclr.data.loader import Batches
from tiny import flags


def paint(root: Path, count: int = 20) -> list[str]:
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (12 * i, 255 - 12 * i, 90)).save(root / f"{i:02}.png")
    return sorted(map(str, root.iterdir()))


def removed(path: str) -> None:
    os.unlink(path)


def damaged(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:40])


def replaced(path: str) -> None:
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path)


def renamed(path: str) -> None:
    shutil.copy(f"{path[:-6]}03.png", f"{path}.new")
    os.replace(f"{path}.new", path)


CHANGES = {
    removed: "No such file or directory.* could be read earlier in this run",
    damaged: "damaged PNG: it is cut short.* could be read earlier in this run",
    replaced: "has changed since this run read it before: it has another size or another time of change",
    renamed: "has changed since this run read it before: it has another size or another time of change",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_change_between_two_epochs_is_an_error_that_names_the_file(tmp_path, workers):
    for change, words in CHANGES.items():
        paths = paint(tmp_path / change.__name__)
        batches = Batches(FileImages("files", paths, 8), workers)
        order = [torch.arange(20).view(5, 4)]
        assert len(list(batches(order))) == 5
        assert len(list(batches(order))) == 5
        change(paths[7])
        with pytest.raises(ValueError, match=f"{re.escape(paths[7])}.*{words}") as said:
            list(batches(order))
        assert "--resume auto" in str(said.value)
        assert "Repair" not in str(said.value)
        if workers:
            break  # starting processes takes seconds


def test_a_file_that_could_never_be_read_is_damaged_and_not_changed(tmp_path):
    paths = paint(tmp_path / "photos")
    damaged(paths[7])
    files = FileImages("files", paths, 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^cannot read 1 image file: .*07\.png .* Repair or remove them\.$"):
            files.images(torch.arange(20))


@pytest.mark.parametrize("held", [{"memory_limit_gb": 4.0}, {"cache_dir": "cache"}], ids=["memory", "cache"])
def test_what_is_held_or_mapped_stays_as_it_was_read(tmp_path, monkeypatch, held):
    monkeypatch.chdir(tmp_path)
    paths = paint(Path("photos"))
    data = ImageData(train_dir="photos", image_size=8, **held)
    data.setup()
    before = data.train.images(torch.arange(20)).clone()
    for change, path in zip(CHANGES, paths[5:], strict=False):
        change(path)
    shutil.rmtree("cache", ignore_errors=True)
    assert torch.equal(data.train.images(torch.arange(20)), before)


class Change(Callback):
    """Damages a file after the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0 and Path("photos/07.png").stat().st_size > 40:
            damaged("photos/07.png")


def test_a_run_stops_at_it_and_goes_on_as_the_line_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paint(Path("photos"))
    settings = {"data.batch_size": 10, "data.memory_limit_gb": 0, "data.workers": 0, "run_dir": "run", "resume": "auto"}
    settings |= {"data.on_error": "skip", "trainer.callbacks": "test_data_changes.Change"}
    command = ["photos", *flags(settings)]

    def stopped(*more: str) -> str:
        with pytest.raises(SystemExit) as end:
            train([*command, *more])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert re.search(r"error: .*07\.png \(damaged PNG.*could be read earlier in this run.*--resume auto", stopped())
    assert Path("run/checkpoints/last.ckpt").exists()
    assert "photos holds other images than the run began with: 20 then, 19 now" in stopped()
    train([*command, "--data.allow_changed_images", "true"])
    out = capsys.readouterr().out
    assert "epoch 2/2" in out
    assert "other images: 20 before, 19 now" in out
