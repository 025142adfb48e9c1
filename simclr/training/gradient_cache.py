"""The exact gradient of a batch whose activations do not fit: two passes over micro-batches (Gao et al. 2021).

A contrastive loss needs the projections of the whole batch at once, but only the projections. The first pass makes
them, micro-batch by micro-batch, without keeping activations; the loss of all of them gives its gradient with respect
to each; the second pass makes each micro-batch again, with activations, and sends its part of that gradient back. One
micro-batch needs no second pass: its activations are kept while the loss is computed. So K micro-batches cost K - 1
forward passes more than one graph over all of them, and the activations of one.

The result is that of one graph over the same micro-batches: in particular, BatchNorm's statistics are those of a
micro-batch, and its running statistics move once for each, in order.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Cached(NamedTuple):
    """What a step with a gradient cache leaves to do.

    Attributes:
        last: scalar whose value is the loss; its backward adds the last micro-batch's part, the only one missing.
        error: scalar, the largest difference between a projection of the first pass and of the second: 0, or rounding,
            if the step was exact.
    """

    last: Tensor
    error: Tensor


def backward_in_parts(
    micro_batches: Sequence[Callable[[], Tensor]],
    loss_of: Callable[[list[Tensor]], Tensor],
    backward: Callable[[Tensor], None],
    modules: Sequence[nn.Module],
    profile: Callable[[str], AbstractContextManager] = nullcontext,
) -> Cached:
    """Loss and gradient of a whole batch, with the activations of one micro-batch at a time.

    Args:
        micro_batches: each makes the projections of one micro-batch, (n, D), the same ones whenever it is called.
            Random numbers of the global generators (dropout, for one) are replayed.
        loss_of: all projections, one tensor a micro-batch, to the scalar loss.
        backward: of a scalar, into the parameters' gradients; called for all micro-batches but the last.
        modules: what the micro-batches run through; their buffers move in the second pass only.
        profile: entered as `profile("loss")` around the loss and its gradient.
    Returns:
        See Cached.
    """
    count = len(micro_batches)
    states: list[list[tuple[torch.device, Tensor]]] = [[] for _ in micro_batches]
    projections: dict[int, Tensor] = {}
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    devices = sorted({p.device for module in modules for p in module.parameters()}, key=str)
    with torch.no_grad():
        for k in range(1, count):
            states[k] = _random_states(devices)
            projections[k] = micro_batches[k]()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    # Autocast keeps the weights it has rounded, here without their gradient.
    torch.clear_autocast_cache()
    kept = micro_batches[0]()  # the one that needs no second pass
    after = _random_states(devices)
    projections[0] = kept.detach()

    # In float32: in 16 bits the unscaled gradient of a large batch would underflow.
    in_order = [projections[k] for k in range(count)]
    leaves = [z.to(torch.promote_types(z.dtype, torch.float32)).requires_grad_() for z in in_order]
    with _no_autocast(devices), profile("loss"):
        loss = loss_of(leaves)
        gradients = torch.autograd.grad(loss, leaves)

    error = torch.zeros((), device=loss.device)
    for k in range(count):
        if k:
            torch.clear_autocast_cache()
            _set_random_states(states[k])
            kept = micro_batches[k]()
            error = torch.maximum(error, (kept.detach() - projections[k]).abs().max().float())
        # Its gradient with respect to z is the loss's.
        surrogate = (kept.to(gradients[k].dtype) * gradients[k]).sum()
        if k < count - 1:
            with _no_autocast(devices):
                backward(surrogate)
            del kept, surrogate
    _set_random_states(after)
    return Cached(loss.detach() + (surrogate - surrogate.detach()), error)


def _no_autocast(devices: Sequence[torch.device]) -> torch.autocast:
    """Backward rounds as forward did, not as an autocast around both says."""
    return torch.autocast(devices[0].type, enabled=False)


def _random_states(devices: Sequence[torch.device]) -> list[tuple[torch.device, Tensor]]:
    """The global generators' states: the CPU's, and those of the devices that have their own.

    Not by `get_device_states` of torch.utils.checkpoint: it enters `torch.mps.device`, which torch 2.14 does not have,
    so that it fails on Macs; and it keeps a state for each tensor given to it, not for each device.
    """
    states = [(torch.device("cpu"), torch.get_rng_state())]
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    return states + [(device, torch.get_device_module(device).get_rng_state(device)) for device in others]


def _set_random_states(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
