"""A program that trains, killed at the moment that its environment names, by the one signal that nothing can catch.

    SIMCLR_TEST_KILL='{"at": "step", "number": 17, "after": 0.01}' python tests/killed.py simclr ARGUMENTS

`simclr` is `simclr train` with these arguments; `stock` is what one gets from torch's DataLoader and Lightning's own
checkpoints (`stock.py`). Without the variable, which the same command given again has not, nothing is done to either.

    python tests/killed.py serve

reads such commands from standard input and starts a process of its own for each, which imports nothing again.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

KILL = "SIMCLR_TEST_KILL"
MARK = "SIMCLR_TEST_RUN"  # in the environment of all processes of a test's run, by which they are found
SERVER = "SIMCLR_TEST_SERVER"  # the process that starts those of a run, by its number: it is none of them
LEFT = "SIMCLR_TEST_LEFT"  # a file: which temporaries there were, of others, as training began

# What an audit hook hears of before it happens, and where in its arguments the path is.
OPERATIONS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0, "os.link": 1}
OPERATIONS |= {"shutil.rmtree": 0}


def marked(run: str) -> list[int]:
    """The living processes of a test's run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        if path.name == os.environ.get(SERVER):
            continue
        with contextlib.suppress(OSError):
            alive = (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and f"{MARK}={run}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def temporaries(*folders: Path) -> list[str]:
    """What stands in folders for temporary files, at any depth, and what was not written to its end in others."""
    found = [str(path) for path in folders[0].rglob("*")]
    return sorted([*found, *(str(path) for folder in folders[1:] for path in folder.rglob(".*.partial"))])


class Death:
    """Waits for its moment.

    Args:
        at: `start`, from where `after` counts; `step`, an optimiser step; `end`, the end of an epoch; `write`, of a
            file; `operation`, any on the files of the run folder or below it.
        number: which: the step, the first being 0; the epoch; of writes those after so many steps; the operation, the
            first being 1, of this process.
        after: seconds that pass from there.
        rank: that dies; -1: all, each by itself; -2: all processes of the run at once.
        name: of the file that is written.
        root: the run folder.
    """

    def __init__(self, at: str, number: int = 0, after: float = 0.0, rank: int = 0, name: str = "", root: str = "."):
        self.at, self.number, self.after, self.rank, self.name = at, number, after, rank, name
        self.root, self.seen, self.steps = os.path.abspath(root), 0, -1

    def come(self) -> None:
        if self.after > 0:
            threading.Thread(target=self._later, daemon=True).start()
        else:
            self._kill()

    def _later(self) -> None:
        time.sleep(self.after)
        self._kill()

    def _kill(self) -> None:
        if self.rank == -2:
            for pid in marked(os.environ[MARK]):
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple) -> None:
        """An audit hook."""
        if event not in OPERATIONS or os.getpid() != self.pid:
            return
        path = arguments[OPERATIONS[event]]
        if not isinstance(path, str | bytes | os.PathLike) or (event == "open" and not self._changes(arguments[2])):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(self.root):
            return
        if self.at == "operation":
            self.seen += 1
            if self.seen == self.number:
                self.come()
        elif event == "open" and path.endswith(".partial") and f".{self.name}." in path and self.steps >= self.number:
            self.at = "over"
            self.come()

    @staticmethod
    def _changes(flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def arm(self) -> None:
        """From here on."""
        self.pid = os.getpid()
        if self.at == "start":
            self.come()
        if self.at in ("write", "operation"):
            sys.addaudithook(self.hear)
        from pytorch_lightning import Trainer  # as late: those who die before have not begun to read it

        init, death = Trainer.__init__, self

        def with_death(trainer, *args, **kwargs):
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), _callback(death)]
            init(trainer, *args, **kwargs)

        with_death.__wrapped__ = init  # its options are read from its signature
        Trainer.__init__ = with_death


def _callback(death: "Death"):
    from pytorch_lightning import Callback

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            if path := os.environ.get(LEFT):
                Path(path).write_text(json.dumps(temporaries(Path(os.environ["TMPDIR"]), Path(death.root))))

        def on_train_batch_start(self, trainer, *args):
            death.steps = trainer.global_step
            if death.at == "step" and death.steps >= death.number:
                death.at = "over"
                death.come()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            death.steps = trainer.global_step
            if death.at == "end" and trainer.is_last_batch and trainer.current_epoch >= death.number:
                death.at = "over"
                death.come()

    return Watch()


def main(arguments: list[str]) -> None:
    program, *rest = arguments
    moment = json.loads(os.environ.get(KILL) or "null")
    own = int(os.environ.get("LOCAL_RANK", 0))
    root = next((word.partition("=")[2] for word in rest if word.startswith("--run_dir=")), ".")
    if moment is not None and (moment.get("rank", 0) in (own, -1) or (moment.get("rank"), own) == (-2, 0)):
        Death(**moment, root=root).arm()
    if program == "stock":
        from stock import train
    else:
        from simclr.cli.train import train
    train(rest)


def serve() -> list[str]:
    """Fork for each line of standard input, {"command", "environment", "said"}, and tell of its number and its end.

    Returns:
        In the process that was started: the command.
    """
    import simclr.cli.train  # noqa: F401

    os.environ[SERVER] = str(os.getpid())
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if (pid := os.fork()) == 0:
            os.environ.update(asked["environment"])
            said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, stream in ((nothing, 0), (said, 1), (said, 2)):
                os.dup2(descriptor, stream)
            sys.argv = [os.path.abspath(__file__), *asked["command"]]
            return asked["command"]
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    main(serve() if sys.argv[1:] == ["serve"] else sys.argv[1:])
