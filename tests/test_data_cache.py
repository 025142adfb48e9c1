"""The cache of decoded images: the same bytes, decoded once, never half-written, whoever else builds or dies."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import forked
import simclr.data.cache as cache_module
import simclr.data.loader as loader_module
from simclr.data import ImageData, MemoryImages
from simclr.data.cache import map_decoded
from simclr.data.decode import read_images
from simclr.data.loader import Batches, _ahead
from tiny import fit, tiny_model

SIDE, COUNT = 8, 10


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten images in two class folders, one of another size."""
    generator = torch.Generator().manual_seed(0)
    for i in range(COUNT):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = (12, 20, 3) if i == 3 else (SIDE, SIDE, 3)
        Image.fromarray(torch.randint(256, size, generator=generator, dtype=torch.uint8).numpy()).save(file)
    return tmp_path / "photos"


def image_data(photos: Path, cache: Path | None, **settings) -> ImageData:
    data = ImageData(
        train_dir=photos, cache_dir=cache, **{"image_size": SIDE, "batch_size": 4, "workers": 1, **settings}
    )
    data.setup()
    return data


def no_decoding(*args, **kwargs):
    raise AssertionError("an image was decoded")


def mapped(photos: Path, cache: Path) -> torch.Tensor:
    paths = sorted(str(path) for path in photos.rglob("*.*"))
    return map_decoded(paths, "names", SIDE, str(cache), threads=1, name="photos")


def kept(cache: Path) -> list[str]:
    """What is in the cache, but for the locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_the_bytes_are_those_of_reading_without_a_cache_in_training_and_evaluation(photos, tmp_path):
    plain = image_data(photos, None)
    test = shutil.copytree(photos, tmp_path / "test")
    for _ in range(2):  # built, then mapped
        cached = image_data(photos, tmp_path / "cache", test_dir=test)
        assert isinstance(cached.train, MemoryImages)
        assert torch.equal(cached.train.pixels, plain.train.pixels)
        for got, want in zip(cached.train_dataloader(), plain.train_dataloader(), strict=True):
            assert all(map(torch.equal, got, want))
        assert torch.equal(torch.cat([x for x, _ in cached.eval_loader("test", 3)]), plain.train.pixels)
        assert cached.train.labels.tolist() == plain.train.labels.tolist()
        assert (cached.train.classes, cached.train.name) == (plain.train.classes, plain.train.name)


def test_a_second_run_decodes_nothing_whatever_the_memory_limit(photos, tmp_path, monkeypatch):
    first = image_data(photos, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "try_images", no_decoding)
    second = image_data(photos, tmp_path / "cache", memory_limit_gb=0)
    assert torch.equal(first.train.pixels, second.train.pixels)


def test_small_blocks_give_the_same_file(photos, tmp_path, monkeypatch):
    whole = mapped(photos, tmp_path / "a")
    monkeypatch.setattr(cache_module, "_BLOCK", 3 * 3 * SIDE**2)  # three images and a bit
    assert torch.equal(mapped(photos, tmp_path / "b"), whole)


def test_the_file_is_plain_npy_and_writing_into_the_images_does_not_reach_it(photos, tmp_path):
    pixels = mapped(photos, tmp_path / "cache")
    [name] = kept(tmp_path / "cache")
    before = pixels.clone()
    pixels.zero_()
    assert np.array_equal(np.load(tmp_path / "cache" / name, allow_pickle=False), before.numpy())


def test_a_changed_added_or_renamed_image_is_noticed_and_a_moved_folder_is_not(photos, tmp_path):
    cache = tmp_path / "cache"
    before = image_data(photos, cache).train.pixels.clone()
    file = photos / "a" / "0.png"
    times, size = (file.stat().st_atime_ns, file.stat().st_mtime_ns), file.stat().st_size
    content = file.read_bytes()

    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(file)  # of another size, at the same time
    os.utime(file, ns=times)
    assert file.stat().st_size != size
    assert image_data(photos, cache).train.pixels[0, :, 0, 0].tolist() == [1, 2, 3]

    file.write_bytes(content)  # of the same size, a moment later
    os.utime(file, ns=(times[0], times[1] + 1))
    assert torch.equal(image_data(photos, cache).train.pixels, before)
    assert len(kept(cache)) == 3

    os.rename(photos, tmp_path / "photos2")
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "photos2", tmp_path / "elsewhere" / "photos")
    image_data(tmp_path / "elsewhere" / "photos", cache)
    assert len(kept(cache)) == 3

    os.rename(tmp_path / "elsewhere" / "photos" / "a" / "2.png", tmp_path / "elsewhere" / "photos" / "a" / "1.png")
    image_data(tmp_path / "elsewhere" / "photos", cache)
    assert len(kept(cache)) == 4


def test_another_size_or_decoder_is_another_file(photos, tmp_path, monkeypatch):
    image_data(photos, tmp_path / "cache")
    assert image_data(photos, tmp_path / "cache", load_size=5).train.side == 5
    monkeypatch.setattr(cache_module, "decoder", lambda rules: "another version")
    image_data(photos, tmp_path / "cache")
    assert len(kept(tmp_path / "cache")) == 3


# Builds in as many processes as asked for, started at once; each says when it decodes and what it has read. Forked from
# a process without threads, because importing takes seconds.
BUILDER = """
import os, sys, time
from pathlib import Path
import simclr.data.decode as decode_module
from simclr.data.cache import map_decoded
photos, cache, pause, processes = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
decode = decode_module.decode
def slowly(content, *rules):
    os.write(1, b"decoding\\n")
    time.sleep(pause)
    return decode(content, *rules)
decode_module.decode = slowly
paths = sorted(str(path) for path in photos.rglob("*.*"))
children = []
while len(children) < processes - 1 and all(children):
    children.append(os.fork())
total = map_decoded(paths, "names", 8, cache, name="photos").long().sum().item()
os.write(1, f"sum {total}\\n".encode())
if all(children):
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
os._exit(0)
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")


def builder(photos: Path, cache: Path, pause: float, processes: int) -> forked.Forked:
    return forked.Forked(["-c", BUILDER, photos, cache, str(pause), str(processes)])


@needs_fork
def test_a_killed_build_leaves_nothing_that_is_read_and_the_next_takes_over_at_once(photos, tmp_path):
    cache = tmp_path / "cache"
    with builder(photos, cache, 3600, processes=1) as process:
        assert process.stdout.readline() == "decoding\n"
        [partial] = kept(cache)
        assert partial.endswith(".partial")
        waiting = []
        thread = threading.Thread(target=lambda: waiting.append(mapped(photos, cache)), daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "two build at once"
        process.kill()
        thread.join()
    assert torch.equal(waiting[0], read_images(sorted(photos.rglob("*.*")), SIDE))
    assert len(kept(cache)) == 1
    assert not kept(cache)[0].endswith(".partial")


def test_what_a_dead_build_of_other_images_left_is_removed_and_a_live_one_is_left_alone(photos, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    dead, live = cache / ".gone-8px-0.npy.partial", cache / ".busy-8px-1.npy.partial"
    for partial in (dead, live):
        partial.write_bytes(b"half")
    with live.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does
        mapped(photos, cache)
    assert not dead.exists()
    assert live.exists()


@needs_fork
def test_processes_that_start_together_decode_once_and_read_the_same(photos, tmp_path):
    with builder(photos, tmp_path / "cache", 0.02, processes=3) as process:
        said = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 0
    total = read_images(sorted(photos.rglob("*.*")), SIDE).long().sum().item()
    assert sorted(said) == ["decoding"] * COUNT + [f"sum {total}"] * 3


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "text", "other shape", "other type"])
def test_a_file_that_is_not_whole_is_refused_and_built_again(photos, tmp_path, damage):
    before = mapped(photos, tmp_path / "cache").clone()
    file = tmp_path / "cache" / kept(tmp_path / "cache")[0]
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[:-1])
        case "longer":
            file.write_bytes(content + b"x")
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("x" * len(content))
        case "other shape":
            np.save(file, np.zeros((COUNT, SIDE, SIDE, 3), dtype=np.uint8))
        case "other type":
            np.save(file, np.zeros((COUNT, 3, SIDE, SIDE), dtype=np.int8))
    assert torch.equal(mapped(photos, tmp_path / "cache"), before)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_read(photos, tmp_path, monkeypatch):
    before = mapped(photos, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "_lock", no_decoding)
    assert torch.equal(mapped(photos, tmp_path / "cache"), before)


def test_too_little_room_is_said_before_anything_is_decoded(photos, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": COUNT * 3 * SIDE**2 - 1})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(cache_module, "try_images", no_decoding)
    with pytest.raises(ValueError, match=rf"cache_dir={tmp_path}/cache has no room: 10 .* take 1,920 bytes, 1,919 are"):
        image_data(photos, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


@pytest.mark.parametrize(("number", "line"), [(errno.ENOSPC, "has no room: 10 .* 1,920 bytes"), (errno.EIO, "be used")])
def test_a_disk_that_fills_up_or_fails_is_one_line_and_leaves_nothing(photos, tmp_path, monkeypatch, number, line):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=line):
        image_data(photos, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_ctrl_c_leaves_nothing(photos, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "try_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        image_data(photos, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_unreadable_images_of_all_blocks_are_named_as_without_a_cache(photos, tmp_path, monkeypatch):
    for name in ("a/0.png", "b/1.png", "b/9.png", "a/8.png"):
        (photos / name).write_text("not an image")
    monkeypatch.setattr(cache_module, "_BLOCK", 3 * 3 * SIDE**2)
    lines = []
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"cannot read 4 image files: .* and 1 others") as error:
            image_data(photos, cache)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert kept(tmp_path / "cache") == []


def test_images_that_change_while_they_are_read_are_not_kept(photos, tmp_path, monkeypatch):
    decode_into = cache_module._decode_into

    def meanwhile(*args):
        decode_into(*args)
        Image.new("RGB", (30, 30)).save(photos / "a" / "0.png")

    monkeypatch.setattr(cache_module, "_decode_into", meanwhile)
    with pytest.raises(ValueError, match="images of photos changed while they were being read"):
        image_data(photos, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_cache_dir_that_cannot_be_made_is_refused_beforehand(photos, tmp_path):
    (tmp_path / "file").touch()
    for place, line in (("file", "is a file"), ("no/where", f"{tmp_path}/no does not exist")):
        [problem] = ImageData(train_dir=photos, cache_dir=tmp_path / place, batch_size=4).problems()
        assert line in problem


def test_a_run_begun_without_a_cache_goes_on_with_one_to_the_same_weights(photos, tmp_path):
    def run(cache: Path | None, epochs: int, **options):
        data = ImageData(train_dir=photos, cache_dir=cache, image_size=16, batch_size=4, workers=1)
        return fit(tmp_path, tiny_model(batch_size=4), data, max_epochs=epochs, **options)

    whole = run(None, 2)
    for begun, continued in ((None, tmp_path / "cache"), (tmp_path / "cache", None)):
        run(begun, 1).save_checkpoint(tmp_path / "half.ckpt")
        resumed = run(continued, 2, ckpt_path=tmp_path / "half.ckpt")
        for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(got, want)


def test_images_for_which_a_gpu_has_no_room_are_gathered_ahead_for_it_and_others_are_not(monkeypatch):
    images = MemoryImages("images", torch.zeros(COUNT, 3, 4, 4, dtype=torch.uint8))
    asked = []
    monkeypatch.setattr(loader_module, "_ahead", lambda pixels, pairs, pin: asked.append(pin) or iter(()))
    images.hold_pixels_on(torch.device("cpu"))
    assert len(list(Batches(images)([torch.arange(4).view(2, 2)]))) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * images.pixels.nbytes - 1, 0))
    images.hold_pixels_on(torch.device("cuda"))
    assert images.pixels.device.type == "cpu"
    list(Batches(images)([torch.arange(4).view(2, 2)]))
    assert asked == [True]


def test_batches_gathered_ahead_are_the_batches_in_order_and_an_epoch_may_be_left():
    pixels = torch.arange(COUNT, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).view(5, 2)
    for batches in (order, order[:1], order[:0]):
        got = list(_ahead(pixels, zip(batches, batches, strict=True), pin=False))
        assert [index.tolist() for _, index in got] == batches.tolist()
        assert all(torch.equal(images, pixels[index]) for images, index in got)
    before = set(threading.enumerate())
    left = _ahead(pixels, zip(order, order, strict=True), pin=False)
    next(left)
    started = set(threading.enumerate()) - before
    assert started
    left.close()
    for thread in started:
        thread.join()
