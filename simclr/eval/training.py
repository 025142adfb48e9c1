"""Training with labels on images at hand: the one loop of fine-tuning, distillation and the ablations' classifiers.

Whole runs with labels, which go on after a kill on any number of devices, are those of `simclr.supervised`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EpochDone(NamedTuple):
    """Where a training stands at the end of an epoch, or of a part of one where it ends.

    Attributes:
        epoch: from 0.
        step: of the optimiser, all so far.
        wrong: of the images seen in it how many were taken for another class; 0 where targets are no classes.
        seen: images.
    """

    epoch: int
    step: int
    wrong: float
    seen: int


def train_epochs(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[tuple[Tensor, Any]]],
    rate: Callable[[int], float],
    *,
    steps: int,
    per_epoch: int,
    step: int = 0,
    loss: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    of: str = "training",
    hint: str = "",
) -> Iterator[EpochDone]:
    """Train, and hand over at the end of each epoch; nothing happens before the first is asked for.

    Args:
        network: views -> logits; in training mode throughout.
        optimizer: of its weights; all groups have the same rate.
        batches: epoch -> (views (n, 3, S, S), target) on the device, `per_epoch` of them.
        rate: step -> learning rate.
        steps: in all.
        per_epoch: steps of an epoch.
        step: those taken before; the end of an epoch.
        loss: (logits, target) -> scalar.
        of, hint: what trains, and what to do about a loss that is not finite, for its error.
    Raises:
        RuntimeError: at the end of an epoch with a loss that is not finite.
    """
    while step < steps:
        epoch, seen = step // per_epoch, 0
        losses, wrong = list[Tensor](), list[Tensor]()
        network.train()
        for views, target in islice(batches(epoch), steps - step):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            with torch.enable_grad():  # callers may hold a frozen encoder under no_grad
                logits = network(views)
                value = loss(logits, target)
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            losses.append(value.detach())
            if isinstance(target, Tensor) and target.dtype == torch.int64:
                wrong.append((logits.detach().argmax(1) != target).sum())
            seen, step = seen + len(logits), step + 1
        # Asked once an epoch: each question waits for the device.
        if not torch.stack(losses).isfinite().all():
            raise RuntimeError(f"{of} diverged in epoch {epoch}{hint and f': {hint}'}.")
        yield EpochDone(epoch, step, float(torch.stack(wrong).sum()) if wrong else 0.0, seen)


class WithHead(nn.Module):
    """An encoder with the first layers of its projection head, as SimCLRv2 fine-tunes it (Chen et al. 2020b).

    Args:
        encoder: images -> h, with its preprocessing.
        layers: h -> the output of the last of these layers; none for h itself.
    Attributes:
        feature_dim: size of what comes out.
        image_size, mean, std: those of the encoder, where it has them.
    """

    def __init__(self, encoder: nn.Module, layers: nn.Sequential | None, feature_dim: int):
        super().__init__()
        self.encoder, self.layers = encoder, nn.Sequential() if layers is None else layers
        last: Any = self.layers[-1] if len(self.layers) else None
        self.feature_dim: int = feature_dim if last is None else last.linear.out_features
        fed_as(self, encoder)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, feature_dim)."""
        return self.layers(self.encoder(images))


def fed_as(network: nn.Module, encoder: nn.Module) -> None:
    """Let a network be given the images that an encoder is given: size, normalisation, channels.

    Args:
        network: is told.
        encoder: says so by `image_size`, `mean` and `std`, where it has them.
    """
    for name in ("image_size", "mean", "std"):
        if getattr(encoder, name, None) is not None:
            setattr(network, name, getattr(encoder, name))


def head_layers(head: nn.Module | None, count: int) -> nn.Sequential | None:
    """The first layers of a projection head.

    Args:
        head: of a run; None where there is none, as for raw pixels.
        count: of them.
    Returns:
        None for no layers, or of no head.
    Raises:
        ValueError: if the head has fewer.
    """
    if head is None or count == 0:
        return None
    layers: Any = head.layers
    if count > len(layers):
        raise ValueError(f"from_layer={count}: the run's projection head has {len(layers)} layers. Use fewer.")
    return layers[:count]
