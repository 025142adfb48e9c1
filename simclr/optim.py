"""Optimisation as in google-research/simclr: LARS, parameter groups, learning-rate scaling, warm-up and cosine.

The loss here is a mean over 2N anchors, as in the paper's equation 1; in that code it is a sum of two means over N,
twice as much. LARS divides by the gradient's length, so that a weight decay there is half of it here, and biases and
normalisation, which have no trust ratio, have half the rate here.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

OptimizerName = Literal["lars", "sgd", "adamw"]
LrScaling = Literal["linear", "sqrt", "none"]


class Rates(NamedTuple):
    """What goes with an optimiser where nothing is said.

    Attributes:
        base_lr, lr_scaling: see `scale_lr`.
        weight_decay: L2 for lars and sgd, decoupled for adamw.
    """

    base_lr: float
    lr_scaling: LrScaling
    weight_decay: float


# Each learns from a thousand images in batches of 32 as from many in batches of 512.
RATES: dict[OptimizerName, Rates] = {
    "lars": Rates(0.075, "sqrt", 1e-4),  # Chen et al. 2020, appendix B.1: for short trainings and batches below 4096
    "sgd": Rates(0.005, "sqrt", 5e-4),  # at batch 512 that of dkobak/simclr-cifar10 for 100 epochs
    "adamw": Rates(4e-3, "none", 1e-2),
}


def default_rates(optimizer: OptimizerName, base_lr: float | None = None) -> Rates:
    """What goes with an optimiser where nothing, or nothing but `base_lr`, is said."""
    own = RATES[optimizer]
    if base_lr is None:
        return own
    # Who gives a rate means it as published ones are meant: per 256 images, and AdamW's as it is.
    return own._replace(base_lr=base_lr, lr_scaling="none" if optimizer == "adamw" else "linear")


def default_warmup(epochs: float) -> float:
    """Epochs of warm-up of a run of this many: ten, as in the paper, but at most a tenth of the run."""
    return min(10.0, epochs / 10)


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a layer-wise trust ratio (You et al. 2017), as in google-research/simclr.

    For each weight w with gradient g: g' = g + weight_decay w; trust = eta |w| / |g'| (1 where either norm is 0);
    v = momentum v + lr trust g'; w = w - v. The learning rate and the trust ratio stand *inside* the velocity, so a
    change of learning rate acts on new gradients only.

    Args:
        params: parameters or groups of them. A group may set `trust=False`: plain momentum SGD for its parameters
            (biases and normalisation), and its own `weight_decay`.
        lr: learning rate >= 0.
        momentum: of the velocity, in [0, 1).
        weight_decay: L2 coefficient >= 0, added to the gradient before the trust ratio.
        eta: the trust coefficient > 0.
        nesterov: step by momentum v + lr trust g' in place of v.
    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        nesterov: bool = False,
        trust: bool = True,
    ):
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or eta <= 0:
            raise ValueError(
                f"LARS needs lr >= 0, momentum in [0, 1), weight_decay >= 0 and eta > 0; "
                f"got lr={lr}, momentum={momentum}, weight_decay={weight_decay}, eta={eta}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "nesterov": nesterov,
            "trust": trust,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for all parameters that have a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step_group(group, weights)
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        # torch._foreach_*: a few launches for a whole network, in place of several for each parameter.
        grads: list[Tensor] | tuple[Tensor, ...] = [p.grad for p in weights if p.grad is not None]  # all: see step
        if group["weight_decay"] > 0:
            grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        if group["trust"]:
            w, g = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(grads))  # (weights,) each
            trust = (group["eta"] * w / g).masked_fill_((w == 0) | (g == 0), 1)
            scaled = torch._foreach_mul(grads, (trust * group["lr"]).unbind())
        else:
            scaled = torch._foreach_mul(grads, group["lr"])
        velocities = []
        for p in weights:
            state = self.state[p]
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p)
            velocities.append(state["velocity"])
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, scaled)
        if group["nesterov"]:
            torch._foreach_add_(scaled, velocities, alpha=group["momentum"])
            torch._foreach_sub_(weights, scaled)
        else:
            torch._foreach_sub_(weights, velocities)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, which decay and take LARS's trust ratio, and the rest, which do neither.

    Args:
        module: its parameters that require a gradient are grouped.
        weight_decay: for the weights.
    Returns:
        Groups with `params`, `weight_decay` and `trust`; an empty one is left out.
    """
    # No decay and no trust ratio for 1-D parameters (biases, BN), as in google-research/simclr.
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "trust": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "trust": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: OptimizerName, module: nn.Module, *, lr: float, weight_decay: float, momentum: float, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of a run over `parameter_groups`.

    Args:
        name: `lars`, `sgd` (Nesterov when momentum > 0) or `adamw`.
        module: whose parameters are optimised.
        lr: learning rate after scaling (see `scale_lr`).
        weight_decay: L2 for lars and sgd, decoupled for adamw.
        momentum: of lars and sgd; adamw has its usual betas.
        fused: let sgd and adamw update all weights in one kernel, two to four times faster on a CPU too. Not for
            Lightning's gradient clipping under mixed precision. (LARS works on all weights at once in any case.)
    """
    groups = parameter_groups(module, weight_decay)
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    for group in groups:
        group.pop("trust")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused or None)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    raise ValueError(f"unknown optimizer {name!r}. Choose from lars, sgd, adamw.")


def scale_lr(base_lr: float, batch_size: int, scaling: LrScaling) -> float:
    """The learning rate of a global batch (Chen et al. 2020, appendix B.1).

    Args:
        base_lr: per 256 images for `linear`, per image for `sqrt`, the learning rate itself for `none`.
        batch_size: images in the global batch.
        scaling: `linear`: base_lr x batch_size / 256; `sqrt`: base_lr x sqrt(batch_size); `none`: base_lr.
    """
    factors = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    if scaling not in factors:
        raise ValueError(f"unknown lr_scaling {scaling!r}. Choose from {', '.join(factors)}.")
    return base_lr * factors[scaling]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """The share of the full learning rate used by a step: a linear warm-up, then half a cosine to zero.

    Args:
        step: 0 for the first step. Step warmup_steps - 1 is the first at the full rate; at total_steps it would be 0.
        warmup_steps: length of the warm-up; a run that ends within it never reaches the full rate.
        total_steps: length of the run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
