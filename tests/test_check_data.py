"""`simclr check-data`: says which images training cannot read, and what the others are."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import forked
from simclr.cli import main
from simclr.data import ImageData, kinds
from simclr.data import scan as scanning
from simclr.data.alike import near_hashes, picture_hash
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
    assert Path("bad.txt").read_text().splitlines() == [reason.removeprefix("photos/") for reason in sorted(reasons)]
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
from simclr.data import ImageData, kinds
from simclr.data import scan
of_a_file, scan._ALONE, scan._RUN = scan.scan_file, 0.0, 1
def scan_file(path, side, rules):
    if "slow" not in path:
        return of_a_file(path, side, rules)
    pathlib.Path("pid").write_text(f"{os.getpid()} ")
    time.sleep(1000)
scan.scan_file = scan_file
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where a shell has it ignored
    main(["check-data", "photos", "--workers", "2"])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", *(pytest.param(h, marks=pytest.mark.slow) for h in ("worker", "parent"))])
def test_whoever_is_stopped_in_the_middle_all_of_it_ends(tmp_path, how):
    for i in range(4):
        picture(tmp_path / f"photos/{i}.png", i)
    picture(tmp_path / "photos/slow.png", 9)
    (tmp_path / "slow.py").write_text(SLOW)
    with forked.Forked(["slow.py"], cwd=tmp_path, session=True) as process:
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


def scene(seed: int, side: int = 96) -> Image.Image:
    """Coarse shapes with finer ones on them."""
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 3, cells, cells, generator=draw) for cells in (4, 9, 24)]
    layers = [torch.nn.functional.interpolate(layer, (side, side), mode="bicubic") for layer in layers]
    pixels = (layers[0] + 0.4 * layers[1] + 0.2 * layers[2])[0].div(1.6).clamp(0, 1).mul(255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def test_images_that_are_nearly_the_same_are_found_and_others_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "test"):
        Path(folder).mkdir()
    for i in range(30):
        scene(i).save(f"train/{i:02}.png")
    scene(3).save("train/compressed.jpg", quality=40)
    scene(4).resize((61, 61)).save("train/smaller.png")
    scene(5).save("train/equal.bmp")
    scene(6).point(lambda value: min(255, value + 6)).save("train/lighter.png")
    scene(7).transpose(Image.Transpose.ROTATE_180).save("train/turned.png")
    scene(8).save("test/x.jpg", quality=60)
    scene(99).save("test/y.png")
    Image.new("RGB", (96, 96), (9, 9, 9)).save("train/blank.png")
    Image.new("RGB", (96, 96), (200, 9, 9)).save("train/blank2.png")
    code, found = checked("train", "--test_dir", "test", "--copies", "copies.txt")
    train = found["folders"]["train"]
    assert code == 0
    assert train["nearly_equal"] == [
        ["train/compressed.jpg", "train/03.png"],
        ["train/lighter.png", "train/06.png"],
        ["train/smaller.png", "train/04.png"],
    ]
    assert train["duplicates"] == [["train/equal.bmp", "train/05.png"]]
    assert found["test_images_nearly_in_train"] == [["test/x.jpg", "train/08.png"]]
    copies = ["compressed.jpg", "equal.bmp", "lighter.png", "smaller.png"]
    assert Path("copies.txt").read_text().splitlines() == copies
    said = " ".join(capsys.readouterr().out.split())
    assert "train/smaller.png looks like train/04.png" in said
    data = ImageData(train_dir="train", image_size=8, leave_out="copies.txt")
    data.setup()
    assert len(data.train) == 30 + 3
    assert sorted(data.left_out_names) == copies


def test_near_hashes_are_those_that_a_double_loop_finds():
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(150):  # some near ones, by flipping 1 to 9 bits
        flips = draw.choice(64, 1 + i % 9, replace=False)
        hashes = np.append(hashes, hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64)))
    for bits in (0, 3, 6, 7):
        wanted = [
            [i, j]
            for i in range(len(hashes))
            for j in range(i + 1, len(hashes))
            if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= bits
        ]
        assert near_hashes(hashes, bits).tolist() == wanted


def test_a_hash_of_what_is_shown_is_the_signs_of_a_cosine_transform():
    image = torch.from_numpy(np.array(scene(1, 32))).permute(2, 0, 1)
    gray = image.double().mean(0).numpy()
    low = [
        sum(
            gray[y, x] * np.cos(np.pi * (2 * y + 1) * u / 64) * np.cos(np.pi * (2 * x + 1) * v / 64)
            for y in range(32)
            for x in range(32)
        )
        for u in range(8)
        for v in range(8)
    ]
    low[0] = 0
    middle = sorted(low)[31]  # of 64: torch's median is the lower one
    assert picture_hash(image) == int("".join(str(int(value > middle)) for value in low), 2)


def test_a_low_range_of_16_bits_and_a_limit_of_pixels_are_as_training_has_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(3):
        Image.fromarray(np.arange(i, 64 + i, dtype=np.uint16).reshape(8, 8) * 60).save(f"photos/{i}.png")
    assert checked("photos")[0] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 in photos have 16 bits a channel" in said
    assert (
        "reach 3900 of 65535, and so 15 of 255: nearly black. If 4095 is white in them: --data.sixteen_bit_max" in said
    )
    code, found = checked("photos", "--sixteen_bit_max", "3899", "--max_pixels", "64")
    assert (code, len(found["folders"]["train"]["unreadable"])) == (1, 1)
    assert checked("photos", "--max_pixels", "63")[1]["folders"]["train"]["unreadable"][2]["file"] == "photos/2.png"
    for wrong in (["--sixteen_bit_max", "0"], ["--max_pixels", "0"], ["--copies", "photos"]):
        with pytest.raises(SystemExit) as stopped:
            main(["check-data", "photos", *wrong])
        assert stopped.value.code == 2
