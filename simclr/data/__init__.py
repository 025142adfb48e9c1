"""Images in: a folder, a named set or the built-in shapes; out: uint8 batches in an order that is a pure function."""

from simclr.data.loader import EvalLoader, GlobalBatchSampler, TrainLoader
from simclr.data.module import ImageData
from simclr.data.shapes import draw_shapes
from simclr.data.sources import FileImages, ImageSet, MemoryImages

__all__ = [
    "EvalLoader",
    "FileImages",
    "GlobalBatchSampler",
    "ImageData",
    "ImageSet",
    "MemoryImages",
    "TrainLoader",
    "draw_shapes",
]
