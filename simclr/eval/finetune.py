"""Fine-tuning: all weights of the encoder trained on with labels, from its representation h (Chen et al. 2020, appendix
B.5 and B.8)."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F

from simclr.eval.classifier import score_classifier
from simclr.eval.features import check_split, extract_features
from simclr.eval.linear import TRAINING_VIEW, crop_and_flip
from simclr.eval.protocol import FrozenFeatures, Outcome
from simclr.seeding import epoch_order


def finetune(
    frozen: FrozenFeatures,
    *,
    epochs: int = 30,
    batch_size: int = 256,
    base_lr: float = 0.05,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """The protocol: a linear classifier and every weight of a copy of the encoder, by SGD on crops and flips.

    Nesterov momentum .9, cosine to zero, no warm-up, the last epoch's network scored. Beside it the random encoder says
    what the same training reaches from scratch. The encoder itself stays as it is.

    Args:
        frozen: the encoder and its features.
        epochs: over the training images.
        batch_size: images a step.
        base_lr: per 256 images.
        weight_decay: L2 on all weights but biases and those of normalisation.
        seed: of the order of the images and their crops.
    Raises:
        ValueError: if a setting is out of range or there are no test images to pass through the trained network.
        RuntimeError: if training diverges.
    """
    if min(epochs, batch_size) < 1 or not base_lr > 0 or not weight_decay >= 0:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}, base_lr={base_lr}, weight_decay={weight_decay}: needed counts "
            ">= 1, base_lr > 0 and a decay >= 0."
        )
    if frozen.test_images is None:
        raise ValueError("fine-tuning passes the test images through a network of its own, and there are none.")
    num_classes, labels = check_split(*frozen.train, *frozen.test), frozen.train[1]
    device, size = torch.device(frozen.device), len(labels)
    network = copy.deepcopy(frozen.encoder).to(device).requires_grad_()
    augmentation = crop_and_flip(network).to(device)
    classifier = torch.nn.Linear(frozen.train[0].shape[1], num_classes).to(device)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    weights = [*network.parameters(), *classifier.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = base_lr * batch_size / 256
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, nesterov=True)
    full = [part for part in torch.arange(size).split(batch_size) if len(part) > 1]  # BatchNorm takes no single image
    steps, step = epochs * len(full), 0
    with torch.random.fork_rng(), torch.enable_grad():  # dropout, where an encoder has it
        torch.manual_seed(seed)
        network.train()
        for epoch in range(epochs):
            losses = []
            order = epoch_order(seed, epoch, size)
            for part in full:
                index = order[part]
                images = frozen.train_images.images(index).to(device, non_blocking=True)
                view = augmentation.view(images, index, epoch, seed, TRAINING_VIEW)
                loss = F.cross_entropy(classifier(network(view)), labels[index].to(device))
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                step += 1
            if not torch.stack(losses).isfinite().all():
                raise RuntimeError(f"fine-tuning diverged in epoch {epoch}: lower finetune.base_lr={base_lr}.")
    features, test_labels = extract_features(network, frozen.test_images, device=device)
    probe = score_classifier(
        classifier.weight.detach(), classifier.bias.detach(), features, test_labels, method="sgd", iterations=steps
    )
    return Outcome(probe.predictions, probe.top5, {"steps": steps})
