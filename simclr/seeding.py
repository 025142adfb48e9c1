"""Randomness as pure functions: what is drawn depends on what it is for, not on when or where it is drawn.

The generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter-based:
every block of four 32-bit words is a function of a key and a counter, without state. The seed is the key; what the
numbers are for is the counter. Only integer operations and one exact conversion are used, so every device gives the
same bits.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
# What a counter is for, in the top byte of its last word, so that uses never share numbers.
_VIEWS, _ORDER, _STREAM, _IN_STREAM = 0, 1, 2, 3


def philox(counter: Tensor, seed: int, rounds: int = 10) -> Tensor:
    """Philox 4x32: four random 32-bit words for each counter.

    Args:
        counter: (..., 4) int64, each entry in [0, 2^32).
        seed: the key, in [0, 2^64).
        rounds: rounds of the bijection; 10 is the published generator.
    Returns:
        (..., 4) int64, each entry in [0, 2^32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & _MASK32, seed >> 32 & _MASK32
    for _ in range(rounds):
        # The 64-bit products wrap around as signed integers; shift and mask still read off the right halves.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _counter(*words: Tensor | int) -> Tensor:
    """A counter's four words side by side, (..., 4) int64: tensors of shapes that fit each other, and numbers."""
    tensors = [word for word in words if isinstance(word, Tensor)]
    shape = torch.broadcast_shapes(*(word.shape for word in tensors))
    counter = torch.empty(*shape, 4, dtype=torch.int64, device=tensors[0].device)
    for place, word in zip(counter.unbind(-1), words, strict=True):
        # `counter[..., 3] = 7` would be a copy to the device in torch 2.14, for which the host waits.
        place.copy_(word) if isinstance(word, Tensor) else place.fill_(word)
    return counter


def check_seed(seed: int) -> None:
    """Refuse a seed that is not an integer in [0, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} is not an integer from 0 to 2^64 - 1.")


def uniforms(seed: int, epoch: int, index: Tensor, view: int, count: int) -> Tensor:
    """Uniform random numbers for one view of each image: a pure function of (seed, epoch, image index, view number).

    Args:
        seed: the run's seed, in [0, 2^64).
        epoch: the epoch, in [0, 2^32).
        index: (N,) integer, the images' numbers in the data set, each >= 0; its device is the result's.
        view: the view's number, in [0, 2^16).
        count: how many numbers each view takes, up to 1024.
    Returns:
        (N, count) float32 in [0, 1), multiples of 2^-24.
    Raises:
        ValueError: if an argument is out of its range.
    """
    check_seed(seed)
    blocks = -(-count // 4)
    if not (0 <= epoch < 2**32 and 0 <= view < 2**16 and 1 <= blocks <= 256):
        raise ValueError(f"epoch={epoch}, view={view} or count={count} is out of range (2^32, 2^16, 1 to 1024).")
    index = index.to(torch.int64)[:, None]
    last = (_VIEWS << 24) | (view << 8) | torch.arange(blocks, device=index.device)  # (blocks,)
    counter = _counter(index & _MASK32, index >> 32, epoch, last)  # (N, blocks, 4)
    words = philox(counter, seed).flatten(1)[:, :count]  # (N, count)
    return (words >> 8).to(torch.float32) * 2.0**-24


def view_stream(seed: int, epoch: int, index: Tensor, view: int) -> Tensor:
    """The key of a long random stream for one view of each image, for draws per pixel: see `stream_uniforms`.

    Args:
        seed, epoch, index, view: as for `uniforms`.
    Returns:
        (N, 2) int64, 64 random bits: a pure function of (seed, epoch, image index, view number).
    """
    check_seed(seed)
    index = index.to(torch.int64)
    counter = _counter(index & _MASK32, index >> 32, epoch, _STREAM << 24 | view << 8)  # (N, 4)
    return philox(counter, seed)[:, :2]


def stream_uniforms(stream: Tensor, count: int) -> Tensor:
    """The first numbers of each stream.

    Args:
        stream: (N, 2) int64 from `view_stream`; its device is the result's.
        count: how many numbers each stream gives, up to 2^34.
    Returns:
        (N, count) float32 in [0, 1), multiples of 2^-24.
    """
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=stream.device)
    counter = _counter(block, stream[:, :1], stream[:, 1:], _IN_STREAM << 24)  # (N, blocks, 4)
    words = philox(counter, seed=0).flatten(1)[:, :count]  # (N, count)
    return (words >> 8).to(torch.float32) * 2.0**-24


ORDER_VERSION = 2  # of `epoch_order`; a checkpoint says by which its run was ordered
_ORDER_ROUNDS = 8  # of the Feistel network, each keyed by 64 bits
_ORDER_BITS = 6  # at least: eight rounds on halves of one or two bits would favour some orders of a handful of images
_ORDER_PART = 2**16  # places at a time, which stay in a CPU's cache


def epoch_order(seed: int, epoch: int, size: int, places: Tensor | None = None) -> Tensor:
    """The order in which an epoch visits a data set: a pure function of (seed, epoch), whatever the ranks and workers.

    A keyed permutation: any part of the order is computed by itself, without the rest, so that a set of a billion
    images costs no more memory than the places asked for. A Feistel network permutes the numbers below the next power
    of two; where it leads out of the set it is followed until it leads back (cycle walking: Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains").

    Args:
        seed: the run's seed, in [0, 2^64).
        epoch: the epoch, in [0, 2^32).
        size: how many images there are, up to 2^62.
        places: (n,) integer on the CPU, each in 0 .. size - 1: which places of the order to tell; all if None.
    Returns:
        (n,) int64 on the CPU, the images at these places; of all places, a permutation of 0 .. size - 1.
    Raises:
        ValueError: for a seed that is none, or a size out of range.
    """
    check_seed(seed)
    if not 0 <= size <= 2**62:
        raise ValueError(f"size={size} is not from 0 to 2^62.")
    bits = max(_ORDER_BITS, (size - 1).bit_length())
    keys = philox(_counter(torch.arange(_ORDER_ROUNDS), 0, epoch, _ORDER << 24), seed)[:, :2].tolist()
    places = torch.arange(size) if places is None else places.to(torch.int64)
    order = torch.empty_like(places)
    for start in range(0, len(places), _ORDER_PART):
        part = slice(start, start + _ORDER_PART)
        number = _feistel(places[part], bits, keys)
        while len(outside := (number >= size).nonzero().flatten()):
            number[outside] = _feistel(number[outside], bits, keys)
        order[part] = number
    return order


def _feistel(number: Tensor, bits: int, keys: list[list[int]]) -> Tensor:
    """A keyed permutation of the numbers below 2^bits: each half in turn is changed by a function of the other."""
    low = bits // 2
    masks = (1 << (bits - low)) - 1, (1 << low) - 1
    changed, other = number >> low, number & masks[1]
    for turn, (first, second) in enumerate(keys):
        noise = _scramble(_scramble(other ^ first) ^ second)
        changed, other = other, changed ^ (noise & masks[turn % 2])
    return changed << low | other  # an even number of turns: each half is back in its place


def _scramble(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby 2011), a bijection of 32 bits that lets each of them change all."""
    x = x ^ (x >> 16)
    x = x.mul_(0x85EBCA6B).bitwise_and_(_MASK32)  # the product wraps around; its lower half is right
    x ^= x >> 13
    x = x.mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    return x.bitwise_xor_(x >> 16)
