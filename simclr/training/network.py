"""Views through encoder and head in one forward pass for each size, compiled if asked for."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
        """All views of a size in one forward pass, so that they share BatchNorm's statistics.

        Args:
            views: (n, C, S, S) each, those of a size one after the other.
            dtype: of the weights; views are float32, under Lightning's bf16-true, 16-true and 64-true they are not.
        Returns:
            (views * n, D), view after view.
        """
        groups = [tuple(of_a_size) for _, of_a_size in itertools.groupby(views, key=lambda view: view.shape[-1])]
        of_groups = [self._run(torch.cat(group).to(dtype), len(groups)) for group in groups]
        return of_groups[0] if len(groups) == 1 else torch.cat(of_groups)

    def _run(self, x: Tensor, sizes: int) -> Tensor:
        if self.settings.get("channels_last", True):
            x = x.contiguous(memory_format=torch.channels_last)
        mode = self.settings.get("compile_encoder")
        if not mode:
            return self.function(x)
        if self._compiled is None:  # not the whole step: logging inside it broke before
            # Of two sizes torch would make one function for any, which is slower than one for each.
            compiling: Any = torch.compile if sizes == 1 else partial(torch.compile, dynamic=False)
            self._compiled = compiling(self.function, mode=mode if isinstance(mode, str) else None)
        if not replays_graphs(self.settings):
            return self._compiled(x)
        # The next run overwrites this one's result. By itself torch takes any compiled function for the next step.
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x).clone()
