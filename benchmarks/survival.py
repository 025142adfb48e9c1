"""What it costs that a run survives: checkpoints, views and order that repeat, checks of files before they are decoded.

    python benchmarks/survival.py                     # one CPU core, ten minutes
    python benchmarks/survival.py --quick             # fewer rounds, to see it run
    python benchmarks/survival.py --markdown FILE     # the tables also to a file

Checkpoints: training under the Trainer with loggers, in which every so many steps begin with the save that
`--checkpoint.every_n_steps` makes; what such a step takes longer than its neighbours, per hundred steps. Determinism:
steps whose views follow from (seed, epoch, image, view) take turns with steps whose views take as many numbers from
torch.rand, and the order of the images is worked out beside torch.randperm. Decoding: torchvision's decoder alone, and
what is looked at before the file is given to it. All contenders take turns; the fastest and the median of many rounds
are given, because what else a machine does only ever makes them slower.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from pytorch_lightning import Callback, Trainer

import simclr.augment
from simclr import SimCLR
from simclr.cli import quiet
from simclr.cli.saving import InsideEpochs, Schedule, newest_checkpoint, take_over_checkpoints
from simclr.container import processor
from simclr.data import jpeg, png
from simclr.data.loader import GlobalBatchSampler, TrainLoader
from simclr.data.sources import MemoryImages
from simclr.loggers import build_loggers
from simclr.seeding import epoch_order, uniforms

EVERY = 100  # steps between two checkpoints, for the table
WARM_UP = 4
BARS = {"checkpoints": 3.0, "determinism": 1.0, "decoding": 10.0}  # per cent


@dataclass
class Case:
    """A network and a batch.

    Attributes:
        name: for the table.
        batch: images.
        size: side of an image and of a view, pixels.
        steps: measured; every `saves`-th begins with a save.
        model: settings of SimCLR.
    """

    name: str
    batch: int
    size: int
    steps: int
    saves: int
    model: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("ResNet-8, 16 channels, AdamW", 128, 32, 400, 10, {"encoder": "resnet8", "optimizer": "adamw"}),
    Case("ResNet-18, LARS", 64, 32, 36, 4, {"encoder": "resnet18"}),
]
CASES[0].model |= {"stem": "small_stride2", "strength": 0.5, "blur_prob": 0.0, "base_lr": 4e-3, "lr_scaling": "none"}


class Clock(Callback):
    """Seconds from the start of each step to that of the next, by whether it began with a save and by its number."""

    def __init__(self, model: SimCLR):
        self.steps: list[tuple[int, float]] = []
        self.last, self.save = 0.0, 0.0
        self.saves: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step > WARM_UP:
            self.steps.append((trainer.global_step - 1, now - self.last))
        self.last = now


class Turns:
    """Stands for `simclr.augment.uniforms`: every second step takes its numbers from torch.rand."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def __call__(self, seed: int, epoch: int, index: torch.Tensor, view: int, count: int) -> torch.Tensor:
        if self.trainer is not None and self.trainer.global_step % 2:
            return torch.rand(len(index), count, device=index.device)
        return uniforms(seed, epoch, index, view, count)


def train(case: Case, folder: Path, schedule: Schedule | None, turns: Turns | None = None) -> list[tuple[int, float]]:
    """(step, seconds) of a run; it is one epoch, so that no save but those of the schedule is among them."""
    torch.manual_seed(0)
    steps = case.steps + WARM_UP + 2
    model = SimCLR(image_size=case.size, batch_size=case.batch, warmup_epochs=0, **case.model)
    pixels = torch.randint(0, 256, (case.batch * 2, 3, case.size, case.size), dtype=torch.uint8)
    source = MemoryImages("noise", pixels.repeat(-(-steps // 2), 1, 1, 1)[: steps * case.batch])
    loader = TrainLoader(source, GlobalBatchSampler(len(source), case.batch))
    clock = Clock(model)
    callbacks: list[Callback] = [clock]
    if schedule is not None:
        callbacks += [newest_checkpoint(folder), InsideEpochs(folder, schedule)]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=build_loggers(folder) if schedule is not None else False,
        log_every_n_steps=25,
        callbacks=callbacks,
        enable_checkpointing=schedule is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    take_over_checkpoints(trainer)
    if turns is not None:
        turns.trainer = trainer
    trainer.fit(model, loader)
    return clock.steps


def checkpoints(case: Case, rounds: int) -> list[str]:
    """The row of a case: a plain step, what a save adds to one, and its share of EVERY steps."""
    plain, saving, size = [], [], 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for step, seconds in train(case, Path(folder), Schedule(every_n_steps=case.saves)):
                (plain if step % case.saves else saving).append(seconds)
            size = (Path(folder) / "checkpoints" / "last.ckpt").stat().st_size
    fastest, usual = (pick(saving) - pick(plain) for pick in (min, median))
    shares = 100 * fastest / (EVERY * min(plain)), 100 * usual / (EVERY * median(plain))
    return [
        f"| {case.name}, batch {case.batch} | {ms(min(plain))} ({ms(median(plain))}) | {size / 1e6:.1f} MB | "
        f"{ms(fastest)} ({ms(usual)}) | {shares[0]:.2f} % ({shares[1]:.2f} %) | {len(saving)} |"
    ]


def determinism(case: Case, rounds: int) -> list[str]:
    """The row of a case: whole steps in turns, and the parts that differ by themselves."""
    turns, steps = Turns(), {0: [], 1: []}
    simclr.augment.uniforms = turns
    try:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                for step, seconds in train(case, Path(folder), None, turns):
                    steps[step % 2].append(seconds)
    finally:
        simclr.augment.uniforms = uniforms
    count, index = 2 * simclr.augment.CROP_TRIES + 20, torch.arange(case.batch)
    size = 50_000
    parts = in_turns(
        {
            "pure numbers": lambda: [uniforms(0, 3, index, view, count) for view in (0, 1)],
            "torch.rand": lambda: [torch.rand(case.batch, count) for _ in (0, 1)],
            "pure order": lambda: epoch_order(0, 3, size, torch.arange(size)),
            "randperm": lambda: torch.randperm(size),
        },
        max(20, 100 * rounds),
    )
    best = {name: min(seconds) for name, seconds in parts.items()}
    # Of an epoch's order a step needs the share of its batch.
    extra = best["pure numbers"] - best["torch.rand"] + (best["pure order"] - best["randperm"]) * case.batch / size
    step = min(steps[0])
    ratios = [100 * (pick(steps[0]) / pick(steps[1]) - 1) for pick in (min, median)]
    return [
        f"| {case.name}, batch {case.batch} | {ms(step)} ({ms(median(steps[0]))}) | {ms(extra)} | "
        f"{100 * extra / step:.2f} % | {ratios[0]:+.2f} % ({ratios[1]:+.2f} %) | {len(steps[0])} |"
    ]


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Smooth areas with some noise, which compress about as photographs do."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse, np.int16) + draw.integers(-6, 7, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def decoding(size: tuple[int, int], rounds: int) -> list[str]:
    """The rows of a size: a PNG in a worker process, in the training process, and a JPEG."""
    files: dict[str, list[bytes]] = {"png": [], "jpeg": []}
    for kind, contents in files.items():
        for seed in range(8):
            photograph(*size, seed).save(file := io.BytesIO(), kind)
            contents.append(file.getvalue())
    raw = {kind: [torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in some] for kind, some in files.items()}
    of_jpeg = [jpeg.header_of(content) for content in files["jpeg"]]
    headers = [png.check_checksums(content) for content in files["png"]]
    rgb = torchvision.io.ImageReadMode.RGB.value
    work = {
        "png": lambda: [torch.ops.image.decode_image(part, rgb, True) for part in raw["png"]],
        "jpeg": lambda: [jpeg.pixels_of(c, h) for c, h in zip(files["jpeg"], of_jpeg, strict=True)],
        "checksums": lambda: [png.check_checksums(content) for content in files["png"]],
        "ours": lambda: [png.pixels_of(c, h) for c, h in zip(files["png"], headers, strict=True)],
        "markers": lambda: [jpeg.header_of(content) for content in files["jpeg"]],
    }
    repeats = max(20, min(400, 4_000_000 // (size[0] * size[1]))) * rounds // 3 or 1
    parts = {name: [s / 8 for s in seconds] for name, seconds in in_turns(work, repeats).items()}
    lines = []
    for what, kind, check in (
        ("PNG, torchvision's decoder", "png", "checksums"),
        ("PNG, the one that is used", "ours", "checksums"),
        ("JPEG", "jpeg", "markers"),
    ):
        best, usual = ([pick(parts[kind]), pick(parts[check])] for pick in (min, median))
        kb = median(map(len, files["jpeg" if kind == "jpeg" else "png"])) / 1000
        lines.append(
            f"| {what} | {size[0]} x {size[1]}, {kb:.0f} kB | {us(best[0])} ({us(usual[0])}) | "
            f"{us(best[1])} ({us(usual[1])}) | {100 * best[1] / best[0]:.1f} % ({100 * usual[1] / usual[0]:.1f} %) |"
        )
    return lines


def in_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round after round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ms(seconds: float) -> str:
    """Milliseconds, for a table."""
    return f"{1e3 * seconds:.2f} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"


def us(seconds: float) -> str:
    """Microseconds, for a table."""
    return f"{1e6 * seconds:,.1f} µs"


def main() -> None:
    """Read the options, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round, to see it run")
    parser.add_argument("--only", choices=tuple(BARS), help="one of the tables")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.quick:
        args.rounds = 1
        for case in CASES:
            case.steps = 3 * case.saves
    tables: dict[str, tuple[str, str, Callable[[], list[list[str]]]]] = {
        "checkpoints": (
            f"One checkpoint every {EVERY} steps (bar: {BARS['checkpoints']:g} %)",
            "| | a step | checkpoint | adds to a step | of the training time | saves |",
            lambda: [checkpoints(case, args.rounds) for case in CASES],
        ),
        "determinism": (
            f"Views and order that repeat (bar: {BARS['determinism']:g} %)",
            "| | a step | numbers and order beside torch.rand and randperm | of a step | whole steps, in turns | n |",
            lambda: [determinism(case, args.rounds) for case in CASES],
        ),
        "decoding": (
            f"Checks before a file is decoded (bar: {BARS['decoding']:g} % of decoding a PNG)",
            "| | | the decoder alone | checks | of decoding |",
            lambda: [decoding(size, args.rounds) for size in ((32, 32), (256, 256), (500, 375))],
        ),
    }
    lines = []
    for name, (title, head, rows) in tables.items():
        if args.only not in (None, name):
            continue
        block = [title, "", head, "|" + "---|" * (head.count("|") - 1)]
        print("\n".join(block), flush=True)
        for row in (row for some in rows() for row in some):
            print(row, flush=True)
            block.append(row)
        print(flush=True)
        lines += [*block, ""]
    git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    about = (
        f"One core of {processor()}, torch {torch.__version__}, torchvision {torchvision.__version__}, commit "
        f"{commit}; {args.rounds} rounds; fastest (median)."
    )
    print(about)
    if args.markdown:
        args.markdown.write_text("\n".join([*lines, about, ""]))


if __name__ == "__main__":
    sys.exit(main())
