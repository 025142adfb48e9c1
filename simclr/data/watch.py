"""Whether those that read files still do: a disk or a network file system that does not answer says nothing itself."""

import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

_LOOK = 1.0  # seconds between two looks, at most
_LEAVE = 5.0  # seconds that threads have to end in


def look_every(limit_s: float) -> float:
    """Seconds between two looks, for a limit in seconds."""
    return min(_LOOK, limit_s / 4)


class Stuck:
    """Which of some readers have been at the same thing for too long, told from looking at them again and again.

    Only time in which somebody looked counts: a process that was stopped by Ctrl-Z has not waited.

    Args:
        limit_s: how many seconds are too long.
    """

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self._at: dict[Hashable, tuple[Hashable, float]] = {}  # of each reader, and for how long
        self._looked = time.monotonic()

    def look(self, at: Iterable[tuple[Hashable, Hashable]]) -> list[Hashable]:
        """Those that have been at it for longer than the limit.

        Args:
            at: each reader, and what it is at; those that are at nothing are left out.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * look_every(self.limit_s)), now
        before, self._at = self._at, {}
        for reader, thing in at:
            thing_before, age = before.get(reader, (None, 0.0))
            self._at[reader] = thing, age + passed if thing_before == thing else 0.0
        return [reader for reader, (_, age) in self._at.items() if age >= self.limit_s]


def in_threads(
    read: Callable[[int], object],
    count: int,
    threads: int,
    limit_s: float | None,
    say: Callable[[Sequence[int]], Exception],
) -> None:
    """Call `read` with each of 0 ... count - 1, by some threads at once, and wait for all, but not for ever.

    The threads are daemons: one that never comes back from the kernel does not keep the process from ending.

    Args:
        read: what to do; what it raises is raised here, and the rest is left.
        count: of calls.
        threads: how many are made at once.
        limit_s: how many seconds one call may take; None without limit.
        say: (those that have taken longer) -> what to raise.
    """
    coming, done = iter(range(count)), queue.SimpleQueue[BaseException | None]()
    at: dict[int, int] = {}  # of each thread
    lock, ended = threading.Lock(), threading.Event()

    def work(thread: int) -> None:
        try:
            while not ended.is_set():
                with lock:
                    i = next(coming, None)
                if i is None:
                    break
                at[thread] = i
                read(i)
                del at[thread]
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)

    running = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(min(threads, count))]
    for thread in running:
        thread.start()
    stuck = None if limit_s is None else Stuck(limit_s)
    failed: BaseException | None = None
    try:
        left = len(running)
        while left and failed is None:
            try:
                failed = done.get(timeout=None if limit_s is None else look_every(limit_s))
                left -= 1
            except queue.Empty:
                assert stuck is not None
                now = dict(at)
                if late := stuck.look(now.items()):
                    failed = say(sorted(i for thread, i in now.items() if thread in late))
                    running = []
    finally:
        ended.set()  # Ctrl-C and errors wait for the files at hand, not for all that remain
        until = time.monotonic() + _LEAVE
        for thread in running:
            thread.join(max(0.0, until - time.monotonic()))
    if failed is not None:
        raise failed
