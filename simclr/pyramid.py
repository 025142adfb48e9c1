"""The maps of an encoder's stages, for what needs to know where things are: detection, segmentation."""

from torch import Tensor, nn

from simclr.resnet import ResNet


class FeaturePyramid(nn.Module):
    """Images (N, C, H, W), normalised -> {"c2": (N, C2, H / 4, W / 4), ..., "c5": (N, C5, H / 32, W / 32)}.

    C2 to C5 are the outputs of a ResNet's four stages (Lin et al. 2017, Feature Pyramid Networks); the CIFAR networks
    have three, C2 to C4. Strides are those of the stem: a quarter of the above behind a small one.

    Args:
        encoder: one of our ResNets; its weights are shared, not copied.
    Attributes:
        channels: of each map, by its name.
        strides: pixels of the image to one of each map, by its name.
        transform: the encoder's.
    Raises:
        ValueError: for another network.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        if not isinstance(encoder, ResNet):
            raise ValueError(
                f"a feature pyramid is made of the stages of a ResNet, resnet8 to resnet152, not of a "
                f"{type(encoder).__name__}. For timm's networks: timm.create_model(NAME, features_only=True)."
            )
        stem = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool)
        self.stem, stages = stem, (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        self.stages = nn.ModuleDict(
            {f"c{number}": stage for number, stage in enumerate(stages, 2) if isinstance(stage, nn.Sequential)}
        )
        per_stage = {"c2": 1, "c3": 2, "c4": 4, "c5": 8}
        stride = int(encoder.conv1.stride[0]) * (2 if isinstance(encoder.maxpool, nn.MaxPool2d) else 1)
        last = len(self.stages) + 1
        self.channels = {name: encoder.feature_dim >> (last - int(name[1])) for name in self.stages}
        self.strides = {name: stride * per_stage[name] for name in self.stages}
        self.transform = getattr(encoder, "transform", None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps by name, the largest first."""
        x, maps = self.stem(images), {}
        for name, stage in self.stages.items():
            maps[name] = x = stage(x)
        return maps
