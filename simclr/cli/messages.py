"""What a command says when it cannot go on, one line and an exit code, and what it keeps to itself."""

import functools
import io
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

FAILED = 1  # exit code of a run that could not do what was asked
BAD_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143  # as a shell reports Ctrl-C and SIGTERM
_SCRIPTS = {"train": "train.py", "linear-eval": "linear_eval.py"}  # of a checkout


_MAY_SPEAK: list[Callable[[], bool]] = []


@contextmanager
def speaking_if(asked: Callable[[], bool]) -> Iterator[None]:
    """Within it `fail` says its line only if this is true then: of several ranks that fail, one speaks."""
    _MAY_SPEAK.append(asked)
    try:
        yield
    finally:
        _MAY_SPEAK.remove(asked)


def program(command: str) -> list[str]:
    """How a command begins where this process was begun: by the script of a checkout, or `simclr <command>`.

    For records, and for what people are told to do next: a script that is not there helps nobody.
    """
    in_checkout = os.path.basename(sys.argv[0]) in _SCRIPTS.values()
    return ["python", _SCRIPTS[command]] if in_checkout and command in _SCRIPTS else ["simclr", command]


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """One line on standard error, and the exit code."""
    if all(asked() for asked in _MAY_SPEAK):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def stop(message: str) -> NoReturn:
    """The end of a command by Ctrl-C: a line on standard error, of several ranks rank 0's, and the exit code."""
    from simclr.distributed import rank  # not above: it brings torch

    if rank() == 0:
        print(message, file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)


def guarded(work: Callable[[], Any]) -> Any:
    """Run a step that checks what the user gave; what it refuses becomes one line and exit code 2."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException  # not above: it brings torch

    try:
        return work()
    except (ValueError, OSError, MisconfigurationException, ModuleNotFoundError) as error:
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(_reason(str(error)))
    except RuntimeError as error:
        wanted = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
        if wanted is None or os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(f"these settings need {int(wanted[1]) / 1e9:,.0f} GB in one piece, more than there is. Use smaller sizes.")


def in_a_line(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says what nobody has foreseen in one line too: what, where, how to see more; exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            # A terminal or a log in ASCII must not end a run over the name of a folder.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        try:
            command(*args, **kwargs)
        except Exception as error:
            if os.environ.get("SIMCLR_TRACEBACK"):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "site-packages" not in frame.filename]
            place = (own or frames)[-1]
            said = next(iter(str(error).strip().splitlines()), "")[:400]
            what = f"{type(error).__name__}: {said}" if said else type(error).__name__
            fail(f"{what} (in {place.filename}, line {place.lineno}; SIMCLR_TRACEBACK=1 shows the traceback)", FAILED)

    return run


def _reason(message: str) -> str:
    """A message as one line; of jsonargparse's reasons why a value is of no kind that is allowed, the first."""
    first = re.match(r"Does not validate against any.*?Errors:\s+- (.+?)\n\s*- ", message, re.DOTALL)
    return " ".join((first[1] if first else message).split())


def quiet() -> None:
    """Keep Lightning's advertisements and known-harmless warnings off the screen."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That there is no GPU, whenever something is compiled.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for message in (
        r"Checkpoint directory .* exists and is not empty",  # likewise when a run is continued
        r"The number of training batches .* is smaller than the logging interval",
        r"You have overridden `\w+` in `LightningModule`",  # on purpose
        # Lightning turns shuffling off for its own loaders only; ours gives every epoch the images of the first.
        r"You requested to overfit but enabled train dataloader shuffling",
        r"The '\w+_dataloader' does not have many workers",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch >= 2.11 about Lightning 2.6
    ):
        warnings.filterwarnings("ignore", message=message)
    threading.excepthook = _except_of_tensorboard


def _except_of_tensorboard(failure: threading.ExceptHookArgs) -> None:
    """A thread's traceback, but not of TensorBoard's writer on a full disk: `EventFiles` says that in a line."""
    of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
    if not (of_tensorboard and issubclass(failure.exc_type, OSError)):
        threading.__excepthook__(failure)
