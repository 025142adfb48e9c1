"""Views through encoder and head in one forward pass, compiled if asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

CompileMode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # torch.compile's
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that replay them


def replays_graphs(settings: Mapping[str, Any]) -> bool:
    """Whether a method of these settings runs its network as CUDA graphs."""
    return settings.get("compile_encoder") in CUDA_GRAPHS


class Network:
    """A function of a batch of images, fed with several views at once.

    Args:
        function: (m, C, S, S) -> (m, D); what it runs is in the memory format and the dtype that training has chosen.
        settings: of the method; `channels_last` and `compile_encoder` are looked up at each call.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], settings: Mapping[str, Any]):
        self.function, self.settings = function, settings
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __call__(self, views: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """All views in one forward pass, so that they share BatchNorm's statistics.

        Args:
            views: (n, C, S, S) each.
            dtype: of the weights; views are float32, under Lightning's bf16-true, 16-true and 64-true they are not.
        Returns:
            (views * n, D), view after view.
        """
        x = torch.cat(tuple(views)).to(dtype)
        if self.settings.get("channels_last", True):
            x = x.contiguous(memory_format=torch.channels_last)
        mode = self.settings.get("compile_encoder")
        if not mode:
            return self.function(x)
        if self._compiled is None:  # not the whole step: logging inside it broke before
            self._compiled = torch.compile(self.function, mode=mode if isinstance(mode, str) else None)
        if not replays_graphs(self.settings):
            return self._compiled(x)
        # The next run overwrites this one's result. By itself torch takes any compiled function for the next step.
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x).clone()
