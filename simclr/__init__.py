"""Self-supervised pretraining of image encoders with SimCLR: exact, reproducible, measured."""

from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import load_encoder
from simclr.encoders import build_encoder
from simclr.heads import ProjectionHead
from simclr.losses import nt_xent
from simclr.module import SimCLR
from simclr.optim import LARS

__version__ = "0.1.0"

__all__ = ["LARS", "ProjectionHead", "SimCLR", "SimCLRAugmentation", "build_encoder", "load_encoder", "nt_xent"]
