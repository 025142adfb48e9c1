"""Every setting reaches something: change it, and what a user meets changes as the setting says.

A table for each signature and in it a row for each setting: the value it is changed to, what must then be seen, and the
settings beside it. `seen(a, b)` compares two observations, a without the change and b with it. It must hold of (a, b),
and must not hold of (a, a), which is what a setting that reaches nothing would give. A setting without a row fails, and
so does a row without a setting.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from kornia.filters import sobel
from PIL import Image
from pytorch_lightning import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode

import simclr.dashboard
from simclr import SimCLR, SimCLRAugmentation, load_encoder
from simclr.dashboard import Dashboard
from simclr.data import ImageData, MemoryImages, draw_shapes, loader, module, sources
from simclr.eval import (
    evaluation,
    extract_features,
    knn_accuracy,
    knn_predict,
    linear_evaluation_sgd,
    linear_probe,
    linear_probe_sgd,
)
from simclr.eval.evaluation import linear_evaluation
from simclr.eval.logreg import predict_by_logreg
from simclr.eval.protocol import find_protocol
from simclr.nonfinite import FiniteSteps, NonFiniteStep
from simclr.online_accuracy import OnlineKNN, OnlineProbe
from simclr.online_quality import OnlineQuality
from simclr.seeding import epoch_order
from simclr.views import compiled
from test_eval_knn import _clusters, _dumb
from test_eval_linear import _data, _objective, _Pixels, _standardised, _TrainSet, in_order, of_views, plain_sgd
from test_losses import reference
from test_multi_crop import to_large_by_double_loop
from test_nonfinite import Poison
from tiny import BATCH, IMAGES, STEPS, fit, tiny_data, tiny_model


class Row(NamedTuple):
    value: Any
    seen: Callable[[Any, Any], bool]
    beside: dict[str, Any]


def row(value: Any, seen: Callable[[Any, Any], bool], /, **beside: Any) -> Row:
    return Row(value, seen, beside)


class Table(NamedTuple):
    of: Callable[..., Any]  # whose settings
    observe: Callable[..., Any]  # settings -> what a user meets
    rows: dict[str, Row]
    inputs: tuple[str, ...] = ()  # arguments that are no settings, or not of this protocol


def same(a: Any, b: Any, atol: float = 1e-6, rtol: float = 1e-5) -> bool:
    """Equal up to rounding: tensors, or mappings of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name], atol, rtol) for name in a)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=atol, rtol=rtol)


def said(by: type[Exception], call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """What a call returns, or the words with which it refuses."""
    try:
        return call(*args, **settings)
    except by as error:
        return str(error)


# SimCLR: a few steps of a tiny network, watched by hooks.


class Watch(Callback):
    """What goes through a network while it trains, and what each step does to its weights."""

    def __init__(self):
        self.views, self.inputs, self.maps, self.h, self.z = [], [], [], [], []
        self.weights, self.grads, self.losses = [], [], []

    def on_train_start(self, trainer, model):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.buffers = [name for name, _ in model.named_buffers()]
        self.kernels = [p.detach().clone() for p in model.encoder.parameters() if p.shape[2:] == (3, 3)]
        model.encoder.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
        model.encoder.avgpool.register_forward_pre_hook(lambda _, args: self.maps.append(args[0]))
        model.head.register_forward_hook(self.see_head)
        self.project, model.project = model.project, self.see_views

    def see_views(self, views):
        self.views.append(views)
        return self.project(views)

    def see_head(self, head, args, z):
        self.h.append(args[0].detach())
        self.z.append(z.detach())

    def on_before_optimizer_step(self, trainer, model, optimizer):
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters()})

    def on_train_batch_end(self, trainer, model, *args):
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.losses.append(trainer.callback_metrics["train_loss"].item())

    def moved(self, step: int) -> dict[str, Tensor]:
        """By how much a step lowered each weight."""
        return {name: value - self.weights[step + 1][name] for name, value in self.weights[step].items()}

    def matrices(self, part: str) -> dict[str, Tensor]:
        """The weights of a part at the start that have two dimensions or more."""
        return {name: w for name, w in self.weights[0].items() if name.startswith(part) and w.ndim > 1}


# Plain SGD at one learning rate, so that a step says what it is made of.
STEPPED = {"optimizer": "sgd", "base_lr": 0.1, "lr_scaling": "none", "momentum": 0.0, "weight_decay": 0.0}
STEPPED |= {"warmup_epochs": 0}


def trained(max_steps: int = 2, augmentation: dict[str, Any] | None = None, **settings: Any) -> Watch:
    watch, compiled = Watch(), []

    def stand_in(function, mode=None, **_):
        return lambda *args: compiled.append(mode) or function(*args)

    shared = {name: settings[name] for name in ("batch_size", "image_size", "seed") if name in settings}
    if settings.get("weights") is not None:
        torch.save({**starting_weights(""), **starting_weights("head.")}, settings["weights"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", stand_in)
        model = tiny_model(**{**STEPPED, **settings}, **augmentation or {})
        data = tiny_data(**shared)
        if "channels" in settings:  # of the images' red
            data.setup()
            data.channels, data.train.pixels = settings["channels"], data.train.pixels[:, : settings["channels"]]
        fit(Path("fit"), model, data, [watch], max_steps=max_steps)
    watch.compiled = compiled
    return watch


def step_is(lr: float, of: Callable[[Tensor, Tensor], Tensor] = lambda grad, w: grad) -> Callable[[Any, Watch], bool]:
    """The first step is the learning rate times a function of gradient and weight."""

    def seen(_, b: Watch) -> bool:
        expected = {name: lr * of(grad, b.weights[0][name]) for name, grad in b.grads[0].items()}
        return same(b.moved(0), expected, atol=1e-7, rtol=1e-3)

    return seen


def signs(_, b: Watch) -> bool:
    """AdamW's first step is the sign of the gradient, wherever that is not next to zero."""
    clear = {name: grad.abs() > 1e-4 for name, grad in b.grads[0].items()}
    steps = {name: (moved / 0.1)[clear[name]] for name, moved in b.moved(0).items()}
    return same(steps, {name: grad.sign()[clear[name]] for name, grad in b.grads[0].items()}, atol=1e-2)


def nesterov(_, b: Watch) -> bool:
    """The second step of SGD with momentum .9, at half the learning rate by the cosine."""
    velocity = {name: 0.9 * b.grads[0][name] + grad for name, grad in b.grads[1].items()}
    expected = {name: 0.05 * (grad + 0.9 * velocity[name]) for name, grad in b.grads[1].items()}
    return same(b.moved(1), expected, atol=1e-7, rtol=1e-3)


def loss_is(name: str, temperature: float) -> Callable[[Any, Watch], bool]:
    """The first loss is that of the double loop."""
    return lambda _, b: abs(b.losses[0] / reference(name, b.z[0].double().chunk(2), temperature).item() - 1) < 1e-4


def semi_hard_of_both(_, b: Watch) -> bool:
    """The triplet loss, and NT-Logistic beside it."""
    logistic = trained(loss="nt_logistic", temperature=0.2, semi_hard=True)
    return loss_is("margin_triplet sh", 0.4)(None, b) and loss_is("nt_logistic sh", 0.2)(None, logistic)


def sides(*expected: int) -> Callable[[Any, Watch], bool]:
    """The side of the first view that is seen, and of the last."""
    return lambda _, b: (b.views[0][0].shape[-1], b.views[-1][-1].shape[-1]) == expected


def views_are(size: int, seed: int = 0, **augmentation: Any) -> Callable[[Any, Watch], bool]:
    """The first step's views are those of this augmentation."""

    def seen(_, b: Watch) -> bool:
        index = epoch_order(seed, 0, IMAGES)[:BATCH]
        expected = SimCLRAugmentation(size, **augmentation)(draw_shapes(IMAGES, 16)[0][index], index, seed=seed)
        return all(torch.equal(view, other) for view, other in zip(b.views[0], expected, strict=True))

    return seen


def small_crop_is(size: int, **augmentation: Any) -> Callable[[Any, Watch], bool]:
    """The last view of the first step is that of this augmentation."""

    def seen(_, b: Watch) -> bool:
        index = epoch_order(0, 0, IMAGES)[:BATCH]
        expected = SimCLRAugmentation(size, **augmentation).view(draw_shapes(IMAGES, 16)[0][index], index, view=2)
        return torch.equal(b.views[0][2], expected)

    return seen


def compared_with_large(_, b: Watch) -> bool:
    """The first loss is that of small crops beside the views, of the projections seen one batch after the other."""
    large, small = b.z[0].double().chunk(2), [b.z[1].double()]
    return abs(b.losses[0] / to_large_by_double_loop(large, small, 0.2).item() - 1) < 1e-4


def kernels(run: Watch, size: int) -> int:
    return sum(w.shape[2:] == (size, size) for w in run.matrices("encoder").values())


def still(run: Watch) -> int:
    """Convolutions that the first step leaves alone: those behind a scale of zero."""
    return sum(not run.grads[0][name].any() for name in run.matrices("encoder"))


def last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def channels_first(a: Watch, b: Watch) -> bool:
    """Images and kernels lie with the channels last in a, and not in b."""
    return all(map(last, (*a.inputs, *a.kernels))) and not any(map(last, (*b.inputs, *b.kernels)))


def starting_weights(prefix: str) -> dict[str, Tensor]:
    """Weights for the encoder of `trained`, others for every prefix, none of them that of a model at random."""
    encoder = tiny_model().encoder.state_dict()
    return {f"{prefix}{name}": torch.full_like(value, 0.01 * (1 + len(prefix))) for name, value in encoder.items()}


def begins_with(prefix: str) -> Callable[[Any, Watch], bool]:
    """The encoder's weights before the first step are those of the file; names that begin as classifiers do are not."""

    def seen(_, b: Watch) -> bool:
        matrices = b.matrices("encoder.")
        return all(torch.equal(w, starting_weights(prefix)[prefix + name[8:]]) for name, w in matrices.items())

    return seen


GROWING = {"start_size": 8, "grow_epochs": 1, "max_steps": STEPS + 1}
WITHOUT_BN = {"norm": "none", "head_batch_norm": False}
TRIPLET = {"loss": "margin_triplet", "margin": 0.4, "semi_hard": False}
SIMCLR = {
    "encoder": row("resnet20", lambda a, b: kernels(b, 3) == 19),
    # Above 64 pixels a ResNet takes the ImageNet stem, of 7 x 7.
    "image_size": row(72, lambda a, b: sides(72, 72)(a, b) and kernels(b, 7) == 1),
    "start_size": row(12, sides(12, 16), **GROWING),
    "grow_epochs": row(2, sides(8, 12), **GROWING),
    "stem": row("small_stride2", lambda a, b: 2 * b.maps[0].shape[-1] == a.maps[0].shape[-1], stem="small"),
    "width": row(0.5, lambda a, b: b.h[0].shape[1] == 2 * a.h[0].shape[1], width=0.25),
    "depth": row(2.0, lambda a, b: (kernels(a, 3), kernels(b, 3)) == (7, 13)),
    "phi": row(
        1, lambda a, b: len(b.matrices("encoder")) > len(a.matrices("encoder")), encoder="efficientnet", width=1.0
    ),
    "shortcut": row("A", lambda a, b: kernels(b, 1) == 0, shortcut="B"),
    "zero_init": row(False, lambda a, b: still(a) == 6 and still(b) == 0, zero_init=True),
    "norm": row("none", lambda a, b: not any(name.startswith("encoder") for name in b.buffers), norm="batch"),
    "weights": row("starting.pt", begins_with("")),
    "weights_prefix": row("head.", begins_with("head."), weights="starting.pt"),
    "head": row("linear", lambda a, b: len(b.matrices("head")) == 1, head="nonlinear"),
    "hidden_dim": row(24, lambda a, b: [w.shape[0] for w in b.matrices("head").values()] == [24, 16]),
    "projection_dim": row(24, lambda a, b: b.z[0].shape[1] == 24),
    "head_layers": row(4, lambda a, b: len(b.matrices("head")) == 4, head="deep", head_layers=3),
    "head_batch_norm": row("hidden", lambda a, b: sum("head" in n and "mean" in n for n in b.buffers) == 1),
    "loss": row("dcl", loss_is("dcl", 0.2), loss="nt_xent", temperature=0.2),
    "temperature": row(0.5, loss_is("nt_xent", 0.5), temperature=0.2),
    "margin": row(0.9, loss_is("margin_triplet", 0.9), **TRIPLET),
    "semi_hard": row(True, semi_hard_of_both, **TRIPLET),
    "small_crops": row(2, lambda a, b: [len(x) for x in b.inputs[:2]] == [2 * BATCH, 2 * BATCH] and sides(16, 8)(a, b)),
    "small_crop_size": row(12, sides(16, 12), small_crops=1),
    "small_crop_scale": row((1.0, 1.0), small_crop_is(8, crop_scale=(1.0, 1.0)), small_crops=1),
    "pairs": row("large", compared_with_large, small_crops=1, temperature=0.2),
    "views": row(3, lambda a, b: len(b.inputs[0]) == 3 * BATCH),
    "micro_batch_size": row(4, lambda a, b: {len(x) for x in b.inputs} == {8}, **WITHOUT_BN),
    "optimizer": row("adamw", signs),
    "base_lr": row(0.2, step_is(0.2)),
    "lr_scaling": row("linear", step_is(0.1 * BATCH / 256)),
    "weight_decay": row(0.5, step_is(0.1, lambda grad, w: grad + 0.5 * w if w.ndim > 1 else grad)),
    "momentum": row(0.9, nesterov),
    "warmup_epochs": row(1, step_is(0.1 / STEPS)),
    "batch_size": row(32, step_is(0.1 * 32 / 256), lr_scaling="linear"),
    "channels": row(1, lambda a, b: {x.shape[1] for x in b.inputs} == {1}),
    "channels_last": row(False, channels_first, channels_last=True),
    "compile_encoder": row("max-autotune-no-cudagraphs", lambda a, b: b.compiled == 2 * ["max-autotune-no-cudagraphs"]),
    "seed": row(1, views_are(16, seed=1)),
    "augmentation": row({"strength": 0.9}, views_are(8, strength=0.9), **GROWING),
}


# SimCLRAugmentation: the views of images whose red rises to the right and whose green rises downwards.


def ramps() -> Tensor:
    red = torch.linspace(0.2, 0.8, 16).expand(16, 16)
    blue = torch.rand(32, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    return torch.stack((red.expand(32, 16, 16), red.T.expand(32, 16, 16), blue), dim=1)


# Nothing but the crop; what a row needs stands beside it.
PLAIN = {f"{name}_prob": 0.0 for name in ("flip", "jitter", "gray", "blur", "rotation", "cutout", "noise", "sobel")}
PLAIN |= {"crop_scale": (0.2, 0.6), "crop_ratio": (3 / 4, 4 / 3), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
COMPILED = 7.0  # what the stand-in for the compiled functions paints


@pytest.fixture(autouse=True, scope="module")
def _compiled_views_are_painted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "crop_and_color", lambda images, draws, norm, out: out.fill_(COMPILED))
        patch.setattr(compiled, "_uncompiled", set())  # whatever another test has found
        yield


def seen_by(augment: SimCLRAugmentation) -> tuple[Tensor, Tensor]:
    return augment(ramps()[:, : augment.channels], torch.arange(32))


def views(**settings: Any) -> tuple[Tensor, Tensor]:
    whole = {"image_size": 16, **PLAIN, **settings}
    channels = whole.get("channels", 3)
    return seen_by(SimCLRAugmentation(**{**whole, **{name: whole[name][:channels] for name in ("mean", "std")}}))


def both(of: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], bool]:
    """Both views with the setting are a function of those without."""
    return lambda a, b: all(same(other, of(view)) for view, other in zip(a, b, strict=True))


def extent(view: Tensor) -> tuple[Tensor, Tensor]:
    """Of the crop, to the right and downwards: (n,) each."""
    red, green = view[:, 0].flatten(1), view[:, 1].flatten(1)
    return red.amax(1) - red.amin(1), green.amax(1) - green.amin(1)


def rough(view: Tensor) -> Tensor:
    return (view[..., 1:] - view[..., :-1])[:, 2].abs().mean((1, 2))


def turned(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Each image by some quarters of a turn, and all of these occur."""
    quarters = [[next((k for k in range(4) if same(y, x.rot90(k, (1, 2)))), None) for x, y in zip(*pair, strict=True)]
                for pair in zip(a, b, strict=True)]  # fmt: skip
    return all(set(found) == {0, 1, 2, 3} for found in quarters)


def hole(view: Tensor) -> list[int]:
    """Pixels of the mean colour, of the images with the fewest and the most."""
    count = (view.abs() < 1e-6).all(1).sum((1, 2))
    return [int(count.min()), int(count.max())]


def noise_is(std: float) -> Callable[[Any, Any], bool]:
    """The plain crops with this much noise, which does not drive them out of [0, 1]."""
    return lambda _, b: all(abs((y - x).std() / std - 1) < 0.05 for x, y in zip(views(), b, strict=True))


def sun(threshold: float) -> Callable[[Tensor], Tensor]:
    return lambda view: torchvision.transforms.functional.solarize(view, threshold)


CENTRED = {"mean": (0.5, 0.5, 0.5)}
AUGMENTATION = {
    "image_size": row(24, lambda a, b: [view.shape[-1] for view in b] == [24, 24]),
    # Of no strength, the jitter leaves what the crop gives.
    "strength": row(0.0, lambda a, b: same(b[0], views()[0]), jitter_prob=1.0),
    "crop_scale": row((1.0, 1.0), lambda a, b: same(b[0], ramps()), crop_ratio=(1.0, 1.0)),
    "crop_ratio": row((1.0, 1.0), lambda a, b: same(*extent(b[0]))),
    "flip_prob": row(1.0, both(lambda view: view.flip(3))),
    "jitter_prob": row(1.0, lambda a, b: ((b[0] - a[0]).abs().mean((1, 2, 3)) > 0.02).sum() > 25),
    "gray_prob": row(1.0, both(lambda view: torchvision.transforms.functional.rgb_to_grayscale(view, 3))),
    "blur_prob": row(1.0, lambda a, b: (rough(b[0]) < 0.9 * rough(a[0])).all(), blur_sigma=(1.0, 1.0)),
    "blur_sigma": row((2.0, 2.0), lambda a, b: (rough(b[0]) < 0.9 * rough(a[0])).all(), blur_prob=1.0,
                      blur_sigma=(0.5, 0.5)),
    "rotation_prob": row(1.0, turned),
    "solarize_prob": row(1.0, both(sun(0.5)), solarize_threshold=0.5),
    "solarize_threshold": row(0.25, lambda a, b: same(b[0], sun(0.25)(views()[0])), solarize_prob=1.0),
    "cutout_prob": row(1.0, lambda a, b: hole(b[0])[0] >= 16 and hole(b[0])[1] == 64, cutout_size=0.5, **CENTRED),
    "cutout_size": row(0.25, lambda a, b: hole(b[0])[1] == 16, cutout_prob=1.0, cutout_size=0.5, **CENTRED),
    "noise_prob": row(1.0, noise_is(0.05), noise_std=0.05),
    "noise_std": row(0.02, noise_is(0.02), noise_prob=1.0, noise_std=0.05),
    "sobel_prob": row(1.0, both(sobel)),
    "augment_second_view": row(False, lambda a, b: torch.equal(a[0], b[0]) and same(b[1], views()[1]), jitter_prob=1.0),
    "channels": row(2, both(lambda view: view[:, :2])),
    "mean": row((0.1, 0.2, 0.3), both(lambda view: view - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))),
    "std": row((0.1, 0.2, 0.4), both(lambda view: view / torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1))),
    "compile_views": row(True, lambda a, b: all((view == COMPILED).all() for view in b), compile_views=False),
}  # fmt: skip


# ImageData: small folders of images, whose red counts them.


def paint(root: str, names: list[str], green: int = 0) -> None:
    for i, name in enumerate(names):
        (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (i, green, 0)).save(Path(root) / name)


@pytest.fixture(autouse=True, scope="module")
def _folders(tmp_path_factory) -> Iterator[None]:
    """Where the rows' folders are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("settings"))
        paint("photos", [f"{c}/{i}.png" for c in "ab" for i in range(5)])
        Path("list.txt").write_text("a/1.png\nb/3.png\n")
        for i in range(8):
            Path("deep", "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((10, 10), 1000 + i, np.uint16)).save(Path("deep", "ab"[i % 2], f"{i}.png"))
        paint("tests", [f"{c}/{i}.png" for c in "ab" for i in range(2)], green=255)
        paint("one", [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(3)])
        paint("two", [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(4)])
        Path("named/cifar-10-batches-py").mkdir(parents=True)
        yield


class Fetched:
    """torchvision's CIFAR-10 of 4 images, which are white where it was asked to fetch them."""

    def __init__(self, root, train, download=False):
        self.data = np.full((4, 32, 32, 3), 255 if download else 0, dtype=np.uint8)
        self.targets, self.classes = [0, 1, 2, 3], list("abcdefghij")


def read(**settings: Any) -> SimpleNamespace:
    """What ImageData makes of its settings: sets and batches, and who reads which files when."""
    small = {"batch_size": 4, "image_size": 8, "workers": 0, "shapes_train": 20, "shapes_test": 10}
    decode, cache, load = sources.read_images, sources.map_decoded, loader.DataLoader
    opened, threads, processes, checked, asked = [], [], [], [], []

    def decoding(paths, side, threads, rules, **others):
        opened.append((len(paths), threads))
        asked.append(rules)
        return decode(paths, side, threads=threads, rules=rules, **others)

    def caching(paths, names, side, cache_dir, number, name, rules):
        threads.append(number)
        return cache(paths, names, side, cache_dir, number, name, rules)

    def loading(source, num_workers, persistent_workers, multiprocessing_context, **options):
        processes.append(num_workers)
        return load(source, **options)  # in this process: to start others takes seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "CIFAR10", Fetched)
        patch.setattr(module, "unreadable", lambda paths, *args: checked.append(len(paths)) or {})
        patch.setattr(sources, "read_images", decoding)
        patch.setattr(sources, "map_decoded", caching)
        patch.setattr(loader, "DataLoader", loading)
        data = ImageData(**{**small, **settings})
        data.setup()
        at_once = list(opened)
        batches = list(data.train_dataloader())
        held = len(data.eval_loader("test").index)
    other = {"files": torch.zeros(1, dtype=torch.int64), "samples": torch.zeros(1, 2, dtype=torch.int64)}
    try:
        data.load_state_dict(other)  # a checkpoint of other images
        goes_on = True
    except ValueError:
        goes_on = False
    return SimpleNamespace(
        goes_on=goes_on,
        checked=checked,
        rules=asked[-1] if asked else None,
        train=len(data.train),
        test=data.test and len(data.test),
        pixels=torch.cat([images for images, _ in batches]),
        order=torch.cat([index for _, index in batches]),
        batches=[len(index) for _, index in batches],
        held=held,
        read_at_once=at_once,
        read_later=opened[len(at_once) :],
        threads=threads,
        processes=processes,
        cached=sorted(path.name for path in Path("cache").glob("*")),
    )


def work_for_two(_, b: SimpleNamespace) -> bool:
    """Two threads fill memory and cache, two processes read what neither holds."""
    cached, files = (read(train_dir="photos", workers=2, **held) for held in (OTHER_CACHE, {"memory_limit_gb": 0.0}))
    return b.read_at_once == [(10, 2)] and cached.threads == [2] and set(files.processes) == {2}


OTHER_CACHE = {"cache_dir": "cache of two"}


def side_is(side: int) -> Callable[[Any, Any], bool]:
    return lambda a, b: b.pixels.shape[1:] == (3, side, side)


IMAGE_DATA = {
    "source": row(
        "imagenet", lambda a, b: (b.train, b.test) == (6, 6), source="cifar10", data_dir="one", download=True
    ),
    "train_dir": row("photos", lambda a, b: b.train == 10 and b.pixels[:, 0].amax() <= 9),
    "test_dir": row("tests", lambda a, b: b.test == 4, train_dir="photos"),
    "data_dir": row("two", lambda a, b: (b.train, b.test) == (8, 8), source="imagenet", data_dir="one"),
    "batch_size": row(5, lambda a, b: b.batches == [5, 5, 5, 5]),
    "image_size": row(12, side_is(12)),
    "load_size": row(12, side_is(12)),
    "workers": row(2, work_for_two, train_dir="photos"),
    "memory_limit_gb": row(0.0, lambda a, b: not b.read_at_once and len(b.read_later) == 2, train_dir="photos"),
    "cache_dir": row("cache", lambda a, b: len(b.cached) > 0 and same(a.pixels, b.pixels), train_dir="photos"),
    "download": row(True, lambda a, b: (b.pixels == 255).all(), source="cifar10", data_dir="named"),
    "seed": row(1, lambda a, b: torch.equal(b.order, epoch_order(1, 0, 20))),
    "shapes_train": row(24, lambda a, b: b.train == 24),
    "shapes_test": row(15, lambda a, b: b.test == 15),
    "holdout": row(0.4, lambda a, b: b.held == 4, train_dir="photos", holdout=0.2),
    "held_out": row(3, lambda a, b: b.batches == [4] and a.batches == [4, 4], train_dir="photos"),
    "on_error": row("skip", lambda a, b: b.checked == [10], train_dir="photos"),
    "leave_out": row("list.txt", lambda a, b: b.train == 8 and a.train == 10, train_dir="photos"),
    "read_timeout_s": row(7.0, lambda a, b: b.rules.timeout_s == 7, train_dir="photos"),
    "max_pixels": row(100, lambda a, b: b.rules.max_pixels == 100, train_dir="photos"),
    "sixteen_bit_max": row(
        4095, lambda a, b: (b.pixels == 1000 // 16).any() and a.pixels.amax() == 3, train_dir="deep"
    ),
    "channels": row(1, lambda a, b: b.pixels.unique().tolist() == [*range(1000, 1008)], train_dir="deep"),
    "bits": row(8, lambda a, b: b.pixels.unique().tolist() == [3], train_dir="deep", channels=1),
    "allow_changed_images": row(True, lambda a, b: b.goes_on, train_dir="photos"),
}


# OnlineKNN: what it logs beside a short training, and which images it looks at.


class Logged(Callback):
    def __init__(self):
        self.knn, self.looked = {}, 0

    def on_train_start(self, trainer, model):
        model.encoder.register_forward_pre_hook(self.count)

    def count(self, encoder, args):
        self.looked += 0 if encoder.training else len(args[0])

    def on_train_epoch_end(self, trainer, model):
        metrics = trainer.callback_metrics
        if "knn_top1" in metrics:
            self.knn[trainer.current_epoch] = metrics.pop("knn_top1").item()


def watched(**settings: Any) -> SimpleNamespace:
    """The run's logged accuracies, and the features that its encoder gives in the end. A class is a tint."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    tints = torch.randint(40, 216, (10, 3, 1, 1), generator=generator)[labels]
    pixels = (tints + torch.randint(-40, 40, (300, 3, 16, 16), generator=generator)).to(torch.uint8)
    logged, data = Logged(), tiny_data()
    data.setup()
    data.train = data.labelled_train = MemoryImages("tints", pixels, labels, [str(i) for i in range(10)])
    knn = OnlineKNN(**{"every_n_epochs": 1, "images": 200, "k": 20, "temperature": 10.0, **settings})
    trainer = fit(Path("fit"), tiny_model(), data, [knn, logged], max_epochs=3, limit_train_batches=1)
    looked = logged.looked
    features, labels = extract_features(trainer.lightning_module.encoder, data.eval_loader("train", limit=200))
    return SimpleNamespace(knn=logged.knn, looked=looked, features=features, labels=labels)


def online_knn_is(k: int, temperature: float) -> Callable[[Any, Any], bool]:
    """The last accuracy is the double loop's, of a fixed fifth of the images among the others."""

    def seen(_, b: SimpleNamespace) -> bool:
        query, bank = epoch_order(20260712, 0, 200).split([40, 160])
        predicted = _dumb(b.features[bank], b.labels[bank], b.features[query], k, temperature)
        expected = (torch.tensor(predicted) == b.labels[query]).double().mean()
        return abs(b.knn[2] - expected) < 1e-6

    return seen


ONLINE_KNN = {
    "every_n_epochs": row(2, lambda a, b: list(b.knn) == [1, 2]),
    "images": row(50, lambda a, b: b.looked == 3 * 50),
    # With the whole bank voting alike, every image is taken for the class that is most frequent in it.
    "k": row(160, online_knn_is(160, 10.0)),
    "temperature": row(0.003, online_knn_is(160, 0.003), k=160),
}


# OnlineProbe: likewise.


def probed_online(**settings: Any) -> SimpleNamespace:
    looked, epochs, data = [], [], tiny_data()
    probe = OnlineProbe(**{"every_n_epochs": 1, "images": 40, **settings})
    predict = probe.predict
    probe.predict = lambda *args: looked.append((len(args[0]) + len(args[2]), predict(*args))) or looked[-1][1]
    end = Callback()
    end.on_train_epoch_end = lambda *args: epochs.append(probe.measured_epoch)
    trainer = fit(Path("fit"), tiny_model(), data, [probe, end], max_epochs=3, limit_train_batches=1)
    features, labels = extract_features(trainer.lightning_module.encoder, data.eval_loader("train", limit=40))
    return SimpleNamespace(epochs=epochs, images=looked[0][0], last=looked[-1][1], features=features, labels=labels)


def probe_is(regularization: float) -> Callable[[Any, Any], bool]:
    """The last predictions are those of torch's optimiser on the definition."""

    def seen(_, b: SimpleNamespace) -> bool:
        query, bank = epoch_order(20260712, 0, 40).split([8, 32])
        expected = predict_by_logreg(b.features[bank], b.labels[bank], b.features[query], regularization=regularization)
        return torch.equal(b.last, expected)

    return seen


ONLINE_PROBE = {
    "every_n_epochs": row(2, lambda a, b: b.epochs == [None, 1, 2]),
    "images": row(50, lambda a, b: b.images == 50),
    "regularization": row(1e6, probe_is(1e6)),
    "train_dir": row("photos", lambda a, b: b.images == 10),
}


# OnlineQuality: in which epochs it measures, and how many images it looks at.


def measured(**settings: Any) -> SimpleNamespace:
    data, epochs, looked = tiny_data(), [], []
    data.setup()
    images = data.test.images
    data.test.images = lambda index: looked.append(len(index)) or images(index)
    quality = OnlineQuality(**{"every_n_epochs": 1, "images": 20, **settings})
    end = Callback()
    end.on_train_epoch_end = lambda *args: epochs.append(quality.measured_epoch)
    fit(Path("fit"), tiny_model(), data, [quality, end], max_epochs=3, limit_train_batches=1)
    return SimpleNamespace(epochs=epochs, looked=looked)


ONLINE_QUALITY = {
    "every_n_epochs": row(2, lambda a, b: b.epochs == [None, 1, 2]),
    "images": row(30, lambda a, b: set(b.looked) == {30}),
}


# FiniteSteps: what becomes of a step that is not finite.


def watched_for_nan(**settings: Any) -> SimpleNamespace:
    finite = FiniteSteps(**settings, say=lambda *args: None)
    ended = said(NonFiniteStep, fit, Path("fit"), tiny_model(), callbacks=[Poison(1), finite], max_epochs=1)
    return SimpleNamespace(ended=ended, skipped=finite.skipped)


FINITE_STEPS = {"on_nonfinite": row("skip", lambda a, b: "at step 1" in str(a.ended) and b.skipped == 1)}


# Dashboard: in which epochs it looks at the network, and at how many images.


def looked(**settings: Any) -> SimpleNamespace:
    data, epochs, images = tiny_data(), [], []
    dashboard = Dashboard(**{"every_n_epochs": 1, "images": 20, **settings})
    look = dashboard._look

    def watch(data, module, last=False):
        found = look(data, module, last)
        epochs.append(module.current_epoch)
        images.append(len(dashboard._sample.index))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard, "_look", watch)
        patch.setattr(simclr.dashboard, "can_show", lambda trainer: True)
        patch.setattr(simclr.dashboard, "tsne", lambda h: h[:, :2])
        fit(Path("fit"), tiny_model(), data, [dashboard], max_epochs=3, limit_train_batches=1)
    return SimpleNamespace(epochs=epochs[1:], images=images)  # without the one before the first step


DASHBOARD = {
    "every_n_epochs": row(2, lambda a, b: b.epochs == [1, 2]),
    "images": row(30, lambda a, b: set(b.images) == {30}),
}


# The protocols of evaluation: on features of four clouds, and on a run.


class Named(TorchFunctionMode):
    """Which of torch's functions are told to compute on `HERE`, and how large their results are."""

    def __init__(self):
        super().__init__()
        self.placed, self.products = set(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, torch.device) and x == HERE for x in (*args, *kwargs.values())):
            self.placed.add(func.__name__)
            if func is Tensor.to and args[0].dtype == torch.uint8 and args[0].ndim == 4:
                self.placed.add(f"{len(args[0])} images")
        result = func(*args, **kwargs)
        if func in (Tensor.matmul, Tensor.__matmul__):
            self.products.append(tuple(result.shape))
        return result


HERE = torch.device("cpu", 0)  # where every tensor is, by a name that nothing else has


def probed(probe: Callable[..., Any], **settings: Any) -> Any:
    x, y, test_x, test_y = (part / 100 if part.is_floating_point() else part for part in _data())
    with Named() as named:
        result = said(RuntimeError, probe, x, y, test_x, test_y, **{**BASE[probe], **settings})
    if isinstance(result, str):
        return result
    return SimpleNamespace(**vars(result), placed=named.placed)


BASE = {linear_probe: {}, linear_probe_sgd: {"epochs": 3, "batch_size": 50}}


def stationary(regularization: float) -> Callable[[Any, Any], bool]:
    """The gradient of the definition with this lambda is zero where the probe ended."""

    def seen(_, b: SimpleNamespace) -> bool:
        x, y = (part / 100 if part.is_floating_point() else part for part in _data()[:2])
        weight = b.weight.double() * x.double().std(0, correction=0)
        bias = b.bias.double() + b.weight.double() @ x.double().mean(0)
        p = torch.cat((weight.flatten(), bias)).requires_grad_()
        gradient = torch.autograd.grad(_objective(p, _standardised(x, x), y, regularization, 3), p)[0] / len(x)
        return gradient.abs().max() < 1e-4

    return seen


def plain_is(seed: int = 0, **settings: Any) -> Callable[[Any, Any], bool]:
    """The classifier is that of torch's own layer and optimiser."""

    def seen(_, b: SimpleNamespace) -> bool:
        x, y = (part / 100 if part.is_floating_point() else part for part in _data()[:2])
        expected = plain_sgd(in_order(x, y, seed), 3, **{**BASE[linear_probe_sgd], **settings})
        return same(b.weight, expected.weight, 1e-5) and same(b.bias, expected.bias, 1e-5)

    return seen


def another_choice(a: SimpleNamespace, b: SimpleNamespace) -> bool:
    return a.validation_accuracy != b.validation_accuracy


FEATURES = ("train_features", "train_labels", "test_features", "test_labels")
LBFGS = {
    "regularization": row(1000.0, stationary(1000.0), regularization=1.0),
    "selection_size": row(30, another_choice),
    "max_iterations": row(1, lambda a, b: "did not converge in 1 iterations" in str(b)),
    "num_classes": row(5, lambda a, b: (len(b.weight), len(b.bias)) == (5, 5)),
    "seed": row(1, another_choice),
    "device": row(HERE, lambda a, b: "to" in b.placed),
}
SGD = {
    "epochs": row(5, plain_is(epochs=5)),
    "batch_size": row(30, plain_is(batch_size=30)),
    "base_lr": row(0.5, plain_is(base_lr=0.5)),
    "momentum": row(0.5, plain_is(momentum=0.5)),
    "weight_decay": row(0.5, plain_is(weight_decay=0.5)),
    "num_classes": row(5, lambda a, b: (len(b.weight), len(b.bias)) == (5, 5)),
    "seed": row(1, plain_is(seed=1)),
    "device": row(HERE, lambda a, b: {"to", "zeros"} <= b.placed),
}


@functools.cache
def pictures() -> tuple[_Pixels, _TrainSet, tuple[Tensor, Tensor]]:
    encoder, train_set = _Pixels(), _TrainSet()
    return encoder, train_set, extract_features(encoder, [(train_set.pixels, train_set.labels)])


def evaluated_by_sgd(**settings: Any) -> SimpleNamespace:
    encoder, train_set, test = pictures()
    with Named() as named:
        result = linear_evaluation_sgd(encoder, train_set, *test, **{"epochs": 3, "batch_size": 40, **settings})
    return SimpleNamespace(**vars(result), placed=named.placed)


def plain_views_are(seed: int = 0, crop_scale: tuple[float, float] = (0.08, 1.0), **settings: Any):
    def seen(_, b: SimpleNamespace) -> bool:
        encoder, train_set, _ = pictures()
        of_epoch = of_views(encoder, train_set.pixels, train_set.labels, seed, crop_scale)
        expected = plain_sgd(of_epoch, 3, **{"epochs": 3, "batch_size": 40, **settings})
        return same(b.weight, expected.weight, 1e-5) and same(b.bias, expected.bias, 1e-5)

    return seen


EVALUATION_SGD = {
    "epochs": row(5, plain_views_are(epochs=5)),
    "batch_size": row(30, plain_views_are(batch_size=30)),
    "base_lr": row(0.5, plain_views_are(base_lr=0.5)),
    "momentum": row(0.5, plain_views_are(momentum=0.5)),
    "weight_decay": row(0.5, plain_views_are(weight_decay=0.5)),
    "crop_scale": row((0.5, 0.6), plain_views_are(crop_scale=(0.5, 0.6))),
    "seed": row(1, plain_views_are(seed=1)),
    "device": row(HERE, lambda a, b: {"to", "zeros"} <= b.placed),
}


# The record of a run, of 96 training and 48 test images.


@functools.cache
def run() -> tuple[Path, ImageData]:
    data = tiny_data(shapes_train=96, shapes_test=48, image_size=8)
    trainer = fit(Path("fit"), tiny_model(image_size=8), data, max_steps=2)
    trainer.save_checkpoint("run.ckpt")
    return Path("run.ckpt").absolute(), data


@pytest.fixture(autouse=True, scope="module")
def _yardsticks_take_one_step() -> Iterator[None]:
    """No row is about their numbers, which take most of an evaluation's time: they have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_YARDSTICK_ITERATIONS", 1)
        yield


HEARD = []


def recorded(*, watched: bool = False, **settings: Any) -> SimpleNamespace:
    """The record; what was computed `HERE` from one line said to the next; what was said to whom the settings name.

    watched: look at each of torch's functions, which doubles the time.
    """
    stages, say, named = [], settings.pop("say", None), Named()
    with named if watched else contextlib.nullcontext():

        def hear(text: str) -> None:
            if text.startswith("no number for this yardstick"):
                return
            stages.append(named.placed)
            named.placed = set()
            if say is not None:
                say(text)

        of_sgd = {**SHORT, **settings.pop("settings", {})} if settings.get("protocol") == "sgd" else {}
        votes = {"k": 20, **settings.pop("knn", {})}
        with pytest.MonkeyPatch.context() as patch:  # no row is about the choice of a regularisation
            patch.setitem(linear_probe.__kwdefaults__, "regularization", 1e3)
            record = linear_evaluation(*run(), settings=of_sgd, knn=votes, **settings, say=hear)
    return SimpleNamespace(record=record, stages=[*stages[1:], named.placed], heard=list(HEARD))


SHORT = {"epochs": 3, "batch_size": 32, "base_lr": 3.0}


def record_is(**settings: Any) -> Callable[[Any, Any], bool]:
    """Every prediction of the record is that of the plain loop's classifier."""

    def seen(_, b: SimpleNamespace) -> bool:
        path, data = run()
        encoder = load_encoder(path)
        pixels, labels = data.train.images(range(96)), data.train.labels
        classifier = plain_sgd(of_views(encoder, pixels, labels), 10, **{**SHORT, **settings})
        features, test_labels = extract_features(encoder, data.eval_loader("test"))
        matrix = [[0] * 10 for _ in range(10)]
        for truth, guess in zip(test_labels.tolist(), classifier(features.double()).argmax(1).tolist(), strict=True):
            matrix[truth][guess] += 1
        return b.record["confusion_matrix"] == matrix

    return seen


def knn_is(k: int, temperature: float) -> Callable[[Any, Any], bool]:
    def seen(_, b: SimpleNamespace) -> bool:
        path, data = run()
        (x, y), (test_x, test_y) = (
            extract_features(load_encoder(path), data.eval_loader(p)) for p in ("train", "test")
        )
        right = [guess == truth for guess, truth in zip(_dumb(x, y, test_x, k, temperature), test_y, strict=True)]
        return abs(b.record["knn_top1"] - sum(right).item() / 48) < 1e-9

    return seen


def everywhere(_, b: SimpleNamespace) -> bool:
    """The features, the classifier of either protocol and both yardsticks are computed there."""
    for found in (b, recorded(protocol="sgd", device=HERE, watched=True)):
        features, classifier, random, pixels = found.stages
        if not all({"to", "96 images", "48 images"} <= stage for stage in (features, random)):
            return False
        if not ("to" in classifier and "to" in pixels):
            return False
    return "zeros" in classifier


EVALUATION = {
    "protocol": row("sgd", record_is()),
    "settings": row({"epochs": 6}, record_is(epochs=6), protocol="sgd"),
    "knn": row({"k": 3}, knn_is(3, 0.1)),
    "device": row(HERE, everywhere, watched=True),
    "command": row("a command", lambda a, b: b.record["command"] == "a command"),
    "say": row(HEARD.append, lambda a, b: any("48 test images" in line for line in b.heard)),
}


def recorded_by_sgd(**settings: Any) -> SimpleNamespace:
    return recorded(protocol="sgd", settings=settings)


def recorded_by_knn(**settings: Any) -> SimpleNamespace:
    return recorded(knn=settings)


def fitted_by_lbfgs(**settings: Any) -> Any:
    path, data = run()
    return said(RuntimeError, linear_evaluation, path, data, settings=settings, knn={"k": 20})


BY_SGD = {
    "epochs": row(6, record_is(epochs=6)),
    "batch_size": row(8, record_is(batch_size=8)),
    "base_lr": row(30.0, record_is(base_lr=30.0)),
    "weight_decay": row(1.0, record_is(weight_decay=1.0)),
}
BY_KNN = {"k": row(3, knn_is(3, 0.1)), "temperature": row(10.0, knn_is(20, 10.0), temperature=0.003)}
BY_LBFGS = {"max_iterations": row(1, lambda a, b: "did not converge in 1 iterations" in str(b))}


def voted(call: Callable[..., Any], *test: int, **settings: Any) -> SimpleNamespace:
    parts = _clusters(80, 60)
    with Named() as named:
        result = said(ValueError, call, *parts[: 3 + len(test)], **{"k": 20, **settings})
    return SimpleNamespace(result=result, queries=[shape[0] for shape in named.products])


def votes_are(k: int, temperature: float) -> Callable[[Any, Any], bool]:
    """The classes, or the part of them that is right, are the double loop's."""

    def seen(_, b: SimpleNamespace) -> bool:
        x, y, test_x, test_y = _clusters(80, 60)
        expected = torch.tensor(_dumb(x, y, test_x, k, temperature))
        return same(
            torch.as_tensor(b.result), expected if torch.is_tensor(b.result) else (expected == test_y).double().mean()
        )

    return seen


KNN = {
    "k": row(3, votes_are(3, 0.1)),
    "temperature": row(0.01, votes_are(20, 0.01), temperature=10.0),
    "num_classes": row(3, lambda a, b: "reach from 0 to 3: needed 0 to 2" in str(b.result)),
    "chunk_size": row(25, lambda a, b: b.queries == [25, 25, 10] and same(*map(torch.as_tensor, (a.result, b.result)))),
}

TABLES = {
    "SimCLR": Table(SimCLR, trained, SIMCLR),
    "SimCLRAugmentation": Table(SimCLRAugmentation, views, AUGMENTATION),
    "ImageData": Table(ImageData, read, IMAGE_DATA),
    "OnlineKNN": Table(OnlineKNN, watched, ONLINE_KNN),
    "OnlineProbe": Table(OnlineProbe, probed_online, ONLINE_PROBE),
    "OnlineQuality": Table(OnlineQuality, measured, ONLINE_QUALITY),
    "FiniteSteps": Table(FiniteSteps, watched_for_nan, FINITE_STEPS, ("run_dir", "say")),
    "Dashboard": Table(Dashboard, looked, DASHBOARD),
    "linear_probe": Table(linear_probe, functools.partial(probed, linear_probe), LBFGS, FEATURES),
    "linear_probe_sgd": Table(linear_probe_sgd, functools.partial(probed, linear_probe_sgd), SGD, FEATURES),
    "linear_evaluation_sgd": Table(
        linear_evaluation_sgd, evaluated_by_sgd, EVALUATION_SGD, ("encoder", "train_set", *FEATURES[2:])
    ),
    "linear_evaluation": Table(  # of the supervised run: tests/test_supervised.py
        linear_evaluation, recorded, EVALUATION, ("checkpoint", "data", "supervised")
    ),
    "the protocol linear": Table(find_protocol("linear"), recorded_by_sgd, BY_SGD, ("frozen",)),
    "the protocol knn": Table(find_protocol("knn"), recorded_by_knn, BY_KNN, ("frozen",)),
    "the protocol logreg": Table(find_protocol("logreg"), fitted_by_lbfgs, BY_LBFGS, ("frozen",)),
    "knn_predict": Table(knn_predict, functools.partial(voted, knn_predict), KNN, FEATURES),
    "knn_accuracy": Table(knn_accuracy, functools.partial(voted, knn_accuracy, 1), KNN, FEATURES),
}
OBSERVED = {}  # observations that several rows compare with


def observation(name: str, settings: dict[str, Any]) -> Any:
    key = name, repr(sorted(settings.items()))
    if key not in OBSERVED:
        OBSERVED[key] = TABLES[name].observe(**settings)
    return OBSERVED[key]


@pytest.mark.parametrize("name", TABLES)
def test_every_setting_has_a_row_and_every_row_a_setting(name):
    table = TABLES[name]
    settings = [setting for setting in inspect.signature(table.of).parameters if setting not in table.inputs]
    assert sorted(table.rows) == sorted(settings)


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in TABLES for setting in TABLES[name].rows])
def test_a_setting_changes_what_it_says(name, setting):
    value, seen, beside = TABLES[name].rows[setting]
    without, changed = observation(name, beside), observation(name, {**beside, setting: value})
    assert not seen(without, without), "the row would be green if the setting reached nothing"
    assert seen(without, changed)


@pytest.mark.parametrize("setting", [setting for setting in AUGMENTATION if setting != "image_size"])
def test_simclr_hands_every_setting_to_its_augmentation(setting):
    value, _, beside = AUGMENTATION[setting]
    settings = {**PLAIN, **beside, setting: value}
    settings |= {name: settings[name][: settings.get("channels", 3)] for name in ("mean", "std")}
    found = seen_by(tiny_model(**settings).augment)
    assert all(torch.equal(view, other) for view, other in zip(found, views(**settings), strict=True))
