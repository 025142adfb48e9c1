"""Python in a process of its own that has imported everything already: it is forked from a server that has.

What a fresh process would import takes it five seconds and more, what such a test is about mostly less. Two or three
tests start `python train.py` and torchrun for real, and say so.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from strict import sitecustomize as strict

# What the command line imports, at once or as a run begins.
IMPORTED = ["simclr.cli.train", "simclr.cli.linear_eval", "simclr.data.loader", "simclr.module"]
IMPORTED += ["torch.utils.tensorboard", "sklearn.linear_model", "sklearn.manifold", "psutil", "pytest"]
CONTEXT = multiprocessing.get_context("forkserver")


def warm() -> None:
    """Start the server, which is the one of worker processes too: whoever comes first says what it imports."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def settle(environment: dict[str, str]) -> None:
    """In a process of the server's, which has the environment of the test that came first: give it this one."""
    os.environ.clear()
    os.environ.update(environment)
    warnings.resetwarnings()
    for line in json.loads(environment[strict.FILTERS]):
        warnings.filterwarnings(*strict.parse(line))


def _become(
    command: list[str], cwd: str, environment: dict[str, str], out: Connection, err: Connection, session: bool
) -> None:
    if session:
        os.setsid()
    for descriptor, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (out.fileno(), 1), (err.fileno(), 2)):
        os.dup2(descriptor, stream)
    out.close(), err.close()
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    settle(environment)
    os.chdir(cwd)
    # As any other process it has its own folder for sockets, and starts itself what clears up after it.
    multiprocessing.current_process()._config.pop("tempdir", None)
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    first, *rest = command
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, "")
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = [first, *rest]
            path = os.path.abspath(first)
            sys.path.insert(0, os.path.dirname(path))
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.stdout.flush()


class Forked:
    """A process, with as much of `subprocess.Popen` as tests need.

    Args:
        command: a script with its arguments, or "-c", a program and its arguments.
        cwd: its working folder.
        env: its environment, if it is not that of the test.
        session: whether it leads a session of its own.
        text: whether `stdout` and `stderr` are read as UTF-8, not as bytes.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike],
        cwd: str | os.PathLike | None = None,
        env: dict[str, str] | None = None,
        session: bool = False,
        text: bool = True,
    ):
        warm()
        self.args = [os.fspath(word) for word in command]
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        there = os.fspath(cwd or os.getcwd())
        args = (self.args, there, dict(os.environ if env is None else env), *(write for _, write in ends), session)
        self._process = CONTEXT.Process(target=_become, args=args)
        self._process.start()
        streams = []
        for read, write in ends:
            write.close()
            streams.append(os.fdopen(os.dup(read.fileno()), **{"encoding": "utf-8"} if text else {"mode": "rb"}))
            read.close()
        self.stdout, self.stderr = streams
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What is written to both streams until nobody can write to them, and the end of the process."""
        found: dict[str, Any] = {}

        def read(name: str) -> None:
            found[name] = getattr(self, name).read()

        threads = [threading.Thread(target=read, args=(name,), daemon=True) for name in ("stdout", "stderr")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        if len(found) < 2:
            raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return found["stdout"], found["stderr"]

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *args: object) -> None:
        if args[0] is not None:
            self.kill()
        self.wait()
        for stream in (self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                stream.close()


def run(
    command: Sequence[str | os.PathLike],
    cwd: str | os.PathLike | None = None,
    env: dict[str, str] | None = None,
    text: bool = True,
    timeout: float | None = None,
) -> subprocess.CompletedProcess:
    """As `subprocess.run` with both streams captured."""
    with Forked(command, cwd, env, text=text) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


TRAIN = Path(__file__).parents[1] / "train.py"
