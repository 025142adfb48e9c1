"""The counter-based generator against its published answers, and the properties that everything above relies on."""

import itertools
import resource
import tracemalloc
from collections import Counter

import pytest
import torch

from simclr.seeding import epoch_order, philox, stream_uniforms, uniforms, view_stream


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(torch.tensor(counter), key[0] | key[1] << 32).tolist() == list(answer)


def test_uniforms_depend_on_each_image_alone():
    index = torch.tensor([5, 0, 2**40 + 3, 17])
    whole = uniforms(1, 2, index, 0, 30)
    assert torch.equal(whole[2:], uniforms(1, 2, index[2:], 0, 30))
    assert torch.equal(whole.flip(0), uniforms(1, 2, index.flip(0), 0, 30))
    assert torch.equal(whole[:, :7], uniforms(1, 2, index, 0, 7))


@pytest.mark.parametrize(
    "other", [(2, 2, 0, 0), (1, 3, 0, 0), (1, 2, 1, 0), (1, 2, 2**32, 0), (1, 2, 0, 1), (1 + 2**32, 2, 0, 0)]
)
def test_uniforms_change_with_seed_epoch_index_and_view(other):
    def draw(seed, epoch, index, view):
        return uniforms(seed, epoch, torch.tensor([index]), view, 16)

    assert not (draw(1, 2, 0, 0) == draw(*other)).any()


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(0, 0, torch.arange(20_000), 0, 8).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 / (12 * 20_000) ** 0.5
    assert (u.var(0) - 1 / 12).abs().max() < 0.003
    assert (torch.corrcoef(u.T) - torch.eye(8)).abs().max() < 5 / 20_000**0.5


def test_uniforms_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    uniforms(0, 0, torch.arange(4), 0, 4)
    epoch_order(0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_streams_depend_on_each_image_alone_and_on_what_they_are_for():
    index = torch.tensor([5, 0, 2**40 + 3, 17])
    streams = view_stream(1, 2, index, 0)
    assert torch.equal(streams[2:], view_stream(1, 2, index[2:], 0))
    others = [view_stream(2, 2, index, 0), view_stream(1, 3, index, 0), view_stream(1, 2, index, 1), streams.flip(0)]
    for other in others:
        assert not (stream_uniforms(streams, 40) == stream_uniforms(other, 40)).any()


def test_a_longer_stream_begins_with_the_shorter_one_and_is_uniform():
    streams = view_stream(0, 0, torch.arange(4), 0)
    u = stream_uniforms(streams, 20_001)
    assert torch.equal(u[1:2, :7], stream_uniforms(streams[1:2], 7))
    assert u.unique().numel() > 0.99 * u.numel()
    assert (u.double().mean(1) - 0.5).abs().max() < 5 / (12 * 20_001) ** 0.5
    assert (torch.corrcoef(u.double()) - torch.eye(4)).abs().max() < 5 / 20_001**0.5


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[3], epoch_order(1, 1, 1000))


def test_every_order_of_a_few_images_is_equally_likely():
    epochs = 240
    seen = Counter(tuple(epoch_order(0, epoch, 4).tolist()) for epoch in range(epochs))
    expected = epochs / 24
    chi_squared = sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(4)))
    assert chi_squared < 23 + 5 * 46**0.5  # mean and five standard deviations, 23 degrees of freedom


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 2**16 + 1])
def test_any_part_of_an_order_is_that_of_the_whole_and_no_image_comes_twice(size):
    whole = epoch_order(3, 1, size)
    assert torch.equal(whole.sort().values, torch.arange(size))
    places = torch.tensor([size - 1, 0, size // 2])
    assert torch.equal(epoch_order(3, 1, size, places), whole[places])


def test_an_order_is_the_plain_feistel_network_followed_until_it_leads_back():
    def scramble(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = ((x ^ x >> shift) * factor) % 2**32
        return x ^ x >> 16

    size, seed, epoch = 100, 5, 2
    counters = torch.tensor([[turn, 0, epoch, 1 << 24] for turn in range(8)])
    keys = [row[:2] for row in philox(counters, seed).tolist()]

    def step(number):  # seven bits: a half of four and one of three
        left, right = divmod(number, 8)
        for turn, (first, second) in enumerate(keys):
            if turn % 2:
                right ^= scramble(scramble(left ^ first) ^ second) % 8
            else:
                left ^= scramble(scramble(right ^ first) ^ second) % 16
        return 8 * left + right

    expected = []
    for place in range(size):
        number = step(place)
        while number >= size:
            number = step(number)
        expected.append(number)
    assert epoch_order(seed, epoch, size).tolist() == expected


def test_a_part_of_the_order_of_a_billion_images_takes_the_memory_of_the_part():
    places = torch.arange(5 * 10**8, 5 * 10**8 + 4096)
    tracemalloc.start()  # sees lists; tensors are seen by what the process takes at its peak
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = epoch_order(0, 0, 10**9, places)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # kB
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(order.unique()) == 4096
    # Spread over the set as 4 096 random numbers are, and without a trend from place to place.
    part = order.double() / 1e9
    assert abs(part.mean() - 0.5) < 5 / (12 * 4096) ** 0.5
    assert abs(torch.corrcoef(torch.stack((part[1:], part[:-1])))[0, 1]) < 5 / 4096**0.5


def test_orders_of_epochs_that_follow_each_other_have_nothing_in_common():
    first, second = (epoch_order(0, epoch, 50_000).double() for epoch in (0, 1))
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 5 / 50_000**0.5
    assert (first == second).sum() < 10


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="size=-1"):
        epoch_order(0, 0, -1)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="not an integer"):
        uniforms(seed, 0, torch.arange(2), 0, 1)


def test_out_of_range_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        uniforms(0, 0, torch.arange(2), 0, 2000)
