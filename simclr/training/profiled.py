"""The parts of a training step by name, for Lightning's profilers and `simclr profile`: Lightning knows the whole."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

from simclr.training.internals import trainer_of


def profiled(name: str) -> Callable[[Callable], Callable]:
    """Decorates a method of a LightningModule: what it does counts under this name in the Trainer's profiler."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def counted(module: Any, *args: Any) -> Any:
            trainer = trainer_of(module)
            with nullcontext() if trainer is None else trainer.profiler.profile(name):
                return function(module, *args)

        return counted

    return decorate
