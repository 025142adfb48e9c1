"""`simclr check-data`: says which images training cannot read, and what the others are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from simclr.cli import main
from simclr.data import kinds
from simclr.data import scan as scanning
from simclr.data.decode import unreadable
from simclr.data.scan import scan
from test_data_loader import session


def picture(path: Path, seed: int, mode: str = "RGB", **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (24, 20, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).convert(mode).save(path, **settings)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Good ones, a copy in another format, and four that cannot be read, each for another reason."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "has_heif", lambda: False)
    root = Path("photos")
    picture(root / "a/good.png", 1)
    picture(root / "a/copy.bmp", 1)
    picture(root / "b/other.png", 2, "L")
    picture(root / "a/flipped.png", 3)
    content = bytearray((root / "a/flipped.png").read_bytes())
    content[-14] ^= 1
    (root / "a/flipped.png").write_bytes(content)
    picture(root / "b/cut.jpg", 4)
    (root / "b/cut.jpg").write_bytes((root / "b/cut.jpg").read_bytes()[:-60])
    (root / "b/text.jpg").write_text("no image")
    (root / "b/void.jpg").touch()
    (root / "b/phone.heic").write_bytes(b"x")
    return root


def checked(*args: str) -> tuple[int, dict]:
    code = 0
    try:
        main(["check-data", *args, "--json", "found.json"])
    except SystemExit as stopped:
        code = stopped.code
    return code, json.loads(Path("found.json").read_text())


def test_what_cannot_be_read_is_what_training_cannot_read(photos, capsys):
    code, found = checked("photos", "--bad", "bad.txt")
    part = found["folders"]["train"]
    said = capsys.readouterr().out
    assert code == 1
    reasons = {bad["file"]: bad["reason"] for bad in part["unreadable"]}
    assert set(reasons) == {"photos/a/flipped.png", "photos/b/cut.jpg", "photos/b/text.jpg", "photos/b/void.jpg"}
    files = sorted(path for path in photos.rglob("*") if path.suffix in (".png", ".jpg", ".bmp"))
    assert {f"{file} ({reason})" for file, reason in reasons.items()} == set(unreadable(files, 224).values())
    assert Path("bad.txt").read_text().splitlines() == sorted(reasons)
    assert all(file in said for file in reasons)
    assert "--data.on_error skip" in said
    assert "1 of 8 pictures in photos are not read: 1 .heic" in " ".join(said.split())


def test_the_rest_is_counted(photos):
    part = checked("photos")[1]["folders"]["train"]
    assert (part["images"], part["classes"]) == (7, {"a": 3, "b": 4})
    assert part["duplicates"] == [["photos/a/good.png", "photos/a/copy.bmp"]]
    assert (part["modes"], part["formats"]) == ({"RGB": 2, "L": 1}, {"BMP": 1, "PNG": 2})
    assert part["sizes"] == {"different": 1, "smallest": [20, 24], "largest": [20, 24]}
    assert part["blank"] == []


def test_a_sound_folder_is_exit_code_0_and_test_images_in_it_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        picture(Path(f"train/{i}.png"), i)
    picture(Path("test/x.png"), 1)
    picture(Path("test/y.png"), 9)
    Image.new("I;16", (8, 8), 700).save("test/deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(Path("test/turned.jpg"), 8, exif=exif)
    code, found = checked("train", "--test_dir", "test")
    assert code == 0
    assert found["test_images_in_train"] == [["test/x.png", "train/1.png"]]
    assert found["folders"]["test"]["blank"] == ["test/deep.png"]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 in test have 16 bits a channel" in said
    assert "1 of 4 in test are turned upright" in said
    assert "on_error" not in said


def test_several_processes_find_the_same_in_the_same_order(photos, monkeypatch):
    paths = sorted(str(path) for path in photos.rglob("*.*"))
    alone = list(scan(paths, 16, 1))
    monkeypatch.setattr(scanning, "_ALONE", 0)
    monkeypatch.setattr(scanning, "_RUN", 2)
    assert list(scan(paths, 16, 2)) == alone
    assert [found.error is None for found in alone].count(True) == 3


# The script is imported in the processes that decode too, so there an image named slow never ends.
SLOW = """
import os, pathlib, signal, time
from simclr.cli import main
from simclr.data import kinds
from simclr.data import scan
of_a_file, scan._ALONE, scan._RUN = scan.scan_file, 0.0, 1
def scan_file(path, side):
    if "slow" not in path:
        return of_a_file(path, side)
    pathlib.Path("pid").write_text(f"{os.getpid()} ")
    time.sleep(1000)
scan.scan_file = scan_file
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where a shell has it ignored
    main(["check-data", "photos", "--workers", "2"])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "worker", "parent"])
def test_whoever_is_stopped_in_the_middle_all_of_it_ends(tmp_path, how):
    for i in range(4):
        picture(tmp_path / f"photos/{i}.png", i)
    picture(tmp_path / "photos/slow.png", 9)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "slow.py"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes) as process:
        pid = tmp_path / "pid"
        assert wait_until(lambda: pid.exists() and pid.read_text().endswith(" ")), (
            "no process has come to the slow image"
        )
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(int(pid.read_text()) if how == "worker" else process.pid, signal.SIGKILL)
        try:
            said = process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    gone = wait_until(lambda: not session(process.pid))
    for left in session(process.pid):
        os.kill(left, signal.SIGKILL)
    assert gone
    code = {"Ctrl-C": 130, "worker": 1, "parent": -9}[how]
    words = {"Ctrl-C": "stopped: not all images were looked at", "worker": "a process that decodes has died"}
    assert process.returncode == code, said
    assert said.startswith((f"error: {words[how]}", words[how]) if how in words else ""), said
    assert said.count("\n") == (how in words)


def wait_until(what):
    """What it is once it is anything, or what it is after two minutes, on however busy a machine."""
    end = time.monotonic() + 120
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_an_image_that_is_blank_but_for_a_corner_is_not_blank(tmp_path):
    pixels = torch.full((64, 64, 3), 7, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "blank.png")
    pixels[63, 61, 2] = 8  # where a sample of every 32nd pixel does not look, in one channel
    Image.fromarray(pixels.numpy()).save(tmp_path / "nearly.png")
    found = scan([str(tmp_path / name) for name in ("blank.png", "nearly.png")], 64, 1)
    assert [of.blank for of in found] == [True, False]


def test_a_hint_to_skip_is_given_where_training_would_skip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for bad, hinted in ((10, True), (11, False)):
        for i in range(12):
            picture(Path(f"of{bad}/{i}.png"), i)
        for i in range(bad):
            Path(f"of{bad}/bad{i}.png").touch()
        assert checked(f"of{bad}")[0] == 1
        assert ("--data.on_error skip" in " ".join(capsys.readouterr().out.split())) == hinted


@pytest.mark.parametrize("test", ["photos", "photos/a", "."])
def test_test_images_in_the_folder_of_training_images_are_refused(photos, test, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check-data", "photos", "--test_dir", test])
    assert stopped.value.code == 2
    assert "test images must not be trained on" in capsys.readouterr().err


def test_ctrl_c_is_a_line_and_130(photos, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("simclr.cli.check_data.scan", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["check-data", "photos"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped: not all images were looked at\n"
