"""`simclr profile`: where the time of a training step goes."""

import os
import sys
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from simclr.allocator import keep_freed_memory
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.ranks import before_ranks_meet
from simclr.cli.train import TrainCLI, check, parse_and_build
from simclr.nonfinite.watch import FiniteSteps
from simclr.profile import StepClock, draw, summarise
from simclr.progress import LOG_STEPS
from simclr.run_folder import RunFolder


class ProfileCLI(TrainCLI):
    """The settings of a training for `simclr profile`: as long as needed, and nothing is written."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """How many steps."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int, default=20, help="Steps to time in parts, and as many untouched.")

    def before_instantiate_classes(self) -> None:
        """No run folder, no end but that of the steps to time."""
        if self.config.ckpt_path:
            raise ValueError("ckpt_path: a profile begins anew. Give the run's settings, --config RUN/config.yaml.")
        if self.config.trainer.profiler is not None:
            raise ValueError("trainer.profiler: simclr profile is one itself. Leave it out, --trainer.profiler null.")
        self.resumed = self.run_dir = None  # type: ignore[assignment]  # a profile has no folder, and asks for none
        if self.config.steps < 1:
            raise ValueError(f"steps={self.config.steps} is not a positive number.")
        endless = {"max_epochs": -1, "max_steps": 1, "min_epochs": None, "min_steps": None, "max_time": None}
        for name, value in {**endless, "fast_dev_run": False, "barebones": False}.items():
            self.config.trainer[name] = value
        self.config.knn.every_n_epochs = self.config.quality.every_n_epochs = 0  # between epochs, which are not timed

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer without loggers and checkpoints."""
        config = self.config.trainer
        if config.sync_batchnorm and (config.accelerator == "cpu" or not torch.cuda.is_available()):
            kwargs["sync_batchnorm"] = False
        if config.log_every_n_steps is None:
            kwargs["log_every_n_steps"] = LOG_STEPS  # as in a long run
        self.finite = FiniteSteps()  # not at work: nothing is watched that is not timed
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return LightningCLI.instantiate_trainer(self, **kwargs, **off)


@in_a_line
def profile(argv: list[str] | None = None) -> None:
    """Say where the time of a training step goes. See `simclr profile --help`."""
    quiet()
    keep_freed_memory()
    args = sys.argv[1:] if argv is None else argv
    folder = RunFolder()
    try:
        with before_ranks_meet():
            cli = guarded(
                lambda: parse_and_build(
                    args, folder, ProfileCLI, "Say where the time of a training step goes.", "profile"
                )
            )
            guarded(lambda: check(cli))
            print_profile(cli)
    except KeyboardInterrupt:
        stop("stopped: no profile")


def print_profile(cli: TrainCLI) -> None:
    """Train for some steps, measure the device, and print the table."""
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    device = trainer.strategy.root_device
    clock = StepClock(cli.config.steps, device.type)
    trainer.callbacks.append(clock)
    trainer.fit_loop.epoch_loop.max_steps = -(-clock.steps // trainer.accumulate_grad_batches)
    if trainer.is_global_zero:
        print(f"timing {clock.steps} steps ...", file=sys.stderr, flush=True)
    try:
        trainer.fit(model, data)
    except FloatingPointError as error:
        fail(str(error), FAILED)
    except ValueError as error:  # an image that cannot be read
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(f"{' '.join(str(error).split())} (SIMCLR_TRACEBACK=1 shows where)")
    except SystemExit as error:  # Lightning's answer to a KeyboardInterrupt
        raise KeyboardInterrupt from error
    if not trainer.is_global_zero:
        return
    images = data.batch_size // trainer.world_size
    found = summarise(clock, model.to(device), images, str(trainer.precision))  # Lightning took it off the device
    Console(width=max(80, Console().width)).print(draw(found, model, trainer, images))
