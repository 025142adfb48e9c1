"""How many operations a training step has, counted and not timed."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simclr.image_sizes import on_meta
from simclr.training.method import Method


def count_operations(model: Method, images: int) -> tuple[int, int] | None:
    """Floating-point operations of encoder and head, forward and backward, for all views of images; None if unknown.

    Counted in a run on shapes alone: matrix products and convolutions, which are nearly all.
    """
    network = nn.Sequential(*(on_meta(part) for part in model.networks)).train()
    forward = whole = 0
    for views, side in model.views.groups(0):
        counter = FlopCounterMode(display=False)
        try:
            with torch.enable_grad(), counter:
                z = network(torch.empty(views * images, model.hparams.get("channels", 3), side, side, device="meta"))
                forward += counter.get_total_flops()
                z.sum().backward()
        except RuntimeError:  # not on shapes alone: no kernel, or a value is read; all else the first step says
            return None
        whole += counter.get_total_flops()
    return forward, whole - forward
