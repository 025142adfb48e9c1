"""Encoders to use by name: a run's, an exported one, or a stock network of torchvision or timm with weights given."""

import hashlib
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from simclr.checkpoint import load_encoder, refuse_mismatch
from simclr.data.decode import ReadingRules
from simclr.encoders import RESNETS, build_encoder, build_timm, timm_knows, torchvision_names, unknown_encoder
from simclr.eval.features import check_finite, encode, encoder_sha256
from simclr.export.reading import BytesTransform, Graph, exported_file
from simclr.inputs import InputTransform, attach_transform
from simclr.paths import expanded, stored

LIBRARIES = ("torchvision", "timm")
_INSIDE = ("state_dict", "model")  # keys under which other programs keep the weights in a checkpoint


@dataclass(frozen=True, eq=False)
class Source:
    """An encoder with what tells it from others.

    Attributes:
        encoder: in eval mode, without gradients, with its `transform`.
        about: for JSON: where it is from (`source`, `weights`, `prefix`, `random_weights`, `image_size`, as
            `open_source` takes them, paths from the root), `sha256`, `feature_dim`, `preprocessing`.
        dropped: weights of the file that are a classifier's.
    """

    encoder: nn.Module
    about: dict[str, Any]
    dropped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        weights = self.about["weights"]
        return f"{self.about['source']} with {weights}" if weights else str(self.about["source"])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its features."""
        return {name: self.about[name] for name in ("sha256", "preprocessing")}

    @property
    def transform(self) -> InputTransform:
        """Its preprocessing."""
        transform: Any = self.encoder.transform
        return transform

    @property
    def rules(self) -> ReadingRules:
        """How it has files read."""
        return self.transform.rules

    @property
    def side(self) -> int:
        """The side in pixels at which images are held before the crop."""
        assert self.transform.load_size is not None
        return self.transform.load_size

    def to(self, device: str) -> None:
        """Bring it to a device.

        Raises:
            ValueError: for a graph, which stays on the CPU.
        """
        if not isinstance(self.encoder, Graph):
            self.encoder.to(device)
        elif torch.device(device).type != "cpu":
            raise ValueError(f"device={device}: {self.name} is a graph, which computes on the CPU. Use --device cpu.")

    def features(self, squares: Tensor) -> Tensor:
        """Representations of images that were read as squares: (n, C, side, side) -> (n, F) float32, on the CPU.

        The bits of `encoder(encoder.transform(paths))`, up to what the memory format of a batch changes.
        """
        with torch.no_grad():
            images = self.transform.of_held(squares)
            if isinstance(self.encoder, Graph):
                return self.encoder(images).float()
            device = next((p.device for p in self.encoder.parameters()), torch.device("cpu"))
            return encode(self.encoder, images.to(device)).cpu()


def open_source(
    source: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    prefix: str = "",
    random_weights: bool = False,
    image_size: int | None = None,
) -> Source:
    """An encoder to use.

    Args:
        source: whatever `simclr.load_encoder` opens; or `torchvision:NAME` or `timm:NAME`, a network of theirs without
            its classifier. Nothing is downloaded.
        weights: of such a network: a state dict, as a file of torch or safetensors, or a checkpoint that holds one.
        prefix: which of the weights in the file are taken, and cut from their names.
        random_weights: of such a network: none are given, and that is meant.
        image_size: the side of its images in pixels, if not the one that it was published with.
    Raises:
        FileNotFoundError, ValueError: for what is no encoder, for weights that do not fit, for options that the source
            has no use for.
        ModuleNotFoundError: for a network of timm without timm.
    """
    library, colon, network = os.fspath(source).partition(":")
    given = {"weights": weights, "prefix": prefix, "random_weights": random_weights, "image_size": image_size}
    if not colon or library not in LIBRARIES:
        if unheard := ", ".join(name for name, value in given.items() if value):
            raise ValueError(
                f"{unheard}: {os.fspath(source)} has its own. These are for torchvision:NAME or timm:NAME."
            )
        path = expanded(source)
        encoder = load_encoder(path)
        return _source(encoder, stored(path), given, exported_file(path) if isinstance(encoder, Graph) else None)
    if weights is None and not random_weights:
        raise ValueError(
            f"{library}:{network} needs weights, and none are downloaded. Use --weights FILE, a state dict; or "
            "--random_weights true for a yardstick."
        )
    if weights is not None and random_weights:
        raise ValueError("weights and random_weights: give one of them.")
    encoder, keys = _torchvision(network, image_size) if library == "torchvision" else _timm(network, image_size)
    dropped: list[str] = []
    if weights is not None:
        found = _weights_in(expanded(weights), prefix)
        dropped = [name for name in found if name in keys - encoder.state_dict().keys()]
        found = {name: value for name, value in found.items() if name not in dropped}
        refuse_mismatch(found, encoder.state_dict(), f"{weights} does not fit {library}:{network}")
        encoder.load_state_dict(found)
        given["weights"] = stored(weights)
    return _source(encoder.eval().requires_grad_(False), f"{library}:{network}", given, None, dropped)


def reopen(about: dict[str, Any], instead: str | None = None) -> Source:
    """The encoder that features were made with.

    Args:
        about: of the `Source` that it was.
        instead: a run or a file that holds it, if it lies elsewhere.
    Raises:
        ValueError: if it is another one.
    """
    names = ("weights", "prefix", "random_weights", "image_size")
    stock = about["source"].partition(":")[0] in LIBRARIES
    if stock and instead is not None and expanded(instead).exists():  # its weights, moved
        found = open_source(about["source"], **{**{name: about[name] for name in names}, "weights": instead})
    elif instead is not None:
        found = open_source(instead)
    else:
        found = open_source(about["source"], **{name: about[name] for name in names})
    if found.identity != {name: about[name] for name in ("sha256", "preprocessing")}:
        raise ValueError(
            f"{found.name} is not the encoder that these features are of: sha256 {found.about['sha256'][:12]} where "
            f"{about['sha256'][:12]} is needed. Give the one that was used by --encoder."
        )
    return found


def _source(
    encoder: nn.Module, name: str, given: dict[str, Any], graph: Path | None, dropped: list[str] | None = None
) -> Source:
    transform: Any = encoder.transform
    if graph is not None:
        with graph.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        for key, value in encoder.state_dict().items():
            if value.is_floating_point():
                check_finite(f"the weights {key} of {name}", value.reshape(1, -1))
        sha256 = encoder_sha256(encoder)
    preprocessing = {name: getattr(transform, name) for name in ("image_size", "load_size", "sixteen_bit_max")}
    preprocessing |= {"mean": list(transform.mean), "std": list(transform.std)}
    preprocessing |= {"bits": transform.bits} if transform.bits != 8 else {}
    preprocessing["inside"] = isinstance(transform, BytesTransform)
    about = {"source": name, **given, "sha256": sha256, "feature_dim": encoder.feature_dim}
    return Source(encoder, {**about, "preprocessing": preprocessing}, dropped or [])


def _torchvision(name: str, image_size: int | None) -> tuple[nn.Module, set[str]]:
    """A network as torchvision published it, its random weights always the same; and its keys with the classifier."""
    if name not in torchvision_names():
        raise ValueError(f"torchvision: {unknown_encoder(name, torchvision_names())}")
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = image_size or preset.crop_size[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Without a size, a ResNet has the stem of its publication whatever the images.
        encoder = build_encoder(name, **({"stem": "imagenet"} if name in RESNETS else {"image_size": size}))
    if name in ("googlenet", "inception_v3"):
        carrier: Any = encoder
        carrier.transform_input = True  # their weights were trained with another normalisation, which they do inside
    attach_transform(encoder, InputTransform(size, preset.mean, preset.std))
    with torch.device("meta"):
        inits = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        keys = set(torchvision.models.get_model(name, weights=None, **inits).state_dict())
    return encoder, keys


def _timm(name: str, image_size: int | None) -> tuple[nn.Module, set[str]]:
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError("timm:NAME needs timm: pip install 'simclr[timm]'.") from error
    if not timm_knows(name):
        raise ValueError(f"timm: {unknown_encoder(name, timm.list_models())}")
    published: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = image_size or published.input_size[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_timm(name, size)
    attach_transform(encoder, InputTransform(size, published.mean, published.std))
    with torch.device("meta"):
        keys = set(timm.create_model(name, pretrained=False).state_dict())
    return encoder, keys


def _weights_in(path: Path, prefix: str) -> dict[str, Tensor]:
    """The weights that a file holds, their names without the prefix; no code in it is run."""
    if not path.is_file():
        raise FileNotFoundError(f"weights={path} is no file.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as weights: it is damaged, or holds more than weights.") from error
    for key in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: names with a tensor each.")
    found = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(
            f"{path} has no weights that begin with prefix={prefix}; its first is {next(iter(content), '')}."
        )
    return found
