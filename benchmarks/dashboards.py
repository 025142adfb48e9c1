"""What watching a run costs: the figures of its steps, its loggers and its dashboard, beside a step of 20 ms.

    python benchmarks/dashboards.py

Two measurements, in about a minute. They count the CPU time of the training thread, which other programs on the machine
disturb less than a clock, and give it as a share of what the work would take at 20 ms a step.

- A step. One run, with every logger and callback that the command line adds at its default cadence in some steps, and
  with none in as many others, in turn; the steps hardly compute anything, so that the difference shows. It holds what
  Lightning does for the callbacks too. Each pair of stretches is a ratio; the median counts.
- A run of ten epochs of 98 steps, as CIFAR-10 has in batches of 512: what stands at its ends of epochs. The passes
  through the network are left out, by features that are at hand: another device makes them in another time. They are
  given as a share of the passes of training. The proof that they leave the network as it is runs on as many tensors as
  a ResNet-18 has, of few numbers each: a device that makes such steps copies the rest in less than a millisecond. The
  search for other views is counted, though it is on the network's device too. Online kNN and the online probe are left
  out: they have settings and costs of their own. What is drawn once for a run, however long, is listed apart.
"""

import contextlib
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch.utils.tensorboard import SummaryWriter

import simclr.dashboard
import simclr.loggers
import simclr.online_quality
from simclr import SimCLR
from simclr.allocator import keep_freed_memory
from simclr.callbacks import EpochLines, ViewGrid
from simclr.cli import quiet
from simclr.contrast.engine import ContrastStats
from simclr.dashboard import Dashboard
from simclr.data import ImageData
from simclr.diagnosis import Diagnosis
from simclr.eval.features import frozen
from simclr.loggers import EventFiles, MetricsCSV, build_loggers
from simclr.online_quality import OnlineQuality
from simclr.progress import LOG_STEPS, LogInterval, ProgressLines
from simclr.step_figures import StepFigures

STEP, STEPS, EPOCHS, BATCH = 0.020, 98, 10, 512  # of the run that is thought of
PAIRS, REPEATS = 60, 3
spent: dict[str, float] = defaultdict(float)  # CPU seconds
inside: list[str] = []  # what is being timed: time within something that is timed counts once


class Cheap(SimCLR):
    """A method whose steps compute hardly anything, with as many weights as a ResNet-18 has."""

    def __init__(self, batch_size: int):
        super().__init__("resnet18", width=0.0625, image_size=32, batch_size=batch_size)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do."""
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Numbers to log."""
        loss = next(self.parameters()).sum()
        told = loss.detach()
        self.step_log.add(self, batch_idx, ContrastStats(told, told, told, told))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of one weight: the others keep the gradient that they have here, of which there are norms."""
        for weight in self.parameters():
            weight.grad = torch.ones_like(weight)
        return torch.optim.SGD([next(self.parameters())], lr=1e-9)


class Watched(Cheap):
    """One that is watched in every other stretch of `LOG_STEPS` steps."""

    def __init__(self) -> None:
        super().__init__(2)
        self.watchers: tuple[list[Any], list[Any]] = ([], [])
        self.on: list[float] = []
        self.off: list[float] = []
        self._steps, self._since = 0, 0.0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Between two steps: no hook of either is open."""
        if self._steps % LOG_STEPS == 0:
            now, stretch = time.thread_time(), self._steps // LOG_STEPS
            if stretch > 0:
                (self.off if stretch % 2 == 0 else self.on).append(now - self._since)
            if stretch == 0:
                self.watchers = self.trainer.callbacks, self.trainer.loggers
            watched = stretch % 2 == 0 and stretch < 2 * PAIRS
            self.trainer.callbacks, self.trainer.loggers = self.watchers if watched else ([], [])
            if not watched:
                self.trainer.log_every_n_steps = 0
            self._since = time.thread_time()
        self._steps += 1
        return batch


def watchers() -> list[Callback]:
    """What the command line adds, but for checkpoints, online kNN and the online probe."""
    return [
        OnlineQuality(),
        Dashboard(),
        LogInterval(),
        ProgressLines(),
        StepFigures(),
        EpochLines(),
        Diagnosis(lambda trainer, text: None),
    ]


def trainer(folder: str, epochs: int) -> Trainer:
    """With all that watches."""
    off = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    loggers = build_loggers(Path(folder))
    return Trainer(
        accelerator="cpu", max_epochs=epochs, logger=loggers, callbacks=watchers(), **dict.fromkeys(off, False)
    )


def of_steps() -> list[float]:
    """Seconds that a step takes longer where it is watched, of each pair of stretches."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * LOG_STEPS * PAIRS + 1
        data = ImageData(shapes_train=2 * steps, shapes_test=2, batch_size=2, image_size=32, workers=0)
        model = Watched()
        with contextlib.redirect_stdout(None):
            trainer(folder, 1).fit(model, data)
    pairs = list(zip(model.on, model.off, strict=True))
    return [(on - off) / LOG_STEPS for on, off in pairs]


def timed(kind: type | object, name: str, under: str) -> None:
    """Have the time spent in a function added up."""
    original = getattr(kind, name)

    def wrapped(*args, **kwargs):
        began = time.thread_time()
        inside.append(under)
        try:
            return original(*args, **kwargs)
        finally:
            inside.pop()
            took = time.thread_time() - began
            spent[under] += took
            if inside:
                spent[inside[-1]] -= took

    setattr(kind, name, wrapped)


def proven(module: SimCLR, *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features that are at hand, of a network that is proven to be as it was."""
    with frozen(torch.nn.Sequential(*module.networks)):
        return features


def of_epochs() -> Iterator[dict[str, float]]:
    """Seconds by what they went into, of runs of ten epochs."""
    for hook in ("on_train_start", "on_train_epoch_start", "on_train_epoch_end"):
        timed(Dashboard, hook, "dashboard, two looks")
    for hook in ("on_train_start", "on_train_epoch_end"):
        timed(OnlineQuality, hook, "figures without labels")
    timed(StepFigures, "on_train_epoch_end", "rows of epochs")
    for kind in (MetricsCSV, EventFiles):
        for hook in ("log_metrics", "save"):
            timed(kind, hook, "rows of epochs")
    generator = torch.Generator().manual_seed(0)
    h, z = torch.randn(4000, 512, generator=generator), torch.randn(4000, 128, generator=generator)
    few = Dashboard().images
    OnlineQuality._features = lambda self, data, module: iter([proven(module, h, z)])
    Dashboard._features = lambda self, module, sample: proven(module, h[:few], z[: 2 * few])
    for kind in (OnlineQuality, Dashboard):
        timed(kind, "_features", "proofs, five")
    timed(simclr.online_quality, "instance_retrieval", "retrieval, three times")
    for name, under in (
        ("tsne", "once: the map's places"),
        *((name, "once: charts") for name in ("draw_map", "draw_spectrum", "as_picture")),
        ("_points", "once: the projector"),
    ):
        timed(simclr.dashboard, name, under)
    timed(ViewGrid, "draw", "once: views")
    timed(EventFiles, "log_hyperparams", "once: settings")
    timed(SummaryWriter, "add_embedding", "once: the projector")
    for _ in range(REPEATS):
        spent.clear()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            torch.manual_seed(0)
            data = ImageData(shapes_train=BATCH, shapes_test=2000, batch_size=BATCH, image_size=32, workers=0)
            trainer(folder, EPOCHS).fit(Cheap(BATCH), data)
        yield dict(spent)


def main() -> None:
    """Measure and print."""
    keep_freed_memory()  # as `simclr train` does
    quiet()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {platform.machine()}, {threads} threads; shares are of {1e3 * STEP:g} ms a step")
    found = of_steps()
    low, middle, high = (100 * q / STEP for q in statistics.quantiles(found, n=4))
    print(
        f"a step: {1e6 * statistics.median(found):.0f} us, {middle:.2f} % (half of the pairs: {low:.2f} to {high:.2f})"
    )
    runs = list(of_epochs())
    whole = STEP * STEPS * EPOCHS
    parts = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in sorted(runs[0])}
    parts["steps, as above"] = statistics.median(found) * STEPS * EPOCHS
    print(f"\na run of {EPOCHS} epochs of {STEPS} steps, {whole:g} s, median of {len(runs)}:")
    for name, seconds in parts.items():
        print(f"  {name:38} {1e3 * seconds:7.0f} ms {100 * seconds / whole:6.2f} %")
    once = sum(seconds for name, seconds in parts.items() if name.startswith("once"))
    every = sum(parts.values()) - once
    looks = 2 * Dashboard().images * 3 + 3 * OnlineQuality().images * 2
    # A training image is two views, each a pass forwards and about two backwards.
    passes = looks / (STEPS * EPOCHS * BATCH * 2 * 3)
    print(f"  passes of {looks:,} images, beside those of training {100 * passes:14.2f} %")
    print(f"an epoch: {100 * (every / whole + passes):.2f} %; and once a run, however long: {once:.2f} s")


if __name__ == "__main__":
    main()
