"""What the programs of cells have in common: their arguments, and the outcome that they leave."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simclr.eval.predictions import packed
from simclr.files import write_atomically


class Outcome:
    """What a cell has measured, to be written once."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.per_image: dict[str, str] = {}
        self.images: dict[str, str] = {}
        self.curves: dict[str, list[list[float]]] = {}

    def add_images(self, metric: str, hits: Tensor, of: str) -> None:
        """A metric that is a share of images, in percent.

        Args:
            metric: its name.
            hits: (N,) bool, the images that count.
            of: what tells these images from others.
        """
        self.metrics[metric] = 100 * hits.double().mean().item()
        self.per_image[metric], self.images[metric] = packed(hits.long()), of

    def write(self, path: Path) -> None:
        """As the engine reads it."""
        write_atomically(path, json.dumps(vars(self)).encode())


def arguments(argv: Sequence[str] | None, **more: Any) -> argparse.Namespace:
    """The arguments of a program of a cell; `settings` as a mapping."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("out", *more):
        parser.add_argument(f"--{name}", type=Path, required=more.get(name, True))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", type=json.loads, default={})
    return parser.parse_args(argv)


def run_program(main: Callable[[], None]) -> None:
    """Run a program of a cell: what goes wrong is its last line, which the engine reads, and exit code 1."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def labels_sha256(labels: Tensor, name: str) -> str:
    """What tells one list of images from another: their labels in order, and what they are of."""
    return hashlib.sha256(name.encode() + labels.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
