"""Where the time of a training step goes, and how near it comes to the limit of the device, both measured."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import ParallelStrategy
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simclr.data.sources import MemoryImages
from simclr.memory import available, estimate
from simclr.module import SimCLR
from simclr.training.network import CUDA_GRAPHS

PARTS = ("data", "augmentation", "encoder", "loss", "backward", "optimiser")
_BLOCK = 5  # steps at a time, timed in parts or untouched: close in time, so that a neighbour disturbs both
_SHORT_STEP = 0.015  # seconds, in which launching a step's kernels takes a good part of it
_WARM_UP = {"cpu": 5, "cuda": 10}  # steps: compiling, the choice of kernels, the first batches of workers


class StepClock(Callback):
    """Times the steps of a real training: some untouched, as many in parts, in turn.

    A part lasts from when the device has done all that was asked of it before to when it has done the part, so that on
    a GPU every part has its own time; waiting makes such a step longer than an untouched one, which is timed as a
    block. The change of epochs is not counted.

    Args:
        steps: how many to time of either kind, rounded up to whole blocks.
        device: where the training runs, "cpu" or "cuda".
    Attributes:
        parts: seconds by part, summed over the steps timed in parts.
        calls: how often each part ran in them.
        timed, untouched: seconds of each block, timed in parts and not.
    """

    def __init__(self, steps: int, device: str):
        self.blocks, self.device = -(-steps // _BLOCK), device
        self.warm_up = _WARM_UP.get(device, 5)
        self.parts, self.calls = Counter(), Counter()
        self.timed: list[float] = []
        self.untouched: list[float] = []
        self._on = False  # in a block that is timed in parts
        self._stack: list[str] = []
        self._since = 0.0  # when the part at hand began or went on
        self._done, self._elapsed, self._began = 0, 0.0, None
        self._undo: list[Callable[[], None]] = []

    @property
    def steps(self) -> int:
        """How many steps the training must have: with those to warm up."""
        return self.warm_up + 2 * _BLOCK * self.blocks

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # Parts. One that begins within another interrupts it: every moment belongs to one part.

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """All that happens within belongs to the part, but for the parts within it."""
        if not self._on:
            yield
            return
        self._switch()
        self._stack.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = self._now()
        if self._stack:
            self.parts[self._stack[-1]] += now - self._since
        self._since = now

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        """Count calls of owner.name to a part, until the training ends."""
        function = getattr(owner, name)

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        own = name in vars(owner)
        setattr(owner, name, counted)
        self._undo.append(lambda: setattr(owner, name, function) if own else delattr(owner, name))

    def on_train_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
        """Find the parts."""
        self._wrap(pl_module.views, "make", "augmentation")
        for name, part in {
            "transfer_batch_to_device": "data",
            "project": "encoder",
            "loss": "loss",
            "optimizer_zero_grad": "optimiser",
        }.items():
            self._wrap(pl_module, name, part)
        self._wrap(torch.Tensor, "backward", "backward")
        self._wrap(torch.autograd, "grad", "loss")  # the gradient cache asks for the loss's alone
        self._wrap_batches(trainer.train_dataloader)
        for optimizer in trainer.optimizers:
            self._wrap_step(optimizer)

    def _wrap_batches(self, loader: Any) -> None:
        batches = loader._batches

        def timed(*args: Any) -> Iterator[Any]:
            iterator = iter(batches(*args))
            while True:
                with self.part("data"):
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch

        loader._batches = timed
        self._undo.append(lambda: setattr(loader, "_batches", batches))

    def _wrap_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step

        @wraps(step)
        def timed(closure: Callable[[], Any] | None = None) -> Any:
            def inner() -> Any:  # forward and backward, which Lightning runs from within
                with self.part("rest"):
                    return closure()

            with self.part("optimiser"):
                return step(inner if closure else None)

        optimizer.step = timed
        self._undo.append(lambda: setattr(optimizer, "step", step))

    # Blocks

    def on_train_epoch_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
        """Go on with the block."""
        if self._done >= self.warm_up:
            self._began = self._now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: SimCLR, *args: Any) -> None:
        """Count the step; at the end of a block, or of an epoch within it, stop the clock."""
        self._done += 1
        counted = self._done - self.warm_up
        ends = counted % _BLOCK == 0 if counted > 0 else counted == 0
        if not (ends or (trainer.is_last_batch and counted > 0)):
            return
        now = self._now()
        if self._began is not None:
            self._elapsed += now - self._began
            self._began = None if trainer.is_last_batch else now
        if not ends:
            return
        if counted:
            (self.timed if self._on else self.untouched).append(self._elapsed)
        self._elapsed, self._on = 0.0, counted // _BLOCK % 2 == 1 and counted < 2 * _BLOCK * self.blocks
        self._began = None if trainer.is_last_batch else self._now()

    def teardown(self, trainer: Trainer, pl_module: SimCLR, stage: str) -> None:
        """Leave everything as it was."""
        self._on = False
        for undo in reversed(self._undo):
            undo()
        self._undo = []


@dataclass
class Limit:
    """What the device does in the precision of the training: operations a second, and in what it reached that."""

    rate: float
    what: str


def dtype_of(precision: str) -> torch.dtype:
    """What a precision of Lightning's multiplies in."""
    names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return next((dtype for name, dtype in names.items() if precision.startswith(name)), torch.float32)


def measure_limit(device: torch.device, precision: str, seconds: float = 0.5) -> Limit:
    """The device's throughput on what it does best: a large matrix product or a wide 3 x 3 convolution.

    Args:
        device: where.
        precision: Lightning's name.
        seconds: of each of the two.
    """
    rates = throughput(device, dtype_of(precision), seconds)
    what = max(rates, key=rates.get)
    return Limit(rates[what], what)


def throughput(device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Operations a second of a matrix product and of a convolution: the best of the calls that fit into the time."""
    side, images = (8192, 256) if device.type == "cuda" else (1024, 16)
    a = torch.randn(side, side, device=device, dtype=dtype)
    convolution = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(images, 128, 16, 16, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    jobs = {
        "matrix products": (lambda: a @ a, 2 * side**3),
        "convolutions": (lambda: convolution(x), 2 * x.numel() * 128 * 9),
    }
    rates = {}
    for name, (job, operations) in jobs.items():
        with torch.no_grad():
            rates[name] = operations / _fastest(job, device, seconds)
    return rates


def _fastest(job: Callable[[], Any], device: torch.device, seconds: float, calls: int = 4) -> float:
    """Seconds of a call, the best of so many in a row, repeated until the time is over."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            job()
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def gain_of_bf16(model: SimCLR, views: int, rounds: int = 3) -> float:
    """How many times as fast encoder and head are forward and backward under bf16-mixed as in float32, on this device.

    Tried with weights of their own on so many views of noise, in turn: what a device multiplies faster it may still
    have to convert, and small networks do little else.
    """
    device, side = next(model.parameters()).device, model.views.size(0)
    network = nn.Sequential(copy.deepcopy(model.encoder), copy.deepcopy(model.head)).train()
    x = torch.randn(views, 3, side, side, device=device)
    if model.hparams.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def step(enabled: bool) -> float:
        def job() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                z = network(x)
            z.float().sum().backward()

        return _fastest(job, device, 0, calls=1)

    step(True), step(False)
    times = [(step(False), step(True)) for _ in range(rounds)]
    return min(plain for plain, _ in times) / min(mixed for _, mixed in times)


def count_operations(model: SimCLR, views: int) -> tuple[int, int] | None:
    """Floating-point operations of encoder and head, forward and backward, for so many views; None if unknown.

    Counted in a run on shapes alone: matrix products and convolutions, which are nearly all.
    """
    network = nn.Sequential(*(copy.deepcopy(part).to("meta") for part in (model.encoder, model.head))).train()
    side = model.views.size(0)
    counter = FlopCounterMode(display=False)
    try:
        with torch.enable_grad(), counter:
            z = network(torch.empty(views, 3, side, side, device="meta"))
            forward = counter.get_total_flops()
            z.sum().backward()
    except (NotImplementedError, RuntimeError):  # a network that cannot run on shapes alone
        return None
    return forward, counter.get_total_flops() - forward


@dataclass
class Profile:
    """A step in numbers; seconds are the mean over the steps timed.

    Attributes:
        parts: seconds by part, `rest` last: Lightning, logging, Python.
        timed, untouched: seconds of a step, timed in parts and untouched.
        spread: slowest block of untouched steps over the fastest, minus 1.
        repeated: the part of the forward passes that micro-batches make a second time.
        operations: of the encoder in a step, forward and backward; None if unknown.
        limit: of the device.
        bf16: see `gain_of_bf16`; None where the training is not in float32.
        steps: timed of either kind.
    """

    parts: dict[str, float]
    timed: float
    untouched: float
    spread: float
    repeated: float
    operations: tuple[float, float] | None
    limit: Limit
    bf16: float | None
    steps: int

    def of_limit(self, part: str) -> float | None:
        """What fraction of the limit a part (or `untouched`) reaches."""
        if self.operations is None:
            return None
        forward, backward = self.operations
        work = {"encoder": forward, "backward": backward, "untouched": forward + backward}.get(part)
        taken = self.untouched if part == "untouched" else self.parts.get(part)
        return work / taken / self.limit.rate if work and taken else None

    def share(self, part: str) -> float:
        """Of a step timed in parts."""
        return self.parts[part] / self.timed


def summarise(clock: StepClock, model: SimCLR, images: int, precision: str) -> Profile:
    """What a clock has measured, beside what the device can do, which is measured here.

    Args:
        clock: after the training.
        model: that was trained, on its device.
        images: in a step, of this device.
        precision: Lightning's name.
    """
    size = model.hparams.micro_batch_size or images
    limit = measure_limit(next(model.parameters()).device, precision)
    is_float32 = dtype_of(precision) == torch.float32
    bf16 = gain_of_bf16(model, model.hparams.views * size) if is_float32 else None
    steps = _BLOCK * clock.blocks
    timed, untouched = sum(clock.timed) / steps, sum(clock.untouched) / steps
    parts = {name: clock.parts[name] / steps for name in PARTS}
    parts["rest"] = timed - sum(parts.values())
    passes = clock.calls["encoder"] / steps
    counted = count_operations(model, model.hparams.views * size)
    operations = counted and (counted[0] * passes, counted[1] * images / size)
    return Profile(
        parts,
        timed,
        untouched,
        max(clock.untouched) / min(clock.untouched) - 1,
        1 - images / size / passes,
        operations,
        limit,
        bf16,
        steps,
    )


_NAMES = {
    "data": "data",
    "augmentation": "augmentation",
    "encoder": "encoder and head, forward",
    "loss": "loss",
    "backward": "backward",
    "optimiser": "optimiser",
    "rest": "rest: Lightning, logging",
}


def draw(profile: Profile, model: SimCLR, trainer: Trainer, images: int) -> Group:
    """The profile as a table with a line of advice or two below it, for people."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("a training step")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("of the limit", justify="right")
    longest = max(profile.parts.values())
    for part, seconds in profile.parts.items():
        bar = Text("█" * round(20 * max(0.0, seconds) / longest), style="cyan")
        table.add_row(
            _NAMES[part], _ms(seconds), f"{100 * profile.share(part):.0f} %", bar, _percent(profile.of_limit(part))
        )
    table.add_section()
    table.add_row("sum of the parts", _ms(profile.timed), "100 %", "", "")
    compared = f"{100 * (profile.timed / profile.untouched - 1):+.0f} % by timing parts"
    reached = _percent(profile.of_limit("untouched"))
    table.add_row("the step untouched", _ms(profile.untouched), "", Text(compared, style="dim"), reached, style="bold")
    device, hparams = trainer.strategy.root_device, model.hparams
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count != 1 else ''}" if device.type == "cpu" else ""
    several = f" on each of {trainer.world_size} devices" if trainer.world_size > 1 else ""
    at_a_time = f", {hparams.micro_batch_size} at a time" if hparams.micro_batch_size else ""
    rate = images * trainer.world_size / profile.untouched
    head = Text.assemble(
        (f"{rate:,.0f} images/s", "bold"),
        f": {hparams.encoder}, {images} images{several}{at_a_time}, {hparams.views} views of {model.views.size(0)} px,"
        "\n"
        f"{trainer.precision} on {device.type}{threads}\n",
    )
    notes = Table.grid(padding=(0, 1))
    dtype = str(dtype_of(str(trainer.precision))).removeprefix("torch.")
    notes.add_row("limit", f"{_rate(profile.limit.rate)}, {profile.limit.what} in {dtype}, measured here", style="dim")
    if profile.operations:
        work = f"{sum(profile.operations) / 1e9:,.3g} GFLOP a step, encoder and head forward and backward"
        notes.add_row("work", work, style="dim")
    busy = ": a busy machine or short steps, try more --steps" if profile.spread > 0.25 else ""
    times = (
        f"{profile.steps} steps in parts, as many untouched, whose blocks differ by {_percent(profile.spread)}{busy}"
    )
    notes.add_row("times", times, style="dim")
    for line in advice(profile, model, trainer, images):
        notes.add_row(Text("advice", style="bold yellow"), line)
    return Group(head, table, Text(), notes)


def advice(profile: Profile, model: SimCLR, trainer: Trainer, images: int) -> list[str]:
    """What would make steps faster, largest first, at most two lines: only what the numbers say."""
    found: list[tuple[float, str]] = []
    hparams, data, device = model.hparams, trainer.datamodule, trainer.strategy.root_device
    share = {part: profile.share(part) for part in profile.parts}
    if share["data"] > 0.1:
        found.append((share["data"], f"data take {_percent(share['data'])}: {_data_advice(data)}"))
    if share["augmentation"] > 0.25:
        line = f"augmentation takes {_percent(share['augmentation'])}: "
        if not hparams.compile_views and device.type == "cpu":
            line += "--model.compile_views true makes views faster, after a minute (needs a C++ compiler)"
        elif hparams.blur_prob and hparams.image_size <= 32:
            line += "at 32 px the paper leaves blur out, --model.blur_prob 0"
        else:
            line += "a larger encoder costs less than it seems"
        found.append((share["augmentation"] / 2, line))
    twice = profile.repeated * (share["encoder"] + share["augmentation"])
    if twice > 0.05:
        found.append(
            (twice, f"the second pass of micro-batches takes {_percent(twice)}: {_larger(model, trainer, images)}")
        )
    network = share["encoder"] + share["backward"]
    if profile.bf16 is not None and profile.bf16 > 1.1:
        line = (
            f"encoder and backward take {_percent(network)}: in bf16-mixed they ran {profile.bf16:.1f} times as fast, "
        )
        found.append((network * (1 - 1 / profile.bf16), f"{line}--trainer.precision bf16-mixed"))
    if share["rest"] > 0.1:
        line = f"Lightning and logging take {_percent(share['rest'])} of a short step: a larger --data.batch_size, or "
        found.append((share["rest"], f"{line}--trainer.log_every_n_steps {5 * (trainer.log_every_n_steps or 10)}"))
    reached = profile.of_limit("untouched")
    alone = trainer.world_size == 1 and not isinstance(trainer.strategy, ParallelStrategy)  # others refuse CUDA graphs
    short = alone and profile.untouched < _SHORT_STEP and (reached or 0) < 0.6
    if device.type == "cuda" and short and hparams.compile_encoder not in CUDA_GRAPHS:
        line = f"{_ms(profile.untouched)} ms are short beside the launching of kernels, which CUDA graphs spare: "
        found.append((0.3 * network, f"{line}--model.compile_encoder reduce-overhead"))
    elif device.type == "cuda" and not hparams.compile_encoder and network > 0.4 and (reached or 1) < 0.35:
        found.append((0.2 * network, "the encoder is far from the limit: --model.compile_encoder true"))
    if not found:
        reach = f", at {_percent(profile.of_limit('backward'))} of the limit backward" if profile.operations else ""
        found.append((0, f"nothing stands out: encoder and backward take {_percent(network)}{reach}"))
    return [line for _, line in sorted(found, reverse=True)[:2]]


def _data_advice(data: Any) -> str:
    if isinstance(data.train, MemoryImages):
        return "they are in memory already, so it is the memory or the bus that is slow"
    gigabytes = data.train.nbytes / 1e9
    if data.cache_dir:
        return f"--data.memory_limit_gb {gigabytes + 0.1:.1f} and no cache_dir would hold them in memory"
    return (
        f"--data.cache_dir DIR keeps them decoded ({gigabytes:.1f} GB), --data.memory_limit_gb {gigabytes + 0.1:.1f} "
        f"holds them in memory, and more --data.workers (now {data._processes()}) decode faster if there are cores"
    )


def _larger(model: SimCLR, trainer: Trainer, images: int) -> str:
    have = available(trainer.strategy.root_device)
    sizes = [n for n in range(model.hparams.micro_batch_size + 1, images + 1) if images % n == 0]
    needs = {n: estimate(model, images, n, trainer.world_size, trainer.precision).total for n in sizes}
    fits = [n for n in sizes if have and needs[n] < 0.5 * have]
    if not fits:
        return "it is the price of their memory"
    if fits[-1] == images:
        return f"the whole batch takes about {_gigabytes(needs[images])}, leave --model.micro_batch_size out"
    return f"--model.micro_batch_size {fits[-1]} takes about {_gigabytes(needs[fits[-1]])}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _rate(operations: float) -> str:
    return f"{operations / 1e12:.1f} TFLOP/s" if operations >= 1e12 else f"{operations / 1e9:.0f} GFLOP/s"
