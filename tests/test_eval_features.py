"""Features are what the encoder gives, in order, at its size and scale; and an encoder that changes is caught."""

import pytest
import torch
from torch import nn

from simclr.eval import encoder_sha256, extract_features, raw_pixels
from simclr.eval.features import check_split, frozen


class _Encoder(nn.Module):
    def __init__(self, seed=0, **attributes):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)
        self.conv.weight.data.normal_(generator=generator)
        self.conv.bias.data.zero_()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        self.seen = x
        return self.bn(self.conv(x)).relu().mean((2, 3))


def _images(n=10, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.arange(n) % 3


def _batches(images, labels, size=4):
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_features_are_the_normalised_forward_pass_in_the_loaders_order():
    images, labels = _images()
    encoder = _Encoder(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).train()
    features, got = extract_features(encoder, _batches(images, labels))
    x = (images / 255 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    torch.testing.assert_close(features, encoder.eval()(x))
    assert torch.equal(got, labels)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    for size in (1, 10):
        torch.testing.assert_close(features, extract_features(encoder, _batches(images, labels, size))[0])
    torch.testing.assert_close(features, extract_features(encoder, _batches(images / 255, labels))[0])


def test_the_mode_of_every_submodule_comes_back_also_after_an_error():
    images, labels = _images()
    encoder = _Encoder().train()
    encoder.bn.eval()
    extract_features(encoder, _batches(images, labels))
    assert (encoder.training, encoder.conv.training, encoder.bn.training) == (True, True, False)
    with pytest.raises(ValueError, match="no labels"):
        extract_features(encoder, [(images, labels), images])
    assert (encoder.training, encoder.conv.training, encoder.bn.training) == (True, True, False)


def test_an_encoder_that_changes_is_an_error():
    class Restless(_Encoder):
        def forward(self, x):
            self.bn.train()
            return super().forward(x)

    images, labels = _images()
    with pytest.raises(RuntimeError, match="the encoder changed"):
        extract_features(Restless(), _batches(images, labels))
    extract_features(_Encoder(), _batches(images, labels))


CHANGES = {
    "a bit of a weight": (lambda e: e.conv.bias.data.__setitem__(0, 1e-45), "conv.bias"),
    "a zero's sign": (lambda e: e.conv.bias.data.neg_(), "conv.bias"),
    "a buffer": (lambda e: e.bn.num_batches_tracked.add_(1), "bn.num_batches_tracked"),
    "a type": (lambda e: setattr(e.bn, "running_var", e.bn.running_var.double()), "bn.running_var"),
    "a buffer more": (lambda e: e.register_buffer("extra", torch.zeros(()), persistent=False), "extra"),
    "a buffer less": (lambda e: delattr(e.bn, "running_mean"), "bn.running_mean"),
    "all": (lambda e: e.bfloat16(), "conv.weight, conv.bias, bn.weight and "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_in_an_encoder_is_named(name):
    change, said = CHANGES[name]
    encoder = _Encoder()
    torch.nn.init.zeros_(encoder.conv.bias)
    with pytest.raises(RuntimeError, match=f"the encoder changed while it was evaluated: {said}"), frozen(encoder):
        change(encoder)


def test_weights_that_are_no_numbers_or_of_another_type_have_not_changed():
    encoder = _Encoder()
    encoder.conv.weight.data.fill_(torch.nan)
    encoder.register_buffer("phase", torch.full((2,), torch.nan, dtype=torch.complex64))
    encoder.register_buffer("of_16_bits", torch.ones(2, dtype=torch.bfloat16))
    encoder.register_buffer("mask", torch.tensor([True, False]))
    encoder.to(memory_format=torch.channels_last)
    reached = False
    with frozen(encoder):
        reached = True
    assert reached  # and nothing was said on leaving; one bit of them is
    for name, other in (("phase", complex(float("nan"), 1)), ("of_16_bits", 1.0078125), ("mask", False)):
        with pytest.raises(RuntimeError, match=f"while it was evaluated: {name};"), frozen(encoder):
            encoder.get_buffer(name)[0] = other


def test_autocast_around_it_does_not_reach_the_features():
    images, labels = _images()
    encoder = _Encoder()
    plain, _ = extract_features(encoder, _batches(images, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, extract_features(encoder, _batches(images, labels))[0])


def test_the_hash_sees_every_bit_name_shape_and_type_and_nothing_else():
    encoder = _Encoder()
    before = encoder_sha256(encoder)
    assert len(before) == 64
    assert before == encoder_sha256(_Encoder().train())
    assert before == encoder_sha256(_Encoder().to(memory_format=torch.channels_last))
    assert before != encoder_sha256(_Encoder(seed=1))
    changed = [_Encoder() for _ in range(6)]
    changed[0].conv.bias.data[0] = 1e-45
    changed[1].bn.running_var[0] += 2**-23
    changed[2].bn.num_batches_tracked += 1
    changed[3].bfloat16()
    changed[4].conv.weight.data = changed[4].conv.weight.data.reshape(3, 5, 3, 3)
    changed[5].register_buffer("extra", torch.zeros(()), persistent=False)
    assert len({before, *map(encoder_sha256, changed)}) == 7


def test_images_are_brought_to_the_encoders_size():
    images, labels = _images(size=40)
    encoder = _Encoder(image_size=16)
    extract_features(encoder, _batches(images, labels))
    assert encoder.seen.shape[-2:] == (16, 16)
    encoder.image_size = 40
    extract_features(encoder, _batches(images, labels, 10))
    assert torch.equal(encoder.seen, images / 255)


def test_raw_pixels_are_the_pixels():
    images, labels = _images(size=8)
    features, got = raw_pixels(_batches(images, labels))
    assert torch.equal(features, images.flatten(1) / 255)
    assert torch.equal(got, labels)
    assert raw_pixels(_batches(*_images(size=80)))[0].shape == (10, 3 * 32 * 32)


def test_what_cannot_be_evaluated_is_refused():
    images, labels = _images()
    encoder = _Encoder()
    for loader, match in [
        ([], "no images"),
        ([images], "no labels"),
        ([(images, None)], "no labels"),
        ([(images, labels.float())], "integer"),
        ([(images, labels[:3])], "10 images"),
        ([(images, labels - 1)], "image 0 has label -1"),
        ([(images / 255 * 4 - 2, labels)], r"needed \[0, 1\]"),
        ([(images.long(), labels)], "needed uint8"),
        ([(images[:, :1], labels)], r"needed a tensor \(n, 3, H, W\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            extract_features(encoder, loader)
    encoder.conv.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite in 10 of 10"):
        extract_features(encoder, _batches(images, labels))
    with pytest.raises(ValueError, match=r"needed a tensor \(n, F\)"):
        extract_features(nn.Conv2d(3, 2, 3), _batches(images, labels))


def test_every_problem_of_a_split_is_listed():
    x, y = torch.rand(6, 3), torch.arange(6) % 3
    assert check_split(x, y, x, y) == 3
    assert check_split(x, y, x, y, 5) == 5
    with pytest.raises(ValueError, match="widths differ") as error:
        check_split(x, y[:5], x[:, :2] * torch.inf, y.float())
    for text in ("the lengths differ", "NaN or infinite", "integer class numbers"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="at least 2"):
        check_split(x, y * 0, x, y * 0)
    with pytest.raises(ValueError, match="needed 0 to 1"):
        check_split(x, y, x, y, 2)
    with pytest.raises(ValueError, match="lack"):
        check_split(x, y, x, y + 1)
