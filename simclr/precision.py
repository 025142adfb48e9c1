"""How exactly a device multiplies matrices of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Operands = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def rounding(operands: Operands = "float32") -> Iterator[None]:
    """Within it, matrix products of float32 tensors round their operands to `operands` where the device can.

    The settings of a training run (`torch.set_float32_matmul_precision` and the like) do not count inside. They are
    PyTorch's, for the process; they are put back.

    Args:
        operands: float32: exact products. tf32 (CUDA): 10 bits of mantissa. bfloat16 (CPUs with bfloat16 arithmetic;
            tf32 on CUDA, whose libraries round no further by themselves): 7 bits. Sums are float32 in any case.
    """
    cuda, cpu = _matmul_settings()
    before, legacy = (cuda.fp32_precision, cpu.fp32_precision), _legacy_precision()
    wanted = {"float32": ("ieee", "highest"), "tf32": ("tf32", "high"), "bfloat16": ("tf32", "medium")}[operands]
    try:
        # torch keeps the older setting beside the newer one. Where they disagree its compiler dies of looking
        # (pytorch issue 166387), and tiles and views may be compiled within.
        if legacy != wanted[1]:
            torch.set_float32_matmul_precision(wanted[1])
        cuda.fp32_precision = wanted[0]
        cpu.fp32_precision = "bf16" if operands == "bfloat16" else "ieee"
        yield
    finally:
        if legacy != wanted[1]:
            torch.set_float32_matmul_precision(legacy)
        cuda.fp32_precision, cpu.fp32_precision = before


def _legacy_precision() -> str:
    """As `torch.set_float32_matmul_precision` left it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer settings were used since
        return "highest"


def is_exact() -> bool:
    """Whether matrix products of float32 are exact as the process is set."""
    return all(setting.fp32_precision in ("ieee", "none") for setting in _matmul_settings())


def _matmul_settings() -> tuple[Any, Any]:
    """Of CUDA and of CPUs."""
    # torch puts an object with this attribute in the place of the module mkldnn.
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Numbers and matrix products in float32, whatever autocast, default dtype and rounding the training has chosen.

    Half precision would shift a crop by parts of a pixel and bend the colors; products in TF32 or bf16 cost up to 0.05.
    """
    before = torch.get_default_dtype()  # Lightning sets it to that of bf16-true and the like
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device_type, enabled=False), rounding():
            yield
    finally:
        torch.set_default_dtype(before)
