"""Files that are there whole or not at all, whatever ends their writer. The only writer of whole files.

What is written stands beside its target under a name of its own, `.NAME.XXXXXXXX.partial`, goes to the disk, and takes
the target's name in one step. A writer holds a lock on its temporary, which dies with it: so what a dead one has left
can be told from what is being written.
"""

import glob
import multiprocessing.util
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # every use asks for it

_OURS = "simclr"  # a file without content, which marks a folder


def write_atomically(path: str | os.PathLike, content: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: the file; one of this name is replaced, the target of a link where it lies.
        content: its bytes.
    Raises:
        OSError: if it cannot be written; what stood there before stands there still.
    """
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write into, which takes its place when the block ends; if that raises, nothing has happened.

    Args:
        path: as for `write_atomically`.
    """
    path = Path(os.path.realpath(path))
    remove_abandoned(path.parent, path.name)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(unfinished, "xb") as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name on disk without all of the bytes
            if fcntl is None:  # Windows renames no file that is open
                file.close()
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


class GrowingFile:
    """A file that grows piece by piece, by one process or by several one after the other, until it is whole.

    It stands under a name of its own. What is on the disk is what was there at the last `to_disk`, and perhaps more:
    whoever goes on says how much counts.

    Args:
        path: the file, made if it is not there.
        length: bytes of it that count, at most what it has; the rest is cut off.

    Attributes:
        whole: whether it has its name.

    Raises:
        ValueError: if it is shorter.
    """

    def __init__(self, path: Path, length: int = 0):
        self.path, self.whole = path, False
        open(path, "ab").close()
        if (size := path.stat().st_size) < length:
            raise ValueError(f"{path} has {size:,} bytes where {length:,} were written. Remove it to begin anew.")
        self._file = open(path, "r+b")  # noqa: SIM115, for as long as this lives
        self._file.truncate(length)
        self._file.seek(length)

    def append(self, content: bytes | memoryview) -> None:
        """Write more at its end."""
        self._file.write(content)

    def to_disk(self) -> None:
        """Return once all that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, target: Path, head: bytes = b"") -> None:
        """Give it the name of a whole file.

        Args:
            target: the name, in the same folder; a file of this name is replaced.
            head: bytes to put in place of its first ones.
        """
        self._file.seek(0)
        self._file.write(head)
        self.to_disk()
        self.close()
        self.path.replace(target)
        self.whole = True
        _sync_folder(target.parent)

    def close(self) -> None:
        """Leave it as it is."""
        self._file.close()


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the temporaries that dead writers have left in a folder.

    Args:
        folder: where to look, not below; it need not be there.
        name: of the file that was being written; of any if not given.
    """
    for unfinished in folder.glob(".*.partial" if name is None else f".{glob.escape(name)}.*.partial"):
        if fcntl is None:
            continue
        with suppress(OSError), open(unfinished, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
            unfinished.unlink()


def hold(folder: Path) -> Callable[[], object]:
    """Hold a folder as its one writer, until told to let go or this process dies; nothing is left in it.

    Where the file system has no locks for folders, as some networks', nobody is refused.

    Args:
        folder: that is there.
    Returns:
        What lets go of it.
    Raises:
        BlockingIOError: if another process holds it.
    """
    if fcntl is None:
        return tuple
    descriptor = os.open(folder, os.O_RDONLY)  # not inherited by programs that are started
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return partial(os.close, descriptor)


@cache
def mark_sockets() -> None:
    """Let the folder of the sockets that lead to worker processes be known for ours while this process lives.

    multiprocessing makes it among the temporary files, `pymp-XXXXXXXX`, and removes it as the process ends; of one that
    was killed it stays. To be called before the first worker is made, which then uses the same one.
    """
    folder = Path(multiprocessing.util.get_temp_dir())
    hold(folder)  # before it is marked: what is marked and not held belongs to a dead process
    (folder / _OURS).touch()


def remove_abandoned_sockets() -> None:
    """Remove the folders that `mark_sockets` has marked and whose process is dead."""
    for mark in glob.glob(f"{glob.escape(tempfile.gettempdir())}/pymp-*/{_OURS}"):
        if fcntl is None:
            continue
        folder = os.path.dirname(mark)
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def say_unwritten(path: str | os.PathLike, error: OSError, consequence: str) -> None:
    """Tell people of a file that could not be written and is not needed to go on, once, on standard error.

    Args:
        path: the file.
        error: what its writer raised.
        consequence: what that means, and what happens instead.
    """
    print(f"warning: {path} could not be written ({reason_of(error)}): {consequence}", file=sys.stderr, flush=True)


def reason_of(error: OSError) -> str:
    """Why a file could not be written, for people: "No space left on device"."""
    return error.strerror or str(error)


def _sync_folder(folder: Path) -> None:
    """The new name to the disk too. Some file systems have no such thing; the file itself is safe by now."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
