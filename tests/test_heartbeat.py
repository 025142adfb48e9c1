"""One writer a folder where hosts see no lock of each other: processes with other host names, and without locks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from simclr import heartbeat
from simclr.heartbeat import NOTE, WrittenElsewhere, be_the_writer, is_written
from strict.sitecustomize import environment
from tiny import flags

ROOT = Path(__file__).parents[1]
# A host whose file system has no locks for folders. It touches its note twice a second, and waits two for others.
HOST = """
import os, socket, sys
from simclr import files, heartbeat
socket.gethostname = lambda: os.environ["NAME_OF_HOST"]
heartbeat._BEAT, heartbeat._STALE = 0.5, float(os.environ.get("STALE", "4"))
plain = files.fcntl.flock
def flock(file, operation):
    if isinstance(file, int):
        raise OSError("no locks")
    return plain(file, operation)
files.fcntl.flock = flock
"""
TRAINS = HOST + "from simclr.cli.train import train; train(sys.argv[1:])"


def on(host: str, where: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-c", TRAINS, *arguments]
    names = environment(ROOT) | {"NAME_OF_HOST": host, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=where, env=names, **pipes)


@pytest.mark.slow
def test_two_hosts_do_not_write_into_one_folder_and_a_dead_ones_run_is_taken_over(tmp_path):
    again = flags({"run_dir": "run", "resume": "auto", "trainer.max_epochs": 2000, "knn.every_n_epochs": 0})
    first = on("a", tmp_path, *again, "--quality.every_n_epochs=0")
    last, note = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / NOTE
    try:
        until = time.monotonic() + 200
        while not last.exists():
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        assert json.loads(note.read_text())["host"] == "a"
        # So that a slow machine is no dead one.
        second = on("b", tmp_path, *again, "--quality.every_n_epochs=0", STALE="60")
        _, err = second.communicate(timeout=200)
        assert second.returncode == 2
        lines = err.splitlines()
        assert f"error: run_dir=run belongs to a run that still goes on, process {first.pid} on a. Wait" in lines[-1]
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert json.loads(note.read_text())["process"] == first.pid  # as it died
    third = on("b", tmp_path, *again, "--quality.every_n_epochs=0", "--trainer.max_time=00:00:00:02")
    out, err = third.communicate(timeout=200)
    assert third.returncode == 0, err
    assert f"process {first.pid} on a is silent for 4 s: its run is taken over" in err
    assert "continued  from" in out
    assert not note.exists()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "_BEAT", 0.05)
    monkeypatch.setattr(heartbeat, "_STALE", 1.0)


def left_by(folder: Path, host: str, process: int, age: float) -> None:
    (folder / NOTE).write_text(json.dumps({"host": host, "process": process, "token": "x"}))
    touched = time.time() - age
    os.utime(folder / NOTE, (touched, touched))


@pytest.mark.parametrize("age", [100.0, 0.5])
def test_a_note_that_is_not_touched_is_a_dead_hosts(tmp_path, quick, capsys, age):
    left_by(tmp_path, "elsewhere", 7, age)
    let_go = be_the_writer(tmp_path, pytest.fail)
    assert "process 7 on elsewhere is silent for 1 s: its run is taken over" in capsys.readouterr().err
    assert is_written(tmp_path)
    let_go()
    assert not is_written(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path, monkeypatch, capsys):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left_by(tmp_path, heartbeat.socket.gethostname(), child.pid, 0.0)
    began = time.monotonic()
    be_the_writer(tmp_path, pytest.fail)()
    assert time.monotonic() - began < 5  # of 45
    assert capsys.readouterr().err == ""


def test_a_writer_that_lives_is_named_and_one_that_lets_go_is_not_waited_for(tmp_path, quick):
    left_by(tmp_path, "elsewhere", 7, 0.0)
    ended = threading.Event()

    def touch():
        while not ended.wait(0.1):
            os.utime(tmp_path / NOTE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(WrittenElsewhere, match="process 7 on elsewhere"):
            be_the_writer(tmp_path, pytest.fail)
    finally:
        ended.set()
        thread.join()
    threading.Timer(0.3, (tmp_path / NOTE).unlink).start()
    be_the_writer(tmp_path, pytest.fail)()


def test_a_writer_that_had_stood_still_learns_that_it_is_none_any_more(tmp_path, quick):
    lost = []
    let_go = be_the_writer(tmp_path, lost.append)
    left_by(tmp_path, "elsewhere", 7, 0.0)
    until = time.monotonic() + 30
    while not lost and time.monotonic() < until:
        time.sleep(0.05)
    assert lost == ["process 7 on elsewhere"]
    let_go()
    assert (tmp_path / NOTE).exists()  # of the other


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_what_is_no_note_is_written_over(tmp_path, content):
    (tmp_path / NOTE).write_text(content)
    be_the_writer(tmp_path, pytest.fail)()
    assert os.listdir(tmp_path) == []
