"""Predictions of single images inside a record: a word of text, so that two records can be compared image by image."""

import base64
import binascii
import zlib

import numpy as np
import torch
from torch import Tensor


def packed(numbers: Tensor) -> str:
    """Class numbers as text: little-endian uint32, compressed, base64.

    Args:
        numbers: (N,) integer, 0 .. 2^32 - 1.
    """
    return base64.b64encode(zlib.compress(numbers.cpu().numpy().astype("<u4").tobytes(), 9)).decode()


def unpacked(text: str) -> Tensor:
    """What `packed` was given, (N,) int64.

    Raises:
        ValueError: if the text is not of `packed`.
    """
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
        return torch.from_numpy(np.frombuffer(content, dtype="<u4").astype(np.int64))
    except (zlib.error, binascii.Error, TypeError) as error:
        raise ValueError(f"not packed predictions: {error}") from error
