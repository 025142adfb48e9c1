"""What is borrowed from torch and torchvision though it is not public, one function each; tests/test_internals.py
says whether it is still there and still means this."""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

# The one base of every batch normalisation, synchronised or not, of any number of dimensions.
BatchNorm = nn.modules.batchnorm._BatchNorm


def storage_id(tensor: Tensor) -> int:
    """What tells the memory of one tensor from that of others, also on the meta device, where addresses are 0."""
    return tensor.untyped_storage()._cdata


def shared_storage(count: int) -> torch.UntypedStorage:
    """So many bytes that other processes can be handed: a tensor filled there need not be copied for them."""
    return torch.UntypedStorage._new_shared(count)


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AMX or AVX512-BF16. The public list of features has neither."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def non_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether a NaN or an infinity is in any of some tensors of one device: (), there, 1 or, if so, infinity.

    The one kernel by which torch.amp.GradScaler looks at gradients; sums of their absolute values take five times as
    long. It multiplies them too: by one, which leaves every bit of what is finite.
    """
    device = tensors[0].device
    found, one = torch.zeros((), device=device), torch.ones((), device=device)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(alike, found, one)
    return one / (one - found)


def has_image_decoders() -> bool:
    """Whether torchvision's own decoders were built and can be called without its Python around them."""
    return torchvision.extension._has_ops()
