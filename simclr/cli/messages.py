"""What a command says when it cannot go on, one line and an exit code, and what it keeps to itself."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

FAILED = 1  # exit code of a run that could not do what was asked
BAD_INPUT = 2
INTERRUPTED, TERMINATED = 130, 143  # as a shell reports Ctrl-C and SIGTERM


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """One line on standard error, and the exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def guarded(work: Callable[[], Any]) -> Any:
    """Run a step that checks what the user gave; what it refuses becomes one line and exit code 2."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException  # not above: it brings torch

    try:
        return work()
    except (ValueError, OSError, MisconfigurationException, ModuleNotFoundError) as error:
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(_reason(str(error)))


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
