"""What a training step needs of a device's memory, before it runs: by a forward pass on shapes alone."""

import os
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from simclr import container
from simclr.image_sizes import on_meta
from simclr.torch_internals import storage_id
from simclr.training.method import Method

# Beyond what backward keeps, a step holds gradients of activations and a kernel's workspace: one or two more of the
# largest activations. Measured on a CPU, see tests/test_memory.py.
_TRANSIENT_ACTIVATIONS = 3
# tests/test_memory.py holds the estimate to 0.6 to 1.6 times what a step takes. At twice the memory, with a margin for
# networks that were not measured, a step cannot fit; from three quarters of it on it may not.
_CERTAIN, _DOUBTFUL = 2.0, 0.75
_STATES = {"lars": 1, "sgd": 1, "adamw": 2}  # numbers an optimiser keeps for each weight


class Memory(NamedTuple):
    """Bytes on one device at the peak of a step; an estimate.

    Attributes:
        activations: what the encoder and the head keep for backward, of the images at hand at a time.
        views: the views of those images.
        weights: with their gradients and the optimiser's state.
        loss: projections and tiles.
    """

    activations: int
    views: int
    weights: int
    loss: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def estimate(
    model: Method, images: int, at_a_time: int | None = None, world_size: int = 1, precision: str = "32-true"
) -> Memory:
    """Memory of a step: within a third for the networks it was measured with, ResNets of 0.1 to 25 M weights.

    Args:
        model: as configured; its weights are not looked at.
        images: of one device.
        at_a_time: of them in a micro-batch; all if None.
        world_size: devices.
        precision: Lightning's name of it.
    """
    hparams = model.hparams
    at_a_time = at_a_time or images
    views_of_each = model.views.count
    groups = [(count * at_a_time, side) for count, side in model.views.groups()]
    views = sum(rows * side**2 for rows, side in groups) * hparams.get("channels", 3) * 4
    width = 2 if precision.startswith(("16", "bf16")) else 8 if precision.startswith("64") else 4
    kept, largest = zip(*(_activations(model, rows, side, width) for rows, side in groups), strict=True)
    z_dim: Any = getattr(model.networks[-1], "out_dim", model.encoder.feature_dim)
    numbers = sum(p.numel() for p in model.parameters())
    per_weight = 2 + _STATES[hparams.optimizer] + (world_size > 1)  # DDP's buckets are one more copy of the gradient
    everyone = views_of_each * images * world_size
    loss = everyone * z_dim * 4 * 3 + views_of_each * images * z_dim * 4 * 4
    of_weight = width if precision.endswith("true") else 4
    return Memory(sum(kept) + _TRANSIENT_ACTIVATIONS * max(largest), 2 * views, numbers * of_weight * per_weight, loss)


def _activations(model: Method, rows: int, side: int, number_bytes: int) -> tuple[int, int]:
    """Bytes that backward keeps of a forward pass of `rows` views of a side, and of the largest tensor among them."""
    network = nn.Sequential(*(on_meta(part) for part in model.networks)).train()
    weights = {storage_id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, tuple[int, object]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage, place = tensor.untyped_storage(), storage_id(tensor)
        if place not in weights:
            scale = number_bytes / 4 if tensor.is_floating_point() else 1
            kept[place] = int(storage.nbytes() * scale), storage  # held, so that no other gets its address
        return tensor

    x = torch.empty(rows, model.hparams.get("channels", 3), side, side, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        z = network(x)
    sizes = [size for size, _ in kept.values()]
    del z
    return sum(sizes), max(sizes, default=0)


def check_memory(
    model: Method, device: torch.device, images: int, world_size: int, here: int, precision: str, refuse: bool = True
) -> str:
    """One line on the memory of a step, for people; empty if it cannot be told.

    Args:
        device: of this process.
        images: of one device.
        world_size: devices in all.
        here: devices on this machine, which share the memory of CPUs.
        precision: Lightning's name of it.
        refuse: False to warn, too, of what certainly does not fit.
    Raises:
        ValueError: if a step certainly does not fit (its estimate is twice the memory), with a micro-batch that would.
    Warns:
        UserWarning: if it may not fit (three quarters), with the same.
    """
    try:
        need = estimate(model, images, model.hparams.get("micro_batch_size"), world_size, precision)
    except RuntimeError:  # not on shapes alone: no kernel, or a value is read; all else the first step says
        return ""
    line = f"about {_size(need.total)} a step: activations {_size(need.activations)}, weights {_size(need.weights)}, "
    line += f"views {_size(need.views)}, loss {_size(need.loss)}"
    have = available(device)
    if have is None:
        return line
    have //= here if device.type == "cpu" else 1
    if need.total > _DOUBTFUL * have:
        takes = (
            f"a step of {model.hparams.get('micro_batch_size') or images} images takes about {_size(need.total)} on a "
        )
        takes += f"device that has {_size(have)}"
        advice = _advise_a_smaller_step(model, have, images, world_size, precision)
        if refuse and need.total > _CERTAIN * have:
            raise ValueError(f"{takes}. {advice} To try it all the same: --check_memory false.")
        rank_zero_warn(f"{takes} and may not fit, as far as can be estimated. {advice}")
    return f"{line}; of {_size(have)}"


def _advise_a_smaller_step(model: Method, have: int, images: int, world_size: int, precision: str) -> str:
    """The largest micro-batch that fits well, as advice."""
    for size in range(images - 1, 0, -1):
        if images % size == 0:
            need = estimate(model, images, size, world_size, precision).total
            if need < _DOUBTFUL * have:
                return f"With --model.micro_batch_size {size} it takes about {_size(need)}."
    return "Use a smaller encoder or batch."


def _size(count: int) -> str:
    """Bytes for people: two digits and a unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f} {name}"
    return f"{count} bytes"


def available(device: torch.device) -> int | None:
    """Bytes of memory the device has in all, of a CPU what machine and container allow; None if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    limits = container.memory_limits()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)
