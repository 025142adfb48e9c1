"""`simclr train`, `python train.py`: pretrain an encoder."""

import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse.typing import restricted_number_type
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar as BarOfLightning
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from simclr.allocator import keep_freed_memory
from simclr.callbacks import EpochLines, ViewGrid, print_line
from simclr.checkpoint import (
    ENCODER,
    LAST,
    STARTING_ENCODER,
    read_checkpoint,
    save_encoder,
    save_encoder_of,
    sound_beside,
)
from simclr.cli.agreement import agree
from simclr.cli.config_files import read_settings
from simclr.cli.ending import reached
from simclr.cli.hints import refuse_file_as_encoder
from simclr.cli.messages import FAILED, INTERRUPTED, fail, guarded, in_a_line, program, quiet, speaking_if
from simclr.cli.parsing import Parser, recipes_of, refuse_empty, values_of
from simclr.cli.ranks import OtherRankFailed, Ranks, WithRanks
from simclr.cli.recipes import with_config_files
from simclr.cli.refusals import LOGGED, LOGGED_WITH_LABELS, check_devices, check_trainer
from simclr.cli.resume_with import purposes, with_purposes
from simclr.cli.saving import (
    InsideEpochs,
    KeepStartingEncoder,
    SaveOnInterrupt,
    Schedule,
    cause_of_stop,
    newest_checkpoint,
    take_over_checkpoints,
)
from simclr.cli.unset import pace_line, record, remarks, settle, settle_names
from simclr.container import threads
from simclr.continuation import Continuation, check_resume
from simclr.dashboard import Dashboard
from simclr.data import ImageData
from simclr.data.module import FOLDERS, LEFT_OUT, SKIPPED, folders_of_run
from simclr.diagnosis import Diagnosis
from simclr.distributed import launched_rank, launched_ranks
from simclr.efficientnet import SCALED, encoder_in_words
from simclr.encoders import choose_stem
from simclr.eval.supervised import METHOD as SUPERVISED
from simclr.files import reason_of, remove_abandoned_sockets, write_atomically
from simclr.loggers import EventFiles, build_loggers
from simclr.memory import check_memory
from simclr.nonfinite.watch import FiniteSteps, NonFiniteStep, OnNonFinite
from simclr.online_accuracy import OnlineKNN, OnlineProbe
from simclr.online_quality import Measurer, OnlineQuality
from simclr.pace import Pace
from simclr.paths import expanded
from simclr.progress import LogInterval, ProgressBar, ProgressLines, duration
from simclr.provenance import provenance
from simclr.run_folder import CONFIG, RunFolder, latest_config, record_continuation
from simclr.run_length import RunLength, run_length
from simclr.step_figures import StepFigures
from simclr.training.internals import children_watched_by, patience_of, wait_for_ranks
from simclr.training.method import DEFAULT_METHOD, find_method, meet_images, name_of, takes
from simclr.wandb_run import WandbMode, WandbOptions, WandbRun, start_wandb, wandb_mode

_LONGEST_WAIT = 7 * 24 * 60  # minutes
_DOES = {
    "train": "Pretrain an image encoder with SimCLR on the images in FOLDER (--data.train_dir).",
    "supervised": "Train an image encoder and a classifier with the labels of class folders: with the settings of RUN, "
    "as its counterpart, into RUN-supervised; or on FOLDER.",
}
_Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # as NumPy's


class TrainCLI(LightningCLI):
    """LightningCLI for pretraining: a method, ImageData, every Trainer option, a run folder and its loggers.

    Args:
        folder: chooses the run folder once the settings are known.
        ranks: of this run, where several may train.
        method: what is trained, see `simclr.training.method`.
        **kwargs: of LightningCLI.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks | None, method: type[LightningModule], **kwargs: Any):
        self.folder, self.ranks, self.method = folder, ranks, method
        self.began = time.monotonic()
        self.counterpart: str | None = None  # a run that this one is to be compared with
        self.chosen: dict[str, Any] = {}  # options of the Trainer that follow from a measurement
        self.pace: Pace | None = None
        self.continuation: Continuation | None = None
        self.schedule = Schedule()
        self.loggers: list[Logger] | None = None  # made once, also where the Trainer is built anew
        self.wandb_mode: Literal["online", "offline", "disabled"] = "disabled"
        self.wandb: WandbRun | None = None  # while the run trains
        super().__init__(method, ImageData, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, always a number: a run without one could not be repeated."""
        parser.add_argument(
            "--seed_everything",
            type=_Seed,
            default=0,
            help="Seed of the weights, the views and the order of the images.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is neither Trainer's nor SimCLR's nor the data's."""
        parser.add_argument(
            "--method",
            type=str,
            default=DEFAULT_METHOD,
            help="What is trained: simclr, byol, supervised (with labels), or the path of a class of your own, "
            "package.module.Class.",
        )
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run, a new one. By default runs/NAME, NAME from the config file or the data.",
        )
        parser.add_argument(
            "--minutes",
            type=float | None,
            default=None,
            help="Train for about so long: a few steps are measured, and the epochs set so that warm-up and cosine end "
            "in time. They go into config.yaml: from then on the run is one of that many epochs.",
        )
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to continue from.")
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never"] | None,
            default=None,
            help="auto: the same command, given again, starts the run of --run_dir, continues it, or says that it is "
            "finished. By itself where a scheduler has restarted the job (SLURM, torchrun).",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=OnNonFinite,
            default="stop",
            help="What becomes of a step whose loss or gradient is NaN or infinite: stop the run, with a dump that "
            "`simclr replay` computes again; or skip the step, up to ten in a row and 1 %% of the run.",
        )
        parser.add_argument(
            "--resume_with",
            type=list[str] | None,
            default=None,
            help="KEY=VALUE, more than once for more: a setting that decides what is learned, and that a continued run "
            "is meant to change. It is recorded, and given again it changes nothing more.",
        )
        parser.add_argument(
            "--wandb",
            type=WandbMode,
            default="disabled",
            help="Weights & Biases. auto: online with a key and a network, else offline.",
        )
        of_wandb = {
            "project": (str | None, "Project on Weights & Biases: by itself WANDB_PROJECT, else simclr."),
            "entity": (str | None, "User or team there: by itself WANDB_ENTITY."),
            "group": (str | None, "What the run is grouped with there: by itself WANDB_RUN_GROUP."),
            "tags": (list[str] | None, "Its tags there, [one,two]: by themselves WANDB_TAGS."),
            "notes": (str | None, "A sentence about it there: by itself WANDB_NOTES."),
            "id": (
                str | None,
                "Its id there: by itself that of the run folder, so that a continued run goes on there.",
            ),
        }
        for name, (kind, text) in of_wandb.items():
            parser.add_argument(f"--wandb_{name}", type=kind, default=None, help=text)
        parser.add_argument(
            "--log_artifact",
            type=bool,
            default=False,
            help="Upload the encoder to Weights & Biases as a model, and the report, where there is --wandb.",
        )
        parser.add_argument(
            "--rank_timeout",
            type=float | None,
            default=None,
            help="Minutes that a rank waits for another which neither goes on nor dies. By default 30, or the "
            "strategy's own.",
        )
        parser.add_argument("--check_memory", type=bool, default=True, help="Refuse what certainly does not fit.")
        parser.add_class_arguments(Schedule, "checkpoint")
        parser.add_lightning_class_args(OnlineKNN, "knn")
        parser.add_lightning_class_args(OnlineProbe, "probe")
        parser.add_lightning_class_args(OnlineQuality, "quality")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        # int: jsonargparse's own kind of number could not be read from a checkpoint.
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.batch_size", "model.batch_size")
        if takes(self.method, "channels"):  # else it is for RGB, and other images are refused as the run is set up
            parser.link_arguments("data.channels", "model.channels")
        parser.link_arguments("model.image_size", "data.image_size")

    def before_instantiate_classes(self) -> None:
        """Choose the run folder. It stays empty until all is checked."""
        settle_names(self)
        self.schedule = Schedule(**self.config.checkpoint.as_dict())
        refuse_file_as_encoder(self.config.model.encoder)
        if self.config.log_artifact and self.config.wandb == "disabled":
            raise ValueError("log_artifact uploads to Weights & Biases, which is disabled. Add --wandb auto.")
        if self.config.trainer.default_root_dir is not None:  # this project's folder of a run takes its place
            raise ValueError(
                f"trainer.default_root_dir is not used. Use --run_dir {self.config.trainer.default_root_dir}."
            )
        self.resumed = read_checkpoint(self.config.ckpt_path) if self.config.ckpt_path else None
        self.on_purpose = purposes([f"--resume_with={meant}" for meant in self.config.resume_with or ()])
        if self.on_purpose and self.resumed is None:
            begin = " ".join(f"--{name} {value}" for name, value in self.on_purpose.items())
            raise ValueError(
                f"resume_with changes a run that goes on, and there is none yet. To begin with it: {begin}."
            )
        again = resumes(self.config.resume)
        if self.config.resume == "auto" and not (self.config.run_dir or self.resumed):
            raise ValueError("resume=auto needs --run_dir, the folder in which the same command finds its run again.")
        self.run_dir = self.folder.choose(self.config, self.resumed.run_dir if self.resumed else None, again)

    @property
    def length(self) -> RunLength:
        """Of the run, once the images are known."""
        return run_length(self.datamodule.steps_per_epoch, self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's loggers and callbacks, the user's beside them."""
        config = self.config.trainer
        check_devices(config.accelerator, config.devices, config.num_nodes)
        watched = not (config.fast_dev_run or config.barebones)
        if config.logger in (None, True) and watched:
            if self.loggers is None:
                self.loggers = build_loggers(self.run_dir, self.resumed)
                if self.folder.first:  # only the first process writes
                    self.wandb_mode = wandb_mode(self.config.wandb)
            kwargs["logger"] = self.loggers
        if config.barebones:
            kwargs |= dict.fromkeys(("logger", "log_every_n_steps", "enable_model_summary", "num_sanity_val_steps"))
        if config.sync_batchnorm and (config.accelerator == "cpu" or not torch.cuda.is_available()):
            kwargs["sync_batchnorm"] = False  # torch has it for GPUs only
        kwargs["default_root_dir"] = str(self.run_dir)
        given = self.config_init.trainer.callbacks or []
        kwargs["callbacks"] = list(given) if isinstance(given, list) else [given]
        if not config.barebones:
            kwargs["enable_progress_bar"] = self._add_progress(kwargs["callbacks"])
        if watched:
            diagnosis = Diagnosis(lambda trainer, text: print_line(trainer, f"warning: {text}"))
            kwargs["callbacks"] += [StepFigures(), ViewGrid(self.run_dir), EpochLines(), diagnosis]
        if watched and self.config.model.get("weights") is not None:
            kwargs["callbacks"].append(KeepStartingEncoder(self.run_dir))
        self.finite = FiniteSteps(self.run_dir if watched else None, self.config.on_nonfinite, print_line)
        if not config.barebones:
            kwargs["callbacks"].append(self.finite)
        self.keeps_checkpoint = watched and config.enable_checkpointing is not False
        self.stop = SaveOnInterrupt(self.run_dir)
        if self.keeps_checkpoint:
            kwargs["callbacks"] += [newest_checkpoint(self.run_dir), self.stop]
            if self.schedule.every_n_steps or self.schedule.every_minutes:
                kwargs["callbacks"].append(InsideEpochs(self.run_dir, self.schedule))
        try:
            trainer = super().instantiate_trainer(**{**kwargs, **self.chosen})
        except (TypeError, RuntimeError, OverflowError) as error:  # Lightning's answer to some options
            raise ValueError(f"trainer: {error}") from error
        self._take_over_ranks(trainer)
        self.checkpoints = take_over_checkpoints(trainer, self.schedule.keep)
        # What measures before the line that shows it.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, Measurer))
        return trainer

    def _take_over_ranks(self, trainer: Trainer) -> None:
        """How long ranks wait for each other, and what they have to agree on before the first step."""
        minutes = self.config.rank_timeout
        if minutes is not None and not 0 < minutes <= _LONGEST_WAIT:
            raise ValueError(f"rank_timeout={minutes:g} is not between 0 and {_LONGEST_WAIT:,} minutes.")
        if minutes is not None:
            wait_for_ranks(trainer, timedelta(minutes=minutes))
        if self.ranks is not None:
            self.ranks.patience = patience_of(trainer)
            trainer.callbacks.insert(0, WithRanks(self.ranks, lambda: agree(self)))

    def _add_progress(self, callbacks: list[Callback]) -> bool:
        """Add what says how far the run is to its callbacks; whether that is a bar."""
        wanted = self.config.trainer.enable_progress_bar
        if self.config.trainer.log_every_n_steps is None:
            callbacks.append(LogInterval())
        if wanted is False or any(isinstance(callback, BarOfLightning) for callback in callbacks):
            return wanted is not False
        bar = wanted or sys.stdout.isatty()
        callbacks.append(ProgressBar() if bar else ProgressLines())
        return bar


def summary(cli: TrainCLI) -> str:
    """What is about to happen, in a few aligned lines."""
    model, data, trainer, hparams = cli.model, cli.datamodule, cli.trainer, cli.model.hparams
    million = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    classes = f", {len(data.train.classes)} classes" if data.train.classes else ", no labels"
    held = f"; {data.held_out:,} of the images are held out, never trained on" if data.held_out else ""
    held += f"; {data.kept_as_test:,} kept from training, the test of evaluation" if data.kept_as_test else ""
    lr = (
        f"{hparams.base_lr:g} x {hparams.lr_scaling} scaling"
        if hparams.lr_scaling != "none"
        else f"{hparams.base_lr:g}"
    )
    epochs, steps = trainer.max_epochs, trainer.max_steps
    late = hparams.warmup_epochs > cli.length.in_epochs
    warmup = f", which {hparams.warmup_epochs:g} warm-up epochs do not reach" if late else ""
    share = f" ({data.batch_size // trainer.world_size} on each of {trainer.world_size} devices)"
    size = f"{hparams.image_size} px"
    if hparams.get("start_size") is not None:
        never = ", which this run does not reach" if 0 < epochs < hparams.grow_epochs and steps == -1 else ""
        size = f"{hparams.start_size} px, growing to {size} over {hparams.grow_epochs} epochs{never}"
    if model.views.small:
        size += f" and {model.views.small} small crop{'s' * (model.views.small > 1)} of {hparams.small_crop_size} px"
    group = model.run.batch_norm_group(model, trainer)
    over = f" (BatchNorm over {group} views)" if group else ""
    at_a_time, head, compiled = (hparams.get(name) for name in ("micro_batch_size", "head", "compile_encoder"))
    parts = f", {at_a_time} at a time{over}" if at_a_time else ""
    head = f", z of {model.networks[-1].out_dim} ({head} head)" if head else ""
    rows = {
        "run": str(cli.run_dir),
        "continued": _continued(cli),
        "data": f"{data.train.name}: {len(data.train):,} images{_kind(data)}{classes}, views of {size}{held}",
        "left out": data.left_out,
        "weights": _weights(cli),
        "encoder": f"{encoder_in_words(hparams)}{_stem(hparams)}, {million:.2f} M parameters, "
        f"h of {model.encoder.feature_dim}{head}",
        "batch": f"{data.batch_size} images{share if trainer.world_size > 1 else ''}{parts}, "
        f"{cli.length}{_left_out(data)}",
        "loss": model.objective(hparams).text,
        "optimiser": f"{hparams.optimizer}, learning rate {lr}{warmup}",
        "memory": cli.memory,
        "time": pace_line(cli),
        "machine": f"{trainer.strategy.root_device.type} x {trainer.world_size}, precision {trainer.precision}"
        f"{', compiled' if compiled else ''}",
        "watch": f"tensorboard --logdir {cli.run_dir.parent}" if _has_tensorboard(trainer) else "",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items() if text)


def _stem(hparams: Any) -> str:
    """That an EfficientNet is not as published; a ResNet's stem goes without saying."""
    small = choose_stem(hparams.encoder, hparams.get("stem", "auto"), hparams.image_size) == "small"
    return ", small stem" if small and hparams.encoder.startswith(SCALED) else ""


def _kind(data: ImageData) -> str:
    """What images are that are not 8-bit RGB."""
    if data.rules.plain:
        return ""
    many = {1: "gray", 3: "RGB"}.get(data.channels, f"{data.channels} channels")
    return f" ({many}{', 16 bits' if data.bits == 16 else ''})"


def _continued(cli: TrainCLI) -> str:
    """Where a run goes on from, and what is different; empty for one that begins."""
    if cli.resumed is None or cli.continuation is None:
        return ""
    return f"\n{'':<11}".join((f"from {cli.resumed.stands}", *cli.continuation.said))


def _weights(cli: TrainCLI) -> str:
    """What the encoder begins with, what of it was dropped and what is fresh; empty for one that begins at random."""
    starting = cli.model.run.starting
    if starting is None:
        return ""
    fresh = any(True for part in cli.model.networks[1:] for _ in part.parameters())
    return f"{starting.text}{'; the head begins at random' if fresh else ''}"


def _has_tensorboard(trainer: Trainer) -> bool:
    return any(isinstance(logger, EventFiles) for logger in trainer.loggers)


def _left_out(data: ImageData) -> str:
    """How many images the last incomplete batch of an epoch would have held."""
    assert data.batch_size is not None  # settled
    rest = data.training_images % data.batch_size
    return f"; {rest} of the {data.training_images:,} images sit out each epoch, others each time" if rest else ""


def keep_to_quota(processes: int = 1) -> None:
    """Compute with as many threads as a container's quota feeds: torch counts the machine's cores."""
    if (allowed := threads(processes)) is not None and allowed < torch.get_num_threads():
        torch.set_num_threads(allowed)


@in_a_line
def train(
    argv: list[str] | None = None,
    command: str = "train",
    typed: list[str] | None = None,
    counterpart: str | None = None,
) -> None:
    """Pretrain an encoder. See `python train.py --help`.

    Args:
        argv: the arguments; those of the process if not given.
        command: of `simclr` that this is: train, or supervised.
        typed: the arguments as they were given to the command, for the record; argv if not given.
        counterpart: the run that this one is to be compared with, where it is known.
    """
    quiet()
    keep_freed_memory()
    keep_to_quota()
    remove_abandoned_sockets()  # of a run that was killed and had workers: this one need not have any
    args = sys.argv[1:] if argv is None else argv
    ranks = Ranks()
    folder = RunFolder()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for people, without a line of code
    try:
        with speaking_if(ranks.may_speak):
            in_a_line(_train)(args, folder, ranks, command, args if typed is None else typed, counterpart)
        ranks.wait_for_children()
    except KeyboardInterrupt:
        ranks.kill_children()
        if ranks.may_speak():
            print("stopped before training began", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BaseException as error:
        ranks.end(getattr(error, "code", None))
        raise
    finally:
        ranks.leaving = True
        folder.let_go()


def _train(
    args: list[str], folder: RunFolder, ranks: Ranks, command: str, typed: list[str], counterpart: str | None
) -> None:
    try:
        cli = guarded(lambda: parse_and_build(args, folder, description=_DOES[command], command=command, ranks=ranks))
        cli.counterpart = counterpart
        guarded(lambda: check(cli))
        finished = cli.continuation if cli.continuation is not None and cli.continuation.finished else None
        if cli.trainer.fast_dev_run or finished is not None:
            folder.remove_empty()
    except BaseException:
        folder.remove_empty()
        raise
    if finished is not None:
        if folder.first:
            guarded(lambda: _leave_encoder(cli))
            print(f"already finished, {finished.length}; --trainer.max_epochs lengthens it", flush=True)
        return
    settings: dict[str, Any] = {}
    if folder.first:
        if not cli.trainer.fast_dev_run:
            try:
                settings = guarded(lambda: _save_config(cli, [*program(command), *typed]))
            except BaseException:
                folder.discard()
                raise
        print(summary(cli), flush=True)
        for line in remarks(cli):
            print(f"note: {line}", flush=True)
    with _dashboards(cli, settings, [*program(command), *typed]):
        _fit_and_end(cli, folder, ranks)


@contextmanager
def _dashboards(cli: TrainCLI, settings: dict[str, Any], args: list[str]) -> Iterator[None]:
    """Let TensorBoard and W&B know the settings; a run on W&B is open while this one trains and saves its encoder."""
    for logger in cli.trainer.loggers:
        if isinstance(logger, EventFiles):
            logger.settings = settings
    if settings and cli.wandb_mode != "disabled":
        given = {field.name: cli.config[f"wandb_{field.name}"] for field in fields(WandbOptions)[:-1]}
        options = WandbOptions(**given, log_artifact=cli.config.log_artifact)
        about = provenance(shlex.join(args))
        step = cli.resumed.global_step if cli.resumed else 0
        cli.wandb = start_wandb(cli.run_dir, cli.wandb_mode, options, {**settings, **about}, step)
    if cli.wandb is None:
        yield
        return
    cli.trainer.loggers = [*cli.trainer.loggers, cli.wandb]
    code = FAILED
    try:
        yield
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else FAILED
        raise
    finally:
        cli.wandb.end(code)


def _fit_and_end(cli: TrainCLI, folder: RunFolder, ranks: Ranks) -> None:
    started = time.perf_counter()
    try:
        _fit(cli, folder, ranks)
    except OtherRankFailed:
        raise
    except FloatingPointError as error:
        _fail_of_numbers(cli, error)
    except ValueError as error:  # an image that cannot be read, found while training
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(f"{' '.join(str(error).split())} (SIMCLR_TRACEBACK=1 shows where)")
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        if cli.stop.signalled or not cli.stop.saved:
            _say_how_to_continue(cli)
            sys.exit(cli.stop.exit_code)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:
        _end(cli, time.perf_counter() - started)


def _end(cli: TrainCLI, seconds: float) -> None:
    """The encoder of a run that has ended by itself; what could not be saved is an error, and how to go on."""
    path = cli.run_dir / ENCODER
    print(*(f"{'' if i else 'reached':<10} {line}\n" for i, line in enumerate(reached(cli.trainer))), sep="", end="")
    try:
        save_encoder(cli.model, path)
    except FloatingPointError as error:  # of a run that keeps no checkpoint
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{_ended(cli, seconds)}, but {path} could not be written ({reason_of(error)}). {_repeat(cli)}", FAILED)
    if cli.wandb is not None:
        files = [path.with_suffix(".safetensors"), latest_config(cli.run_dir) or cli.run_dir / CONFIG]
        figures = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        about = {**figures, "encoder": cli.model.hparams.encoder, "global_step": cli.trainer.global_step}
        epoch = f"epoch-{cli.trainer.current_epoch}"
        cli.wandb.log_files("encoder", "model", files, ["latest", epoch], about)
    if unsaved := _unsaved(cli):
        fail(f"{_ended(cli, seconds)}; encoder in {path}; but {unsaved}. {_repeat(cli)}", FAILED)
    print(f"{_ended(cli, seconds)}; encoder in {path}; {_next_step(cli)}", flush=True)


def _leave_encoder(cli: TrainCLI) -> None:
    """The encoder of a finished run that was killed, or found no room, before it had written one."""
    assert cli.resumed is not None  # its checkpoint is that of the last step
    path = cli.resumed.run_dir / ENCODER
    here = cli.run_dir.resolve() == cli.resumed.run_dir.resolve()
    if here and not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        save_encoder_of(cli.resumed, path)


def _fail_of_numbers(cli: TrainCLI, error: FloatingPointError) -> None:
    """Loss, gradient or weights are not finite: said once, with the way on."""
    if isinstance(error, NonFiniteStep) and not cli.trainer.is_global_zero:  # all ranks have met it
        sys.exit(FAILED)
    dump = cli.finite.dump
    replayed = "" if dump is None or isinstance(error, NonFiniteStep) else f" Look at it: simclr replay {dump}."
    end = "." if isinstance(error, NonFiniteStep) and dump is not None else ""
    fail(f"{error}{end}{replayed}{_last_good(cli)}", FAILED)


def _last_good(cli: TrainCLI) -> str:
    path = cli.run_dir / LAST
    if not path.exists():
        return ""
    way = " To go on from there without such steps: --on_nonfinite skip." if cli.finite.on_nonfinite == "stop" else ""
    return f" {path} holds the last good weights.{way}"


def _unsaved(cli: TrainCLI) -> str | None:
    """What of the newest checkpoint could not be written; None if it was."""
    failed = cli.checkpoints and cli.checkpoints.failed
    return failed and f"{failed[0]} could not be written ({failed[1]})"


def _repeat(cli: TrainCLI) -> str:
    """What to do once there is room."""
    return f"Make room, then {_how_to_continue(cli)}."


def _stopped_early(cli: TrainCLI) -> bool:
    return cli.model.run.total_steps is not None and cli.trainer.global_step < cli.model.run.total_steps


def _ended(cli: TrainCLI, seconds: float) -> str:
    count = cli.finite.skipped
    skipped = f", {count} {'step' if count == 1 else 'steps'} skipped" if count else ""
    if not _stopped_early(cli):
        return f"trained for {duration(seconds)}{skipped}"
    cause = cli.stop.cause or cause_of_stop(cli.trainer)
    return f"stopped by {cause} at step {cli.trainer.global_step} of {cli.model.run.total_steps}{skipped}"


def _fit(cli: TrainCLI, folder: RunFolder, ranks: Ranks) -> None:
    """Train; what fails before the first step is done leaves no folder, and what Lightning refuses is one line."""

    def discard() -> None:
        if cli.trainer.global_step == 0 and cli.finite.dump is None:
            folder.discard()

    ranks.tidy, ranks.stopping = discard, lambda: cli.stop.agreed
    launched = cli.trainer.num_devices > 1
    if launched and (share := threads(cli.trainer.num_devices)) is not None:
        os.environ["OMP_NUM_THREADS"] = str(share)  # which Lightning leaves alone
        torch.set_num_threads(share)
    try:
        with children_watched_by(ranks.adopt):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resumed and cli.resumed.path, weights_only=True)
        ranks.leaving = True
    except Exception as error:
        discard()
        ranks.answer(error)
        if isinstance(error, MisconfigurationException):
            raise ValueError(str(error)) from error
        raise


def _next_step(cli: TrainCLI) -> str:
    if not cli.keeps_checkpoint:
        return "no checkpoint, as asked"
    if _stopped_early(cli):
        return _how_to_continue(cli)
    if name_of(cli.model) == SUPERVISED:
        known, run = cli.counterpart is not None, shlex.quote(cli.counterpart or "RUN")
        meaning = "" if known else ", RUN a pretraining of the same images"
        return f"next: simclr eval {run} --supervised {shlex.quote(str(cli.run_dir))}{meaning}"
    measure = shlex.join([*program("linear-eval"), "--checkpoint", str(cli.run_dir / LAST)])
    if cli.datamodule.has_labels:
        return f"next: {measure}"
    return f"next: simclr report --run_dir {cli.run_dir}, or with labelled images {measure} --data.train_dir ..."


def _writable(write: Callable[[], Any]) -> Any:
    """What `write` gives; a setting that YAML has no text for is refused."""
    try:
        return write()
    except (yaml.YAMLError, ValueError) as error:
        unknown = re.search(r"'(cannot represent an object)', (.+?)\)", str(error))  # jsonargparse lists much more
        reason = " ".join(unknown.groups() if unknown else str(error).split())
        raise ValueError(
            f"a setting cannot be written to config.yaml, by which the run is repeated: {reason}."
        ) from error


def _save_config(cli: TrainCLI, args: list[str]) -> dict[str, Any]:
    """Write the settings into the run folder; returns them, nested."""
    record(cli)
    if cli.datamodule.skipped:
        write_atomically(cli.run_dir / SKIPPED, ("\n".join(cli.datamodule.skipped) + "\n").encode())
    if named := cli.datamodule.left_out_names:
        write_atomically(cli.run_dir / LEFT_OUT, os.fsencode("\n".join(named) + "\n"))
    # Without what belongs to this run alone, so that `--config` repeats it in another folder.
    config = cli.config.clone()
    config.run_dir = config.ckpt_path = config.resume_with = None
    for name in FOLDERS:
        config.data[name] = cli.datamodule.hparams[name]  # from the root: it is read from other folders too
    config.data.allow_changed_images = False
    settings = _writable(lambda: cli.parser.dump(config, skip_none=False))
    if cli.continuation is None or cli.resumed is None:
        write_atomically(cli.run_dir / CONFIG, settings.encode())
        return yaml.safe_load(settings)
    found = cli.continuation
    began = cli.resumed.run_dir / STARTING_ENCODER
    if began.is_file() and not (cli.run_dir / STARTING_ENCODER).exists():
        write_atomically(cli.run_dir / STARTING_ENCODER, began.read_bytes())
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(args),
        "checkpoint": str(cli.resumed.path),
        "from_step": found.step,
        "total_steps": found.total,
        "changed": {name: {"was": was, "is": now} for name, (was, now) in found.changes.items()},
        "resume_with": [f"{name}={value}" for name, value in cli.on_purpose.items()],
        "images": found.images,
        "said": found.said,
    }
    record_continuation(cli.run_dir, cli.resumed.run_dir, settings, entry)
    return yaml.safe_load(settings)


def parse_and_build(
    args: list[str],
    folder: RunFolder,
    kind: type[TrainCLI] = TrainCLI,
    description: str = "",
    command: str = "train",
    ranks: Ranks | None = None,
) -> TrainCLI:
    """Settings read and objects built; the run folder is reserved, and empty."""
    refuse_empty(args)
    arguments = sys.argv
    args = with_purposes(_with_config_of_run(_with_own_checkpoint(args)))
    try:
        sys.argv = arguments[:1]  # LightningCLI warns where both are given
        return kind(
            folder,
            ranks,
            find_method(_method_in(with_config_files(args, recipes_of("train")))),
            args=args,
            run=False,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"description": description or _DOES["train"], "command": command},
            trainer_defaults={
                "max_epochs": 100,
                "use_distributed_sampler": False,  # our sampler hands out shares of one global batch
                "sync_batchnorm": torch.cuda.is_available(),  # statistics over all devices, as in the paper
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    finally:
        sys.argv = arguments


def _method_in(args: list[str]) -> str:
    """The method that the arguments or their config files name: it decides what can be set."""
    named = [DEFAULT_METHOD]
    for file in values_of(args, "--config", "-c"):
        try:
            content = read_settings(file)
        except (OSError, ValueError):  # the parser says what is wrong with it
            continue
        named += [str(content["method"])] if content.get("method") else []
    return (values_of(args, "--method") or named)[-1]


def resumes(asked: str | None) -> bool:
    """Whether the run found in `--run_dir` goes on: asked for, or the job was restarted by what had launched it."""
    if asked is not None:
        return asked == "auto"
    counts = (os.environ.get(name, "") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def _with_own_checkpoint(args: list[str]) -> list[str]:
    """Given again, the command of a run that has a checkpoint continues it, with all that was settled as it began."""
    run_dir, asked = values_of(args, "--run_dir"), values_of(args, "--resume")
    if asked and asked[-1] not in ("auto", "never", "null"):
        raise ValueError(f"resume={asked[-1]} is neither auto nor never. To continue a run: --ckpt_path {asked[-1]}.")
    if not run_dir or values_of(args, "--ckpt_path") or not resumes(asked[-1] if asked else None):
        return args
    run = expanded(run_dir[-1])
    checkpoint = _newest_sound(run)
    if checkpoint is None:
        return args
    own = latest_config(run)
    # Its length is settled too.
    return [*([] if own is None else ["--config", str(own)]), *args, "--ckpt_path", str(checkpoint), "--minutes=null"]


def _newest_sound(run: Path) -> Path | None:
    """What a run goes on from: its last checkpoint or, if that is damaged or gone, the newest sound one beside it."""
    if (run / LAST).exists():
        try:
            read_checkpoint(run)
        except ValueError as error:
            damage = str(error).split(". An earlier")[0]
        else:
            return run
    else:
        damage = f"{run / LAST} is gone"
    found = sound_beside(run / LAST)
    if found is None:  # what is wrong with the last one is said when it is read
        return run if (run / LAST).exists() else None
    if launched_rank() == 0:
        print(f"note: {damage}. Going on from {found[0]}, of step {found[1]}", flush=True)
    return found[0]


def _with_config_of_run(args: list[str]) -> list[str]:
    """A run continued without a config goes on with its own; settings given beside it still come last."""
    checkpoint = values_of(args, "--ckpt_path")
    if not checkpoint or values_of(args, "--config", "-c") or not expanded(checkpoint[-1]).exists():
        return args
    own = latest_config(read_checkpoint(checkpoint[-1]).run_dir)
    return args if own is None else ["--config", str(own), *args]


def check(cli: TrainCLI) -> None:
    """Refuse what cannot train, and read the images.

    Raises:
        ValueError: with what to use.
    """
    # Else each would be a run of its own, in one folder.
    if (launched := launched_ranks()) not in (1, cli.trainer.world_size):
        here = os.environ.get("LOCAL_WORLD_SIZE", str(launched))
        raise ValueError(
            f"{launched} ranks were launched, and these settings train on {cli.trainer.world_size}. "
            f"Add --trainer.devices {here}."
        )
    if cli.resumed and cli.resumed.data:
        cli.datamodule.adopt(cli.resumed.data)
    with folders_of_run(cli.datamodule, cli.resumed.data if cli.resumed else {}):
        meet_images(cli.model, cli.datamodule)
        cli.datamodule.validate(cli.trainer.world_size)
    trainer = cli.trainer
    if trainer.max_epochs == trainer.max_steps == -1:
        raise ValueError("trainer.max_epochs=-1: a cosine needs an end. Set trainer.max_epochs or trainer.max_steps.")
    cli.continuation = None
    if cli.resumed:
        cli.continuation = check_resume(cli.resumed, cli.model, cli.datamodule, trainer, list(cli.on_purpose))
    cli.model.run.settle(cli.datamodule.batch_size)
    logged = LOGGED_WITH_LABELS if cli.datamodule.learns_from_labels else LOGGED
    check_trainer(trainer, cli.config.trainer.val_check_interval, logged)
    cli.finite.check(trainer)
    cli.model.run.check(trainer)
    if cli.continuation is not None and cli.continuation.finished:
        return
    if cli.resumed is None:
        cli.model.run.read_weights(cli.model)
    cli.memory = check_memory(
        cli.model,
        trainer.strategy.root_device,
        cli.datamodule.batch_size // trainer.world_size,
        trainer.world_size,
        trainer.num_devices,
        trainer.precision,
        cli.config.check_memory,
    )
    cli.datamodule.setup("fit")
    for callback in trainer.callbacks:
        if isinstance(callback, Measurer):
            callback.check(trainer, cli.datamodule)
    settle(cli)


def _how_to_continue(cli: TrainCLI) -> str:
    if not (cli.run_dir / LAST).exists():
        return f"no checkpoint yet, {cli.run_dir} can be deleted"
    return f"continue with: {shlex.join([*program('train'), '--ckpt_path', str(cli.run_dir / LAST)])}"


def _say_how_to_continue(cli: TrainCLI) -> None:
    if not cli.trainer.is_global_zero:
        return
    # Not if a second signal has cut the step short.
    where = f" at step {cli.trainer.global_step} of {cli.model.run.total_steps}" if cli.stop.signalled else ""
    unsaved = _unsaved(cli)
    after = f" but {unsaved}; make room, then" if unsaved else ""
    print(f"stopped{where};{after} {_how_to_continue(cli)}", file=sys.stderr, flush=True)
