"""`simclr train`, `python train.py`: pretrain an encoder."""

import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
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
from simclr.callbacks import EpochLines, OnlineKNN, ViewGrid, print_line
from simclr.checkpoint import ENCODER, LAST, read_checkpoint, save_encoder, save_encoder_of, sound_beside
from simclr.cli.config_files import read_settings
from simclr.cli.hints import refuse_file_as_encoder
from simclr.cli.messages import FAILED, INTERRUPTED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, recipes_of, refuse_empty, values_of
from simclr.cli.recipes import with_config_files
from simclr.cli.refusals import check_devices, check_trainer
from simclr.cli.saving import (
    InsideEpochs,
    SaveOnInterrupt,
    Schedule,
    cause_of_stop,
    newest_checkpoint,
    take_over_checkpoints,
)
from simclr.cli.unset import pace_line, record, remarks, settle, settle_names
from simclr.continuation import check_resume
from simclr.data import ImageData
from simclr.data.module import FOLDERS, SKIPPED, folders_of_run
from simclr.diagnosis import Diagnosis
from simclr.distributed import launched_rank
from simclr.files import reason_of, remove_abandoned_sockets, write_atomically
from simclr.loggers import WandbMode, build_loggers
from simclr.memory import check_memory
from simclr.online_quality import OnlineQuality
from simclr.pace import Pace
from simclr.paths import expanded
from simclr.progress import LogInterval, ProgressBar, ProgressLines
from simclr.run_folder import CONFIG, RunFolder, latest_config, record_continuation
from simclr.run_length import RunLength, run_length
from simclr.training.method import DEFAULT_METHOD, find_method

_Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**32 - 1)])  # as NumPy's


class TrainCLI(LightningCLI):
    """LightningCLI for pretraining: a method, ImageData, every Trainer option, a run folder and its loggers.

    Args:
        folder: chooses the run folder once the settings are known.
        method: what is trained, see `simclr.training.method`.
        **kwargs: of LightningCLI.
    """

    def __init__(self, folder: RunFolder, method: type[LightningModule], **kwargs: Any):
        self.folder = folder
        self.began = time.monotonic()
        self.chosen: dict[str, Any] = {}  # options of the Trainer that follow from a measurement
        self.pace: Pace | None = None
        self.schedule = Schedule()
        self.loggers: list[Logger] | None = None  # made once, also where the Trainer is built anew
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
            help="What is trained: simclr, or the path of a class of your own, package.module.Class.",
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
            "--wandb",
            type=WandbMode,
            default="disabled",
            help="Weights & Biases. auto: online with a key and a network, else offline.",
        )
        parser.add_argument("--wandb_project", type=str, default="simclr", help="Project on Weights & Biases.")
        parser.add_argument("--check_memory", type=bool, default=True, help="Refuse what certainly does not fit.")
        parser.add_class_arguments(Schedule, "checkpoint")
        parser.add_lightning_class_args(OnlineKNN, "knn")
        parser.add_lightning_class_args(OnlineQuality, "quality")
        # int: jsonargparse's own kind of number could not be read from a checkpoint.
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.batch_size", "model.batch_size")
        parser.link_arguments("model.image_size", "data.image_size")

    def before_instantiate_classes(self) -> None:
        """Choose the run folder. It stays empty until all is checked."""
        settle_names(self)
        self.schedule = Schedule(**self.config.checkpoint.as_dict())
        refuse_file_as_encoder(self.config.model.encoder)
        if self.config.trainer.default_root_dir is not None:  # this project's folder of a run takes its place
            raise ValueError(
                f"trainer.default_root_dir is not used. Use --run_dir {self.config.trainer.default_root_dir}."
            )
        self.resumed = read_checkpoint(self.config.ckpt_path) if self.config.ckpt_path else None
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
            mode = self.config.wandb if self.folder.first else "disabled"  # only the first process writes
            if self.loggers is None:
                self.loggers = build_loggers(self.run_dir, mode, self.config.wandb_project, self.resumed)
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
            kwargs["callbacks"] += [ViewGrid(self.run_dir), EpochLines(), diagnosis]
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
        self.checkpoints = take_over_checkpoints(trainer, self.schedule.keep)
        # What measures before the line that shows it.
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, OnlineKNN | OnlineQuality))
        return trainer

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
    group = model.run.batch_norm_group(model, trainer)
    over = f" (BatchNorm over {group} views)" if group else ""
    at_a_time, head, compiled = (hparams.get(name) for name in ("micro_batch_size", "head", "compile_encoder"))
    parts = f", {at_a_time} at a time{over}" if at_a_time else ""
    head = f", z of {model.networks[-1].out_dim} ({head} head)" if head else ""
    rows = {
        "run": str(cli.run_dir),
        "continued": cli.continuation and f"\n{'':<11}".join((f"from {cli.resumed.stands}", *cli.continuation.said)),
        "data": f"{data.train.name}: {len(data.train):,} images{classes}, views of {size}",
        "left out": data.left_out,
        "encoder": f"{hparams.encoder}, {million:.2f} M parameters, h of {model.encoder.feature_dim}{head}",
        "batch": f"{data.batch_size} images{share if trainer.world_size > 1 else ''}{parts}, "
        f"{cli.length}{_left_out(data)}",
        "loss": model.objective(hparams).text,
        "optimiser": f"{hparams.optimizer}, learning rate {lr}{warmup}",
        "memory": cli.memory,
        "time": pace_line(cli),
        "machine": f"{trainer.strategy.root_device.type} x {trainer.world_size}, precision {trainer.precision}"
        f"{', compiled' if compiled else ''}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items() if text)


def _left_out(data: ImageData) -> str:
    """How many images the last incomplete batch of an epoch would have held."""
    rest = len(data.train) % data.batch_size
    return f"; {rest} of the {len(data.train):,} images sit out each epoch, others each time" if rest else ""


@in_a_line
def train(argv: list[str] | None = None) -> None:
    """Pretrain an encoder. See `python train.py --help`."""
    quiet()
    keep_freed_memory()
    remove_abandoned_sockets()  # of a run that was killed and had workers: this one need not have any
    args = sys.argv[1:] if argv is None else argv
    folder = RunFolder()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for people, without a line of code
    try:
        _train(args, folder)
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    finally:
        folder.let_go()


def _train(args: list[str], folder: RunFolder) -> None:
    try:
        cli = guarded(lambda: parse_and_build(args, folder))
        guarded(lambda: check(cli))
        finished = cli.continuation is not None and cli.continuation.finished
        if cli.trainer.fast_dev_run or finished:
            folder.remove_empty()
    except BaseException:
        folder.remove_empty()
        raise
    if finished:
        if folder.first:
            guarded(lambda: _leave_encoder(cli))
            print(f"already finished, {cli.continuation.length}; --trainer.max_epochs lengthens it", flush=True)
        return
    if folder.first:
        if not cli.trainer.fast_dev_run:
            try:
                guarded(lambda: _save_config(cli, args))
            except BaseException:
                folder.discard()
                raise
        print(summary(cli), flush=True)
        for line in remarks(cli):
            print(f"note: {line}", flush=True)
    started = time.perf_counter()
    try:
        _fit(cli, folder)
    except FloatingPointError as error:
        fail(f"{error}{_last_good(cli)}", FAILED)
    except ValueError as error:  # an image that cannot be read, found while training
        if os.environ.get("SIMCLR_TRACEBACK"):
            raise
        fail(f"{' '.join(str(error).split())} (SIMCLR_TRACEBACK=1 shows where)")
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        if cli.stop.signalled or not cli.stop.saved:
            _say_how_to_continue(cli)
            sys.exit(cli.stop.exit_code)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:
        _end(cli, (time.perf_counter() - started) / 60)


def _end(cli: TrainCLI, minutes: float) -> None:
    """The encoder of a run that has ended by itself; what could not be saved is an error, and how to go on."""
    path = cli.run_dir / ENCODER
    try:
        save_encoder(cli.model, path)
    except FloatingPointError as error:  # of a run that keeps no checkpoint
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{_ended(cli, minutes)}, but {path} could not be written ({reason_of(error)}). {_repeat(cli)}", FAILED)
    if unsaved := _unsaved(cli):
        fail(f"{_ended(cli, minutes)}; encoder in {path}; but {unsaved}. {_repeat(cli)}", FAILED)
    print(f"{_ended(cli, minutes)}; encoder in {path}; {_next_step(cli)}", flush=True)


def _leave_encoder(cli: TrainCLI) -> None:
    """The encoder of a finished run that was killed, or found no room, before it had written one."""
    path = cli.resumed.run_dir / ENCODER
    here = cli.run_dir.resolve() == cli.resumed.run_dir.resolve()
    if here and not (path.is_file() and path.with_suffix(".safetensors").is_file()):
        save_encoder_of(cli.resumed, path)


def _last_good(cli: TrainCLI) -> str:
    path = cli.run_dir / LAST
    return f" {path} holds the last good ones." if path.exists() else ""


def _unsaved(cli: TrainCLI) -> str | None:
    """What of the newest checkpoint could not be written; None if it was."""
    failed = cli.checkpoints and cli.checkpoints.failed
    return failed and f"{failed[0]} could not be written ({failed[1]})"


def _repeat(cli: TrainCLI) -> str:
    """What to do once there is room."""
    return f"Make room, then {_how_to_continue(cli)}."


def _stopped_early(cli: TrainCLI) -> bool:
    return cli.model.run.total_steps is not None and cli.trainer.global_step < cli.model.run.total_steps


def _ended(cli: TrainCLI, minutes: float) -> str:
    if not _stopped_early(cli):
        return f"trained {minutes:.1f} min"
    cause = cli.stop.cause or cause_of_stop(cli.trainer)
    return f"stopped by {cause} at step {cli.trainer.global_step} of {cli.model.run.total_steps}"


def _fit(cli: TrainCLI, folder: RunFolder) -> None:
    """Train; what fails before the first step is done leaves no folder, and what Lightning refuses is one line."""
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resumed and cli.resumed.path, weights_only=True)
    except Exception as error:
        if cli.trainer.global_step == 0:
            folder.discard()
        if isinstance(error, MisconfigurationException):
            raise ValueError(str(error)) from error
        raise


def _next_step(cli: TrainCLI) -> str:
    if not cli.keeps_checkpoint:
        return "no checkpoint, as asked"
    if _stopped_early(cli):
        return _how_to_continue(cli)
    measure = f"python linear_eval.py --checkpoint {cli.run_dir / LAST}"
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


def _save_config(cli: TrainCLI, args: list[str]) -> None:
    record(cli)
    if cli.datamodule.skipped:
        write_atomically(cli.run_dir / SKIPPED, ("\n".join(cli.datamodule.skipped) + "\n").encode())
    # Without what belongs to this run alone, so that `--config` repeats it in another folder.
    config = cli.config.clone()
    config.run_dir = config.ckpt_path = None
    for name in FOLDERS:
        config.data[name] = cli.datamodule.hparams[name]  # from the root: it is read from other folders too
    config.data.allow_changed_images = False
    settings = _writable(lambda: cli.parser.dump(config, skip_none=False))
    if cli.continuation is None:
        write_atomically(cli.run_dir / CONFIG, settings.encode())
        return
    found = cli.continuation
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "train.py", *args]),
        "checkpoint": str(cli.resumed.path),
        "from_step": found.step,
        "total_steps": found.total,
        "changed": {name: {"was": was, "is": now} for name, (was, now) in found.changes.items()},
        "images": found.images,
        "said": found.said,
    }
    record_continuation(cli.run_dir, cli.resumed.run_dir, settings, entry)


def parse_and_build(
    args: list[str],
    folder: RunFolder,
    kind: type[TrainCLI] = TrainCLI,
    description: str = "Pretrain an image encoder with SimCLR on the images in FOLDER (--data.train_dir).",
    command: str = "train",
) -> TrainCLI:
    """Settings read and objects built; the run folder is reserved, and empty."""
    refuse_empty(args)
    arguments = sys.argv
    args = _with_config_of_run(_with_own_checkpoint(args))
    try:
        sys.argv = arguments[:1]  # LightningCLI warns where both are given
        return kind(
            folder,
            find_method(_method_in(with_config_files(args, recipes_of("train")))),
            args=args,
            run=False,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"description": description, "command": command},
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
    with folders_of_run(cli.datamodule, cli.resumed.data if cli.resumed else {}):
        cli.datamodule.validate(cli.trainer.world_size)
    trainer = cli.trainer
    if trainer.max_epochs == trainer.max_steps == -1:
        raise ValueError("trainer.max_epochs=-1: a cosine needs an end. Set trainer.max_epochs or trainer.max_steps.")
    cli.continuation = check_resume(cli.resumed, cli.model, cli.datamodule, trainer) if cli.resumed else None
    cli.model.run.settle(cli.datamodule.batch_size)
    check_trainer(trainer, cli.config.trainer.val_check_interval)
    cli.model.run.check(trainer)
    if cli.continuation is not None and cli.continuation.finished:
        return
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
        if isinstance(callback, OnlineKNN | OnlineQuality):
            callback.check(trainer, cli.datamodule)
    settle(cli)


def _how_to_continue(cli: TrainCLI) -> str:
    if not (cli.run_dir / LAST).exists():
        return f"no checkpoint yet, {cli.run_dir} can be deleted"
    return f"continue with: {shlex.join(['python', 'train.py', '--ckpt_path', str(cli.run_dir / LAST)])}"


def _say_how_to_continue(cli: TrainCLI) -> None:
    if not cli.trainer.is_global_zero:
        return
    # Not if a second signal has cut the step short.
    where = f" at step {cli.trainer.global_step} of {cli.model.run.total_steps}" if cli.stop.signalled else ""
    unsaved = _unsaved(cli)
    after = f" but {unsaved}; make room, then" if unsaved else ""
    print(f"stopped{where};{after} {_how_to_continue(cli)}", file=sys.stderr, flush=True)
