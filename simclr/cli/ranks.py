"""The ranks of one run: the first that fails says so, once, and all others end with it, whatever it died of.

Each rank has a thread that looks at what it can see without talking: the process that launched it, the ranks that it
has launched itself, the other ranks of this machine; and at a note in the store in which the ranks have found each
other, which the first to fail leaves there. The connections between ranks tell of a death too, but late where GPUs
exchange, and as an error of its own on every rank: an echo, which is kept to itself.
"""

import atexit
import functools
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer

from simclr import distributed
from simclr.cli.messages import BAD_INPUT, FAILED, INTERRUPTED, TERMINATED, in_a_line, speaking_if
from simclr.nonfinite.watch import NonFiniteStep
from simclr.run_folder import launcher

_LOOK_EVERY = 0.3  # seconds
_TO_LEAVE = 3.0  # seconds that a rank has to end by itself, once another has failed: in a collective it cannot
_TO_HEAR = 5.0  # seconds that a rank whose connection is lost waits to hear why
_TO_BE_HEARD = 1.5  # seconds that the host of the store stays after its note, for all to look at it
_TO_CLEAR_UP = 60.0  # seconds for ranks that have trained
_SAID = (FAILED, BAD_INPUT, INTERRUPTED, TERMINATED)  # exit codes of a rank that has said why

# What torch, gloo and NCCL say of another rank that is gone, and what this package does.
_GONE = (
    r"closed by peer|reset by peer|Broken pipe|Connection refused|remote process exited|NCCL (error|communicator)"
    r"|failed to recv|reached monitoredBarrier|\bgloo\b|rank \d+ failed: |its own error says which"
)
_SILENT = r"Timed out waiting|timed out|Timeout at NCCL|wait timeout|Socket Timeout|Watchdog caught collective"


class OtherRankFailed(SystemExit):
    """This rank ends because another did."""


class _Failure(NamedTuple):
    """What to say, None where it has been said; and the exit code."""

    text: str | None
    code: int = FAILED


class Ranks:
    """What this rank knows of the others.

    Attributes:
        leaving: whether the run ends by itself, so that a rank that is gone is nothing to speak of.
        stopping: whether all have agreed to stop, so that they go one by one.
        tidy: what to do before this process is ended from outside its main thread.
    """

    def __init__(self) -> None:
        self.leaving = False
        self.stopping: Callable[[], bool] = bool
        self.tidy: Callable[[], object] = tuple
        self.patience: timedelta | None = None
        self._children: list[subprocess.Popen] = []
        self._places: list[tuple[str, int]] = []  # host and process of each rank, once they have met
        self._asked = self._mine = False  # to speak, and whether it was given to this rank
        self._failed_with: int | None = None
        self._lock = threading.Lock()
        self._known = threading.Event()  # that another rank has failed, and that this is said
        self._thread: threading.Thread | None = None
        self._stores: dict[str, Any] = {}  # a connection for each thread that asks
        launched_by = launcher()
        self._parent = launched_by or (os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
        if launched_by is not None and _is_dead(launched_by):
            raise OtherRankFailed(FAILED)
        atexit.register(self._exit_at_once)
        if self._parent is not None and self._parent == os.getppid():
            self._begin_to_look()

    def adopt(self, children: list[subprocess.Popen]) -> None:
        """Watch processes that this one has launched: ranks 1, 2, ... of this machine."""
        self._children = children
        self._begin_to_look()

    def meet(self) -> None:
        """Watch all ranks, once the process group is there."""
        self._places = distributed.exchange_objects((_this_machine(), os.getpid()))
        # While its host lives: who waits for a dead one waits long.
        self._stores = {who: distributed.open_store() for who in ("look", "speak")}
        self._begin_to_look()

    def may_speak(self) -> bool:
        """Whether this rank says why the run has ended: true once, for the first rank that asks."""
        with self._lock:
            if self._asked:
                return False
            self._mine = self._ask_to_speak()
            self._asked = True
            return self._mine

    def answer(self, error: BaseException) -> None:
        """What follows from an error on this rank: if it is only the echo of another's failure, the end, in silence.

        Args:
            error: as raised in training.
        Raises:
            OtherRankFailed: for an echo, once the failure is said. This rank says it, if no other does.
        """
        kind = echo(error)
        if kind is None or os.environ.get("SIMCLR_TRACEBACK") or not (self._places or kind == "silent"):
            return
        for number in (signal.SIGTERM, signal.SIGINT):  # of the launcher, who has seen it too
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, signal.SIG_IGN)
        until = time.monotonic() + _TO_HEAR
        while not self._known.wait(0.1) and not self._is_said("speak"):
            found = self._look_at_processes()
            if found is None and time.monotonic() < until:
                continue
            self._say(found.text if found is not None else self._what_echoed(kind, error))
            break
        self.kill_children()
        raise OtherRankFailed(FAILED)

    def end(self, code: object) -> None:
        """This rank has failed: those that it has launched end, and so will this process, whatever torch's threads do.

        Args:
            code: its exit code.
        """
        self.kill_children()
        if self._places:
            self._failed_with = code if isinstance(code, int) else FAILED
            hosts = self._rank() == 0 and not distributed.launcher_has_store()
            if self._mine and hosts and not self._children:
                time.sleep(_TO_BE_HEARD)

    def _exit_at_once(self) -> None:
        """At exit: threads of torch's that still talk to a rank which is gone end a process by SIGABRT."""
        if self._failed_with is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._failed_with)

    def kill_children(self) -> None:
        """End the ranks that this process has launched."""
        self.leaving = True
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()

    def wait_for_children(self) -> None:
        """The run has ended: so will the ranks that this process has launched, and none of them outlives it."""
        until = time.monotonic() + _TO_CLEAR_UP
        for child in self._children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill_children()

    def _begin_to_look(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="simclr-ranks")
            self._thread.start()

    def _look(self) -> None:
        while not self.leaving:
            time.sleep(_LOOK_EVERY)
            if self.stopping():
                continue
            found = self._look_at_processes()
            if found is None and self._is_said("look"):
                found = _Failure(None)
            if found is not None and not self.leaving:
                self._end(found)

    def _end(self, failure: _Failure) -> None:
        self._say(failure.text)
        self._known.set()
        until = time.monotonic() + _TO_LEAVE
        while time.monotonic() < until:  # the main thread may be on its way, and this one ends with it
            time.sleep(_LOOK_EVERY)
            if self.leaving:
                return
        self.tidy()
        self.kill_children()
        os._exit(failure.code)

    def _say(self, text: str | None) -> None:
        if text is not None and self.may_speak():
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _look_at_processes(self) -> _Failure | None:
        """Who of those that can be seen from here has died."""
        for rank, child in enumerate(self._children, start=self._rank() + 1):
            if code := child.poll():
                return _Failure(None, code) if code in _SAID else _Failure(_died(f"rank {rank}", child.pid, code))
        if self._parent is not None and os.getppid() != self._parent:
            if launcher() is None:
                return _Failure(f"torchrun (process {self._parent}) is gone, and its ranks end with it.")
            first = int(os.environ.get("LOCAL_RANK", "0")) == 1  # of those that see the same
            place = f"rank {distributed.launched_rank() - int(os.environ.get('LOCAL_RANK', '0'))}"
            return _Failure(_died(place, self._parent) if first else None)
        here = _this_machine() if self._places else ""
        for rank, (machine, process) in enumerate(self._places):
            if machine == here and _is_dead(process):
                return _Failure(_died(f"rank {rank}", process))
        return None

    def _rank(self) -> int:
        return distributed.rank() if self._places else distributed.launched_rank()

    def _what_echoed(self, kind: str, error: BaseException) -> str:
        rank = distributed.rank()
        if kind == "silent" and not self._places:
            return (
                f"rank {self._rank()} has waited for the other ranks to start ({' '.join(str(error).split())[:200]})."
            )
        if kind == "silent":
            waited = f" {self.patience.total_seconds() / 60:g} min" if self.patience is not None else ""
            return (
                f"rank {rank} has waited{waited} for another rank, which neither went on nor died. Where a step may "
                "take longer: --rank_timeout MINUTES."
            )
        return f"rank {rank} has lost the connection to another rank ({' '.join(str(error).split())[:200]})."

    def _store(self, who: str) -> Any:
        if who not in self._stores:
            self._stores[who] = distributed.open_store() if distributed.launcher_has_store() else None
        return self._stores[who]

    def _is_said(self, who: str) -> bool:
        """Whether another rank has said why the run ends."""
        try:
            key = f"{distributed.attempt()}/failed"
            store = self._store(who) if self._places else None
            return store is not None and store.check([key]) and not self._mine
        except RuntimeError:  # its host is gone
            self._stores[who] = None
            return False

    def _ask_to_speak(self) -> bool:
        me = str(self._rank())
        try:
            store = self._store("speak")
            if store is not None:
                return store.compare_set(f"{distributed.attempt()}/failed", "", me).decode() == me
        except RuntimeError:  # its host is gone
            pass
        here = _this_machine()
        living = [rank for rank, (machine, pid) in enumerate(self._places) if machine == here and not _is_dead(pid)]
        return not living or living[0] == int(me)


class WithRanks(Callback):
    """Tells `Ranks` of a Trainer's.

    Args:
        ranks: to tell.
        alike: called on every rank once they have met; raises if they are not of one run.
    """

    def __init__(self, ranks: Ranks, alike: Callable[[], object]):
        self.ranks, self.alike = ranks, alike

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the first step."""
        if trainer.world_size > 1:
            self.ranks.meet()
            self.alike()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No rank is gone before all have come so far."""
        self.ranks.leaving = True
        distributed.barrier()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Told to stop, ranks go at different times."""
        self.ranks.leaving |= isinstance(exception, KeyboardInterrupt)


@contextmanager
def one_speaks(ranks: Ranks) -> Iterator[None]:
    """Within it, of ranks that fail one says why, and all end."""
    try:
        with speaking_if(ranks.may_speak):
            yield
    except BaseException as error:
        ranks.end(getattr(error, "code", None))
        raise
    finally:
        ranks.leaving = True


@contextmanager
def before_ranks_meet() -> Iterator[None]:
    """Within it one of the ranks that a launcher has started says why they cannot go on, if they cannot."""
    ranks = Ranks()

    def say(error: Exception) -> None:
        ranks.answer(error)
        raise error

    with one_speaks(ranks):
        try:
            yield
        except Exception as error:
            in_a_line(say)(error)


def on_launched_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that several ranks may share, `torchrun --nproc_per_node 2 -m simclr eval RUN`; else it is as it was.

    Each rank goes through the command, within a process group. What is printed is rank 0's, and if one fails one says
    why and all end.

    Args:
        command: writes files on rank 0 alone.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if distributed.launched_ranks() == 1:
            command(*args, **kwargs)
            return
        ranks = Ranks()

        def shared() -> None:
            try:
                with distributed.group_of_launched_ranks(), ExitStack() as stack:
                    ranks.meet()
                    if distributed.rank() > 0:
                        stack.enter_context(redirect_stdout(io.StringIO()))
                    command(*args, **kwargs)
                    ranks.leaving = True
                    distributed.barrier()
            except Exception as error:
                ranks.answer(error)
                raise

        with one_speaks(ranks):
            in_a_line(shared)()

    return run


def echo(error: BaseException) -> str | None:
    """Whether an error says only that another rank is "gone" or "silent"; None for one of this rank's own."""
    if isinstance(error, NonFiniteStep) or not isinstance(error, RuntimeError | ValueError | FloatingPointError):
        return None
    said = str(error)
    if re.search(_SILENT, said):
        return "silent"
    from_torch = type(error).__name__.startswith("Dist")
    return "gone" if from_torch or re.search(_GONE, said) else None


def _died(rank: str, process: int, code: int | None = None) -> str:
    how = "has died without a word"
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    elif code is not None:
        how = f"has ended with exit code {code} and without a word"
    memory = ", or the system for want of memory" if code in (None, -signal.SIGKILL) else ""
    by = f" Someone has killed it{memory}." if code is None or code < 0 else ""
    if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE):
        by = ""
    return f"{rank} (process {process} on {socket.gethostname()}) {how}, and the run ends with it.{by}"


def _this_machine() -> str:
    """What processes share that can see each other: containers of one host name have processes of their own."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _is_dead(process: int) -> bool:
    """Whether a process of this machine has ended, also where nobody has asked for its exit code yet."""
    if Path("/proc/self").exists():
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
