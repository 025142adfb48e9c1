"""How products of float32 round is set for a while, alike in both of torch's ways to set it, and put back."""

import pytest
import torch

from simclr.precision import rounding


@pytest.mark.parametrize("operands", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("process", ["untouched", "highest", "high", "medium", "ieee", "tf32"])
def test_the_older_and_the_newer_setting_agree_within(process, operands):
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    at_first = cuda.fp32_precision, cpu.fp32_precision
    older = process in ("highest", "high", "medium")
    try:
        if older:
            torch.set_float32_matmul_precision(process)
        elif process != "untouched":
            cuda.fp32_precision = process
        before = cuda.fp32_precision, cpu.fp32_precision
        with rounding(operands):
            torch.get_float32_matmul_precision()  # this look and the next raise where the two disagree
            assert cuda.allow_tf32 == (operands != "float32")
            assert cpu.fp32_precision == ("bf16" if operands == "bfloat16" else "ieee")
        assert (cuda.fp32_precision, cpu.fp32_precision) == before
        assert not older or torch.get_float32_matmul_precision() == process
    finally:
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision, cpu.fp32_precision = at_first
