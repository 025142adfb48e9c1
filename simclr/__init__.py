"""Self-supervised pretraining of image encoders with SimCLR: exact, reproducible, measured."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr.augment import SimCLRAugmentation
    from simclr.byol import BYOL
    from simclr.checkpoint import load_encoder
    from simclr.encoders import build_encoder
    from simclr.heads import ProjectionHead
    from simclr.losses import nt_xent
    from simclr.module import SimCLR
    from simclr.optim import LARS
    from simclr.supervised import Supervised

__version__ = "0.1.0"

__all__ = ["BYOL", "LARS", "ProjectionHead", "SimCLR", "SimCLRAugmentation", "Supervised"]
__all__ += ["build_encoder", "load_encoder", "nt_xent"]

_HOME = {
    "BYOL": "byol",
    "LARS": "optim",
    "ProjectionHead": "heads",
    "SimCLR": "module",
    "SimCLRAugmentation": "augment",
    "Supervised": "supervised",
    "build_encoder": "encoders",
    "load_encoder": "checkpoint",
    "nt_xent": "losses",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `simclr --help` answers without torch, which takes seconds.
    if name in _HOME:
        value = getattr(importlib.import_module(f"simclr.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in ("data", "eval"):
        return importlib.import_module(f"simclr.{name}")
    raise AttributeError(f"module 'simclr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "data", "eval"})
