"""The network of torchvision or timm that an encoder's weights belong to, and the lines of Python that make it."""

from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
from torch import nn

from simclr.efficientnet import B0, EFFICIENTNETS, SCALED, build_scaled, published_name, take_strides_out
from simclr.encoders import RESNETS, choose_stem
from simclr.model_zoo import build_timm, build_torchvision, first_convolution, timm_knows, torchvision_names

_SMALL = {"small": 1, "small_stride2": 2}  # stem -> the stride of its convolution


@dataclass(frozen=True)
class Counterpart:
    """A network of another library with an encoder's weights' names.

    Attributes:
        network: it, in eval mode.
        lines: how to make it, in Python, as the name `network`.
    """

    network: nn.Module
    lines: list[str]


def torchvision_counterpart(settings: dict[str, Any]) -> Counterpart:
    """torchvision's network for an encoder of these settings.

    Raises:
        ValueError: if it has none, with what to do.
    """
    name, size, channels = published_name(settings), settings["image_size"], settings.get("channels", 3)
    if name in RESNETS:
        _refuse_other_resnets(settings, "torchvision")
        lines = ["import torch, torchvision", f"network = torchvision.models.{name}()"]
        return _resnet(torchvision.models.get_model(name), "fc", settings, lines)
    if name != SCALED and name not in torchvision_names():
        raise ValueError(f"torchvision has no {name}. It is one of timm's: use --format timm.")
    if name == SCALED:
        return _efficientnet(settings)
    options = {"image_size": size} if name.startswith("vit_") else {}
    options |= {"input_size": (size, size)} if name == "maxvit_t" else {}
    options |= {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    whole = torchvision.models.get_model(name, weights=None, **options)
    network = build_torchvision(name, size, channels)
    taken_off = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.Identity) and not isinstance(whole.get_submodule(path), nn.Identity)
    ]
    lines = ["import torch, torchvision", f"network = torchvision.models.get_model({name!r}, weights=None{given})"]
    lines += [f"network.set_submodule({path!r}, torch.nn.Identity())" for path in taken_off]
    if channels != 3:
        place, _ = first_convolution(whole)
        first = network.get_submodule(place)
        lines += [f"network.set_submodule({place!r}, torch.nn.{first})"]
    if name in EFFICIENTNETS:
        return _with_stem(Counterpart(network.eval(), lines), settings)
    return Counterpart(network.eval(), lines)


def _efficientnet(settings: dict[str, Any]) -> Counterpart:
    """An EfficientNet that torchvision can build, but has no name for."""
    scale = {"width_mult": settings.get("width", 1.0), "depth_mult": settings.get("depth", 1.0)}
    channels = settings.get("channels", 3)
    multipliers = dict[str, Any](width=scale["width_mult"], depth=scale["depth_mult"], phi=None)
    network = build_scaled(SCALED, None, channels, **multipliers)
    given = ", ".join(f"{name}={value:g}" for name, value in scale.items())
    lines = ["import torch", "from torchvision.models.efficientnet import EfficientNet, MBConvConfig"]
    lines += ["network = EfficientNet(["]
    lines += [f"    MBConvConfig({', '.join(map(str, stage))}, {given})," for stage in B0]
    lines += ["], dropout=0)", "network.classifier = torch.nn.Identity()"]
    if channels != 3:
        place, first = "features.0.0", network.get_submodule("features.0.0")
        lines += [f"network.set_submodule({place!r}, torch.nn.{first})"]
    return _with_stem(Counterpart(network.eval(), lines), settings)


def _with_stem(found: Counterpart, settings: dict[str, Any]) -> Counterpart:
    """An EfficientNet with the strides of its stem."""
    if choose_stem(settings["encoder"], settings.get("stem", "auto"), settings["image_size"]) != "small":
        return found
    network, lines = found.network, found.lines
    before = {path: module.stride for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    take_strides_out(network)
    moved = [path for path, stride in before.items() if network.get_submodule(path).stride != stride]
    return Counterpart(network, [*lines, *(f"network.get_submodule({path!r}).stride = (1, 1)" for path in moved)])


def timm_counterpart(settings: dict[str, Any]) -> Counterpart:
    """timm's network for an encoder of these settings.

    Raises:
        ValueError: if it has none, with what to do.
        ModuleNotFoundError: without timm.
    """
    name, size, channels = settings["encoder"], settings["image_size"], settings.get("channels", 3)
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError("format=timm needs timm: pip install 'simclr[timm]'.") from error
    if name in RESNETS:
        _refuse_other_resnets(settings, "timm")
        taking = f", in_chans={channels}" if channels != 3 else ""
        lines = ["import timm, torch", f"network = timm.create_model({name!r}, num_classes=0{taking})"]
        return _resnet(timm.create_model(name, num_classes=0, in_chans=channels), None, settings, lines)
    if name in torchvision_names() or not timm_knows(name):
        raise ValueError(f"{name} is torchvision's, whose weights have other names in timm. Use --format torchvision.")
    published = timm.get_pretrained_cfg(name)
    sized = f", img_size={size}" if published is not None and published.fixed_input_size else ""
    sized += f", in_chans={channels}" if channels != 3 else ""
    lines = ["import timm", f"network = timm.create_model({name!r}, num_classes=0{sized})"]
    return Counterpart(build_timm(name, size, channels).eval(), lines)


def _resnet(network: Any, classifier: str | None, settings: dict[str, Any], lines: list[str]) -> Counterpart:
    """A ResNet of another library with the stem of these settings and without its classifier."""
    channels = settings.get("channels", 3)
    if classifier:
        network.set_submodule(classifier, nn.Identity())
        lines = [*lines, f"network.{classifier} = torch.nn.Identity()"]
    if (stem := settings["stem"]) in _SMALL:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=_SMALL[stem], padding=1, bias=False)
        network.maxpool = nn.Identity()
        shape = f"{channels}, 64, kernel_size=3, stride={_SMALL[stem]}, padding=1, bias=False"
        lines = [*lines, f"network.conv1 = torch.nn.Conv2d({shape})", "network.maxpool = torch.nn.Identity()"]
    elif channels != network.conv1.in_channels:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        shape = f"{channels}, 64, kernel_size=7, stride=2, padding=3, bias=False"
        lines = [*lines, f"network.conv1 = torch.nn.Conv2d({shape})"]
    return Counterpart(network.eval(), lines)


def _refuse_other_resnets(settings: dict[str, Any], library: str) -> None:
    problems = [] if RESNETS[settings["encoder"]] in (18, 34, 50, 101, 152) else ["is a CIFAR network"]
    problems += [f"has width {settings['width']:g}"] if settings.get("width", 1) != 1 else []
    problems += [f"has depth {settings['depth']:g}"] if settings.get("depth", 1) != 1 else []
    problems += [f"has shortcut {settings['shortcut']}"] if settings.get("shortcut", "B") != "B" else []
    problems += ["has no normalisation"] if settings.get("norm", "batch") != "batch" else []
    if problems:
        raise ValueError(
            f"{library} has no counterpart of this {settings['encoder']}: it {' and '.join(problems)}. "
            "Use --format safetensors, onnx or torch-export."
        )


def same_features(network: nn.Module, encoder: nn.Module, image_size: int) -> float:
    """The largest difference between what two networks make of the same noise."""
    with torch.no_grad():
        transform: Any = encoder.transform
        images = torch.randn(4, transform.channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
        return float((network(images).flatten(1) - encoder(images)).abs().max())
