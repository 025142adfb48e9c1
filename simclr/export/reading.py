"""Opens exported graphs again: ONNX by ONNX Runtime, archives of torch.export without running what they may carry."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from simclr.export.card import CARD, read_card
from simclr.inputs import InputTransform, attach_transform, transform_of

GRAPHS = (".onnx", ".pt2")
_PLAIN_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
SETTINGS = "simclr"  # the key under which a graph holds the settings of its encoder, as JSON


def exported_file(path: Path) -> Path:
    """The exported file of a folder that `simclr export` has written; any other path as it is."""
    return path / read_card(path / CARD)["file"] if (path / CARD).is_file() else path


def runs_by_itself(path: Path) -> bool:
    """Whether a file holds a network and not only its weights."""
    return path.suffix in GRAPHS


class BytesTransform(InputTransform):
    """What an exported encoder takes that has its preprocessing inside: (N, C, load_size, load_size) uint8."""

    def __call__(self, images: Any) -> Tensor:
        """As `InputTransform`, but for the crop and the normalisation."""
        items = images if isinstance(images, list | tuple) else [images]
        return torch.cat([(self._hold(item) * 255).round().to(torch.uint8) for item in items])

    def of_held(self, images: Tensor) -> Tensor:
        """Images as they are held are what it takes."""
        return images


class Graph(nn.Module):
    """An exported encoder: images -> representations (N, feature_dim).

    Args:
        run: images -> representations.
        settings: of the encoder, and `preprocessing`, inside or outside.
    Attributes:
        feature_dim, transform, image_size, mean, std: as of `simclr.load_encoder`.
    """

    def __init__(self, run: Any, settings: dict[str, Any]):
        super().__init__()
        self.run = run
        self.feature_dim: int = settings["feature_dim"]
        kind = BytesTransform if settings["preprocessing"] == "inside" else InputTransform
        attach_transform(self, transform_of(settings, kind))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """As it was exported: normalised images, or with its preprocessing inside, uint8 of any size."""
        return self.run(images)


def load_graph(path: Path) -> Graph:
    """An encoder out of an ONNX file or an archive of torch.export; without gradients, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: without ONNX Runtime.
        ValueError: if the file is damaged, of another program, or could run code of its own.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no exported encoder at {path}.")
    return _load_onnx(path) if path.suffix == ".onnx" else _load_archive(path)


def _load_onnx(path: Path) -> Graph:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModuleNotFoundError("ONNX files need ONNX Runtime: pip install 'simclr[onnx]'.") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own, one class a kind of damage
        raise ValueError(f"{path} cannot be read as ONNX: {next(iter(str(error).splitlines()), '')}") from error
    settings = _settings(session.get_modelmeta().custom_metadata_map.get(SETTINGS), path)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))

    return Graph(run, settings)


def _load_archive(path: Path) -> Graph:
    extra = {SETTINGS: ""}
    try:
        with _without_pickled_code(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it then raises
            module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: it is damaged, no archive of torch.export, or holds more than a network."
        ) from error

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, module(images))

    return Graph(run, _settings(extra[SETTINGS], path))


@contextmanager
def _without_pickled_code() -> Iterator[None]:
    """Within it `torch.load`, whoever calls it, opens tensors and plain types only.

    `torch.export.load` unpickles whatever an archive says is pickled; this is torch's own switch against it.
    """
    before = os.environ.get(_PLAIN_ONLY)
    os.environ[_PLAIN_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_PLAIN_ONLY]
        if before is not None:
            os.environ[_PLAIN_ONLY] = before


def _settings(text: str | None, path: Path) -> dict[str, Any]:
    settings = json.loads(text) if text else {}
    lacking = {"encoder", "image_size", "mean", "std", "load_size", "feature_dim", "preprocessing"} - settings.keys()
    if lacking:
        raise ValueError(f"{path} was not exported by simclr: it lacks {', '.join(sorted(lacking))}.")
    return settings
