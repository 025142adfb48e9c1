"""The command line: `simclr <command>`, `python train.py` and `python linear_eval.py`."""

import contextlib
import difflib
import functools
import inspect
import itertools
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import NonNegativeInt
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich import box
from rich.console import Console
from rich.table import Table

import simclr
from simclr import distributed
from simclr.callbacks import EpochLines, OnlineKNN, ViewGrid
from simclr.checkpoint import LAST, Checkpoint, check_resume, read_checkpoint, save_encoder
from simclr.data import ImageData
from simclr.eval.evaluation import linear_evaluation, write_result
from simclr.loggers import WandbMode, build_loggers
from simclr.memory import check_memory
from simclr.module import SimCLR
from simclr.profile import StepClock, draw, summarise
from simclr.report import write_report
from simclr.run_folder import RunFolder

BAD_INPUT = 2  # exit code
INTERRUPTED = 130  # as a shell reports Ctrl-C
_AGREE_EVERY = 8  # steps after which several ranks ask each other whether to stop


class Parser(LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line, the nearest right key and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Without allow_abbrev=False, --trainer.max_epoch is silently taken for --trainer.max_epochs.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was probably meant, and exit."""
        fail(self.explain(message))

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:
        """As in jsonargparse; remembers the names of config files, which its messages do not give."""
        self.config_files = " or ".join(values_of(sys.argv[1:] if args is None else args, "--config", "-c"))
        return super().parse_args(args, *rest, **kwargs)

    def explain(self, message: str) -> str:
        """jsonargparse's message as one clear line."""
        unknown = (
            re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message)
            or re.search(r"Option '([^']+)' is not accepted", message)
            or re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'", message)
        )
        if unknown:
            key = ".".join(unknown.groups())
            where = "" if message.startswith("unrecognized") else f" in {self.config_files}"
            return f"unknown key {key}{where}. {self.suggest(key)}"
        if message.startswith("Problems parsing config"):
            detail = " ".join(re.sub(r'in "<unicode string>",', "in", message.partition(":")[2]).split())
            return f"{self.config_files} is not valid YAML: {detail}."
        message = re.sub(r'^(?:Parser key|argument) "?(?:--)?([^":]+)"?:\s*', r"\1: ", message)
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        if not value:
            return " ".join(message.split())
        key = message.split(":", 1)[0]
        wanted = dict.fromkeys(
            re.findall(r"Expected an? (?:typing\.)?(?:Literal)?(.+?)(?:\. Got|$)", message, re.MULTILINE)
        )
        names = [re.sub(r"<class '(.+?)'>", r"\1", kind).replace("NoneType", "null") for kind in wanted]
        choices = re.findall(r"'([^']*)'", " ".join(names))
        if choices and len(names) == 1:
            nearest = difflib.get_close_matches(value.group(1), choices, n=1, cutoff=0.6)
            meant = f" Did you mean {nearest[0]}?" if nearest else ""
            return f"{key}={value.group(1)} is not one of {', '.join(choices)}.{meant}"
        return f"{key}={value.group(1)} is not {' or '.join(names) or 'valid'}."

    def suggest(self, key: str) -> str:
        """The nearest key that exists, or where to look."""
        keys = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
        same_end = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        if nearest or same_end:
            return f"Did you mean {(same_end or nearest)[0]}?"
        return "See --help for the keys there are."


def values_of(args: list[str], *names: str) -> list[str]:
    """The values given to any of some options, as in `--name value` or `--name=value`."""
    found = [value for name, value in itertools.pairwise(args) if name in names]
    return found + [arg.partition("=")[2] for arg in args if arg.partition("=")[0] in names and "=" in arg]


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def guarded(work: Callable[[], Any]) -> Any:
    """Run a step that checks what the user gave; what it refuses becomes one line and exit code 2."""
    try:
        return work()
    except (ValueError, OSError, MisconfigurationException, ModuleNotFoundError) as error:
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(" ".join(str(error).split()))


class TrainCLI(LightningCLI):
    """LightningCLI for pretraining: SimCLR, ImageData, every Trainer option, a run folder and its loggers.

    Args:
        folder: chooses the run folder once the settings are known.
        **kwargs: of LightningCLI.
    """

    def __init__(self, folder: RunFolder, **kwargs: Any):
        self.folder = folder
        super().__init__(SimCLR, ImageData, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, always a number: a run without one could not be repeated."""
        parser.add_argument(
            "--seed_everything",
            type=NonNegativeInt,
            default=0,
            help="Seed of the weights, the views and the order of the images.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is neither Trainer's nor SimCLR's nor the data's."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run, a new one. By default runs/NAME, NAME from the config file or the data.",
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to continue from.")
        parser.add_argument(
            "--wandb",
            type=WandbMode,
            default="disabled",
            help="Weights & Biases. auto: online with a key and a network, else offline.",
        )
        parser.add_argument("--wandb_project", type=str, default="simclr", help="Project on Weights & Biases.")
        parser.add_lightning_class_args(OnlineKNN, "knn")
        # int: jsonargparse's own kind of number could not be read from a checkpoint.
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.batch_size", "model.batch_size")
        parser.link_arguments("model.image_size", "data.image_size")

    def before_instantiate_classes(self) -> None:
        """Choose the run folder. It stays empty until all is checked."""
        self.resumed = read_checkpoint(self.config.ckpt_path) if self.config.ckpt_path else None
        self.run_dir = self.folder.choose(self.config, self.resumed.run_dir if self.resumed else None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's loggers and callbacks, the user's beside them."""
        config = self.config.trainer
        watched = not (config.fast_dev_run or config.barebones)
        if config.logger in (None, True) and watched:
            step = self.resumed.global_step if self.resumed else None
            mode = self.config.wandb if self.folder.first else "disabled"  # only the first process writes
            kwargs["logger"] = build_loggers(self.run_dir, mode, self.config.wandb_project, step)
        if config.barebones:
            kwargs |= dict.fromkeys(("logger", "log_every_n_steps", "enable_model_summary", "num_sanity_val_steps"))
        elif config.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if config.sync_batchnorm and (config.accelerator == "cpu" or not torch.cuda.is_available()):
            kwargs["sync_batchnorm"] = False  # torch has it for GPUs only
        if config.profiler is None and not config.barebones:
            kwargs["profiler"] = Unprofiled()
        kwargs["default_root_dir"] = str(self.run_dir)
        given = self.config_init.trainer.callbacks or []
        kwargs["callbacks"] = list(given) if isinstance(given, list) else [given]
        if watched:
            kwargs["callbacks"] += [ViewGrid(self.run_dir), EpochLines()]
        self.keeps_checkpoint = watched and config.enable_checkpointing is not False
        if self.keeps_checkpoint:
            kwargs["callbacks"] += [SaveOnInterrupt(self.run_dir), newest_checkpoint(self.run_dir)]
        trainer = super().instantiate_trainer(**kwargs)
        # kNN before the line that shows it.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, OnlineKNN))
        return trainer


class NewestCheckpoint(ModelCheckpoint):
    """Lightning's checkpointing under a name of its own, so that it goes beside one that the user adds.

    For one that saves after epochs only. Lightning asks for the key before each hook of each step.
    """

    @functools.cached_property
    def state_key(self) -> str:
        """Lightning's, formatted once."""
        return super().state_key

    def on_train_batch_end(self, *args: Any) -> None:
        """Nothing: Lightning's would find out at every step that it has nothing to do."""


class Unprofiled(PassThroughProfiler):
    """No profiler, as by default, without the generator that Lightning enters and leaves thirty times a step for it."""

    def profile(self, action_name: str) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return _NOTHING


_NOTHING = contextlib.nullcontext()


def newest_checkpoint(run_dir: Path) -> ModelCheckpoint:
    """Keeps `checkpoints/last.ckpt`, after every epoch."""
    return NewestCheckpoint(
        dirpath=run_dir / LAST.parent, filename=LAST.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )


class SaveOnInterrupt(Callback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint that continues exactly from it, and stop.

    Several ranks, which may be told at different steps or not all, agree on the step.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / LAST
        self.asked = self.agreed = self.saved = False
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the two signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        # Lightning agrees on a SIGTERM before every batch on the device, and so waits for all that is queued there
        # (its issue 21487). This callback agrees between the hosts.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if distributed.rank() == 0:
            print("\nfinishing this step, then saving; again to stop at once", file=sys.stderr, flush=True)

    def _agree(self) -> None:
        self.agreed |= any(asked for (asked,) in distributed.exchange([self.asked]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if asked to stop: after an optimiser step, because accumulated gradients are not in a checkpoint."""
        if trainer.world_size == 1 or batch_idx % _AGREE_EVERY == 0:
            self._agree()
        if self.agreed and (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            self.saved = True

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop, once the loggers have the last step's metrics."""
        if self.saved:
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asked to stop in the last step of an epoch: what belongs to its end, the checkpoint too, has been done."""
        self._agree()
        if self.agreed:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def summary(cli: TrainCLI) -> str:
    """What is about to happen, in a few aligned lines."""
    model, data, trainer, hparams = cli.model, cli.datamodule, cli.trainer, cli.model.hparams
    million = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    classes = f", {len(data.train.classes)} classes" if data.train.classes else ", no labels"
    lr = (
        f"{hparams.base_lr:g} x {hparams.lr_scaling} scaling"
        if hparams.lr_scaling != "none"
        else f"{hparams.base_lr:g}"
    )
    epochs, steps = trainer.max_epochs, trainer.max_steps
    length = f"{epochs} epoch{'s' if epochs != 1 else ''}" if steps == -1 else f"{steps} steps in all"
    late = hparams.warmup_epochs > epochs > 0 and steps == -1
    warmup = f", which {hparams.warmup_epochs:g} warm-up epochs do not reach" if late else ""
    share = f" ({data.batch_size // trainer.world_size} on each of {trainer.world_size} devices)"
    size = f"{hparams.image_size} px"
    if hparams.start_size is not None:
        never = ", which this run does not reach" if 0 < epochs < hparams.grow_epochs and steps == -1 else ""
        size = f"{hparams.start_size} px, growing to {size} over {hparams.grow_epochs} epochs{never}"
    group = model.batch_norm_group(trainer)
    over = f" (BatchNorm over {group} views)" if group else ""
    parts = f", {hparams.micro_batch_size} at a time{over}" if hparams.micro_batch_size else ""
    chosen = {"nt_xent": "NT-Xent", "dcl": "DCL", "nt_logistic": "NT-Logistic", "margin_triplet": "margin triplet"}
    loss = f"{chosen[hparams.loss]}{', semi-hard' if hparams.semi_hard else ''}, " + (
        f"margin {hparams.margin:g}" if hparams.loss == "margin_triplet" else f"temperature {hparams.temperature:g}"
    )
    rows = {
        "run": str(cli.run_dir),
        "data": f"{data.train.name}: {len(data.train):,} images{classes}, views of {size}",
        "encoder": f"{hparams.encoder}, {million:.2f} M parameters, h of {model.encoder.feature_dim}, "
        f"z of {model.head.out_dim} ({hparams.head} head)",
        "batch": f"{data.batch_size} images{share if trainer.world_size > 1 else ''}{parts}, "
        f"{data.steps_per_epoch} steps an epoch, {length}",
        "loss": f"{loss}{f', {hparams.views} views' if hparams.views > 2 else ''}",
        "optimiser": f"{hparams.optimizer}, learning rate {lr}{warmup}",
        "memory": cli.memory,
        "machine": f"{trainer.strategy.root_device.type} x {trainer.world_size}, precision {trainer.precision}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items() if text)


def train(argv: list[str] | None = None) -> None:
    """Pretrain an encoder. See `python train.py --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    folder = RunFolder()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for people, without a line of code
    try:
        _train(args, folder)
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    finally:
        folder.forget()


def _train(args: list[str], folder: RunFolder) -> None:
    try:
        cli = guarded(lambda: _parse_and_build(args, folder))
        guarded(lambda: _check(cli))
        if cli.trainer.fast_dev_run:
            folder.release()
    except BaseException:
        folder.release()
        raise
    if folder.first:
        if not cli.trainer.fast_dev_run:
            _save_config(cli)
        print(summary(cli), flush=True)
    started = time.perf_counter()
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resumed and cli.resumed.path, weights_only=True)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except ValueError as error:  # an image that cannot be read, found while training
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(f"{' '.join(str(error).split())} (SIMCLR_TRACEBACK=1 shows where)")
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        _say_how_to_continue(cli)
        sys.exit(INTERRUPTED)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:
        save_encoder(cli.model.encoder, cli.run_dir / "encoder.pt")
        minutes = (time.perf_counter() - started) / 60
        print(f"trained {minutes:.1f} min; encoder in {cli.run_dir / 'encoder.pt'}; {_next_step(cli)}", flush=True)


def _next_step(cli: TrainCLI) -> str:
    if not cli.keeps_checkpoint:
        return "no checkpoint, as asked"
    measure = f"python linear_eval.py --checkpoint {cli.run_dir / LAST}"
    if cli.datamodule.has_labels:
        return f"next: {measure}"
    return f"next: simclr report --run_dir {cli.run_dir}, or with labelled images {measure} --data.train_dir ..."


def _save_config(cli: TrainCLI) -> None:
    # Without what belongs to this run alone, so that `--config` repeats it in another folder.
    config = cli.config.clone()
    config.run_dir = config.ckpt_path = None
    cli.parser.save(config, str(cli.run_dir / "config.yaml"), skip_none=False, overwrite=True)


def _parse_and_build(
    args: list[str],
    folder: RunFolder,
    kind: type[TrainCLI] = TrainCLI,
    description: str = "Pretrain an image encoder with SimCLR.",
) -> TrainCLI:
    arguments = sys.argv
    try:
        sys.argv = arguments[:1]  # LightningCLI warns where both are given
        return kind(
            folder,
            args=_with_config_of_run(args),
            run=False,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"description": description},
            trainer_defaults={
                "max_epochs": 100,
                "use_distributed_sampler": False,  # our sampler hands out shares of one global batch
                "sync_batchnorm": torch.cuda.is_available(),  # statistics over all devices, as in the paper
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 25,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    finally:
        sys.argv = arguments


def _with_config_of_run(args: list[str]) -> list[str]:
    """A run continued without a config goes on with its own; settings given beside it still come last."""
    checkpoint = values_of(args, "--ckpt_path")
    if not checkpoint or values_of(args, "--config", "-c") or not Path(checkpoint[-1]).exists():
        return args
    own = read_checkpoint(checkpoint[-1]).run_dir / "config.yaml"
    return ["--config", str(own), *args] if own.is_file() else args


def _check(cli: TrainCLI) -> None:
    cli.datamodule.validate(cli.trainer.world_size)
    cli.model.check(cli.trainer)
    if cli.trainer.max_epochs == cli.trainer.max_steps == -1:
        raise ValueError("trainer.max_epochs=-1: a cosine needs an end. Set trainer.max_epochs or trainer.max_steps.")
    if cli.resumed:
        check_resume(cli.resumed, cli.model, cli.datamodule)
    trainer = cli.trainer
    cli.memory = check_memory(
        cli.model,
        trainer.strategy.root_device,
        cli.datamodule.batch_size // trainer.world_size,
        trainer.world_size,
        trainer.num_devices,
        trainer.precision,
    )
    cli.datamodule.setup("fit")


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
        self.resumed = self.run_dir = None
        if self.config.steps < 1:
            raise ValueError(f"steps={self.config.steps} is not a positive number.")
        endless = {"max_epochs": -1, "max_steps": 1, "min_epochs": None, "min_steps": None, "max_time": None}
        for name, value in {**endless, "fast_dev_run": False, "barebones": False}.items():
            self.config.trainer[name] = value
        self.config.knn.every_n_epochs = 0  # between epochs, which are not timed

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer without loggers and checkpoints."""
        config = self.config.trainer
        if config.sync_batchnorm and (config.accelerator == "cpu" or not torch.cuda.is_available()):
            kwargs["sync_batchnorm"] = False
        if config.profiler is None and not config.barebones:
            kwargs["profiler"] = Unprofiled()  # as in train
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return LightningCLI.instantiate_trainer(self, **kwargs, **off)


def profile(argv: list[str] | None = None) -> None:
    """Say where the time of a training step goes. See `simclr profile --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    folder = RunFolder()
    try:
        cli = guarded(lambda: _parse_and_build(args, folder, ProfileCLI, "Say where the time of a training step goes."))
        guarded(lambda: _check(cli))
        print_profile(cli)
    except KeyboardInterrupt:
        print("stopped: no profile", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


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
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
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


def _say_how_to_continue(cli: TrainCLI) -> None:
    last = cli.run_dir / LAST
    if not cli.trainer.is_global_zero:
        return
    if last.exists():
        command = shlex.join(["python", "train.py", "--ckpt_path", str(last)])
        print(f"stopped; continue with: {command}", file=sys.stderr, flush=True)
    else:
        print(f"stopped before the first checkpoint; {cli.run_dir} can be deleted", file=sys.stderr, flush=True)


_NOT_SETTINGS = {"checkpoint", "data", "device", "command", "say"}  # what linear_evaluation takes from elsewhere


def linear_eval(argv: list[str] | None = None) -> None:
    """Measure a pretrained encoder. See `python linear_eval.py --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config, data, checkpoint = guarded(lambda: _parse_linear_eval(args))
    settings = {name: config[name] for name in inspect.signature(linear_evaluation).parameters if name in config}
    settings = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}
    device = guarded(lambda: _device(config.device))
    command = shlex.join(["python", "linear_eval.py", *args])
    try:
        record = guarded(
            lambda: linear_evaluation(
                checkpoint.path,
                data,
                **settings,
                device=device,
                command=command,
                say=lambda text: print(text, flush=True),
            )
        )
    except RuntimeError as error:  # the encoder changed, or a classifier diverged: there is no number
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    print_result(record)
    print(f"written to {guarded(lambda: write_result(record, checkpoint.run_dir))}")


def _parse_linear_eval(args: list[str]) -> tuple[Namespace, ImageData, Checkpoint]:
    parser = Parser(description="Linear evaluation of a pretrained encoder, frozen, beside two yardsticks.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file with any of these settings.")
    parser.add_argument("--checkpoint", type=str, required=True, help="A run folder or a checkpoint file.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    parser.add_function_arguments(linear_evaluation, skip=_NOT_SETTINGS)
    # The size of an image is the encoder's; the seed orders training images only.
    parser.add_class_arguments(ImageData, "data", skip={"image_size", "seed", "batch_size"}, fail_untyped=False)
    checkpoint = read_checkpoint(parser.parse_args(args).checkpoint)
    known = {f"data.{name}" for name in inspect.signature(ImageData.__init__).parameters}
    known -= {"data.self", "data.image_size", "data.seed", "data.batch_size"}
    trained_on = {f"data.{name}": value for name, value in checkpoint.data.items()}
    parser.set_defaults({name: value for name, value in trained_on.items() if name in known})
    config = parser.parse_args(args)
    data = ImageData(**config.data.as_dict(), image_size=checkpoint.model["image_size"], batch_size=2)
    data.validate()
    return config, data, checkpoint


def report(argv: list[str] | None = None) -> None:
    """Write a run's page: curves, views, neighbours, a map. See `simclr report --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    parser = Parser(description="Write report.html of a run, one page that works offline.")
    parser.add_argument("--run_dir", type=str, required=True, help="The run folder.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    config = parser.parse_args(args)
    path = guarded(
        lambda: write_report(config.run_dir, device=_device(config.device), say=lambda text: print(text, flush=True))
    )
    print(f"written to {path}")


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not here
        raise ValueError(f"device={wanted} cannot be used: {str(error).splitlines()[0]}") from error
    return wanted


def print_result(record: dict[str, Any]) -> None:
    """The result as a small table for people, in percent."""
    low, high = (f"{100 * bound:.1f}" for bound in record["ci95"])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{record['encoder']}, epoch {record['epoch']}")
    table.add_column("top-1", justify="right")
    table.add_column("")
    rows = [
        (f"linear classifier ({record['protocol']})", "linear_top1", f"95 % interval {low} to {high}"),
        (f"kNN (k = {record['knn_k']})", "knn_top1", ""),
        ("yardstick: random encoder", "random_encoder_top1", ""),
        ("yardstick: raw pixels", "raw_pixels_top1", ""),
    ]
    for number, (name, key, remark) in enumerate(rows):
        if record[key] is None:
            table.add_row(name, "-", "did not converge")
            continue
        ahead = f"{100 * (record['linear_top1'] - record[key]):+.1f} points" if number > 1 else remark
        if key == "linear_top1":
            ahead += f", top-5 {100 * record['linear_top5']:.1f} %"
        table.add_row(name, f"{100 * record[key]:.1f} %", ahead, style="bold" if number == 0 else None)
    data = record["data"]
    Console(width=max(80, Console().width)).print(table)
    print(f"{data['test_images']:,} test images of {data['test']}; classifiers trained on {data['train_images']:,}")
    if data["note"]:
        print(f"note: {data['note']}")


def quiet() -> None:
    """Keep Lightning's advertisements and known-harmless warnings off the screen."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r"Experiment logs directory .* exists and is not empty",  # our run folder, and its rows are kept
        r"Checkpoint directory .* exists and is not empty",  # likewise when a run is continued
        r"The number of training batches .* is smaller than the logging interval",
        r"You have overridden `\w+` in `LightningModule`",  # on purpose
        r"The '\w+_dataloader' does not have many workers",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch >= 2.11 about Lightning 2.6
    ):
        warnings.filterwarnings("ignore", message=message)


def main(argv: list[str] | None = None) -> None:
    """`simclr <command>`: reaches every command of the project."""
    args = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "linear-eval": linear_eval,
        "report": report,
        "profile": profile,
    }
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
        print("usage: simclr <command> [options]\n\n" + "\n".join(lines))
        return
    if args[0] == "--version":
        print(f"simclr {simclr.__version__}")
        return
    if args[0] not in commands:
        nearest = difflib.get_close_matches(args[0], commands, n=1)
        fail(
            f"unknown command {args[0]}. "
            + (f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(commands)}.")
        )
    commands[args[0]](args[1:])
