"""A training step in micro-batches: the exact gradient of the whole batch in the memory of one."""

from contextlib import nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from simclr.training.gradient_cache import backward_in_parts
from simclr.training.network import replays_graphs


def step_in_parts(module: LightningModule, images: Tensor, index: Tensor, batch_idx: int) -> Tensor:
    """A step with a gradient cache: see `simclr.training.gradient_cache`. Views are made anew in its second pass.

    Args:
        module: a method that has `make_views`, `project`, to (views * m, D), and `loss`, of all projections, view after
            view.
        images: (n, C, H, W).
        index: (n,).
        batch_idx: of the epoch.
    Returns:
        What `training_step` returns: its value is the loss, its backward adds the last micro-batch's gradient.
    """
    trainer, size = module.trainer, module.hparams.micro_batch_size
    profile = trainer.profiler.profile
    micro_batches = [
        lambda pair=pair: module.project(module.make_views(*pair))
        for pair in zip(images.split(size), index.split(size), strict=True)
    ]
    stats = []

    def loss_of(z: list[Tensor]) -> Tensor:
        by_view = [torch.cat(view) for view in zip(*(part.chunk(module.views.count) for part in z), strict=True)]
        loss, found = module.loss(torch.cat(by_view))
        stats.append(found)
        return loss

    def backward(surrogate: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        surrogate = surrogate / trainer.accumulate_grad_batches  # as Lightning does to what a step returns
        # One all-reduce a step, that of the last part.
        with getattr(trainer.strategy, "block_backward_sync", nullcontext)(), profile("backward"):
            (scaler.scale(surrogate) if scaler else surrogate).backward()

    cached = backward_in_parts(micro_batches, loss_of, backward, (module,), profile)
    module.step_log.add(module, batch_idx, stats[0], cached.error)
    return cached.last


def clears_gradients(settings: Any) -> bool:
    """Whether a step clears gradients as it begins; Lightning does it before backward, after `training_step`."""
    return settings.get("micro_batch_size") is not None or replays_graphs(settings)


def begin_step(module: LightningModule, index: Tensor, batch_idx: int) -> None:
    """At the start of `training_step`: refuses labels in place of numbers, clears gradients where Lightning cannot.

    Args:
        module: the method that trains.
        index: (n,), the images' numbers in the data set.
        batch_idx: of the epoch, from 0.
    Raises:
        ValueError: if the first batch of an epoch repeats a number.
    """
    if batch_idx == 0 and len(index.unique()) < len(index):
        raise ValueError(
            "a batch is (images, index) with the images' numbers in the data set, but numbers repeat in the first "
            "batch. Are they labels? simclr.data.ImageData yields what is needed."
        )
    _clear_gradients(module, batch_idx)


def _clear_gradients(module: LightningModule, batch_idx: int) -> None:
    """Before the first forward pass of an optimiser's step, where `clears_gradients`."""
    settings, accumulated = module.hparams, module.trainer.accumulate_grad_batches
    if not clears_gradients(settings) or batch_idx % accumulated:
        return
    added_up = settings.get("micro_batch_size") is not None or accumulated > 1
    module.optimizers(use_pl_optimizer=False).zero_grad()
    # The gradients of a CUDA graph lie in memory that its next run overwrites, unless they are added to others.
    for p in module.parameters() if replays_graphs(settings) and added_up else ():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
