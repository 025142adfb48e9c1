"""Whole files: there or not at all, whatever ends the writer, and nothing of a dead one stays."""

import ast
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from simclr.files import remove_abandoned, remove_abandoned_sockets, write_atomically, written_whole
from strict import sitecustomize as strict

PACKAGE = Path(__file__).parents[1] / "simclr"
WRITER = """
import sys
from simclr.files import write_atomically
for number in range(10**9):
    write_atomically(sys.argv[1], bytes([number % 251]) * 4_000_000)
    print(number, flush=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"old", b"the new one"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["x.json"]
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "last.ckpt"
    link.symlink_to(tmp_path / "elsewhere" / "real.ckpt")
    write_atomically(link, b"content")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "real.ckpt").read_bytes() == b"content"


def write_half(path: Path, then) -> None:
    with written_whole(path) as file:
        file.write(b"half of it")
        then()


@pytest.mark.parametrize("moment", ["the write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment != "the write":
        monkeypatch.setattr(os, moment, full)
    with pytest.raises(OSError, match="No space left"):
        write_half(path, full if moment == "the write" else tuple)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.json"]


def test_what_is_renamed_is_on_the_disk_and_so_is_its_name(tmp_path, monkeypatch):
    done, (sync, replace) = [], (os.fsync, os.replace)
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda f: done.append(kind[os.path.isdir(f"/proc/self/fd/{f}")]) or sync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    write_atomically(tmp_path / "x", b"content")
    assert done == ["file", "rename", "folder"]


def killed_writer(path: Path, seconds: float) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # the first is whole
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)


def assert_killed_writes_do_no_harm(path: Path, kills: int) -> int:
    """How many temporaries the kills have left, over all; none stays."""
    left = 0
    for number in range(kills):
        killed_writer(path, random.Random(number).uniform(0, 0.05))
        content = path.read_bytes()
        assert len(content) == 4_000_000
        assert content.count(content[:1]) == len(content), "of two writes"
        left += len(names(path.parent)) - 1
    write_atomically(path, b"the next")
    assert names(path.parent) == [path.name]
    return left


def test_a_kill_during_a_write_leaves_the_old_file_and_the_next_write_clears_up(tmp_path):
    assert_killed_writes_do_no_harm(tmp_path / "last.ckpt", kills=6)


@pytest.mark.slow
def test_a_hundred_kills_during_writes(tmp_path):
    assert assert_killed_writes_do_no_harm(tmp_path / "last.ckpt", kills=100) > 20, "few were killed while writing"


def test_what_is_being_written_is_left_alone(tmp_path):
    (tmp_path / ".x[1].0a1b2c3d.partial").write_bytes(b"of a dead writer")
    (tmp_path / ".other.0a1b2c3d.partial").write_bytes(b"of a dead writer")
    (tmp_path / ".hidden").write_bytes(b"of someone else")
    with written_whole(tmp_path / "x[1]") as file:
        file.write(b"content")
        assert len(names(tmp_path)) == 3  # that of the same file went as this write began
        remove_abandoned(tmp_path)
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == [".hidden", "x[1]"]
    remove_abandoned(tmp_path / "not there")


SOCKETS = """
import multiprocessing.util, sys
from simclr.files import mark_sockets
mark_sockets()
print(multiprocessing.util.get_temp_dir(), flush=True)
if sys.stdin.read():
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_sockets_of_a_dead_process_are_removed_and_those_of_a_living_one_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("pymp-of-others", "other"):
        (tmp_path / name).mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = strict.environment() | {"TMPDIR": str(tmp_path)}
    folders, processes = [], []
    for _ in range(2):
        processes.append(subprocess.Popen([sys.executable, "-c", SOCKETS], env=environment, **pipes))
        folders.append(Path(processes[-1].stdout.readline().strip()))
    remove_abandoned_sockets()
    assert all(folder.is_dir() and folder.parent == tmp_path for folder in folders)
    processes[0].communicate("die")
    assert folders[0].is_dir()
    remove_abandoned_sockets()
    assert [folder.is_dir() for folder in folders] == [False, True]
    processes[1].communicate("")
    assert names(tmp_path) == ["other", "pymp-of-others"]


def test_no_other_file_of_the_package_writes_a_whole_file():
    written = {"write_text", "write_bytes", "replace", "rename", "copyfile", "copy", "mkstemp", "save_file"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            last = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if last != "open" and last not in written:
                continue
            name = ast.unparse(node.func)
            of_files = (last in written and name.startswith(("os.", "shutil.", "tempfile.", "safetensors."))) or (
                last in ("write_text", "write_bytes", "save_file", "mkstemp")
            )
            mode = ast.unparse(node.args[1]) if last == "open" and len(node.args) > 1 else ""
            if of_files or (last == "open" and any(c in mode for c in "wx")):
                found.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert found == ["files.py: open", "files.py: os.replace"]
