"""The residual networks of He et al. 2015 (arXiv:1512.03385), without their classifier.

Two families share one class: the ImageNet networks (table 1; four stages) and the CIFAR networks (section 4.2; 6n + 2
layers, three stages). Modules are named as in torchvision, so a state_dict of the one loads in the other (minus `fc`).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B", "C", "none"]
Norm = Literal["batch", "none"]

# Kernel size and stride of the first convolution; whether a 3 x 3 max-pool of stride 2 follows.
STEMS = {
    "small": (3, 1, False),
    "small_stride2": (3, 2, False),
    "imagenet": (7, 2, True),
}


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Batch normalisation, or nothing."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def make_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: Norm) -> nn.Conv2d:
    """A convolution from (H, W) to (ceil(H / stride), ceil(W / stride))."""
    # BN subtracts any constant, so a bias before it would be dead weight.
    bias = norm == "none"
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)


def pixels_at(x: Tensor, stride: int | tuple[int, int]) -> Tensor:
    """Every `stride`-th pixel of every `stride`-th row: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride))."""
    # As x[:, :, ::stride, ::stride], but the slice of an odd-sized map loses channels_last.
    return F.avg_pool2d(x, 1, stride)


def guard_projections(network: nn.Module) -> nn.Module:
    """Have strided 1 x 1 convolutions of few channels first take the pixels that they read; returns the network.

    On CPUs the gradient of oneDNN's strided one writes beyond its memory, for channels_last maps from 56 x 56 on: seen
    with 4, 8, 12 and 15 channels, never with 16 or more (torch 2.14 and 2.15, AVX2 and AVX-512). The function, its
    numbers, the names and shapes of weights stay as they are.
    """
    conv: Any  # a module, which takes any attribute
    for conv in network.modules():
        strided = isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        if strided and conv.in_channels < 16 and conv.padding in ((0, 0), "valid"):
            conv.reads_every, conv.stride = conv.stride, (1, 1)
            conv.register_forward_pre_hook(_take_pixels)
    return network


def _take_pixels(conv: Any, inputs: tuple[Tensor]) -> Tensor:
    return pixels_at(inputs[0], conv.reads_every)


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, with zeros for the channels that x lacks. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(pixels_at(x, self.stride), (0, 0, 0, 0, 0, self.extra_channels))


def make_shortcut(shortcut: Shortcut, in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module | None:
    """What is added to a block's residual branch; None for a plain block, to which nothing is added."""
    if shortcut == "none":
        return None
    same_shape = stride == 1 and in_channels == out_channels
    if same_shape and shortcut != "C":
        return nn.Identity()
    if shortcut == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=norm == "none")
    return nn.Sequential(projection, make_norm(norm, out_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions: (N, in_channels, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride))."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, norm: Norm):
        super().__init__()
        self.conv1 = make_conv(in_channels, channels, 3, stride, norm)
        self.bn1 = make_norm(norm, channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = make_conv(channels, channels, 3, 1, norm)
        self.bn2 = make_norm(norm, channels)
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out += self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions: (N, in_channels, H, W) -> (N, 4 * channels, ceil(H / stride), ...).

    The stride is in the 3 x 3 convolution, as in torchvision and google-research/simclr; the paper has it in the first
    1 x 1, which throws three of four activations away unseen.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, norm: Norm):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = make_conv(in_channels, channels, 1, 1, norm)
        self.bn1 = make_norm(norm, channels)
        self.conv2 = make_conv(channels, channels, 3, stride, norm)
        self.bn2 = make_norm(norm, channels)
        self.conv3 = make_conv(channels, out_channels, 1, 1, norm)
        self.bn3 = make_norm(norm, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            out += self.downsample(x)
        return self.relu(out)


# Depth: block, blocks in each stage, channels of the first stage (at width 1; each later stage doubles them).
DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], int]] = {
    18: (BasicBlock, (2, 2, 2, 2), 64),
    34: (BasicBlock, (3, 4, 6, 3), 64),
    50: (Bottleneck, (3, 4, 6, 3), 64),
    101: (Bottleneck, (3, 4, 23, 3), 64),
    152: (Bottleneck, (3, 8, 36, 3), 64),
    **{6 * n + 2: (BasicBlock, (n, n, n), 16) for n in (1, 3, 5, 7, 9, 18)},
}


class ResNet(nn.Module):
    """Residual network: images (N, C, H, W) -> representations h (N, feature_dim), the mean over the last stage's map.

    Args:
        depth: number of weighted layers, the classifier included: 18, 34, 50, 101, 152 (ImageNet networks) or 8, 20,
            32, 44, 56, 110 (CIFAR networks).
        width: multiplies the channels of the stem and of every stage, the inner ones of a bottleneck too, as in
            google-research/simclr: its ResNet-50 (4x) is depth 50, width 4. Fractions of whole channels are refused.
        deeper: multiplies the blocks of every stage, rounded up.
        stem: "small", 3 x 3 convolution; "small_stride2", the same with stride 2 (a quarter of the work);
            "imagenet", 7 x 7 with stride 2 and a max-pool.
        shortcut: where a block changes the shape, "A" pads with zeros and "B" projects; "C" projects in every block;
            "none" leaves shortcuts out: the plain network of the paper's degradation experiment.
        zero_init: start every block's residual branch at zero, so that the block begins as its shortcut
            (Goyal et al. 2017, section 5.1): the scale of its last BN or, without BN, its last convolution.
        norm: "batch", or "none" for convolutions with a bias and no BN: then no image influences another's h.
        image_channels: C, of the images.
    Raises:
        ValueError: if depth, stem, shortcut or norm is not one of the above, if a width leaves a fraction of a channel,
            if `deeper` is not positive, or if zero_init meets shortcut "none".
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        depth: int,
        *,
        width: float,
        stem: str,
        shortcut: Shortcut,
        zero_init: bool,
        norm: Norm,
        deeper: float = 1.0,
        image_channels: int = 3,
    ):
        super().__init__()
        for option, value, allowed in (
            ("depth", depth, sorted(DEPTHS)),
            ("stem", stem, list(STEMS)),
            ("shortcut", shortcut, ["A", "B", "C", "none"]),
            ("norm", norm, ["batch", "none"]),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is not one of {allowed}.")
        if zero_init and shortcut == "none":
            # relu(0) passes no gradient, so nothing would ever move.
            raise ValueError(
                "zero_init=True with shortcut='none' makes every block output zero for good. Set zero_init=False."
            )
        block, blocks_per_stage, base_channels = DEPTHS[depth]
        channels = base_channels * width
        if channels < 1 or channels != int(channels):
            raise ValueError(
                f"width={width} gives {channels:g} channels in the first stage; they must be a whole number from 1 on. "
                f"Use a multiple of 1/{base_channels}."
            )
        if not 0 < deeper < math.inf:
            raise ValueError(f"depth={deeper} multiplies the blocks of each stage, and must be positive.")
        blocks_per_stage = tuple(math.ceil(blocks * deeper) for blocks in blocks_per_stage)
        channels = int(channels)
        kernel_size, stride, pool = STEMS[stem]

        self.conv1 = make_conv(image_channels, channels, kernel_size, stride, norm)
        self.bn1 = make_norm(norm, channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity()
        in_channels = channels
        for stage, blocks in enumerate(blocks_per_stage):
            layer = nn.Sequential()
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(block(in_channels, channels * 2**stage, stride, shortcut, norm))
                in_channels = channels * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", layer)
        if len(blocks_per_stage) == 3:
            self.layer4 = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = in_channels
        self.init_weights(zero_init)
        guard_projections(self)

    @torch.no_grad()
    def init_weights(self, zero_init: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks = [module for module in self.modules() if isinstance(module, BasicBlock | Bottleneck)]
        for block in blocks:
            last_conv, last_norm = (
                (block.conv2, block.bn2) if isinstance(block, BasicBlock) else (block.conv3, block.bn3)
            )
            norm_weight = last_norm.weight if isinstance(last_norm, nn.BatchNorm2d) else None
            if zero_init:
                nn.init.zeros_(last_conv.weight if norm_weight is None else norm_weight)
            elif norm_weight is None and block.downsample is not None:
                # Without BN every added branch would double the variance; scaled, L blocks multiply it by at most e.
                last_conv.weight /= len(blocks) ** 0.5

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return torch.flatten(self.avgpool(x), 1)  # (N, feature_dim)
