"""What the layers of a network do to a signal, and what of its gradient comes back (He et al. 2015, Figure 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr.data.shapes import draw_shapes
from simclr.encoders import RESNETS
from simclr.resnet import BasicBlock, Bottleneck, ResNet, Shortcut

IMAGES, SIDE = 256, 32


def responses_at_start(encoder: str, *, shortcut: Shortcut, seed: int) -> tuple[dict[str, float], dict[str, list]]:
    """One forward and one backward pass of a network that has not been trained, on the built-in images.

    Args:
        encoder: resnet8 ... resnet110.
        shortcut: A, B, C or none.
        seed: of the weights.
    Returns:
        Metrics: "block_change", the mean over blocks that keep the shape of |out - in| / |in|, for maps about their
        mean; "gradient_decades", the decades from the gradient of the last convolution's weights to the first block's;
        "response_std", the mean standard deviation of what the BatchNorms after 3 x 3 convolutions give.
        And curves over depth, of the same by layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(RESNETS[encoder], width=1.0, stem="small", shortcut=shortcut, zero_init=False, norm="batch")
        classifier = nn.Linear(network.feature_dim, 10)
    images, labels = draw_shapes(IMAGES, SIDE)
    x = (images.float() / 255 - 0.5) / 0.25
    changes: list[float] = []
    hooks = [
        block.register_forward_hook(lambda _, given, out: changes.append(_change(given[0], out)))
        for block in network.modules()
        if isinstance(block, BasicBlock | Bottleneck) and _keeps_shape(block)
    ]
    with layer_responses(network) as stds:
        loss = F.cross_entropy(classifier(network.train()(x)), labels % 10)
    loss.backward()
    for hook in hooks:
        hook.remove()
    convolutions = [m for _, m in _layers(network)]
    norms = [float(conv.weight.grad.norm()) for conv in convolutions if conv.weight.grad is not None]
    decades = torch.tensor(norms).log10()
    metrics = {
        "block_change": sum(changes) / len(changes),
        "gradient_decades": float(decades[0] - decades[-1]),
        "response_std": sum(stds) / len(stds),
    }
    curves = {
        "gradient": [[float(i + 1), norm] for i, norm in enumerate(norms)],
        "block_change": [[float(i + 1), change] for i, change in enumerate(changes)],
        "response_std": [[float(i + 1), std] for i, std in enumerate(stds)],
    }
    return metrics, curves


class layer_responses:
    """Within it, the standard deviation of what each BatchNorm after a 3 x 3 convolution gives, layer after layer."""

    def __init__(self, network: nn.Module):
        self.network, self.stds = network, list[float]()

    def __enter__(self) -> list[float]:
        norms = [dict(self.network.named_modules())[name.replace("conv", "bn")] for name, _ in _layers(self.network)]
        self.hooks = [
            norm.register_forward_hook(lambda _, given, out: self.stds.append(float(out.detach().std())))
            for norm in norms
        ]
        return self.stds

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _layers(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """The 3 x 3 convolutions of the blocks, in their order."""
    found = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return [(name, m) for name, m in found if "." in name]


def _keeps_shape(block: BasicBlock | Bottleneck) -> bool:
    last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
    return block.conv1.in_channels == last.out_channels and block.conv1.stride == block.conv2.stride == (1, 1)


def _change(before: Tensor, after: Tensor) -> float:
    before, after = before.detach(), after.detach()
    return float((after - before).norm() / (before - before.mean()).norm())
