"""Encoders of other libraries: the models of torchvision and timm by name, without their classifiers."""

import difflib
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torchvision.models
from torch import nn


def torchvision_names() -> list[str]:
    """All classification models of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def build_torchvision(name: str, image_size: int | None, channels: int = 3) -> nn.Module:
    """A model of torchvision without its classifier; see `simclr.encoders.build_encoder`."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary classifiers would turn the output in training mode into a tuple.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_") and image_size is not None:
        patch_size = int(name.rsplit("_", 1)[1])
        if image_size % patch_size:
            raise ValueError(f"{name} needs an image_size that is a multiple of {patch_size}, not {image_size}.")
        options = {"image_size": image_size}
    elif name == "maxvit_t" and image_size is not None:
        options = {"input_size": (image_size, image_size)}
    encoder = torchvision.models.get_model(name, weights=None, **options)
    encoder.feature_dim = remove_classifier(encoder)
    if channels != 3:
        take_channels(encoder, channels)
    return encoder


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The convolution that sees the image, and its name: the first of all that takes three channels.

    Raises:
        ValueError: if there is none.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            return name, layer
    raise ValueError("it has no first convolution of three channels that could be replaced")


def take_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution of a network by one for images of other channels than three, in place.

    Its random weights answer as strongly as those that they take the place of: they are as many more as each is less.
    """
    name, old = first_convolution(model)
    shape: dict[str, Any] = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation}
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, bias=old.bias is not None, **shape)  # type: ignore[arg-type]
    with torch.no_grad():
        new.weight.normal_().mul_(old.weight.std() * math.sqrt(3 / channels))
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    model.set_submodule(name, new)


def remove_classifier(model: nn.Module) -> int:
    """Replace the last weighted layer, and a dropout before it, by nn.Identity; returns the size of that layer's input.

    Every classification model of torchvision ends in a Linear (SqueezeNet: in a 1 x 1 convolution). What else is part
    of the last module stays: the LayerNorm of ConvNeXt, the hidden layers of VGG and MobileNetV3.
    """
    layers = list(model.named_modules())
    last = max(i for i, (_, layer) in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
    removed = [layers[last][0]]
    if isinstance(layers[last - 1][1], nn.Dropout):
        removed.append(layers[last - 1][0])
    for path in removed:
        model.set_submodule(path, nn.Identity())
    classifier = layers[last][1]
    return classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels


def timm_knows(name: str) -> bool:
    """Whether timm is installed and has a model of this name."""
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def build_timm(name: str, image_size: int | None, channels: int = 3) -> nn.Module:
    """A model of timm without its classifier; see `simclr.encoders.build_encoder`."""
    import timm

    options: dict[str, Any] = {}
    if image_size is not None and (published := timm.get_pretrained_cfg(name)) and published.fixed_input_size:
        options = {"img_size": image_size}
    if channels != 3:
        options["in_chans"] = channels
    encoder: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
    # Models with a layer between pooling and classifier (MobileNetV3) keep it: h has that layer's size.
    encoder.feature_dim = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder


def unknown_encoder(name: str, names: Sequence[str]) -> str:
    """The message for a name that nobody knows, with the nearest of those that are known, timm's among them."""
    known, advice = list(names), " If it is one of timm's, install timm: pip install 'simclr[timm]'."
    with suppress(ImportError):
        import timm

        known, advice = known + timm.list_models(), ""
    # timm knows some of torchvision's names too; its own go on after what people say: vit_small_patch16_224.
    begun = [other for other in dict.fromkeys(known) if name and other.startswith(f"{name}_")][:2]
    nearest = begun or difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    question = f" Did you mean {' or '.join(nearest)}?" if nearest else " simclr.encoders.encoder_names() lists them."
    return f"Unknown encoder {name!r}.{question}{advice}"
