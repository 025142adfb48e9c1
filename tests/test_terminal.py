"""A run as its terminal shows it: in wide and narrow windows, without colours, and in logs that take ASCII only."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

import forked
from simclr.cli import main
from simclr.progress import fitting
from strict.sitecustomize import environment
from test_data_module import fill
from tiny import flags

ROOT = Path(__file__).parents[1]
RUN = {"data.train_dir": "photos", "data.batch_size": 4, "trainer.max_epochs": 2, "run_dir": "run"}
RUN |= {"data.held_out": 4, "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 0}


def on_a_terminal(columns: int, arguments: list[str], monkeypatch) -> str:
    """What a command writes to a terminal of this width: the bytes as they come."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts = []

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                return
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            patch.delenv("COLUMNS", raising=False)
            main(arguments)
    finally:
        reader.join(timeout=60)
        os.close(ours)
    return b"".join(parts).decode()


def screen(written: str) -> list[str]:
    """The lines that stay: what is written over is gone."""
    return [
        max((part for part in line.split("\r") if part.strip()), key=len, default="").rstrip()
        for line in written.replace("\r\n", "\n").split("\n")
    ]


@pytest.mark.parametrize(
    ("columns", "drawn"),
    [
        (40, r"epoch 2/2 █+ 2/2, loss \d\.\d{3}"),
        (80, r"epoch 2/2 \S*█\S* 2/2, loss \d\.\d{3}"),
        (120, r"epoch 2/2 \S*█{20}\S* 2/2, loss \d\.\d{3}"),
    ],
)
def test_the_bar_fits_its_window(tmp_path, monkeypatch, columns, drawn):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "photos", [f"{i}.png" for i in range(12)])
    written = on_a_terminal(columns, ["train", *flags(RUN)], monkeypatch)
    bars = [part.rstrip() for part in re.split(r"[\r\n]", written) if re.match(r"epoch \d/2 .*\d/2,", part)]
    assert bars
    assert max(map(len, bars)) <= columns
    assert re.match(drawn, bars[-1]), bars[-1]
    assert all(re.search(r"(left|images/s|loss \d\.\d{3})$", bar) for bar in bars), bars  # whole words
    if columns > 40:
        assert "images/s" in bars[-1], bars[-1]
    assert "\x1b[3" not in written, "a colour"
    # The end of the run.
    lines = screen(written)
    [at] = [i for i, line in enumerate(lines) if line.startswith("reached ")]
    pattern = r"reached    loss \d\.\d{3} in the last epoch; on held-out images, in eval mode, \d\.\d{3}"
    assert re.fullmatch(pattern, lines[at]), lines[at]
    pattern = r" {11}the other view of a held-out image is the nearest of 4: \d+\.\d %, untrained network \d+\.\d %"
    assert re.fullmatch(pattern, lines[at + 1]), lines[at + 1]
    end = r"trained for \d+ s; encoder in run/encoder\.pt; next: simclr report --run_dir run, or with labelled"
    assert re.match(end, lines[at + 2]), lines[at + 2]


LOSS, SPEED, LEFT = ["loss 4.123"], ["1,234 images/s"], ["2 h 13 min left"]


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (60, "loss 4.123  1,234 images/s  2 h 13 min left"),
        (43, "loss 4.123  1,234 images/s  2 h 13 min left"),
        (42, "loss 4.123  2 h 13 min left"),
        (26, "2 h 13 min left"),
        (3, "2 h 13 min left"),
    ],
)
def test_in_a_narrow_window_the_time_left_stays_longest(room, shown):
    assert fitting(room, LOSS, SPEED, LEFT) == shown
    assert fitting(3, LOSS, [], []) == "loss 4.123"


@pytest.mark.slow  # two runs in processes of their own
def test_a_log_in_ascii_has_every_line_of_one_in_utf8(tmp_path):
    """A folder of another alphabet, no terminal, no colours, the C locale."""
    fill(tmp_path / "фото ü", [f"{i}.png" for i in range(12)])
    command = [forked.TRAIN, *flags({**RUN, "data.train_dir": "фото ü"})]
    settings = {**environment(ROOT), "NO_COLOR": "1"}
    of_ascii = {**settings, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}  # what only a new process reads
    there = subprocess.run([sys.executable, *command], cwd=tmp_path, env=of_ascii, capture_output=True)
    here = forked.run([*command, "--run_dir=run2"], cwd=tmp_path, env=settings, text=False)
    for done in (there, here):
        assert done.returncode == 0, done.stderr
    ascii_, utf8 = there.stdout.decode("ascii"), here.stdout.decode()
    assert "фото ü: 12 images" in utf8
    assert "\\u0444\\u043e\\u0442\\u043e \\xfc: 12 images" in ascii_
    assert "\x1b" not in ascii_ + utf8
    assert len(ascii_.splitlines()) == len(utf8.splitlines())
