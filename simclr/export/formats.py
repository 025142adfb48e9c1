"""The forms in which an encoder leaves: each writes one file, which the other library then opens and is compared by."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from simclr import __version__
from simclr.checkpoint import NetworkName, as_encoder_file, as_state_dict_file, load_encoder, read_encoder
from simclr.data.decode import DEEPEST
from simclr.export.card import CARD, VERSION, card_text
from simclr.export.counterparts import Counterpart, same_features, timm_counterpart, torchvision_counterpart
from simclr.export.graph import WithPreprocessing
from simclr.export.reading import GRAPHS, SETTINGS, load_graph
from simclr.files import write_atomically
from simclr.inputs import InputTransform
from simclr.paths import expanded

Format = Literal["torchvision", "timm", "safetensors", "onnx", "torch-export"]
FILES = {
    "torchvision": "encoder.pth",
    "timm": "encoder.safetensors",
    "safetensors": "encoder.safetensors",
    "onnx": "encoder.onnx",
    "torch-export": "encoder.pt2",
}
# By how much of the largest feature (of 1, where all are smaller) those of the file may differ, where other code does
# the computing; with its preprocessing inside, resizing rounds to the next byte in a tie now and then.
TOLERANCES = {"torchvision": 0.0, "timm": 0.0, "safetensors": 0.0, "onnx": 1e-4, "torch-export": 1e-6}
_INSIDE = 1e-3


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        file, card: where.
        difference: the largest one between a feature of the file, as the other library computes it, and the encoder's;
            of graphs as a part of the largest feature, if that is more than 1.
        checked_by: that library.
    """

    file: Path
    card: Path
    difference: float
    checked_by: str


def export_encoder(
    source: str | os.PathLike,
    format: Format,
    out: str | os.PathLike,
    *,
    preprocessing: Literal["outside", "inside"] = "outside",
    network: NetworkName = "online",
    license: str | None = None,
    about: dict[str, Any] | None = None,
) -> Exported:
    """Write an encoder as another library opens it, open it there, compare, and put a card beside it.

    Args:
        source: whatever `simclr.load_encoder` opens that holds weights.
        format: torchvision: a state dict that torchvision's network takes strictly. timm: safetensors that timm's
            takes. safetensors: with everything in its metadata that builds and feeds the encoder. onnx: a graph for
            ONNX Runtime and others. torch-export: an archive of torch.export. The batch of both is free.
        out: a folder that is not there, or empty.
        preprocessing: of a graph. inside: it takes bytes of any size.
        network: of a run with two; see `simclr.load_encoder`.
        license: said in the card.
        about: `data`, `recipe`, `results` of the card; see `simclr.export.card.card_text`.
    Raises:
        FileNotFoundError, ValueError: for what is no encoder, for a format that it has not, for a folder with files.
        ModuleNotFoundError: without the other library.
        RuntimeError: if what was written gives other features.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format} is none of {', '.join(get_args(Format))}.")
    if preprocessing == "inside" and Path(FILES[format]).suffix not in GRAPHS:
        raise ValueError(f"format={format} holds weights, in which no preprocessing fits. Use onnx or torch-export.")
    folder = expanded(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"out={out} is there already. Name another folder.")
    path, weights, settings = read_encoder(source, network)
    encoder = load_encoder(path, network=network)
    transform = cast(InputTransform, encoder.transform)
    if preprocessing == "inside" and transform.bits != 8:
        raise ValueError(
            "preprocessing=inside takes bytes, and this encoder's images have 16 bits. Leave it out: "
            "load_encoder(...).transform prepares images of 16 bits."
        )
    settings = {**settings, "feature_dim": encoder.feature_dim, "simclr_version": __version__}
    with torch.no_grad():
        if not encoder(next(_trials(settings, False))).isfinite().all():
            raise ValueError(f"the features of {source} are NaN or infinite: the encoder cannot be used.")
    library: Counterpart | None = None
    if format in ("torchvision", "timm"):
        library = (torchvision_counterpart if format == "torchvision" else timm_counterpart)(settings)
    _need_packages(format)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILES[format]
    weights = {name: value.contiguous().clone() for name, value in weights.items()}
    try:
        difference, checked_by = _write(format, file, encoder, weights, settings, preprocessing, library)
    except BaseException:
        file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    head = _head(format, file, encoder, settings, preprocessing, license, about or {})
    head["network"] = network
    head["checked"] = {"by": checked_by, "largest_difference": difference}
    head = json.loads(json.dumps(head))  # no list twice: YAML would write a reference
    card = folder / CARD
    write_atomically(card, card_text(head, "\n".join(_use(format, file, library, preprocessing))).encode())
    return Exported(file, card, difference, checked_by)


def _write(
    format: str,
    file: Path,
    encoder: nn.Module,
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    preprocessing: str,
    library: Counterpart | None,
) -> tuple[float, str]:
    """Write the file; how far it is from the encoder, and by whose word."""
    if format == "torchvision":
        write_atomically(file, as_state_dict_file(weights))
        assert library is not None
        library.network.load_state_dict(torch.load(file, weights_only=True))
        return _checked(format, same_features(library.network, encoder, settings["image_size"]), file), _of(
            "torchvision"
        )
    if format == "timm":
        write_atomically(file, save_safetensors(weights, {"format": "pt"}))
        assert library is not None
        library.network.load_state_dict(load_safetensors(file.read_bytes()))
        return _checked(format, same_features(library.network, encoder, settings["image_size"]), file), _of("timm")
    if format == "safetensors":
        write_atomically(file, as_encoder_file(weights, settings))
        found = same_features(load_encoder(file), encoder, settings["image_size"])
        return _checked(format, found, file), _of("safetensors")
    inside, transform = preprocessing == "inside", cast(InputTransform, encoder.transform)
    settings = {**settings, "preprocessing": preprocessing}
    network = WithPreprocessing(encoder, transform).eval() if inside else encoder
    example, dynamic = _example(settings, inside)
    write = _write_onnx if format == "onnx" else _write_archive
    with _silent():
        write(network, example, dynamic, settings, file)
    graph, differences = load_graph(file), []
    for images in _trials(settings, inside):
        with torch.no_grad():
            wanted = encoder(transform(images) if inside else images)
        differences.append(float((graph(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1)))
    checked_by = _of("onnxruntime") if format == "onnx" else f"torch.export of torch {torch.__version__}"
    return _checked(format, max(differences), file, inside), checked_by


def _checked(format: str, difference: float, file: Path, inside: bool = False) -> float:
    allowed = max(TOLERANCES[format], _INSIDE if inside else 0.0)
    if not difference <= allowed:  # NaN too
        raise RuntimeError(
            f"{file} gives other features than the encoder, {difference:.2g} apart where {allowed:g} is allowed: "
            "it was removed."
        )
    return difference


def _example(settings: dict[str, Any], inside: bool) -> tuple[Tensor, dict[int, Any]]:
    """Images to trace a graph with, and which of their dimensions are free."""
    any_size, channels = torch.export.Dim.DYNAMIC, settings.get("channels", 3)
    if inside:
        return torch.zeros(2, channels, 211, 157, dtype=torch.uint8), {0: any_size, 2: any_size, 3: any_size}
    return torch.zeros(2, channels, settings["image_size"], settings["image_size"]), {0: any_size}


def _trials(settings: dict[str, Any], inside: bool) -> Iterator[Tensor]:
    noise = torch.Generator().manual_seed(0)
    size, held, channels = settings["image_size"], settings["load_size"], settings.get("channels", 3)
    if not inside:
        yield from (torch.randn(n, channels, size, size, generator=noise) for n in (1, 3))
        return
    for n, height, width in ((1, held, held), (3, 2 * held + 1, 3 * held), (2, held + 5, held // 2 + 1)):
        coarse = torch.rand(n, channels, 9, 9, generator=noise)  # as smooth as photographs, not noise by the pixel
        image = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        yield (image * 255).round().to(torch.uint8)


def _write_onnx(
    network: nn.Module, example: Tensor, dynamic: dict[int, Any], settings: dict[str, Any], file: Path
) -> None:
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=(dynamic,),
        input_names=["images"],
        output_names=["h"],
        verbose=False,
    )
    assert program is not None  # with dynamo
    program.model.metadata_props[SETTINGS] = json.dumps(settings)
    write_atomically(file, program.model_proto.SerializeToString())


def _write_archive(
    network: nn.Module, example: Tensor, dynamic: dict[int, Any], settings: dict[str, Any], file: Path
) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=(dynamic,))
    # At the place itself: torch's writer takes the name of its inner folder from the file's.
    torch.export.save(program, file, extra_files={SETTINGS: json.dumps(settings)})


@contextmanager
def _silent() -> Iterator[None]:
    """Without what torch's exporters have to say to their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _need_packages(format: str) -> None:
    """Refuse before anything is written what cannot be done here."""
    if format != "onnx":
        return
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "format=onnx needs ONNX Runtime and onnxscript: pip install 'simclr[onnx]'."
        ) from error


def _of(package: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)}"


def _head(
    format: str,
    file: Path,
    encoder: nn.Module,
    settings: dict[str, Any],
    preprocessing: str,
    license: str | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    size, inside = settings["image_size"], preprocessing == "inside"
    fed = {name: settings[name] for name in ("image_size", "load_size", "mean", "std")}
    channels = settings.get("channels", 3)
    shape = f"(N, {channels}, H, W), any H and W" if inside else f"(N, {channels}, {size}, {size})"
    colours = {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels")
    values = f"uint8, {colours}" if inside else f"float32, {colours}, normalised"
    if settings.get("bits", 8) == 16:
        fed |= {"bits": 16, "sixteen_bit_max": settings.get("sixteen_bit_max", DEEPEST)}
    return {
        "simclr_export": VERSION,
        "format": format,
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "encoder": settings,
        "input": {"shape": shape, "channels": channels, "values": values, "preprocessing": preprocessing, **fed},
        "output": {"shape": f"(N, {encoder.feature_dim}) float32", "feature_dim": encoder.feature_dim},
        "data": about.get("data", {}),
        "recipe": about.get("recipe", {}),
        "results": about.get("results", []),
        "license": license,
    }


def _use(format: str, file: Path, library: Counterpart | None, preprocessing: str) -> list[str]:
    name = file.name
    fed = "encoder.transform" if preprocessing == "outside" or format in ("torchvision", "timm") else None
    if format == "torchvision":
        assert library is not None
        return [*library.lines, f'network.load_state_dict(torch.load("{name}", weights_only=True))']
    if format == "timm":
        assert library is not None
        plain = [line for line in library.lines if line.startswith("network = ")]
        if library.lines[-1:] == plain:
            made = library.lines[-1].removesuffix(")")
            return [*library.lines[:-1], f'{made}, checkpoint_path="{name}")']
        load = f'network.load_state_dict(safetensors.torch.load_file("{name}"))'
        return ["import safetensors.torch", *library.lines, load]
    if format == "onnx":
        what = "normalised images" if fed else "bytes of any size"
        return [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{name}")',
            f'h = session.run(None, {{"images": images}})[0]  # {what}, NumPy',
            "",
            "import simclr  # or, with images of any kind",
            f'encoder = simclr.load_encoder("{name}")',
            'h = encoder(encoder.transform("photo.jpg"))',
        ]
    if format == "torch-export":
        what = "normalised images" if fed else "bytes of any size"
        return ["import torch", f'network = torch.export.load("{name}").module()', f"h = network(images)  # {what}"]
    return [
        "import simclr",
        f'encoder = simclr.load_encoder("{name}")',
        'h = encoder(encoder.transform("photo.jpg"))',
    ]
