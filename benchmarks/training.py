"""Whole training beside its rivals: images a second, what the Trainer costs, two ranks, ten times the data.

    python benchmarks/training.py --images cifar10/train          # two CPU cores, a quarter of an hour
    python benchmarks/training.py --quick                         # on PNGs that it makes itself: two minutes
    python benchmarks/training.py --device cuda --images cifar10/train

Every contender is a process of its own, which waits until it is its turn to train for one epoch: they take turns, round
after round, after an epoch each to warm up (workers started, kernels compiled), so that a disturbance of the machine
meets all. Printed are medians and ranges over rounds; a ratio is taken within each round. Reading the images before the
first epoch is not in an epoch's time and is printed apart; it happens once a run.

Contenders: ours, SimCLR under the Trainer with the loggers and the checkpoint after each epoch that `simclr train` has;
the bare loop, the same parts in a plain loop of PyTorch, which logs and saves nothing; lightly's documented recipe in
plain PyTorch, with LightlyDataset, SimCLRTransform, a DataLoader with workers, SimCLRProjectionHead and NTXentLoss, the
same encoder and the same optimiser. A rival that is not installed is named and left out.
"""

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer

from simclr.cli import quiet
from simclr.cli.saving import newest_checkpoint
from simclr.container import processor
from simclr.data import ImageData
from simclr.data.loader import GlobalBatchSampler, TrainLoader
from simclr.data.sources import MemoryImages, list_folder
from simclr.loggers import build_loggers
from simclr.losses import nt_xent
from simclr.module import SimCLR
from simclr.optim import build_optimizer, scale_lr, warmup_cosine

# CIFAR-10's augmentation, and an optimiser that every contender has.
RECIPE = {
    "crop_scale": (0.08, 1.0),
    "strength": 0.5,
    "blur_prob": 0.0,
    "temperature": 0.5,
    "base_lr": 0.06,
    "weight_decay": 5e-4,
}
RECIPE |= {"crop_scale": (0.08, 1.0), "optimizer": "sgd", "projection_dim": 128, "warmup_epochs": 1}
EIGHT_LAYERS = {"encoder": "resnet8", "stem": "small_stride2"}  # width 1: 16 channels, 2: 32
EPOCHS = 1000  # more than any contender is asked for: the length of the schedule


@dataclass
class Contender:
    """One process (or one for each rank) that trains epoch after epoch.

    Attributes:
        name: in the tables.
        kind: `trainer`, `bare` or `lightly`.
        folder: of images.
        model: settings of SimCLR beyond RECIPE.
        batch_size: the global batch.
        precision: as Lightning names it.
        threads: torch's, of each rank.
        ranks: processes that share the training.
        workers: processes that decode, for lightly and for images that are not held in memory.
        in_memory: hold the images in memory.
        device: cpu or cuda.
        compiled: SimCLR's compile_encoder.
    """

    name: str
    kind: str
    folder: str
    model: dict[str, Any]
    batch_size: int = 256
    precision: str = "32-true"
    threads: int = 2
    ranks: int = 1
    workers: int = 2
    in_memory: bool = True
    device: str = "cpu"
    compiled: bool | str = False

    def build(self) -> SimCLR:
        """The model, alike for all contenders of the same settings."""
        torch.manual_seed(0)
        return SimCLR(**{**RECIPE, **self.model}, batch_size=self.batch_size, compile_encoder=self.compiled)

    def data(self) -> ImageData:
        """The images for ours and for the bare loop."""
        limit = 1e3 if self.in_memory else 0.0
        return ImageData(train_dir=self.folder, batch_size=self.batch_size, workers=self.workers, memory_limit_gb=limit)


# In a contender's process


class Stop(Exception):
    """The benchmark has what it wants of this contender."""


class Turn:
    """Called between epochs: says how long the last one took, then waits until the next is asked for."""

    def __init__(self, connection: Connection, device: str):
        self.connection, self.device = connection, device
        self.began: float | None = None
        self.created = time.perf_counter()

    def __call__(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.began is None:
            self.connection.send(("ready", now - self.created))
        else:
            self.connection.send(("epoch", now - self.began, memory()))
        while (order := self.connection.recv()) != "go":
            if order == "stop":
                raise Stop
            self.connection.send(("in use", memory_in_use()))
        self.began = time.perf_counter()


class TakeTurns(Callback):
    """An epoch lasts from its start to the start of the next: with all that the Trainer does in between."""

    def __init__(self, turn: Turn):
        self.turn = turn

    def on_train_epoch_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
        """Wait for the turn."""
        self.turn()


def contend(contender: Contender, rank: int, port: int, connection: Connection) -> None:
    """A process: train until told to stop."""
    quiet()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message="Kornia's operations make the views")  # compiled in name only
    torch.set_num_threads(contender.threads)
    if contender.ranks > 1:  # as a launcher would: Lightning starts no processes then
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    kind = {"trainer": with_trainer, "bare": bare, "lightly": with_lightly}[contender.kind]
    try:
        kind(contender, connection)
    except (Stop, KeyboardInterrupt, EOFError):
        pass
    except ImportError as error:
        connection.send(("missing", str(error)))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))


def with_trainer(contender: Contender, connection: Connection) -> None:
    """Ours."""
    turn = Turn(connection, contender.device)
    with tempfile.TemporaryDirectory() as run_dir:
        Trainer(
            accelerator="gpu" if contender.device == "cuda" else "cpu",
            devices=contender.ranks,
            strategy="ddp" if contender.ranks > 1 else "auto",
            precision=contender.precision,
            max_epochs=EPOCHS,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=False,  # as in `simclr train` where nobody watches
            log_every_n_steps=25,
            logger=build_loggers(Path(run_dir)),
            callbacks=[TakeTurns(turn), newest_checkpoint(Path(run_dir))],
            default_root_dir=run_dir,
        ).fit(contender.build(), contender.data())


def bare(contender: Contender, connection: Connection) -> None:
    """The parts of ours in a plain loop."""
    turn, device = Turn(connection, contender.device), torch.device(contender.device)
    model, data = contender.build().to(device), contender.data()
    data.setup()
    if isinstance(data.train, MemoryImages):
        data.train.hold_pixels_on(device)
    sampler = GlobalBatchSampler(len(data.train), contender.batch_size)
    loader = TrainLoader(data.train, sampler, contender.workers)
    model.run.settle(contender.batch_size)
    hparams = model.hparams
    optimizer = build_optimizer(
        hparams.optimizer,
        model,
        lr=scale_lr(hparams.base_lr, contender.batch_size, hparams.lr_scaling),
        weight_decay=hparams.weight_decay,
        momentum=hparams.momentum,
        fused=True,  # as ours, without clipping
    )
    warmup = round(hparams.warmup_epochs * len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup, EPOCHS * len(loader))
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=contender.precision == "bf16-mixed")
    model.train()
    for epoch in range(EPOCHS):
        turn()
        sampler.set_epoch(epoch)
        for images, index in loader:
            images = images.to(device, non_blocking=True)
            views = [model.augment.view(images, index, epoch, 0, view) for view in range(2)]
            optimizer.zero_grad()
            with autocast:
                z = model.project(views)
                loss = nt_xent(*z.chunk(2), hparams.temperature)
            loss.backward()
            optimizer.step()
            schedule.step()


def with_lightly(contender: Contender, connection: Connection) -> None:
    """lightly's documented recipe (its examples/pytorch/simclr.py) for images of 32 pixels."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    turn, device = Turn(connection, contender.device), torch.device(contender.device)
    ours = contender.build()
    encoder, width = ours.encoder.to(memory_format=torch.contiguous_format), ours.encoder.feature_dim
    network = torch.nn.Sequential(encoder, SimCLRProjectionHead(width, width, RECIPE["projection_dim"])).to(device)
    transform = SimCLRTransform(input_size=32, cj_strength=RECIPE["strength"], gaussian_blur=0.0)
    loader = torch.utils.data.DataLoader(
        LightlyDataset(contender.folder, transform=transform),
        batch_size=contender.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=contender.workers,
        persistent_workers=contender.workers > 0,  # not in its example: a gift
        pin_memory=device.type == "cuda",  # likewise
    )
    criterion = NTXentLoss(temperature=RECIPE["temperature"])
    optimizer = torch.optim.SGD(
        network.parameters(), lr=RECIPE["base_lr"], momentum=0.9, weight_decay=RECIPE["weight_decay"], nesterov=True
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=contender.precision == "bf16-mixed")
    network.train()
    while True:
        turn()
        for batch in loader:
            first, second = batch[0]
            with autocast:
                z1 = network(first.to(device, non_blocking=True))
                z2 = network(second.to(device, non_blocking=True))
                loss = criterion(z1, z2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def memory() -> float | None:
    """MB of memory of this process and those below it, what they share counted once; None where that is not told.

    Without what is backed by files: libraries belong to whoever else on the machine has loaded them too, and a
    process's part of them changed by 180 MB within a run, with what others started and ended.
    """
    total, waiting = 0, [os.getpid()]
    try:
        while waiting:
            process = Path("/proc") / str(waiting.pop())
            fields = dict(line.split(":") for line in (process / "smaps_rollup").read_text().splitlines()[1:])
            total += sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
            for task in (process / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    except (OSError, KeyError):
        return None
    return total / 1e3


def memory_in_use() -> float | None:
    """As `memory`, after this process has given back what it had freed; None where malloc cannot be told to.

    What glibc keeps of the activations of past steps, to use it again, is about as much as all that is in use, and goes
    up and down by 60 MB from epoch to epoch, however many images there are.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None
    return memory()


# In the benchmark's own process


@dataclass
class Result:
    """What a contender did: seconds and MB of each counted epoch, seconds until the first could begin, MB in use."""

    contender: Contender
    images: int
    ready: float = 0.0
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float | None] = field(default_factory=list)
    in_use: float | None = None

    @property
    def rates(self) -> list[float]:
        """Images a second, round by round."""
        return [self.images / seconds for seconds in self.seconds]

    @property
    def step(self) -> float:
        """Seconds of a step, the median."""
        return statistics.median(self.seconds) / (self.images // self.contender.batch_size)


class Racer:
    """A contender's processes, seen from the benchmark."""

    def __init__(self, contender: Contender):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(contender.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=contend, args=(contender, rank, port, theirs))
            process.start()
            theirs.close()  # the end of the process is then the end of the pipe
            self.connections.append(ours)
            self.processes.append(process)
        steps = len(list_folder(contender.folder, "--images").paths) // contender.batch_size
        self.result = Result(contender, steps * contender.batch_size)

    def answers(self) -> list[tuple]:
        """One from each rank. ImportError where a package is missing; RuntimeError where the contender failed."""
        answers = []
        for connection in self.connections:
            try:
                answer = connection.recv()
            except EOFError:
                answer = ("failed", "it ended without a word")
            if answer[0] in ("missing", "failed"):
                raise {"missing": ImportError, "failed": RuntimeError}[answer[0]](answer[1])
            answers.append(answer)
        return answers

    def begin(self) -> None:
        """Begin an epoch."""
        for connection in self.connections:
            connection.send("go")

    def epoch(self, counted: bool = True, begun: bool = False) -> None:
        """Train for an epoch; the slowest rank counts."""
        if not begun:
            self.begin()
        answers = self.answers()
        if counted:
            megabytes = [answer[2] for answer in answers]
            self.result.seconds.append(max(answer[1] for answer in answers))
            self.result.megabytes.append(None if None in megabytes else sum(megabytes))

    def ask_memory(self) -> None:
        """How much is in use between two epochs."""
        for connection in self.connections:
            connection.send("in use")
        answers = [answer[1] for answer in self.answers()]
        self.result.in_use = None if None in answers else sum(answers)

    def end(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send("stop")
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.terminate()


def race(contenders: Sequence[Contender], rounds: int, warm_up_together: bool = False) -> dict[str, Result]:
    """All contenders in turn, the order turned round every other round; those that are not installed are left out.

    The epoch to warm up is not counted: where it compiles for minutes, all may do so at once.
    """
    say(f"{len(contenders)} x {rounds} epochs: {', '.join(contender.name for contender in contenders)} ...")
    racers: list[Racer] = []
    try:
        racers += [Racer(contender) for contender in contenders]
        for racer in list(racers):
            try:
                racer.result.ready = max(answer[1] for answer in racer.answers())
            except ImportError as error:
                say(f"{racer.result.contender.name} is left out: {error}. pip install -e '.[benchmarks]'")
                racer.end()
                racers.remove(racer)
        for racer in racers if warm_up_together else ():
            racer.begin()
        for racer in racers:
            racer.epoch(counted=False, begun=warm_up_together)
        for number in range(rounds):
            for racer in racers if number % 2 == 0 else reversed(racers):
                racer.epoch()
        for racer in racers:
            racer.ask_memory()
    finally:
        for racer in racers:
            racer.end()
    return {racer.result.contender.name: racer.result for racer in racers}


def say(text: str) -> None:
    """To the terminal, not into the table."""
    print(text, file=sys.stderr, flush=True)


def make_images(folder: Path, count: int) -> Path:
    """Smooth random PNGs of 32 pixels in ten class folders, as many bytes each as CIFAR-10's."""
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        (folder / str(i)).mkdir(parents=True)
    for start in range(0, count, 1024):
        size = min(1024, count - start)
        coarse = torch.rand(size, 3, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
        fine = torch.randn(size, 3, 32, 32, generator=generator) * 0.02
        pixels = (smooth + fine).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()
        for number, image in enumerate(pixels, start):
            Image.fromarray(image).save(folder / str(number % 10) / f"{number:06}.png")
    return folder


def choose_images(paths: Sequence[str], folder: Path, count: int) -> str:
    """A folder of links to an even choice of the images, in their class folders."""
    for i in np.linspace(0, len(paths) - 1, count).round().astype(int):
        path = Path(paths[i])
        link = folder / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows without the right to
            shutil.copy(path, link)
    return str(folder)


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f}{unit} ({low:,.{digits}f}-{high:,.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def verdict(value: float, bar: float, at_least: bool) -> str:
    """The bar, marked if the value misses it."""
    met = value >= bar if at_least else value <= bar
    return f"{'>=' if at_least else '<='} {bar:g}{'' if met else ', **missed**'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, and an empty line."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


# The four questions


def whole_training(base: Contender, rounds: int, bars: bool) -> Iterator[str]:
    """Images a second of whole epochs, beside lightly; compiled: encoder and views by torch.compile."""
    rows, starts = [], {}
    for width, bar in ((2, 3.0), (1, 4.0)):
        base = replace(base, model={**EIGHT_LAYERS, "width": width})
        compiled = replace(base, compiled=True, model={**base.model, "compile_views": True})
        results = race(
            [
                replace(base, name="ours", kind="trainer"),
                replace(base, name="bare loop", kind="bare"),
                replace(base, name="lightly", kind="lightly"),
                replace(base, name="ours, bf16", kind="trainer", precision="bf16-mixed"),
                replace(compiled, name="ours, compiled", kind="trainer"),
                replace(compiled, name="ours, bf16, compiled", kind="trainer", precision="bf16-mixed"),
            ],
            rounds,
        )
        for name, result in results.items():
            starts.setdefault(name, []).append(result.ready)
            cells = ["-", "-"]
            if "lightly" in results and name != "lightly":
                ratio = ratios(result.rates, results["lightly"].rates)
                cells = [f"{spread(ratio, 2)} x", ""]
                if name.startswith("ours") and bars:
                    cells[1] = verdict(statistics.median(ratio), bar, at_least=True)
            step = f"{1e3 * result.step:.1f} ms"
            rows.append([f"{16 * width} channels, {name}", spread(result.rates), step, *cells])
    yield f"Whole training, images/s: 8-layer ResNet, stem of stride 2, batch {base.batch_size}, {base.threads} threads"
    yield ""
    yield from table(["", "images/s", "step", "against lightly", "bar"], rows)
    seconds = ", ".join(f"{name} {statistics.median(times):.1f} s" for name, times in starts.items())
    yield f"Until the first epoch, not counted above: {seconds}."
    yield ""


def cost_of_the_trainer(base: Contender, rounds: int) -> Iterator[str]:
    """Time of a step under the Trainer and in the bare loop, where steps are short."""
    rows = []
    for size in (64, 32, 16):  # the two smaller take 10 to 20 ms on two cores
        base = replace(base, model={**EIGHT_LAYERS, "width": 1}, batch_size=size)
        results = race(
            [replace(base, name="ours", kind="trainer"), replace(base, name="bare loop", kind="bare")], rounds
        )
        ours, plain = results["ours"], results["bare loop"]
        ratio = ratios(ours.seconds, plain.seconds)
        steps = [f"{1e3 * result.step:.2f} ms" for result in (ours, plain)]
        more = f"{1e3 * (ours.step - plain.step):+.2f} ms"
        median = statistics.median(ratio)
        met = verdict(median, 1.05, at_least=False) if 0.01 <= plain.step <= 0.02 else ""
        rows.append([f"batch {size}", *steps, more, spread(ratio, 3), met])
    yield f"A step under the Trainer against the bare loop: 16 channels, {base.threads} threads"
    yield ""
    yield from table(["", "ours", "bare loop", "more", "ratio", "bar for 10-20 ms"], rows)


def two_ranks(base: Contender, rounds: int) -> Iterator[str]:
    """Throughput of one and of two ranks of one thread each, on the same global batch."""
    base = replace(base, kind="trainer", threads=1, workers=1)
    rows = []
    for width in (2, 1):
        base = replace(base, model={**EIGHT_LAYERS, "width": width})
        results = race([replace(base, name="1 rank"), replace(base, name="2 ranks", ranks=2)], rounds)
        one, two = results["1 rank"], results["2 ranks"]
        ratio = spread(ratios(two.rates, one.rates), 2)
        rows.append([f"{16 * width} channels", spread(one.rates), spread(two.rates), f"{ratio} x"])
    yield f"Ranks of one thread each (gloo), global batch {base.batch_size}, images/s"
    yield ""
    yield from table(["", "1 rank", "2 ranks", "2 against 1"], rows)


def growth(base: Contender, small: str, large: str, rounds: int) -> Iterator[str]:
    """Time of an epoch and memory of ten times the images.

    Memory is what is in use after the last round, because only that depends on nothing but the images: see `memory` and
    `memory_in_use`. Beside it stands the most after any epoch, with what malloc keeps. An image in a file may take
    190 bytes: its path, its label and its place in the order took 114 and 147 in two runs; with the paths as Python's
    objects in each of two workers it was 230, which is to be a miss.
    """
    base = replace(base, kind="trainer", model={**EIGHT_LAYERS, "width": 1})
    rows = []
    for where, in_memory in (("in memory", True), ("read from files", False)):
        base = replace(base, in_memory=in_memory)
        results = race([replace(base, name="N", folder=small), replace(base, name="10 N", folder=large)], rounds)
        few, many = results["N"], results["10 N"]
        per_image = ratios(many.seconds, few.seconds)
        ratio = [
            r * 10 * few.images / many.images for r in per_image
        ]  # of whole batches, which are not quite ten times
        median = statistics.median(ratio)
        cells = [f"{few.images:,} / {many.images:,}", spread(few.seconds, 2, " s"), spread(many.seconds, 2, " s")]
        cells += [spread(ratio, 2), verdict(median, 10.5, at_least=False)]
        if None in (few.in_use, many.in_use, *few.megabytes, *many.megabytes):
            cells += ["-"] * 4
        else:
            more = many.in_use - few.in_use
            each = 1e6 * more / (many.images - few.images) - in_memory * 3 * 32 * 32
            cells += [f"{few.in_use:,.0f} MB", f"{more:+,.1f} MB"]
            cells += [f"{each:,.0f} bytes, {verdict(each, 190, at_least=False)}"]
            cells += [f"{max(few.megabytes):,.0f} / {max(many.megabytes):,.0f} MB"]
        rows.append([where, *cells])
    head = ["images", "N / 10 N", "epoch of N", "of 10 N", "ratio", "bar", "memory in use, N", "10 N"]
    head += ["an image more, without its pixels", "most, with what malloc keeps"]
    yield f"Ten times the images: 16 channels, batch {base.batch_size}; memory is that of the process and its workers"
    yield ""
    yield from table(head, rows)


def on_gpu(base: Contender, rounds: int, compiled: Sequence[bool | str]) -> Iterator[str]:
    """Seconds of an epoch of CIFAR-10."""
    ours = replace(base, name="ours", kind="trainer")
    contenders = [ours, replace(base, name="bare loop", kind="bare")]
    for how in compiled:
        contenders.append(replace(ours, name=f"ours, compile_encoder={str(how).lower()}", compiled=how))
    if compiled:
        contenders.append(
            replace(contenders[1], name=f"bare loop, compile_encoder={compiled[-1]}", compiled=compiled[-1])
        )
    contenders.append(replace(base, name="lightly", kind="lightly"))
    results = race(contenders, rounds, warm_up_together=True)
    rows = []
    for name, result in results.items():
        bar = verdict(statistics.median(result.seconds), 2.0, at_least=False) if name.startswith("ours") else ""
        against = "-"
        if "lightly" in results and name != "lightly":
            against = f"{spread(ratios(results['lightly'].seconds, result.seconds), 2)} x"
        seconds, step = spread(result.seconds, 2, " s"), f"{1e3 * result.step:.2f} ms"
        rows.append([name, seconds, step, against, bar, f"{result.ready:.1f} s"])
    yield f"{base.model['encoder']}, two views of {result.images:,} images, batch {base.batch_size}, {base.precision}"
    yield ""
    yield from table(["", "epoch", "step", "faster than lightly", "bar", "until the first epoch"], rows)


def describe(options: argparse.Namespace) -> str:
    """Command, commit, machine and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = (
        f"{torch.cuda.get_device_name()}, {cores} cores"
        if options.device == "cuda"
        else f"{cores} cores of {processor()}"
    )
    here = Path(__file__).parent
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = []
    for name in ("torch", "pytorch-lightning", "lightly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    images = "PNGs made here" if options.images is None else "the images given"
    return (
        f"`python {shlex.join(sys.argv)}`, commit {commit}, {machine}, {', '.join(versions)}, {images}, "
        f"{options.rounds} rounds. Median (range); ratios within a round."
    )


def main() -> None:
    """Read the options, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of class folders of images, as CIFAR-10's; made here if not given")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's, and worker processes of lightly")
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each contender")
    parser.add_argument("--count", type=int, help="images of an epoch (an even choice), in place of the default")
    parser.add_argument("--batch_size", type=int, help="in place of 256 (512 on CUDA), to try it out")
    parser.add_argument("--only", nargs="+", choices=["training", "trainer", "ranks", "growth"], metavar="PART")
    parser.add_argument("--quick", action="store_true", help="fewer images and three rounds: to see that it runs")
    parser.add_argument("--rehearse", action="store_true", help="what --device cuda runs, tiny and on the CPU")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what is printed there too")
    options = parser.parse_args()
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds are 1 or more.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device. --rehearse runs the same on the CPU.")
    if options.quick:
        options.rounds = min(options.rounds, 3)
    multiprocessing.set_start_method("spawn")
    text: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for line in parts(options, Path(scratch)):
                print(line, flush=True)
                text.append(line)
        except ValueError as error:
            parser.error(" ".join(str(error).split()))
    text.append(describe(options))
    print(text[-1])
    if options.markdown:
        options.markdown.write_text("\n".join(text) + "\n")


def parts(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """The tables, line by line."""
    on_cuda = options.device == "cuda" or options.rehearse
    batch_size = options.batch_size or (16 if options.rehearse else 512 if on_cuda else 256)
    wanted = 4 * batch_size if options.rehearse else 50_000 if on_cuda else 10_240 if options.quick else 20_480
    if options.images is None:
        say(f"making {wanted:,} PNGs ...")
        make_images(scratch / "made", wanted)
    paths = list_folder(options.images or str(scratch / "made"), "--images").paths

    def chosen(name: str, count: int) -> str:
        if min(count, len(paths)) < batch_size:
            raise ValueError(f"{min(count, len(paths))} images are fewer than a batch of {batch_size}.")
        return choose_images(paths, scratch / name, min(count, len(paths)))

    base = Contender("", "trainer", "", {}, batch_size, threads=options.threads, workers=options.threads)
    if on_cuda:
        base = replace(
            base, folder=chosen("all", options.count or wanted), device=options.device, precision="bf16-mixed"
        )
        base = replace(base, model={"encoder": "resnet8" if options.rehearse else "resnet18"})
        base = replace(base, workers=max(1, min(16, len(os.sched_getaffinity(0)))))
        yield from on_gpu(base, options.rounds, ("reduce-overhead",) if options.rehearse else (True, "reduce-overhead"))
        return
    quick = options.quick
    base = replace(base, folder=chosen("some", options.count or (2560 if quick else 5120)))
    asked = options.only or ["training", "trainer", "ranks", "growth"]
    many = min(10_240 if quick else 20_480, len(paths))
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "training": lambda: whole_training(base, options.rounds, batch_size == 256),
        "trainer": lambda: cost_of_the_trainer(
            replace(base, folder=chosen("steps", 2560 if quick else 12_800)), options.rounds
        ),
        "ranks": lambda: two_ranks(base, min(3, options.rounds)),
        "growth": lambda: growth(base, chosen("few", many // 10), chosen("many", many), min(3, options.rounds)),
    }
    for name, section in sections.items():
        if name in asked:
            yield from section()


if __name__ == "__main__":
    main()
