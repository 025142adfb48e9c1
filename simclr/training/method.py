"""What a method of pretraining is to the rest of the house: checkpoint, command line, callbacks, evaluation, report.

A method is a LightningModule with an `encoder`. It is chosen by `--method NAME` or by the path of its class, and its
typed signature is its configuration. It is made of the parts of this folder; `simclr.module.SimCLR` shows how.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import nn

from simclr.augment import SimCLRAugmentation
from simclr.checks import find_named
from simclr.training.objective import Objective

if TYPE_CHECKING:
    from simclr.training.run import PretrainingRun
    from simclr.training.step_log import StepLog
    from simclr.training.views import EpochViews

DEFAULT_METHOD = "simclr"
# Those that have a name of their own.
METHODS = {"simclr": "simclr.module.SimCLR", "byol": "simclr.byol.BYOL", "supervised": "simclr.supervised.Supervised"}


class Method(Protocol):
    """The attributes that a method has, beside others of a LightningModule.

    Attributes:
        architecture: the settings of its signature that decide which weights it has: with others its checkpoints cannot
            be loaded.
        hparams: the settings, as Lightning keeps them.
        encoder: what training leaves behind: images (n, C, S, S) -> h (n, `encoder.feature_dim`).
        networks: what a view goes through, one after the other, the encoder first.
        views: makes the views of an epoch.
        run: settles what was left out, and knows how long the run is and where it stands.
        step_log: the loss so far.
    """

    architecture: ClassVar[tuple[str, ...]]
    hparams: Any
    encoder: nn.Module
    views: "EpochViews"
    run: "PretrainingRun"
    step_log: "StepLog"

    def parameters(self) -> Iterator[nn.Parameter]: ...

    @property
    def networks(self) -> Sequence[nn.Module]: ...

    @staticmethod
    def objective(settings: Mapping[str, Any]) -> Objective:
        """What a method of these settings minimises."""
        ...


def find_method(name: str) -> type:
    """The class of a method by its name, or by the path of the class: `package.module.Class`.

    Raises:
        ValueError: if there is none.
    """
    found = find_named("method", name, METHODS, "a class")
    lacking = [part for part in ("architecture", "objective", "training_step") if not hasattr(found, part)]
    if lacking:
        raise ValueError(f"method={name} is no method of pretraining: it lacks {', '.join(lacking)}.")
    return found


def takes(method: type, setting: str) -> bool:
    """Whether a class of a method has this setting, of its own or as one of the augmentation's."""
    known = inspect.signature(method).parameters
    rest = [name for name, p in known.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if setting in known:
        return setting not in rest
    return bool(rest) and setting in inspect.signature(SimCLRAugmentation).parameters


def meet_images(method: Any, data: object) -> None:
    """Let a method that depends on the images know them, before its weights are counted or compared.

    A method that does has `meet`; the others depend on their settings alone.

    Args:
        method: as built.
        data: the data module of its run; it need not be set up.
    Raises:
        ValueError: if the images do not serve.
    """
    if meet := getattr(method, "meet", None):
        meet(data)


def name_of(method: Method) -> str:
    """The name by which `find_method` finds a method again."""
    path = f"{type(method).__module__}.{type(method).__qualname__}"
    return next((name for name, known in METHODS.items() if known == path), path)


def record_of(method: Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its method: name, architecture and objective, in plain types."""
    about = {"name": name_of(method), "architecture": list(method.architecture)}
    return about | {"objective": method.objective(settings)._asdict()}
