"""Who writes into a folder, told to hosts that see no lock of each other's: a note in it that is touched as he lives.

A lock (`simclr.files.hold`) dies with its process at once, but some file systems that hosts share have none. There a
writer is known by `NOTE`: host, process, and when it was last touched, by the clock of the file system.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr.files import write_atomically

NOTE = ".writer.json"
_BEAT = 10.0  # seconds between two touches
_STALE = 45.0  # seconds after which one that was not touched is a dead writer's


class WrittenElsewhere(BlockingIOError):
    """A writer that lives; `args[0]` says where."""


def be_the_writer(folder: Path, lost: Callable[[str], object]) -> Callable[[], object]:
    """Leave a note in a folder that this process writes into it, and touch it until told to let go.

    Args:
        folder: that is there.
        lost: called once, from a thread, with who it is, when another writer has taken the folder: this process had
            stood still for longer than a living one may.
    Returns:
        What lets go of it, and takes the note away.
    Raises:
        WrittenElsewhere: if another writer lives. That takes as long as one may be silent, at most.
    """
    note = folder / NOTE
    before = _read(note)
    again = before and (before["host"], before["process"]) == (socket.gethostname(), os.getpid())  # a container's
    if before and not again and _may_live(before) and _lives(note, before):
        raise WrittenElsewhere(_who(before))
    mine = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
    with suppress(OSError):  # a folder that cannot be written is refused where that is said better
        write_atomically(note, json.dumps(mine).encode())
        if (found := _read(note)) != mine and found:  # two at once: the later one has it
            raise WrittenElsewhere(_who(found))
    ended = threading.Event()
    threading.Thread(target=_touch, args=(note, mine, ended, lost), daemon=True, name="simclr-heartbeat").start()

    def let_go() -> None:
        ended.set()
        with suppress(OSError):
            if _read(note) == mine:
                note.unlink()

    return let_go


def is_written(folder: Path) -> bool:
    """Whether a writer has left a note in a folder and touched it lately, by the clock of this host."""
    note = folder / NOTE
    found = _read(note)
    try:
        return bool(found and _may_live(found) and time.time() - note.stat().st_mtime < _STALE)
    except OSError:
        return False


def _touch(note: Path, mine: dict[str, Any], ended: threading.Event, lost: Callable[[str], object]) -> None:
    while not ended.wait(_BEAT):
        found = _read(note)
        if ended.is_set():
            return
        if found and found != mine:
            lost(_who(found))
            return
        with suppress(OSError):
            os.utime(note)


def _may_live(writer: dict[str, Any]) -> bool:
    """False for a process of this host that is gone, which need not be waited for."""
    if writer["host"] != socket.gethostname():
        return True
    try:
        os.kill(writer["process"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _lives(note: Path, writer: dict[str, Any]) -> bool:
    """Whether a note is touched, if need be by waiting for it."""
    try:
        touched = note.stat().st_mtime_ns
        left = _STALE - (_now(note.parent) - touched) / 1e9
        if left > 0:
            wait = f"note: {_who(writer)} may still write into {note.parent}; looking for {left:.0f} s"
            print(wait, file=sys.stderr, flush=True)
        until = time.monotonic() + left
        while time.monotonic() < until:
            time.sleep(min(1.0, _BEAT / 4))
            if note.stat().st_mtime_ns != touched:
                return True
    except FileNotFoundError:  # let go
        return False
    print(f"note: {_who(writer)} is silent for {_STALE:g} s: its run is taken over", file=sys.stderr, flush=True)
    return False


def _now(folder: Path) -> int:
    """Nanoseconds by the clock of the file system, which may be another host's."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    write_atomically(probe, b"")
    try:
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _read(note: Path) -> dict[str, Any] | None:
    """A note; None where there is none, or another program's file."""
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("host"), str) and isinstance(found.get("process"), int)
    return found if known else None


def _who(writer: dict[str, Any]) -> str:
    return f"process {writer['process']} on {writer['host']}"
