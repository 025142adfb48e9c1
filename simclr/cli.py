"""The command line: `simclr <command>`, `python train.py` and `python linear_eval.py`."""

import difflib
import inspect
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
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich import box
from rich.console import Console
from rich.table import Table

import simclr
from simclr.callbacks import EpochLines, OnlineKNN, ViewGrid
from simclr.checkpoint import LAST, Checkpoint, check_resume, read_checkpoint, save_encoder
from simclr.data import ImageData
from simclr.distributed import launched_rank
from simclr.eval.evaluation import linear_evaluation, write_result
from simclr.loggers import WandbMode, build_loggers
from simclr.module import SimCLR
from simclr.report import write_report

BAD_INPUT = 2  # exit code
INTERRUPTED = 130  # as a shell reports Ctrl-C
_RUN_DIR = "SIMCLR_RUN_DIR"  # tells the ranks that this process launches which folder it chose


class Parser(LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line, the nearest right key and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Without allow_abbrev=False, --trainer.max_epoch is silently taken for --trainer.max_epochs.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was probably meant, and exit."""
        fail(self.explain(message))

    def explain(self, message: str) -> str:
        """jsonargparse's message as one clear line."""
        unknown = (
            re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message)
            or re.search(r"Option '([^']+)' is not accepted", message)
            or re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'", message)
        )
        if unknown:
            key = ".".join(unknown.groups())
            return f"unknown key {key}. {self.suggest(key)}"
        message = re.sub(r'^(?:Parser key|argument) "?(?:--)?([^":]+)"?:\s*', r"\1: ", message)
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        if not value:
            return " ".join(message.split())
        key = message.split(":", 1)[0]
        wanted = dict.fromkeys(
            re.findall(r"Expected an? (?:typing\.)?(?:Literal)?(.+?)(?:\. Got|$)", message, re.MULTILINE)
        )
        names = [re.sub(r"<class '(.+?)'>", r"\1", kind).replace("NoneType", "null") for kind in wanted]
        return f"{key}={value.group(1)} is not {' or '.join(names) or 'valid'}."

    def suggest(self, key: str) -> str:
        """The nearest key that exists, or where to look."""
        keys = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
        same_end = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        if nearest or same_end:
            return f"Did you mean {(same_end or nearest)[0]}?"
        return "See --help for the keys there are."


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
    """LightningCLI for pretraining: SimCLR, ImageData, every Trainer option, a run folder and its loggers."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, always a number: a run without one could not be repeated."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of the weights, the views and the order of the images."
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
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.batch_size", "model.batch_size")
        parser.link_arguments("model.image_size", "data.image_size")

    def before_instantiate_classes(self) -> None:
        """Choose the run folder; nothing is written yet."""
        self.resumed = None
        if self.config.ckpt_path:
            self.resumed = read_checkpoint(self.config.ckpt_path)
        self.run_dir = choose_run_dir(self.config, self.resumed.run_dir if self.resumed else None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's loggers and callbacks, the user's beside them."""
        config = self.config.trainer
        if config.logger in (None, True):
            step = self.resumed.global_step if self.resumed else None
            kwargs["logger"] = build_loggers(self.run_dir, self.config.wandb, self.config.wandb_project, step)
        if config.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
        if config.sync_batchnorm and config.accelerator == "cpu":
            kwargs["sync_batchnorm"] = False
        kwargs["default_root_dir"] = str(self.run_dir)
        given = self.config_init.trainer.callbacks or []
        kwargs["callbacks"] = list(given) if isinstance(given, list) else [given]
        if not config.fast_dev_run:
            kwargs["callbacks"] += [ViewGrid(self.run_dir), EpochLines(), SaveOnInterrupt(self.run_dir)]
            kwargs["callbacks"] += [newest_checkpoint(self.run_dir)]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.sort(
            key=lambda callback: not isinstance(callback, OnlineKNN)
        )  # before the line that shows it
        return trainer


def newest_checkpoint(run_dir: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=run_dir / LAST.parent, filename=LAST.stem, save_on_train_epoch_end=True, enable_version_counter=False
    )


class SaveOnInterrupt(Callback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint that continues exactly from it, and stop.

    With several ranks, which may notice at different steps, a run stops at once and goes on from its last epoch.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / LAST
        self.asked = self.saved = False
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the two signals."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; again to stop at once", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save, if asked to stop."""
        if self.asked and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            self.saved = True

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop, once the loggers have the last step's metrics."""
        if self.saved:
            raise KeyboardInterrupt

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asked to stop in the last step of an epoch: what belongs to its end, the checkpoint too, has been done."""
        if self.asked:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def choose_run_dir(config: Namespace, resumed: Path | None) -> Path:
    """The folder of this run: the one asked for, the one continued, or a free name below runs/.

    Raises:
        ValueError: if the folder asked for is taken by another run.
    """
    if os.environ.get(_RUN_DIR) and launched_rank() > 0:
        return Path(os.environ[_RUN_DIR])
    if config.run_dir or resumed:
        run_dir = Path(config.run_dir or resumed)
        same = resumed is not None and run_dir.resolve() == resumed.resolve()
        if not same and launched_rank() == 0 and run_dir.exists() and (run_dir.is_file() or any(run_dir.iterdir())):
            hint = f" or continue it with --ckpt_path {run_dir / LAST}" if (run_dir / LAST).exists() else ""
            raise ValueError(f"run_dir={run_dir} is taken. Choose another{hint}.")
        return run_dir
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    name = run_name(config)
    if job and job != "none":  # ranks launched from outside must agree on a name without talking
        return Path("runs") / f"{name}-{job}"
    run_dir, number = Path("runs") / name, 1
    while run_dir.exists():
        number += 1
        run_dir = Path("runs") / f"{name}-{number}"
    return run_dir


def run_name(config: Namespace) -> str:
    """A run's name: that of its config file, else of its data and encoder."""
    if config.config:
        path = Path(str(config.config[-1]))
        return path.parent.name if path.stem == "config" else path.stem
    folder = config.data.train_dir or config.data.data_dir
    data = Path(folder).resolve().name if folder else ("shapes" if config.data.source == "auto" else config.data.source)
    return f"{data}_{config.model.encoder}"


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
    share = f" ({data.batch_size // trainer.world_size} on each of {trainer.world_size} devices)"
    rows = {
        "run": str(cli.run_dir),
        "data": f"{data.train.name}: {len(data.train):,} images{classes}, views of {hparams.image_size} px",
        "encoder": f"{hparams.encoder}, {million:.2f} M parameters, h of {model.encoder.feature_dim}, "
        f"z of {model.head.out_dim} ({hparams.head} head)",
        "batch": f"{data.batch_size} images{share if trainer.world_size > 1 else ''}, "
        f"{data.steps_per_epoch} steps an epoch, {length}",
        "optimiser": f"{hparams.optimizer}, learning rate {lr}, temperature {hparams.temperature:g}",
        "machine": f"{trainer.strategy.root_device.type} x {trainer.world_size}, precision {trainer.precision}",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def train(argv: list[str] | None = None) -> None:
    """Pretrain an encoder. See `python train.py --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    cli = guarded(lambda: _parse_and_build(args))
    trainer, data = cli.trainer, cli.datamodule
    guarded(lambda: _check(cli))
    if trainer.is_global_zero and not trainer.fast_dev_run:
        os.environ[_RUN_DIR] = str(cli.run_dir)
        guarded(lambda: cli.run_dir.mkdir(parents=True, exist_ok=True))
        cli.parser.save(cli.config, str(cli.run_dir / "config.yaml"), skip_none=False, overwrite=True)
    if trainer.is_global_zero:
        print(summary(cli), flush=True)
    started = time.perf_counter()
    try:
        trainer.fit(cli.model, data, ckpt_path=cli.resumed.path if cli.resumed else None, weights_only=True)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        _say_how_to_continue(cli)
        sys.exit(INTERRUPTED)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        save_encoder(cli.model.encoder, cli.run_dir / "encoder.pt")
        minutes = (time.perf_counter() - started) / 60
        print(
            f"trained {minutes:.1f} min; encoder in {cli.run_dir / 'encoder.pt'}; "
            f"next: python linear_eval.py --checkpoint {cli.run_dir / LAST}",
            flush=True,
        )


def _parse_and_build(args: list[str]) -> TrainCLI:
    arguments = sys.argv
    try:
        sys.argv = arguments[:1]  # LightningCLI warns where both are given
        return TrainCLI(
            SimCLR,
            ImageData,
            args=args,
            run=False,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"description": "Pretrain an image encoder with SimCLR."},
            trainer_defaults={
                "max_epochs": 100,
                "use_distributed_sampler": False,  # our sampler hands out shares of one global batch
                "sync_batchnorm": torch.cuda.is_available(),  # statistics over all devices, as in the paper
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    finally:
        sys.argv = arguments


def _check(cli: TrainCLI) -> None:
    cli.datamodule.validate(cli.trainer.world_size)
    if cli.trainer.max_epochs == cli.trainer.max_steps == -1:
        raise ValueError("trainer.max_epochs=-1: a cosine needs an end. Set trainer.max_epochs or trainer.max_steps.")
    if cli.resumed:
        check_resume(cli.resumed, cli.model)
    cli.datamodule.setup("fit")


def _say_how_to_continue(cli: TrainCLI) -> None:
    last = cli.run_dir / LAST
    if not cli.trainer.is_global_zero:
        return
    if last.exists():
        command = shlex.join(
            ["python", "train.py", "--config", str(cli.run_dir / "config.yaml"), "--ckpt_path", str(last)]
        )
        print(f"stopped; continue with: {command}", file=sys.stderr, flush=True)
    else:
        print(f"stopped before the first checkpoint; {cli.run_dir} can be deleted", file=sys.stderr, flush=True)


def linear_eval(argv: list[str] | None = None) -> None:
    """Measure a pretrained encoder. See `python linear_eval.py --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config, data, checkpoint = guarded(lambda: _parse_linear_eval(args))
    settings = {name: config[name] for name in _linear_eval_settings()}
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


def _linear_eval_settings() -> list[str]:
    elsewhere = {"checkpoint", "data", "device", "command", "say"}
    return [name for name in inspect.signature(linear_evaluation).parameters if name not in elsewhere]


def _parse_linear_eval(args: list[str]) -> tuple[Namespace, ImageData, Checkpoint]:
    parser = Parser(description="Linear evaluation of a pretrained encoder, frozen, beside two yardsticks.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file with any of these settings.")
    parser.add_argument("--checkpoint", type=str, required=True, help="A run folder or a checkpoint file.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    skip = {"checkpoint", "data", "device", "command", "say"}
    parser.add_function_arguments(linear_evaluation, skip=skip)
    # The size of an image is the encoder's; the seed orders training images only.
    parser.add_class_arguments(ImageData, "data", skip={"image_size", "seed", "batch_size"}, fail_untyped=False)
    checkpoint = read_checkpoint(parser.parse_args(args).checkpoint)
    known = {f"data.{name}" for name in inspect.signature(ImageData.__init__).parameters}
    known -= {"data.self", "data.image_size", "data.seed", "data.batch_size"}
    trained_on = {f"data.{name}": value for name, value in checkpoint.data.items()}
    parser.set_defaults({name: value for name, value in trained_on.items() if name in known})
    config = parser.parse_args(args)
    data = ImageData(**config.data.as_dict(), image_size=checkpoint.model["image_size"], batch_size=1)
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
        r"You have overridden `on_after_batch_transfer` in `LightningModule`",  # on purpose
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
