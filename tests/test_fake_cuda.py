"""The CUDA paths on a machine without one: what a step asks of the device, with tensors that have no numbers.

A `FakeCuda` says that it is on a CUDA device and knows only shapes, types and strides (it wraps a tensor of the meta
device). It refuses what CUDA refuses, operands of two devices, and what would make the host wait for the device: a look
at a number, a shape that depends on numbers, a copy that blocks. Tensors on the CPU are as real as ever, the views'
parameters among them. Which kernels CUDA has and what they compute is for tests/test_gpu.py.

torch's own FakeTensorMode cannot do it: without a device its CUDA tensors have no backward (the engine asks for the
device's context), and it takes the numbers of the CPU's tensors too.
"""

import ast
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from simclr.augment import SimCLRAugmentation
from simclr.contrast import tiles
from simclr.data import loader
from simclr.eval import nearest
from simclr.losses import dcl, margin_triplet, nt_logistic, nt_xent, nt_xent_unnormalized, sup_con
from simclr.nonfinite import FiniteSteps
from simclr.optim import build_optimizer
from simclr.report.pictures import neighbour_picture
from simclr.seeding import stream_uniforms, uniforms, view_stream
from simclr.training.gradient_cache import backward_in_parts
from simclr.views import compiled
from tiny import BATCH, fit, tiny_data, tiny_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
CUDA, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
# Operations whose result the host, or the next kernel's shape, needs at once.
LOOKS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount}
LOOKS |= {aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten._linalg_check_errors}
# What autocast computes in its lower precision, as far as a network here calls it.
LOWER = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.addmm, torch.bmm}


class WaitsForDevice(RuntimeError):
    """The host would stand still until the device has done all that was asked of it."""


class FakeCuda(Tensor):
    """A tensor on a CUDA device that is not there."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu, is_meta = CUDA, True, False, False

    @staticmethod
    def __new__(cls, meta: Tensor):
        layout = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, meta.shape, **layout, device="meta")
        tensor.meta = meta
        return tensor

    def __repr__(self, *, tensor_contents=None):
        return f"FakeCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        there = Cuda.active
        if packet in LOOKS:
            there.waits(packet)
            if packet is aten._local_scalar_dense:
                return torch.ones((), dtype=args[0].dtype).item()  # made up, for what may look
        if packet in (aten._to_copy, aten.copy_):
            return there.copy(func, args, kwargs)
        if packet in (aten.index, aten.index_put, aten.index_put_):
            there.check_indices(packet, args)
        else:
            there.check_devices(packet, (args, kwargs))
        if packet in (torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adamw_):
            return None  # changes numbers only
        kwargs = {name: META if name == "device" else value for name, value in kwargs.items()}
        result = tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))
        return return_and_correct_aliasing(func, args, kwargs, result)


def unwrap(x):
    """What the operation is done with: shapes alone."""
    return x.meta if isinstance(x, FakeCuda) else x.to("meta") if isinstance(x, Tensor) else x


def wrap(x):
    return FakeCuda(x) if isinstance(x, Tensor) and not isinstance(x, FakeCuda) else x


class Cuda(TorchFunctionMode):
    """A machine with a CUDA device, as far as this file needs one. With `strict`, waiting for it is an error."""

    active: "Cuda"

    def __init__(self, strict: bool = True):
        super().__init__()
        self.strict, self.waited, self.pinned, self.allowed = strict, [], [], ()

    def __enter__(self):
        Cuda.active = self
        return super().__enter__()

    def waits(self, what) -> None:
        self.waited.append(str(what))
        if self.strict and not str(what).startswith(self.allowed):
            raise WaitsForDevice(f"{what} waits for the device")

    def check_devices(self, what, arguments) -> None:
        # A number on the CPU goes with the kernel's other arguments.
        on_cpu = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and not isinstance(x, FakeCuda) and x.ndim]
        if on_cpu:
            raise RuntimeError(f"{what}: all tensors must be on one device; cpu {tuple(on_cpu[0].shape)} beside cuda:0")

    def check_indices(self, what, args) -> None:
        self.check_devices(what, (args[0], args[2:]))
        for index in args[1]:
            if isinstance(index, Tensor) and (index.dtype == torch.bool or not isinstance(index, FakeCuda)):
                self.waits(f"{what} with an index of {index.dtype} on {index.device.type}")

    def upload(self, x: Tensor, non_blocking: bool) -> None:
        """Only from page-locked memory does CUDA copy without waiting."""
        if not (non_blocking and any(x is pinned for pinned in self.pinned)):
            memory = "page-locked" if any(x is pinned for pinned in self.pinned) else "pageable"
            self.waits(f"copy of {tuple(x.shape)} from {memory} memory, non_blocking={non_blocking}")

    def copy(self, func, args, kwargs):
        if func.overloadpacket is aten.copy_:
            target, source = args[:2]
            if not isinstance(target, FakeCuda):
                if not (
                    any(target is pinned for pinned in self.pinned) and (len(args) > 2 or kwargs.get("non_blocking"))
                ):
                    self.waits("copy to the CPU")
                return target.copy_(torch.ones(source.shape))
            if not isinstance(source, FakeCuda):
                self.upload(source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return target
        device = kwargs.get("device")
        if device is not None and device.type == "cpu":
            self.waits("copy to the CPU")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return FakeCuda(func(unwrap(args[0]), **{**kwargs, "device": META}))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fake = bool(args) and isinstance(args[0], FakeCuda)
        if func is Tensor.to:
            return self.to(fake, *args, **kwargs)
        sends = fake if func is Tensor.new_tensor else is_cuda(kwargs.get("device")) and not fake
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and sends:
            self.waits(func.__name__)
        if func in (Tensor.tolist, Tensor.numpy) and fake:
            self.waits(func.__name__)
        if func is Tensor.__setitem__ and fake and not isinstance(args[2], Tensor):
            self.waits("a number written into a place")  # a copy from pageable memory in torch 2.14; `fill_` never is
        if func is Tensor.pin_memory or kwargs.pop("pin_memory", False):
            self.pinned.append(args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs))
            return self.pinned[-1]
        if is_cuda(kwargs.get("device")):
            made = func(*args, **{**kwargs, "device": META})
            return made if isinstance(made, FakeCuda) else FakeCuda(made).requires_grad_(made.requires_grad)
        if func in LOWER and torch.is_autocast_enabled("cuda"):
            # Autocast itself looks for a CUDA device in C++, where these tensors are on another.
            lower = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map(
                lambda x: x.to(lower) if isinstance(x, FakeCuda) and x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **kwargs)

    def to(self, fake: bool, x: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        arguments = {"dtype": dtype or x.dtype, "memory_format": memory_format or torch.preserve_format, "copy": copy}
        if device is None or fake is is_cuda(device):
            return Tensor.to(x, **arguments)
        if fake:
            return Tensor.to(x, "cpu", **arguments)
        self.upload(x, non_blocking)
        return FakeCuda(x.detach().to("meta", **arguments))


def is_cuda(device) -> bool:
    """C++ takes a FakeCuda for a tensor of the meta device."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


@pytest.fixture
def cuda(monkeypatch):
    """Within it a device "cuda" is there, where compiled functions run as they are written."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    monkeypatch.setattr(compiled, "compile_once", lambda function: function)
    monkeypatch.setattr(tiles, "compiled_on", lambda function, device_type: function)
    with Cuda() as there:
        yield there


def on_cuda(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=CUDA, dtype=dtype)


@pytest.mark.parametrize(
    "look",
    [
        Tensor.item,
        bool,
        float,
        Tensor.cpu,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.nonzero,
        Tensor.unique,
        lambda x: x[x > 0],
        lambda x: x[torch.arange(1)],
        lambda x: torch.equal(x, x),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.zeros(1).to(x.device, non_blocking=True),
        lambda x: torch.zeros(1).pin_memory().to(x.device),
        lambda x: torch.zeros(1).to(x),
        lambda x: x.copy_(torch.zeros(1)),
        lambda x: torch.zeros(1).copy_(x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.__setitem__((..., slice(1)), True),
    ],
)
def test_the_fake_refuses_what_waits(cuda, look):
    with pytest.raises(WaitsForDevice):
        look(on_cuda(1))


def test_the_fake_refuses_two_devices_and_knows_the_rest(cuda):
    x = on_cuda(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="on one device"):
        x + torch.zeros(4, 8)
    with torch.autocast("cuda", torch.bfloat16):
        z = F.linear(x, on_cuda(3, 8))
    assert (z.device, z.dtype, z.shape) == (CUDA, torch.bfloat16, (4, 3))
    z.float().sum().backward()
    assert (x.grad.device, x.grad.shape) == (CUDA, (4, 8))
    assert torch.zeros(4).pin_memory().to(CUDA, non_blocking=True).device == CUDA
    assert (x * torch.tensor(2.0))[torch.arange(2, device=CUDA)].shape == (2, 8)


ALL_OPERATIONS = {"rotation_prob": 0.5, "cutout_prob": 0.5, "noise_prob": 0.5, "sobel_prob": 0.5}
# Kornia's Normalize sends mean and standard deviation from pageable memory; the compiled views, CUDA's default, do not.
OF_NORMALIZE = "copy of (3,) from pageable memory, non_blocking=True"


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "Kornia"])
@pytest.mark.parametrize("settings", [{}, ALL_OPERATIONS], ids=["SimCLR", "all operations"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_are_made_without_waiting(cuda, compiled, settings, dtype):
    cuda.allowed = () if compiled else (OF_NORMALIZE,)
    augment = SimCLRAugmentation(32, compile_views=compiled, **settings)
    images = torch.zeros(16, 3, 40, 40, device=CUDA, dtype=dtype)
    for number in range(2):
        view = augment.view(images, torch.arange(16), epoch=1, seed=2, view=number)
        assert (view.device, view.dtype, view.shape) == (CUDA, torch.float32, (16, 3, 32, 32))


def test_random_numbers_are_drawn_on_the_device_without_waiting(cuda):
    index = torch.zeros(4, device=CUDA, dtype=torch.int64)
    stream = view_stream(1, 2, index, 3)
    assert (stream.device, stream.shape) == (CUDA, (4, 2))
    for drawn in (uniforms(1, 2, index, 3, 10), stream_uniforms(stream, 10)):
        assert (drawn.device, drawn.dtype, drawn.shape) == (CUDA, torch.float32, (4, 10))


SIX = {"nt_xent": nt_xent, "dcl": dcl, "nt_logistic": nt_logistic, "margin_triplet": margin_triplet}
SIX |= {f"{name}, semi-hard": lambda *z, f=SIX[name], **k: f(*z, semi_hard=True, **k) for name in list(SIX)[2:]}


@pytest.mark.parametrize("loss", [*SIX, "sup_con"])
@pytest.mark.parametrize("n", [7, 150], ids=["dense", "tiled"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_losses_are_taken_without_waiting(cuda, loss, n, operands, monkeypatch):
    monkeypatch.setitem(tiles.TILE_VALUES, "cuda", 2**12)  # several tiles, mirrored ones among them
    views = [on_cuda(n, 16).requires_grad_() for _ in range(3 if loss == "sup_con" else 2)]
    arguments = (views,) if loss == "sup_con" else views
    value, stats = {**SIX, "sup_con": sup_con}[loss](*arguments, 0.2, operands=operands, return_stats=True)
    assert (value.device, value.dtype, value.shape) == (CUDA, torch.float32, ())
    assert {stat.device for stat in stats} == {CUDA}
    for grad, view in zip(torch.autograd.grad(value, views), views, strict=True):
        assert (grad.device, grad.dtype, grad.shape) == (CUDA, torch.float32, view.shape)


def test_the_loss_of_dot_products_is_taken_without_waiting(cuda):
    views = [on_cuda(7, 16).requires_grad_() for _ in range(2)]
    value, stats = nt_xent_unnormalized(*views, 10.0, return_stats=True)
    assert {value.device, *(stat.device for stat in stats)} == {CUDA}
    assert all(grad.device == CUDA for grad in torch.autograd.grad(value, views))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-mixed"])
def test_a_gradient_is_cached_without_waiting(cuda, autocast):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, device=CUDA), torch.nn.Dropout(0.5))
    parts = [on_cuda(6, 8) for _ in range(3)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        cached = backward_in_parts(
            [lambda x=x: model(x) for x in parts], lambda z: nt_xent(*torch.cat(z).chunk(2), 0.2), backward, [model]
        )
        cached.last.backward()
    assert model[0].weight.grad.device == cached.error.device == CUDA


def backward(surrogate):
    surrogate.backward()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_optimisers_step_without_waiting(cuda, name, fused):
    cuda.strict = False
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).to(CUDA)
    cuda.strict = True
    optimizer = build_optimizer(name, model, lr=0.1, weight_decay=1e-4, momentum=0.9, fused=fused)
    for _ in range(2):
        model(on_cuda(4, 8)).sum().backward()
        optimizer.step()
    states = [state for of in optimizer.state.values() for state in of.values() if state.ndim]
    assert states
    assert {state.device for state in states} == {CUDA}


class NoWaiting(Callback):
    """To wait for the device is an error from the first step of an epoch to the last, which may report the loss."""

    def __init__(self, there: Cuda):
        self.there, self.steps = there, 0

    def on_train_batch_start(self, trainer, *args):
        # Not only until the step ends: the next one's views are made before it starts.
        self.there.strict = not trainer.is_last_batch
        self.steps += self.there.strict


class Accelerator(CPUAccelerator):
    """Lightning's of a CUDA device would ask the driver."""

    def setup_device(self, device):
        pass


class Event:
    """What tells when a copy is there. To wait for it is no wait for what was queued since."""

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded


class Here:
    """A ThreadPoolExecutor without threads, which would not know of the fake."""

    def __init__(self, threads):
        pass

    def submit(self, function, *args):
        result = function(*args)
        return type("Done", (), {"result": lambda self: result})()

    __enter__ = __exit__ = lambda self, *args: self


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"loss": "dcl", "accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        {"optimizer": "sgd", "views": 3, "start_size": 8, "grow_epochs": 1},
        pytest.param({"optimizer": "adamw", "gradient_clip_val": 1.0}, marks=pytest.mark.slow),
        {"loss": "margin_triplet", "semi_hard": True, "images": "on the host"},
        {"micro_batch_size": 8},
    ],
    ids=str,
)
def test_a_step_under_the_trainer_waits_for_the_device_nowhere(tmp_path, cuda, settings, monkeypatch):
    cuda.strict = False
    settings = dict(settings)
    if settings.pop("images", None):  # the device has no room for them
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**36))
        monkeypatch.setattr(loader, "ThreadPoolExecutor", Here)
    names = {"gradient_clip_val", "accumulate_grad_batches"} & settings.keys()
    of_trainer = {name: settings.pop(name) for name in names}
    strategy, watch = SingleDeviceStrategy(CUDA, Accelerator()), NoWaiting(cuda)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    finite = FiniteSteps(tmp_path)
    # Lightning asks by a number on the device whether there are batches at all.
    monkeypatch.setattr(strategy, "reduce", lambda *args, **kwargs: torch.ones(()))
    fit(
        tmp_path,
        tiny_model(**settings),
        tiny_data(shapes_train=3 * BATCH),
        [watch, finite],
        max_epochs=1,
        accelerator="auto",  # the strategy's
        strategy=strategy,
        plugins=[MixedPrecision("bf16-mixed", "cuda")],
        log_every_n_steps=50,
        **of_trainer,
    )
    assert watch.steps == 2
    assert finite.dump is None


def test_the_notebook_draws_neighbours_from_images_that_training_moved_to_the_device(cuda):
    cuda.strict = False
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    (cell,) = (source for source in cells if source.count("neighbour_picture(") and "import" not in source)
    data, model = tiny_data(), tiny_model()
    data.setup()
    data.train.hold_pixels_on(CUDA)
    assert data.train.pixels.device == CUDA
    scope = {"torch": torch, "data": data, "model": model, "nearest": nearest, "neighbour_picture": neighbour_picture}
    loaders = {f"{split}_loader": data.eval_loader(split) for split in ("train", "test")}
    tree = ast.parse(cell)
    shown = ast.Expression(tree.body.pop().value)
    # The fake has no numbers, and features come back to the CPU.
    scope |= {"extract_features": lambda _, loader: (torch.randn(len(loader.labels), 8), loader.labels), **loaders}
    exec(compile(tree, "quickstart", "exec"), scope)
    assert eval(compile(shown, "quickstart", "eval"), scope).size == (64 * 9 + 8 * 9 + 18, 26 + 6 * 72)
