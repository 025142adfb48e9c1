"""Whoever reads images and hangs, dies or is stopped ends the run in time, in a line that names the file."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from simclr.cli.train import train
from simclr.data import FileImages, ImageData
from simclr.data.decode import ReadingRules, read_images
from simclr.data.fingerprint import sampled
from simclr.data.loader import Batches
from simclr.data.watch import Stuck, in_threads
from tiny import flags

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names, which nobody writes to"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # of one core
]


@pytest.fixture
def folder(tmp_path):
    """70 images, one of which is a pipe that never says anything; its name is not among those looked into."""
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(70):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:02}.png")
    paths = sorted(map(str, root.iterdir()))
    hanging = next(path for i, path in enumerate(paths) if i not in sampled(str(root), paths))
    os.unlink(hanging)
    os.mkfifo(hanging)
    yield root, hanging
    with open(os.open(hanging, os.O_RDWR | os.O_NONBLOCK), "wb"):  # lets a thread go that still waits here
        time.sleep(0.1)


def line_of(folder, workers: int) -> str:
    root, _ = folder
    source = FileImages("files", sorted(map(str, root.iterdir())), 8, rules=ReadingRules(timeout_s=2))
    with pytest.raises(ValueError, match="read_timeout_s") as said:
        list(Batches(source, workers)([torch.arange(70).view(7, 10)]))
    return str(said.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_never_read_is_named_in_time(folder, workers):
    began = time.monotonic()
    said = line_of(folder, workers)
    assert said == (
        f"reading {folder[1]} takes more than data.read_timeout_s=2 seconds: does the disk or the network file system "
        "answer?"
    )
    assert time.monotonic() - began < 90  # on however busy a machine


@pytest.mark.parametrize("held", ["workers", "memory"])
def test_on_the_command_line_it_is_one_line(folder, capfd, monkeypatch, held):
    monkeypatch.chdir(folder[0].parent)
    settings = {"data.workers": 1, "data.read_timeout_s": 3, "data.batch_size": 32}
    settings |= {"data.memory_limit_gb": 0} if held == "workers" else {}
    with pytest.raises(SystemExit) as stopped:
        train(["photos", "--run_dir=run", *flags(settings)])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    assert f"error: reading {folder[1]} takes more than data.read_timeout_s=3 seconds" in err
    assert "Traceback" not in err


def workers_of(source: FileImages, workers: int, steps: int):
    """Batches of files, read by processes, and what these are at."""
    batches = Batches(source, workers)
    return batches([torch.arange(len(source)).view(-1, 10)] * steps), batches._workers


def test_a_worker_that_dies_is_told_with_its_file_long_before_the_limit(folder):
    root, hanging = folder
    paths = sorted(map(str, root.iterdir()))
    coming, workers = workers_of(FileImages("files", paths, 8, rules=ReadingRules(timeout_s=1000)), 1, 1)

    def kill():
        while (row := workers.table[0].tolist())[1] != paths.index(hanging):
            time.sleep(0.05)
        os.kill(row[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(
        ValueError, match=r"a process that reads images died: .*\. It was reading .*\.png\. Is there too"
    ):
        list(coming)


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_a_process_that_ends_just_now_is_dead_though_nobody_has_asked_for_it(folder, after_s):
    """A connection breaks before the process is gone, and one that is gone keeps its name until its parent asks."""
    _, workers = workers_of(FileImages("files", sorted(map(str, folder[0].iterdir())), 8), 2, 1)
    ending, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    workers.table[:, :2] = torch.tensor([[ending.pid, 4], [other.pid, 5]])
    threading.Timer(after_s, lambda: os.kill(ending.pid, signal.SIGKILL)).start()
    try:
        assert workers.images_of_dead() == [4]
    finally:
        for process in (ending, other):
            process.kill()
            process.wait()


def test_a_worker_that_was_stopped_between_two_files_is_told(tmp_path):
    for i in range(10):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = sorted(map(str, tmp_path.iterdir()))
    coming, workers = workers_of(FileImages("files", paths, 8, rules=ReadingRules(timeout_s=2)), 1, 10_000)
    next(coming)
    time.sleep(0.5)  # it has read ahead as far as it may, and rests
    os.kill(int(workers.table[0, 0]), signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"have done nothing for data.read_timeout_s=2 seconds|takes more than"):
        list(coming)


def test_slow_readers_that_go_on_are_let(tmp_path):
    """Ten files of half a second each are more than the limit together, and no one is alone."""
    source = FileImages("files", [str(tmp_path)] * 10, 8, rules=ReadingRules(timeout_s=2))
    done = []
    in_threads(lambda i: (time.sleep(0.3), done.append(i)), 10, 1, source.rules.timeout_s, lambda late: 1 / 0)
    assert done == list(range(10))


def test_what_a_thread_raises_is_raised_and_the_rest_is_left():
    done = []

    def read(i: int) -> None:
        if i == 3:
            raise KeyError(i)
        done.append(i)

    with pytest.raises(KeyError):
        in_threads(read, 1000, 1, None, lambda late: 1 / 0)
    assert done == [0, 1, 2]
    for threads in (1, 3):
        done.clear()
        in_threads(lambda i: done.append(i), 100, threads, 5.0, lambda late: 1 / 0)
        assert sorted(done) == list(range(100))
    in_threads(lambda i: 1 / 0, 0, 2, None, lambda late: 1 / 0)


def test_time_in_which_nobody_looked_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("simclr.data.watch.time.monotonic", lambda: now[0])
    stuck = Stuck(10)

    def after(seconds: float, *at: tuple[str, int]) -> list:
        now[0] += seconds
        return stuck.look(at)

    assert after(1, ("a", 1), ("b", 1)) == []
    for _ in range(9):
        assert after(1, ("a", 1), ("b", 2)) == []
    assert after(1, ("a", 1), ("b", 3)) == ["a"]
    assert after(1, ("a", 2)) == []
    assert after(1000, ("a", 2)) == []  # Ctrl-Z
    for _ in range(7):
        assert after(1, ("a", 2)) == []
    assert after(1, ("a", 2)) == ["a"]
    assert after(1) == []
    assert after(1, ("a", 2)) == []


def test_the_limit_may_be_left_out_and_has_to_be_a_number_of_seconds(folder):
    for none in (0, None):
        assert ImageData(train_dir=str(folder[0]), read_timeout_s=none).rules.timeout_s is None
    assert ImageData(train_dir=str(folder[0])).rules.timeout_s == 300
    for wrong in (-1, float("nan"), float("inf")):
        found = ImageData(train_dir=str(folder[0]), batch_size=2, read_timeout_s=wrong).problems()
        assert found == [f"data.read_timeout_s={wrong} is no number of seconds. Use 0 for no limit."]


def test_reading_in_a_thread_gives_the_same(folder):
    paths = [path for path in sorted(map(str, folder[0].iterdir())) if path != folder[1]]
    assert torch.equal(read_images(paths, 8, rules=ReadingRules(timeout_s=60)), read_images(paths, 8))
