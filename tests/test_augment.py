"""The views against torchvision image by image with the same parameters, and the parameters against statistics."""

import math
import platform

import pytest
import torch
import torch.nn.functional as F
from kornia.filters import sobel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as tv

from simclr import augment
from simclr.augment import SimCLRAugmentation
from simclr.views import kernels

# Both sides compute in float32 on values up to 1 and add up to 23 products twice: 1e-5 is about 100 roundings.
CLOSE = {"atol": 1e-5, "rtol": 0}
EVERYTHING = {
    f"{name}_prob": 0.5 for name in ("flip", "rotation", "jitter", "gray", "blur", "sobel", "noise", "cutout")
}
NOTHING = dict.fromkeys(EVERYTHING, 0.0)
UNIT = {"mean": (0, 0, 0), "std": (1, 1, 1)}
PAPER = {"strength": 1.0, "crop_scale": (0.08, 1.0), "blur_prob": 0.5}  # of ImageNet
SMALL = {"strength": 0.5, "crop_scale": (0.2, 1.0), "blur_prob": 0.0}


def pictures(count, height=32, width=32, seed=0):
    """Smooth random pictures with noise, uint8, including saturated and gray pixels."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(count, 3, 5, 5, generator=generator), (height, width), mode="bicubic")
    x = (smooth * 1.4 - 0.2 + 0.1 * torch.randn(count, 3, height, width, generator=generator)).clamp(0, 1)
    x[:, :, : height // 4, : width // 4] = x[:, :1, : height // 4, : width // 4]
    return (x * 255).round().to(torch.uint8)


def rng(count, low, high, seed=0):
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def column(values):
    return values.view(-1, 1, 1, 1)


# Each operation against torchvision.


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (24, 40, 48), (100, 37, 32), (37, 100, 33), (256, 230, 224), (1, 1, 2)]
)
def test_crop_and_flip_are_torchvisions_for_boxes_larger_and_smaller_than_the_view(height, width, size):
    images = pictures(12, height, width).float() / 255
    table = SimCLRAugmentation(size, **PAPER).draw(torch.arange(12), height, width)
    boxes = torch.cat((table["box"][:-1], torch.tensor([[0, 0, height, width]])))
    views = kernels.crop_resize(images, boxes, table["flip"], size)
    for image, box, flip, view in zip(images, boxes.tolist(), table["flip"], views, strict=True):
        expected = tv.resized_crop(image, *box, [size, size], antialias=True)
        # A place on the float32 sampling grid is off by up to 2e-5 pixels at 256, and neighbours differ by up to 1.
        torch.testing.assert_close(view, tv.hflip(expected) if flip else expected, atol=3e-5, rtol=0)


class Dtypes(TorchDispatchMode):
    """The dtypes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


@pytest.mark.parametrize("resample", [kernels.sample_bilinear, kernels.resize_by_matrices])
def test_a_device_without_float64_makes_the_same_crops(monkeypatch, resample):
    images, table = pictures(12, 100, 80), SimCLRAugmentation(32, **PAPER).draw(torch.arange(12), 100, 80)
    expected = resample(images, table["box"], table["flip"], 32) / 255
    monkeypatch.setattr(kernels, "_WITHOUT_FLOAT64", ("cpu",))
    with Dtypes() as dtypes:
        views = resample(images, table["box"], table["flip"], 32) / 255
    assert torch.float32 in dtypes.seen
    assert torch.float64 not in dtypes.seen
    torch.testing.assert_close(views, expected, **CLOSE)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (kernels.adjust_brightness, tv.adjust_brightness, 0.0, 1.8),
        (kernels.adjust_contrast, tv.adjust_contrast, 0.0, 1.8),
        (kernels.adjust_saturation, tv.adjust_saturation, 0.0, 1.8),
        (kernels.adjust_hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_color_adjustments_are_torchvisions(ours, theirs, low, high):
    images, factors = pictures(16).float() / 255, rng(16, low, high)
    expected = torch.stack([theirs(x, f.item()) for x, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images, column(factors)), expected, **CLOSE)


def test_gray_is_torchvisions():
    images = pictures(4).float() / 255
    torch.testing.assert_close(kernels.to_gray(images), tv.rgb_to_grayscale(images), **CLOSE)


@pytest.mark.parametrize(("size", "kernel_size"), [(32, 3), (40, 23), (12, 23)])
def test_blur_is_torchvisions(size, kernel_size):
    images, sigmas = pictures(6, size, size + 3).float() / 255, rng(6, 0.1, 2.0)
    expected = torch.stack(
        [tv.gaussian_blur(x, [kernel_size] * 2, [s.item()] * 2) for x, s in zip(images, sigmas, strict=True)]
    )
    torch.testing.assert_close(kernels.blur(images, sigmas, kernel_size), expected, **CLOSE)


def test_sobel_is_kornias():
    images = pictures(3).float() / 255
    augmentation = SimCLRAugmentation(
        32, **{**NOTHING, "sobel_prob": 1.0}, **UNIT, crop_scale=(1, 1), crop_ratio=(1, 1)
    )
    views = augmentation.view(images, torch.arange(3))
    torch.testing.assert_close(views, sobel(images), **CLOSE)


def by_torchvision(augmentation, image, row):
    """One view of one float image by torchvision's functions, in the documented order; noise is left out."""
    size = augmentation.image_size
    x = tv.resized_crop(image, *row["box"].tolist(), [size, size], antialias=True)
    if row["flip"]:
        x = tv.hflip(x)
    if row["rotation"]:
        x = torch.rot90(x, row["quarter_turns"].item(), (1, 2))
    if row["jitter"]:
        steps = [
            (tv.adjust_brightness, "brightness"),
            (tv.adjust_contrast, "contrast"),
            (tv.adjust_saturation, "saturation"),
            (tv.adjust_hue, "hue"),
        ]
        for which in row["order"].tolist():
            adjust, name = steps[which]
            x = adjust(x, row[name].item())
    if row["gray"]:
        x = tv.rgb_to_grayscale(x, 3)
    if row["blur"]:
        kernel_size = (size // 10) // 2 * 2 + 1  # int(kernel_size / 2) each side, as in google-research/simclr
        x = tv.gaussian_blur(x, [kernel_size] * 2, [row["sigma"].item()] * 2)
    if row["cutout"]:
        top, left, bottom, right = row["hole"].clamp(0, size).tolist()
        fill = torch.tensor(augmentation.mean)[:, None, None]
        x = tv.erase(x, top, left, bottom - top, right - left, fill)
    return tv.normalize(x, list(augmentation.mean), list(augmentation.std))


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 64, 32), (30, 20, 70)])
def test_a_view_is_torchvisions_pipeline_with_the_drawn_parameters(height, width, size):
    augmentation = SimCLRAugmentation(
        size, **{**EVERYTHING, "sobel_prob": 0.0, "noise_prob": 0.0}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
    )
    images, index = pictures(48, height, width), torch.arange(100, 148)
    for view, views in enumerate(augmentation(images, index, epoch=3, seed=7)):
        table = augmentation.draw(index, height, width, epoch=3, seed=7, view=view)
        rows = [{name: value[i] for name, value in table.items()} for i in range(48)]
        expected = torch.stack(
            [by_torchvision(augmentation, x / 255, row) for x, row in zip(images.float(), rows, strict=True)]
        )
        # Hue and contrast steepen small differences, dividing by std=0.2 multiplies them by 5.
        torch.testing.assert_close(views, expected, atol=5e-5, rtol=0)


# A view is a pure function.


@pytest.mark.parametrize("size", [32, 48, 20])
def test_a_view_does_not_depend_on_the_batch_around_it_to_the_last_bit(size):
    augmentation = SimCLRAugmentation(size, **EVERYTHING)
    images, index = pictures(150, 32, 40), torch.arange(150)
    whole = augmentation(images, index, 1, 2)
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for view in (0, 1):
        again = augmentation.view(images[shuffle], index[shuffle], 1, 2, view)
        assert torch.equal(again, whole[view][shuffle])
        for parts, chosen in ((7, index), (1, index[::5])):  # some of them each by itself
            chunked = [augmentation.view(images[i], i, 1, 2, view) for i in chosen.split(parts)]
            assert torch.equal(torch.cat(chunked), whole[view][chosen])


def test_the_number_of_threads_changes_no_bit():
    augmentation, images, index = SimCLRAugmentation(224, jitter_prob=1.0), pictures(4, 256, 240), torch.arange(4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = augmentation.view(images, index)
        torch.set_num_threads(2)
        assert torch.equal(augmentation.view(images, index), whole)
        for i in range(4):  # alone: with one image in hand, PyTorch splits its sums over the threads
            assert torch.equal(augmentation.view(images[i : i + 1], index[i : i + 1])[0], whole[i])
    finally:
        torch.set_num_threads(before)


def test_parts_on_the_cpu_do_not_change_a_bit(monkeypatch):
    augmentation = SimCLRAugmentation(32, **EVERYTHING)
    images, index = pictures(40), torch.arange(40)
    whole = augmentation.view(images, index)
    monkeypatch.setattr(augment, "_CHUNK_VALUES", 1)
    assert torch.equal(augmentation.view(images, index), whole)


def test_views_change_with_seed_epoch_index_and_view_and_repeat_without():
    augmentation, images = SimCLRAugmentation(32, **PAPER), pictures(1).expand(8, -1, -1, -1)
    index = torch.arange(8)
    first = augmentation.view(images, index, 1, 2, 0)
    assert torch.equal(first, augmentation.view(images, index, 1, 2, 0))
    others = [(index, 2, 2, 0), (index, 1, 3, 0), (index, 1, 2, 1), (index + 8, 1, 2, 0)]
    for other in [augmentation.view(images, *call) for call in others] + [first.roll(1, 0)]:
        assert ((first - other).abs().amax((1, 2, 3)) > 0.01).all()


def test_the_global_generator_does_not_move():
    before = torch.get_rng_state()
    SimCLRAugmentation(32, **EVERYTHING)(pictures(16), torch.arange(16))
    assert torch.equal(before, torch.get_rng_state())


def test_images_are_left_as_they_were():
    images = pictures(16).float() / 255
    before = images.clone()
    SimCLRAugmentation(32, **EVERYTHING, crop_scale=(1, 1), crop_ratio=(1, 1))(images, torch.arange(16))
    assert torch.equal(images, before)


def test_autocast_and_module_dtype_change_no_bit():
    augmentation, images, index = SimCLRAugmentation(32, **EVERYTHING), pictures(32), torch.arange(32)
    whole = augmentation.view(images, index)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmentation.view(images, index), whole)
    assert torch.equal(augmentation.to(torch.bfloat16).view(images, index), whole)


def test_the_matmul_precision_of_the_training_changes_no_bit():
    augmentation, images, index = SimCLRAugmentation(32, **EVERYTHING), pictures(32, 64, 64), torch.arange(32)
    whole = augmentation.view(images, index)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(augmentation.view(images, index), whole)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bytes_and_floats_give_the_same_view():
    augmentation, images, index = SimCLRAugmentation(32, blur_prob=0.5), pictures(32, 30, 50), torch.arange(32)
    # Dividing by 255 before or after the resampling rounds differently; std=0.25 and the jitter enlarge that.
    torch.testing.assert_close(
        augmentation.view(images, index), augmentation.view(images.float() / 255, index), atol=5e-5, rtol=0
    )


def test_views_are_float32_without_gradient_and_an_empty_batch_stays_empty():
    augmentation = SimCLRAugmentation(24)
    for view in augmentation((pictures(3) / 255).double().requires_grad_(), torch.arange(3, dtype=torch.int32)):
        assert (view.shape, view.dtype, view.requires_grad) == ((3, 3, 24, 24), torch.float32, False)
    assert augmentation.view(pictures(1)[:0], torch.arange(0)).shape == (0, 3, 24, 24)


# What is drawn.


@pytest.mark.parametrize(("size", "given"), [(64, SMALL), (65, PAPER)])
def test_small_views_are_changed_as_for_cifar_and_larger_ones_as_for_imagenet(size, given):
    index, images = torch.arange(64), pictures(64, 80, 80)
    for view in (0, 1):
        usual = SimCLRAugmentation(size).view(images, index, view=view)
        assert torch.equal(usual, SimCLRAugmentation(size, **given).view(images, index, view=view))
    assert not torch.equal(usual, SimCLRAugmentation(size, **{**given, "strength": 0.7}).view(images, index, view=1))


COUNT = 20_000


@pytest.fixture(scope="module")
def table():
    return SimCLRAugmentation(32, **PAPER, rotation_prob=0.25, cutout_prob=1.0).draw(torch.arange(COUNT), 300, 400)


@pytest.mark.parametrize(
    ("gate", "prob"),
    [("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("blur", 0.5), ("rotation", 0.25), ("cutout", 1), ("noise", 0)],
)
def test_gates_open_with_their_probability(table, gate, prob):
    assert abs(table[gate].double().mean() - prob) <= 5 * math.sqrt(prob * (1 - prob) / COUNT)


def test_gates_are_independent(table):
    gates = torch.stack([table[name].double() for name in ("flip", "jitter", "gray", "blur", "rotation")])
    assert (torch.corrcoef(gates) - torch.eye(5)).abs().max() < 5 / COUNT**0.5


def test_every_order_of_the_jitter_is_equally_likely(table):
    orders, counts = table["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (orders.sort(1).values == torch.arange(4)).all()
    assert (counts / COUNT - 1 / 24).abs().max() < 5 * math.sqrt(1 / 24 * 23 / 24 / COUNT)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2), ("sigma", 0.1, 2)],
)
def test_factors_are_uniform_over_their_range(table, name, low, high):
    unit = (table[name].double() - low) / (high - low)
    assert unit.min() > -1e-6
    assert unit.max() < 1 + 1e-6
    # Kolmogorov-Smirnov: beyond 2.2 / sqrt(n) is a chance of 1e-4.
    grid = (torch.arange(COUNT) + 0.5) / COUNT
    assert (unit.sort().values - grid).abs().max() < 2.2 / COUNT**0.5


def test_the_range_of_the_factors_follows_the_strength():
    table = SimCLRAugmentation(32, strength=0.5).draw(torch.arange(COUNT), 32, 32)
    for name, low, high in (("brightness", 0.6, 1.4), ("hue", -0.1, 0.1)):
        assert low <= table[name].min() < low + 0.001
        assert high - 0.001 < table[name].max() <= high
    assert SimCLRAugmentation(32, strength=2.0).draw(torch.arange(COUNT), 32, 32)["contrast"].min() >= 0


def test_crops_lie_inside_with_the_area_and_shape_asked_for(table):
    top, left, height, width = table["box"].double().T
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) > 0
    assert (top + height).max() == 300
    assert (left + width).max() == 400
    area, ratio = height * width / (300 * 400), width / height
    # Rounding a side of at least 84 pixels moves area and ratio by up to 0.6 %.
    assert 0.079 < area.min() < 0.085
    assert 0.99 < area.max() <= 1
    assert 0.745 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.342


def test_crops_are_distributed_as_torchvision_draws_them(table):
    from torchvision.transforms import RandomResizedCrop

    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    torch.set_rng_state(generator_state)
    theirs, ours = torch.tensor(theirs).double(), table["box"].double()
    for column in range(4):  # Kolmogorov-Smirnov for two samples: beyond 2.2 * sqrt(1/n + 1/m) is a chance of 1e-4.
        values = torch.arange(401.0).double()
        cdfs = [torch.searchsorted(x[:, column].sort().values, values, right=True) / len(x) for x in (ours, theirs)]
        assert (cdfs[0] - cdfs[1]).abs().max() < 2.2 * math.sqrt(1 / COUNT + 1 / 4000)


def test_a_crop_is_as_often_tall_as_wide():
    augmentation = SimCLRAugmentation(32, crop_scale=(0.05, 0.05), crop_ratio=(1 / 4, 4))
    height, width = augmentation.draw(torch.arange(COUNT), 400, 400)["box"][:, 2:].double().T
    unit = (width / height).log() / (2 * math.log(4)) + 0.5  # uniform, whatever the ratio: log scale
    assert abs(unit.mean() - 0.5) < 5 / (12 * COUNT) ** 0.5


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, [0, 43, 10, 13]), (100, 10, [43, 0, 13, 10])],  # 4/3 of 10, rounded, in the middle
)
def test_if_no_crop_fits_the_largest_central_one_is_taken(height, width, box):
    table = SimCLRAugmentation(32, crop_scale=(1, 1)).draw(torch.arange(5), height, width)
    assert table["box"].tolist() == [box] * 5


def test_rotation_takes_each_quarter_turn_equally_often(table):
    counts = table["quarter_turns"].bincount() / COUNT
    assert len(counts) == 4
    assert (counts - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / COUNT)


def test_the_hole_has_its_size_and_its_centre_is_anywhere(table):
    top, left, bottom, right = table["hole"].T
    assert (bottom - top == 16).all()
    assert (right - left == 16).all()
    for start in (top, left):
        assert (start.min(), start.max()) == (-8, 23)


def test_noise_is_normal_and_differs_between_pixels_images_and_views():
    augmentation = SimCLRAugmentation(64, **{**NOTHING, "noise_prob": 1.0}, noise_std=0.1, **UNIT)
    images = torch.full((8, 3, 64, 64), 0.5)
    noise = torch.stack(augmentation(images, torch.arange(8))).flatten(0, 1).flatten(1).double() - 0.5  # (16, 12288)
    n = noise.shape[1]
    assert (noise.mean(1).abs() < 5 * 0.1 / n**0.5).all()
    assert ((noise.std(1) - 0.1).abs() < 5 * 0.1 / (2 * n) ** 0.5).all()
    assert abs((noise.abs() < 0.1).double().mean() - math.erf(0.5**0.5)) < 5 * 0.5 / noise.numel() ** 0.5
    assert (torch.corrcoef(noise) - torch.eye(16)).abs().max() < 5 / n**0.5
    assert abs((noise[:, 1:] * noise[:, :-1]).mean() / 0.01) < 5 / noise.numel() ** 0.5


# Switches.


def test_everything_can_be_switched_off():
    images = pictures(4)
    plain = SimCLRAugmentation(32, **NOTHING, crop_scale=(1, 1), crop_ratio=(1, 1))
    expected = (images.float() / 255 - 0.5) / 0.25
    for view in plain(images, torch.arange(4)):
        torch.testing.assert_close(view, expected, **CLOSE)
    without_jitter = SimCLRAugmentation(32, jitter_prob=0.0).view(images, torch.arange(4))
    assert torch.equal(SimCLRAugmentation(32, strength=0.0).view(images, torch.arange(4)), without_jitter)


def test_switching_one_operation_on_changes_no_other_draw():
    index = torch.arange(50)
    less, more = (
        SimCLRAugmentation(32, **PAPER).draw(index, 32, 32),
        SimCLRAugmentation(32, **{**PAPER, **EVERYTHING}).draw(index, 32, 32),
    )
    for name in ("box", "order", "brightness", "hue", "sigma", "flip", "blur", "hole"):
        assert torch.equal(less[name], more[name])


def test_the_second_view_can_be_left_at_crop_and_resize():
    augmentation = SimCLRAugmentation(32, **dict.fromkeys(EVERYTHING, 1.0), augment_second_view=False)
    images, index = pictures(8), torch.arange(8)
    first, second = augmentation(images, index)
    cropped = SimCLRAugmentation(32, **NOTHING)
    assert torch.equal(second, cropped.view(images, index, view=1))
    assert not torch.isclose(first, cropped.view(images, index)).flatten(1).all(1).any()


def test_the_description_names_what_is_on():
    text = repr(SimCLRAugmentation(224, strength=0.5, gray_prob=0.0))
    for part in ("image_size=224", "strength=0.5", "'jitter': (0.8,)", "kernel_size=23", "ColorJitter"):
        assert part in text
    assert "Grayscale" not in text


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flip_prob": 1.5}, "flip_prob=1.5 is not a probability"),
        ({"gray_prob": float("nan")}, "gray_prob=nan"),
        ({"strength": -0.1}, "strength=-0.1"),
        ({"strength": 2.6}, "half"),
        ({"crop_scale": (0.5, 0.2)}, "0 < low <= high <= 1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"image_size": 0}, "Use 1 or more"),
        ({"cutout_size": 0.0}, "cutout_size"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"mean": (0.5, 0.5)}, "3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "positive number"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimCLRAugmentation(**{"image_size": 32, **arguments})


def test_all_bad_arguments_are_listed_at_once():
    with pytest.raises(ValueError, match=r"jitter_prob=2.*strength=-1.*crop_scale="):
        SimCLRAugmentation(32, jitter_prob=2, strength=-1, crop_scale=(0, 1))


@pytest.mark.parametrize(
    ("images", "index", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.arange(2), r"\(2, 1, 8, 8\) are not \(N, 3, H, W\)"),
        (torch.zeros(3, 8, 8), torch.arange(3), "are not"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.arange(2), "torch.int64. Pass uint8"),
        (torch.zeros(2, 3, 8, 8), torch.arange(3), "does not number 2 images"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), "torch.float32. Pass the images' numbers"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0, -1]), "negative"),
    ],
)
def test_bad_batches_are_refused(images, index, message):
    with pytest.raises(ValueError, match=message):
        SimCLRAugmentation(8)(images, index)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_solarize_is_torchvisions():
    x = pictures(4, 8, 8).float() / 255
    torch.testing.assert_close(kernels.solarize(x, 0.4), tv.solarize(x, 0.4))


def test_chosen_views_are_solarized_after_the_blur_and_the_others_are_as_before():
    images, index = pictures(64, 20, 20), torch.arange(64)
    settings = {"blur_prob": 0.5, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    without = SimCLRAugmentation(16, **settings)
    some = SimCLRAugmentation(16, **settings, solarize_prob=0.3, solarize_threshold=0.6)
    chosen = some.draw(index, 20, 20, 1, 2)["solarize"]
    assert 5 < chosen.sum() < 35
    before, after = without.view(images, index, 1, 2), some.view(images, index, 1, 2)
    assert torch.equal(after[~chosen], before[~chosen])
    torch.testing.assert_close(after[chosen], tv.solarize(before[chosen], 0.6))


BYOL = {"blur_prob": [1.0, 0.1], "solarize_prob": [0.0, 0.2], "gray_prob": 0.2}  # Grill et al. 2020, table 6


def test_each_view_has_its_own_probabilities_and_further_views_have_the_last():
    images, index = pictures(40, 24, 24), torch.arange(40)
    both = SimCLRAugmentation(16, **BYOL)
    alone = [
        SimCLRAugmentation(16, blur_prob=blur, solarize_prob=sun, gray_prob=0.2) for blur, sun in ((1, 0), (0.1, 0.2))
    ]
    for view, augmentation in ((0, alone[0]), (1, alone[1]), (2, alone[1])):
        table, expected = both.draw(index, 24, 24, 3, 4, view), augmentation.draw(index, 24, 24, 3, 4, view)
        assert all(torch.equal(values, expected[name]) for name, values in table.items())
        assert torch.equal(both.view(images, index, 3, 4, view), augmentation.view(images, index, 3, 4, view))


def test_a_second_view_left_alone_is_one_whose_probabilities_are_zero():
    images, index = pictures(20, 24, 24), torch.arange(20)
    names = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob")
    by_view = SimCLRAugmentation(16, **{name: [0.5, 0.0] for name in names})
    by_name = SimCLRAugmentation(16, **dict.fromkeys(names, 0.5), augment_second_view=False)
    for view in range(3):
        assert torch.equal(by_view.view(images, index, view=view), by_name.view(images, index, view=view))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blur_prob": [0.5, 1.5]}, "blur_prob=1.5 is not a probability"),
        ({"solarize_prob": -0.1}, "solarize_prob=-0.1 is not a probability"),
        ({"blur_prob": []}, "blur_prob lists no view"),
        ({"solarize_threshold": 2.0}, "solarize_threshold=2.0 is not a pixel's value"),
    ],
)
def test_bad_probabilities_by_view_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimCLRAugmentation(16, **arguments)
