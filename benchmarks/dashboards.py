"""What watching a run costs: the figures of its steps, its loggers and its dashboard, beside a step of 20 ms.

    python benchmarks/dashboards.py

Trains a small network in one process for ten epochs of 98 steps, as CIFAR-10 has in batches of 512, with every logger
and callback of the command line at its default cadence, and sums the CPU time of the training thread inside what
watches: other programs on the machine disturb it less than they do a clock. Online kNN is left out; it has a cadence of
its own. Drawing the map, once at the end of a run, is listed apart.
"""

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from pytorch_lightning import Trainer

import simclr.dashboard
import simclr.loggers
from simclr import SimCLR
from simclr.cli import quiet
from simclr.dashboard import Dashboard
from simclr.data import ImageData
from simclr.loggers import EventFiles, MetricsCSV, build_loggers
from simclr.progress import LogInterval
from simclr.step_figures import StepFigures

STEP, STEPS, EPOCHS, BATCH = 0.020, 98, 10, 8
spent: dict[str, float] = defaultdict(float)  # CPU seconds
inside: list[str] = []  # what is being timed: time within something that is timed counts once


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


def main() -> None:
    """Measure and print."""
    quiet()
    torch.set_num_threads(1)
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end"):
        timed(StepFigures, hook, "figures of steps")
    for kind in (MetricsCSV, EventFiles):
        for hook in ("log_metrics", "save"):
            timed(kind, hook, "loggers")
    timed(Dashboard, "on_train_start", "dashboard")
    timed(Dashboard, "on_train_epoch_end", "dashboard")
    timed(simclr.dashboard, "tsne", "map, once")
    timed(simclr.dashboard, "as_picture", "charts, once")
    timed(simclr.dashboard, "_points", "projector, once")
    timed(simclr.dashboard, "view_grid", "views, once")
    timed(simclr.loggers, "_to_tensorboard", "dashboard")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        data = ImageData(shapes_train=STEPS * BATCH, shapes_test=1000, batch_size=BATCH, image_size=16, workers=0)
        model = SimCLR("resnet8", width=0.25, image_size=16, batch_size=BATCH)
        callbacks = [StepFigures(), LogInterval(), Dashboard()]
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            logger=build_loggers(Path(folder)),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(model, data)
    whole = STEP * STEPS * EPOCHS
    print(
        f"torch {torch.__version__}, {EPOCHS} epochs of {STEPS} steps; shares are of a run of {1000 * STEP:g} ms a step"
    )
    for name, seconds in sorted(spent.items()):
        print(f"{name:20} {1000 * seconds:8.1f} ms  {100 * seconds / whole:6.2f} %")
    of_steps = spent["figures of steps"] + spent["loggers"]
    print(f"a step: {1e6 * of_steps / STEPS / EPOCHS:.0f} us, {100 * of_steps / whole:.2f} % of it")
    print(f"dashboard of every fifth epoch: {100 * spent['dashboard'] / whole:.2f} % of the run")


if __name__ == "__main__":
    main()
