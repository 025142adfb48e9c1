"""How exactly a device multiplies matrices of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Operands = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def products(operands: Operands = "float32") -> Iterator[None]:
    """Within it, matrix products of float32 tensors round their operands to `operands` where the device can.

    The settings of a training run (`torch.set_float32_matmul_precision` and the like) do not count inside. They are
    PyTorch's, for the process; they are put back.

    Args:
        operands: float32: exact products. tf32 (CUDA): 10 bits of mantissa. bfloat16 (CPUs with bfloat16 arithmetic;
            tf32 on CUDA, whose libraries round no further by themselves): 7 bits. Sums are float32 in any case.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision = "ieee" if operands == "float32" else "tf32"
        cpu.fp32_precision = "bf16" if operands == "bfloat16" else "ieee"
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def is_exact() -> bool:
    """Whether matrix products of float32 are exact as the process is set."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return all(setting.fp32_precision in ("ieee", "none") for setting in settings)
