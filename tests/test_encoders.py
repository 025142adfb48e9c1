import copy
import importlib.util
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from simclr import encoders, image_sizes, resnet
from simclr.efficientnet import PHI, encoder_in_words, remark
from simclr.encoders import build_encoder, encoder_names

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")


def stem_of(encoder):
    pool = not isinstance(encoder.maxpool, nn.Identity)
    return encoder.conv1.kernel_size[0], encoder.conv1.stride[0], pool


SMALL, SMALL_STRIDE2, IMAGENET = (3, 1, False), (3, 2, False), (7, 2, True)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("build_encoder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_standard_names_have_torchvision_keys(name):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        ours = build_encoder(name).state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == shapes


@pytest.mark.parametrize(
    ("name", "options", "stem"),
    [
        ("resnet18", {}, IMAGENET),
        ("resnet20", {}, SMALL),
        ("resnet18", {"image_size": 32}, SMALL),
        ("resnet18", {"image_size": 64}, SMALL),
        ("resnet18", {"image_size": 65}, IMAGENET),
        ("resnet50", {"image_size": 224}, IMAGENET),
        ("resnet20", {"image_size": 32}, SMALL),
        ("resnet20", {"image_size": 96}, IMAGENET),
        ("resnet18", {"stem": "small"}, SMALL),
        ("resnet20", {"stem": "imagenet"}, IMAGENET),
        ("resnet18", {"stem": "imagenet", "image_size": 64}, IMAGENET),
        ("resnet18", {"stem": "small", "image_size": 96}, SMALL),
        ("resnet8", {"stem": "small_stride2", "image_size": 32}, SMALL_STRIDE2),
        ("resnet8", {"stem": "small_stride2", "image_size": 224}, SMALL_STRIDE2),
    ],
)
def test_stem(name, options, stem):
    with torch.device("meta"):
        assert stem_of(build_encoder(name, **options)) == stem


@pytest.mark.parametrize(
    ("stem", "image_size", "message"),
    [
        ("imagenet", 32, "stem='imagenet' at image_size=32 leaves 8 of 32 px"),
        ("small", 224, "stem='small' at image_size=224 .*16 times the work"),
    ],
)
def test_a_stem_that_does_not_suit_the_images_is_built_with_a_warning(stem, image_size, message):
    with torch.device("meta"), pytest.warns(UserWarning, match=message) as caught:
        encoder = build_encoder("resnet18", stem=stem, image_size=image_size)
    assert stem_of(encoder) == (SMALL if stem == "small" else IMAGENET)
    assert [warning.filename for warning in caught] == [__file__]


def test_options_reach_the_resnet():
    torch.manual_seed(0)
    encoder = build_encoder("resnet8", width=2, shortcut="A", norm="none", zero_init=False)
    assert encoder.feature_dim == 128
    assert not any("downsample" in key or "bn" in key for key in encoder.state_dict())
    assert encoder.layer1[0].conv2.weight.abs().sum() > 0
    encoder = build_encoder("resnet8", zero_init=True)
    assert encoder.layer1[0].bn2.weight.abs().sum() == 0


# One of each way in which torchvision writes a classifier.
TORCHVISION = {
    "alexnet": 4096,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "resnext50_32x4d": 2048,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "vgg11": 4096,
    "vit_b_16": 768,
    "googlenet": 1024,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_lose_their_classifier(name):
    with torch.device("meta"):
        encoder = build_encoder(name).train()
        h = encoder(torch.empty(2, 3, 224, 224))
        with_classifier = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        theirs = torchvision.models.get_model(name, weights=None, **with_classifier).state_dict()
    assert h.shape == (2, encoder.feature_dim)
    assert encoder.feature_dim == TORCHVISION[name]
    missing = theirs.keys() - encoder.state_dict().keys()
    assert encoder.state_dict().keys() < theirs.keys()
    assert {theirs[key].shape[0] for key in missing} == {1000}  # the classifier's weight and bias and nothing else
    assert len(missing) == (1 if name == "maxvit_t" else 2)


@pytest.mark.parametrize("phi", [pytest.param(phi, marks=[pytest.mark.slow] * (phi not in (0, 2))) for phi in PHI])
def test_phi_is_torchvisions_network_to_the_last_bit(phi):
    encoders = []
    for name, options in (("efficientnet", {"phi": phi}), (f"efficientnet_b{phi}", {})):
        torch.manual_seed(0)
        encoders.append(build_encoder(name, **options).eval())
    ours, theirs = encoders
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    assert ours.feature_dim == theirs.feature_dim == round(1280 * PHI[phi][0] / 8) * 8


def test_an_efficientnet_of_other_multipliers_has_their_channels_and_layers():
    with torch.device("meta"):
        base, scaled = build_encoder("efficientnet"), build_encoder("efficientnet", width=0.5, depth=2.0)
    assert (base.feature_dim, scaled.feature_dim) == (1280, 640)
    assert [len(stage) for stage in base.features[1:8]] == [1, 2, 2, 3, 3, 4, 1]
    assert [len(stage) for stage in scaled.features[1:8]] == [2, 4, 4, 6, 6, 8, 2]
    assert build_encoder("efficientnet", width=0.25, channels=2)(torch.randn(2, 2, 32, 32)).shape == (2, 320)


@pytest.mark.parametrize(
    ("options", "map_of_32"),
    [({"image_size": 32}, 4), ({"image_size": 65}, 1), ({}, 1), ({"image_size": 32, "stem": "imagenet"}, 1)],
)
def test_stem_of_an_efficientnet(options, map_of_32):
    with torch.device("meta"):
        encoder = build_encoder("efficientnet", width=0.25, **options)
        assert encoder.features(torch.empty(2, 3, 32, 32)).shape[-1] == map_of_32
        # By torchvision's name, auto is as published: checkpoints of it mean that.
        assert build_encoder("efficientnet_b0", image_size=32).features(torch.empty(2, 3, 32, 32)).shape[-1] == 1


def test_depth_multiplies_the_blocks_of_a_resnet():
    with torch.device("meta"):
        encoder = build_encoder("resnet50", depth=1.5)
        published = build_encoder("resnet18").state_dict()
        assert build_encoder("resnet18", depth=0.5).state_dict().keys() < published.keys()
    assert [len(getattr(encoder, f"layer{i}")) for i in (1, 2, 3, 4)] == [5, 6, 9, 5]  # of 3, 4, 6, 3
    assert build_encoder("resnet8", depth=2, width=0.25)(torch.randn(2, 3, 8, 8)).shape == (2, 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientnet", {"phi": 8}, r"^phi=8 is not a whole number from 0 to 7, the EfficientNets B0 to B7\."),
        ("efficientnet", {"phi": 3, "width": 2}, "^phi=3 means width 1.2 and depth 1.4: leave width=2 out, or phi"),
        (
            "efficientnet_b3",
            {"phi": 3},
            "efficientnet_b3 has no phi=3: its name says .* Give encoder=efficientnet with p",
        ),
        ("efficientnet_b0", {"width": 2}, "efficientnet_b0 has no width=2: .* Give encoder=efficientnet with width=2"),
        ("resnet18", {"phi": 1}, r"resnet18 has no phi=1. These options are for efficientnet\."),
        ("vit_b_16", {"phi": 1}, r"vit_b_16 has no phi=1. These options are for efficientnet\."),
        ("mobilenet_v2", {"depth": 2}, r"mobilenet_v2 has no depth=2. These options are for resnet8, .*resnet152"),
        ("efficientnet", {"norm": "none"}, "efficientnet has no norm='none'. These options are for resnet8"),
        ("resnet18", {"depth": 0}, "depth=0 multiplies the blocks of each stage, and must be positive"),
        ("efficientnet", {"depth": -1}, "^width=1.0, depth=-1: both multiply, and must be positive"),
    ],
)
def test_multipliers_that_a_network_does_not_take_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, image_size=32, **options)


def test_the_image_size_that_goes_with_phi_is_suggested():
    def said(encoder="efficientnet", image_size=32, stem="auto", **settings):
        return remark({"encoder": encoder, "image_size": image_size, "stem": stem, **settings})

    assert said(phi=0) is said(width=1.2) is said("resnet18") is said(phi=3, image_size=300) is None
    assert "phi 3 goes with images of 300 px, where phi 0 has 224: a factor of 1.34. These have 43" in said(
        phi=3, image_size=43
    )
    assert said(phi=3, image_size=43).count("as if those of phi 0 had 32") == 1
    assert "efficientnet_b0 leaves a map of 1 x 1 of 32 px" in said("efficientnet_b0")
    assert said("efficientnet_b0", stem="small") is None


def test_an_encoder_in_words_has_what_scales_it():
    assert encoder_in_words({"encoder": "efficientnet", "phi": 0, "width": 1.0}) == "efficientnet, phi 0"
    assert encoder_in_words({"encoder": "resnet50", "width": 2.0, "depth": 1.5}) == "resnet50, width 2, depth 1.5"
    assert encoder_in_words({"encoder": "resnet18", "phi": None}) == "resnet18"


def test_torchvision_features_are_what_its_classifier_takes(no_network):
    # regnet does not build on the meta device; two others have a dropout that is part of the classifier.
    for name in ("regnet_y_400mf", "mobilenet_v3_small", "squeezenet1_1"):
        torch.manual_seed(0)
        encoder = build_encoder(name).eval()
        torch.manual_seed(0)
        theirs = torchvision.models.get_model(name, weights=None).eval()
        taken = []
        layers = [m for m in theirs.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        layers[-1].register_forward_hook(lambda module, args, out, taken=taken: taken.append(args[0]))
        images = torch.randn(2, 3, 64, 64)
        theirs(images)
        expected = taken[0] if taken[0].ndim == 2 else taken[0].relu().mean(dim=(2, 3))
        torch.testing.assert_close(encoder(images), expected)


def test_dropout_of_the_classifier_does_not_blur_h():
    for name in ("efficientnet_b0", "mobilenet_v3_small", "mobilenet_v2"):
        with torch.device("meta"):
            classifier = build_encoder(name).classifier
        assert not any(isinstance(m, nn.Dropout) for m in classifier.modules())


def test_vision_transformers_take_the_size_of_the_images():
    with torch.device("meta"):
        assert build_encoder("vit_b_16", image_size=32)(torch.empty(2, 3, 32, 32)).shape == (2, 768)
        assert build_encoder("maxvit_t", image_size=448)(torch.empty(2, 3, 448, 448)).shape == (2, 512)
    with pytest.raises(ValueError, match="vit_b_16 needs an image_size that is a multiple of 16, not 40"):
        build_encoder("vit_b_16", image_size=40)


@needs_timm
@pytest.mark.parametrize(
    ("name", "image_size", "feature_dim"),
    [("vit_tiny_patch16_224", 64, 192), ("mobilenetv3_small_050", 64, 1024), ("resnet10t", None, 512)],
)
def test_timm_models(name, image_size, feature_dim, no_network):
    encoder = build_encoder(name, image_size=image_size)
    assert encoder.feature_dim == feature_dim
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, feature_dim)


@needs_timm
def test_timm_names_of_the_hub_are_not_followed(no_network):
    with pytest.raises(ValueError, match="Unknown encoder 'hf_hub:timm/resnet18'"):
        build_encoder("hf_hub:timm/resnet18")


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what an import of a missing package finds
    with pytest.raises(ValueError, match=r"Unknown encoder 'vit_tiny_patch16_224'.*pip install 'simclr\[timm\]'"):
        build_encoder("vit_tiny_patch16_224")


@pytest.mark.parametrize("with_timm", [pytest.param(True, marks=needs_timm), False])
@pytest.mark.parametrize(("name", "nearest"), [("resnet_18", "resnet18"), ("efficientnetb0", "efficientnet_b0")])
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest, with_timm, monkeypatch):
    if not with_timm:
        monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"Unknown encoder '{name}'. Did you mean .*\b{nearest}\b"):
        build_encoder(name)


def test_a_name_that_timm_knows_too_is_suggested_once(monkeypatch):
    timm = SimpleNamespace(is_model=lambda name: False, list_models=lambda: ["resnet18", "resnet61q"])
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(ValueError, match="Did you mean") as error:
        build_encoder("resnet1_8")
    assert str(error.value).count("resnet18") == 1


@needs_timm
def test_names_of_timm_are_among_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean .*\bvit_tiny_patch16_224\b"):
        build_encoder("vit_tiny_patch_16_224")


def test_a_name_like_no_other_is_answered_with_where_to_look():
    with pytest.raises(ValueError, match=r"Unknown encoder '!!!'. simclr.encoders.encoder_names\(\) lists them"):
        build_encoder("!!!")


@pytest.mark.parametrize("name", ["vit_b_16", "efficientnet_b0", pytest.param("resnet10t", marks=needs_timm)])
def test_resnet_options_are_refused_by_other_models_by_name(name):
    with pytest.raises(ValueError, match=f"{name} has no width=2, shortcut='A', norm='none'. .* resnet8, resnet18"):
        build_encoder(name, width=2, shortcut="A", norm="none")
    with pytest.raises(ValueError, match=f"{name} has no stem='small_stride2', zero_init=False"):
        build_encoder(name, stem="small_stride2", zero_init=False)


def test_image_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size=0 must be at least 1"):
        build_encoder("resnet18", image_size=0)


def test_encoder_names_are_in_order_and_known():
    names = encoder_names()
    assert names[:3] == ["resnet8", "resnet18", "resnet20"]
    assert len(names) == len(set(names))
    assert {"resnet110", "resnet152", "vit_b_16"} < set(names)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("alexnet", 32, r"alexnet cannot take images of 32 px: .*Output size is too small\. It needs at least 63"),
        pytest.param(
            *("inception_v3", 32, r"inception_v3 cannot take images of 32 px: .*\. It needs at least 75"),
            marks=pytest.mark.slow,  # its initial weights take seconds
        ),
        pytest.param("efficientformer_l1", 64, r"efficientformer_l1 cannot .* 64 px: .*It needs", marks=needs_timm),
    ],
)
def test_images_that_a_model_cannot_take_are_refused_with_the_size_that_it_needs(name, image_size, message):
    with pytest.raises(ValueError, match=message) as refused:
        build_encoder(name, image_size=image_size)
    assert "\n" not in str(refused.value)
    least = int(str(refused.value).split("at least ")[1].split(":")[0])
    encoder = build_encoder(name, image_size=least).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, least, least)).shape == (1, encoder.feature_dim)


class CountsPixels(nn.Module):
    """A network whose path depends on numbers, which shapes alone have not."""

    def __init__(self, least=0):
        super().__init__()
        self.weight, self.least = nn.Parameter(torch.zeros(1)), least

    def forward(self, x):
        if x.mean() > 10 or x.shape[-1] < self.least:
            raise RuntimeError(f"below {self.least}\nand more")
        return x.mean((2, 3))


def test_a_network_that_cannot_run_on_shapes_alone_is_asked_with_images():
    with pytest.raises(RuntimeError):
        CountsPixels().to("meta")(torch.empty(2, 3, 8, 8, device="meta"))
    assert image_sizes.why_not(CountsPixels(), 8) is None
    assert image_sizes.why_not(CountsPixels(least=9), 8) == "below 9"


def test_to_look_at_a_model_leaves_it_and_the_random_numbers_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert image_sizes.why_not(model, 8) is None
    assert "Kernel size" in image_sizes.why_not(model, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {t.device.type for t in image_sizes.on_meta(model).state_dict().values()} == {"meta"}


def strided_projections(encoder):
    convolutions = (m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    return [c for c in convolutions if c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 16]


GUARDED = ["resnet8", pytest.param("gernet_s", marks=needs_timm)]
GUARDED += [pytest.param(name, marks=[needs_timm, pytest.mark.slow]) for name in ("mobileone_s0", "fastvit_t8")]


@pytest.mark.parametrize("name", GUARDED)
def test_no_encoder_has_a_strided_projection_of_few_channels_and_the_numbers_are_the_same(name, monkeypatch):
    """oneDNN's gradient of those writes beyond its memory, for maps from 56 x 56 on; here they are smaller."""
    width, guard_projections = {"width": 0.25} if name in encoders.RESNETS else {}, resnet.guard_projections

    def build(guard):
        monkeypatch.setattr(encoders, "guard_projections", guard)
        monkeypatch.setattr(resnet, "guard_projections", guard)
        torch.manual_seed(0)
        return build_encoder(name, image_size=32, **width)

    plain, ours = build(lambda network: network), build(guard_projections)
    assert strided_projections(plain)
    assert not strided_projections(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, expected = (copy.deepcopy(encoder)(images) for encoder in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    of_ours, of_plain = (torch.autograd.grad(f(images).square().sum(), list(f.parameters())) for f in (ours, plain))
    for grad, other in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4)
