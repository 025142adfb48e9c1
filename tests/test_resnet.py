import pytest
import torch
import torchvision
from torch import nn

from simclr.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet, ZeroPadShortcut, guard_projections

IMAGENET_DEPTHS = [18, 34, 50, 101, 152]
CIFAR_DEPTHS = [8, 20, 32, 44, 56, 110]


def make_resnet(depth, *, width=1, stem="small", shortcut="B", zero_init=False, norm="batch"):
    return ResNet(depth, width=width, stem=stem, shortcut=shortcut, zero_init=zero_init, norm=norm)


def count_parameters(depth, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in make_resnet(depth, **options).parameters())


def randomise_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_state_dict_has_the_keys_and_shapes_of_torchvision_in_its_order(depth):
    with torch.device("meta"):
        ours = make_resnet(depth, stem="imagenet")
        theirs = torchvision.models.get_model(f"resnet{depth}", weights=None)
    shapes = [(key, value.shape) for key, value in theirs.state_dict().items() if not key.startswith("fc.")]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == shapes


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("training", [True, False])
def test_torchvision_weights_give_torchvision_outputs_and_gradients(depth, training):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None)
    randomise_norms(theirs)
    theirs.fc = nn.Identity()
    ours = make_resnet(depth, stem="imagenet")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 70, 64)
    h = ours.train(training)(images)
    expected = theirs.train(training)(images)
    assert h.shape == (2, ours.feature_dim)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-6)
    h.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.conv1.weight.grad, theirs.conv1.weight.grad)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_small_stem_is_torchvision_without_the_pool_and_with_a_3x3_convolution():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    ours = make_resnet(18)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=1e-6)


def test_initial_weights_have_the_scale_of_torchvision():
    torch.manual_seed(0)
    ours, theirs = make_resnet(18, stem="imagenet"), torchvision.models.resnet18(weights=None)
    for name, weight in ours.named_parameters():
        expected = theirs.get_parameter(name)
        if weight.ndim == 4:
            assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.05), name
        else:
            assert torch.equal(weight, expected), name


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS + CIFAR_DEPTHS)
def test_weighted_layers_and_the_classifier_add_up_to_the_depth(depth):
    with torch.device("meta"):
        net = make_resnet(depth)
    weighted = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(weighted) + 1 == depth
    assert depth in DEPTHS


# He et al. 2015, table 6, in millions, to the digits printed there. Shortcuts of option A; the classifier has 650.
@pytest.mark.parametrize(
    ("depth", "millions", "digits"), [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)]
)
def test_cifar_networks_have_the_parameters_of_the_paper(depth, millions, digits):
    assert round((count_parameters(depth, shortcut="A") + 650) / 1e6, digits) == millions


# Chen et al. 2020 (widths of ResNet-50) and SimCLRv2 (depths), in millions, without classifier and projection head.
@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(50, 1, 24), (50, 2, 94), (50, 4, 375), (101, 1, 43), (101, 2, 170), (152, 1, 58)]
)
def test_wide_networks_have_the_parameters_of_the_simclr_papers(depth, width, millions):
    with torch.device("meta"):
        net = make_resnet(depth, width=width, stem="imagenet")
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert net.feature_dim == 2048 * width


@pytest.mark.parametrize(("depth", "feature_dim"), [(8, 64), (18, 512), (50, 2048)])
@pytest.mark.parametrize("width", [0.125, 0.5, 1, 2, 3])
def test_width_multiplies_every_batch_norm(depth, feature_dim, width):
    with torch.device("meta"):
        net, wide = make_resnet(depth), make_resnet(depth, width=width)
    assert wide.feature_dim == feature_dim * width
    channels = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in wide.modules() if isinstance(m, nn.BatchNorm2d)] == [c * width for c in channels]


@pytest.mark.parametrize(
    ("stem", "first_map"), [("small", (33, 30)), ("small_stride2", (17, 15)), ("imagenet", (9, 8))]
)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_stems_and_shortcuts_round_odd_sizes_up(stem, first_map, shortcut):
    net = make_resnet(8, width=0.25, stem=stem, shortcut=shortcut)
    shapes = []
    for layer in (net.maxpool, net.layer1, net.layer2, net.layer3):
        layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[2:])))
    assert net(torch.randn(2, 3, 33, 30)).shape == (2, 16)
    height, width = first_map
    second_map = ((height + 1) // 2, (width + 1) // 2)
    assert shapes == [first_map, first_map, second_map, ((second_map[0] + 1) // 2, (second_map[1] + 1) // 2)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_option_a_is_every_second_pixel_and_zeros_for_the_added_channels(memory_format):
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    out = ZeroPadShortcut(4, 10, stride=2)(x)
    expected = torch.zeros(2, 10, 4, 3)
    for row in range(4):
        for column in range(3):
            expected[:, :4, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=memory_format)


def test_options_differ_by_exactly_the_projections():
    # Depth 8 has three blocks: 16 -> 16, 16 -> 32 and 32 -> 64 channels. A projection has c_in * c_out weights and a
    # BN of 2 * c_out.
    plain = count_parameters(8, shortcut="none")
    growing = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count_parameters(8, shortcut="A") == plain
    assert count_parameters(8, shortcut="B") == plain + growing
    assert count_parameters(8, shortcut="C") == plain + growing + 16 * 16 + 2 * 16


@pytest.mark.parametrize(("block", "expansion"), [(BasicBlock, 1), (Bottleneck, 4)])
@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_with_a_silent_residual_branch_a_block_is_relu_of_its_shortcut(block, expansion, shortcut, stride):
    torch.manual_seed(0)
    net = block(8, 8, stride, shortcut, "batch")
    nn.init.zeros_((net.bn2 if block is BasicBlock else net.bn3).weight)
    x = torch.randn(3, 8, 6, 6)
    out = net(x)
    if shortcut == "none":
        expected = torch.zeros(3, 8 * expansion, 6 // stride, 6 // stride)
    elif shortcut == "C" or (shortcut == "B" and (stride == 2 or expansion == 4)):
        conv, bn = net.downsample
        pixels = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1)  # a 1 x 1 convolution is a Linear on every pixel
        expected = bn((pixels @ conv.weight[:, :, 0, 0].T).permute(0, 3, 1, 2))
    else:
        expected = torch.zeros(3, 8 * expansion, 6 // stride, 6 // stride)
        expected[:, :8] = x[:, :, ::stride, ::stride]
    torch.testing.assert_close(out, expected.relu())


@pytest.mark.parametrize("depth", [8, 50])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_zero_init_makes_every_block_its_shortcut(depth, norm):
    torch.manual_seed(0)
    net = make_resnet(depth, width=0.25, shortcut="A", zero_init=True, norm=norm)
    images = torch.randn(2, 3, 16, 16)
    stem = net.relu(net.bn1(net.conv1(images)))
    x = torch.zeros(2, net.feature_dim, 2, 2) if depth == 50 else torch.zeros(2, net.feature_dim, 4, 4)
    stride = 16 // x.shape[-1]
    x[:, : stem.shape[1]] = stem[:, :, ::stride, ::stride]
    torch.testing.assert_close(net(images), x.mean(dim=(2, 3)))


def test_without_zero_init_every_scale_starts_at_one():
    norms = [m for m in make_resnet(50, width=0.25).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((m.weight == 1).all()) for m in norms)


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_without_norm_the_features_keep_their_scale(zero_init, shortcut):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    for depth in (8, 110):
        net = make_resnet(depth, shortcut=shortcut, zero_init=zero_init, norm="none")
        assert 0.02 < net(images).square().mean().sqrt() < 5


def test_without_norm_an_image_does_not_see_its_batch():
    torch.manual_seed(0)
    net = make_resnet(8, norm="none").train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert all(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(images)[:2], net(images[:2]))


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_every_parameter_learns_and_the_loss_falls(shortcut, norm):
    torch.manual_seed(0)
    net = make_resnet(8, width=0.5, stem="small_stride2", shortcut=shortcut, zero_init=shortcut != "none", norm=norm)
    classifier = nn.Linear(net.feature_dim, 4)
    labels = torch.arange(32) % 4
    images = torch.randn(4, 3, 16, 16)[labels] + 0.3 * torch.randn(32, 3, 16, 16)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([*net.parameters(), *classifier.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(classifier(net(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_channels_last_is_kept_to_the_last_map():
    net = make_resnet(8, width=0.5, shortcut="A").to(memory_format=torch.channels_last)
    maps = []
    net.layer3.register_forward_hook(lambda module, args, out: maps.append(out))
    images = torch.randn(2, 3, 16, 16)
    h = net.eval()(images.to(memory_format=torch.channels_last))
    assert maps[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(h, net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 19}, "depth=19 is not one of .*18, 20"),
        ({"stem": "tiny"}, "stem='tiny' is not one of .*'small_stride2'"),
        ({"shortcut": "D"}, "shortcut='D' is not one of .*'C', 'none'"),
        ({"norm": "group"}, "norm='group' is not one of .*'batch', 'none'"),
        ({"width": 0.3}, "width=0.3 gives 4.8 channels .* multiple of 1/16"),
        ({"width": 0}, "width=0 gives 0 channels"),
        ({"width": -1}, "width=-1 gives -16 channels"),
        ({"shortcut": "none", "zero_init": True}, "every block output zero for good. Set zero_init=False"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make_resnet(**{"depth": 8, **options})


@pytest.mark.parametrize(("size", "stride"), [(64, 2), (9, 2), (9, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_is_a_strided_convolution(size, stride, bias):
    # 4 channels of 64 x 64 are among the shapes for which oneDNN's strided kernel ends the process.
    torch.manual_seed(0)
    x = torch.randn(64, 4, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = guard_projections(torch.nn.Conv2d(4, 8, 1, stride, bias=bias)).to(memory_format=torch.channels_last)
    plain = torch.nn.Conv2d(4, 8, 1, stride, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    exact = x.detach().double().contiguous().requires_grad_()
    out, expected = ours(x), plain(exact)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape)
    found = torch.autograd.grad(out, [x, *ours.parameters()], upstream)
    for grad, other in zip(
        found, torch.autograd.grad(expected, [exact, *plain.parameters()], upstream.double()), strict=True
    ):
        torch.testing.assert_close(grad.double(), other, rtol=1e-4, atol=1e-4)  # sums over 65 536 pixels
