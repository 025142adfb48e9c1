"""The counter-based generator against its published answers, and the properties that everything above relies on."""

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


def test_every_image_is_equally_likely_in_every_place():
    first = torch.stack([epoch_order(0, epoch, 5) for epoch in range(4000)])  # (4000, 5)
    counts = torch.stack([(first == image).double().mean(0) for image in range(5)])
    assert (counts - 0.2).abs().max() < 5 * (0.16 / 4000) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="not an integer"):
        uniforms(seed, 0, torch.arange(2), 0, 1)


def test_out_of_range_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        uniforms(0, 0, torch.arange(2), 0, 2000)
