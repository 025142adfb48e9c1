"""What a run leaves unset: chosen as it begins, by the images, the machine and the time there is, and recorded."""

import re
import time
from typing import TYPE_CHECKING, Any

from simclr.dashboard import Dashboard
from simclr.efficientnet import remark
from simclr.encoders import default_encoder
from simclr.online_accuracy import OnlineAccuracy
from simclr.online_quality import OnlineQuality
from simclr.pace import FEWEST_STEPS, Pace, duration, epochs_within, is_long, measure_pace, parse_duration, usual_pace
from simclr.paths import stored
from simclr.starting_weights import stored_source

if TYPE_CHECKING:
    from simclr.cli.train import TrainCLI

_LONG = 6 * 3600  # seconds of a run on a CPU, of which one is told
_MODEL = (
    *("encoder", "stem", "base_lr", "lr_scaling", "weight_decay", "warmup_epochs"),
    *("strength", "crop_scale", "blur_prob", "small_crop_size", "small_crop_scale", "compile_encoder", "compile_views"),
)


def settle_names(cli: "TrainCLI") -> None:
    """Before anything is built: what the run's name and its limits follow from."""
    model, trainer = cli.config.model, cli.config.trainer
    if model.get("weights") is not None:
        model.weights = stored_source(model.weights)
    if model.encoder == "auto" and trainer.accelerator == "cpu":  # also where there is a GPU
        model.encoder, model.stem = default_encoder(model.stem, model.image_size, accelerated=False)
    elif model.encoder == "auto":
        model.encoder, model.stem = default_encoder(model.stem, model.image_size)
    if isinstance(trainer.max_time, str) and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", trainer.max_time):
        seconds = parse_duration(trainer.max_time)
        days, rest = divmod(seconds, 86400)
        trainer.max_time = f"{days:02d}:{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    if cli.config.minutes is None:
        return
    if cli.config.minutes <= 0:
        raise ValueError(f"minutes={cli.config.minutes:g} is not positive.")
    if trainer.max_epochs != cli.parser.get_default("trainer.max_epochs") or trainer.max_steps != -1:
        raise ValueError("minutes sets the length of the run: leave trainer.max_epochs and trainer.max_steps out.")
    if cli.config.ckpt_path:
        raise ValueError("minutes sets the length of a new run; one that is continued has its length.")


def settle(cli: "TrainCLI") -> None:
    """Once the run is known to be possible: rates and warm-up, precision, compiling and, by `--minutes`, the length.

    The Trainer is built anew where it has to be another.

    Raises:
        ValueError: if not one step fits into the minutes.
    """
    if cli.resumed:  # settled when the run began
        cli.model.run.settle(cli.datamodule.batch_size, cli.length.in_epochs)
        return
    pace = _pace(cli)
    model = cli.model
    model.hparams.compile_encoder, model.hparams.compile_views = pace.compile_encoder, pace.compile_views
    model.augment.compile_views = pace.compile_views
    chosen: dict[str, Any] = {} if pace.precision == cli.trainer.precision else {"precision": pace.precision}
    if cli.config.minutes is not None:
        chosen |= _length(cli, pace)
    if chosen:
        for name, value in chosen.items():
            cli.config.trainer[name] = value
        cli.chosen = chosen
        cli.trainer = cli.instantiate_trainer()
    cli.model.run.settle(cli.datamodule.batch_size, cli.length.in_epochs)
    cli.pace = pace


def _pace(cli: "TrainCLI") -> Pace:
    trainer, precision = cli.trainer, cli.config.trainer.precision
    device = trainer.strategy.root_device
    alone = trainer.world_size == 1 and not (trainer.fast_dev_run or trainer.barebones)
    minutes = cli.config.minutes
    if minutes is not None and not alone:
        raise ValueError(
            f"minutes={minutes:g} measures steps on one device, not on {trainer.world_size}. "
            "Give --trainer.max_epochs, or stop in time with --trainer.max_time."
        )
    work = cli.length.batches * cli.model.views.work(cli.length.in_epochs)  # in batches of the first epoch
    if minutes is None and not (alone and device.type == "cpu" and is_long(cli.model, cli.datamodule.batch_size, work)):
        return usual_pace(cli.model, device, precision)
    return measure_pace(
        cli.model,
        cli.datamodule,
        device,
        precision=precision,
        lasts=(lambda seconds: work * seconds) if minutes is None else (lambda seconds: _left(cli)),
        say=lambda text: print(text, flush=True),
    )


def _left(cli: "TrainCLI") -> float:
    """Seconds of the minutes."""
    return 60 * cli.config.minutes - (time.monotonic() - cli.began)


def _length(cli: "TrainCLI", pace: Pace) -> dict[str, int]:
    """Trainer's options for the epochs that fit into the minutes, or the steps of less than two epochs."""
    minutes, data = cli.config.minutes, cli.datamodule
    assert pace.seconds is not None  # measured, because minutes are given
    between, work = _measuring_seconds(cli, pace), cli.model.views.work
    epochs = epochs_within(_left(cli), pace, cli.length.batches, between, work)
    if epochs >= 2:
        return {"max_epochs": int(epochs)}
    steps = int(epochs * cli.length.batches) // cli.length.accumulate
    if steps < 1:
        raise ValueError(
            f"minutes={minutes:g} leaves no time for a step of {data.batch_size} images, which takes "
            f"{duration(pace.seconds)} here. Give more time, a smaller --model.encoder or --data.batch_size."
        )
    return {"max_epochs": -1, "max_steps": steps}


def _measuring_seconds(cli: "TrainCLI", pace: Pace) -> float:
    """Of online accuracies and figures, in the mean of all epochs: a third of a step's work on one view of an image."""
    assert pace.seconds is not None  # measured, because minutes are given
    data, views = cli.datamodule, 0.0  # through the encoder
    for callback in cli.trainer.callbacks:
        if isinstance(callback, OnlineAccuracy) and callback.why_not(cli.trainer, data) is None:
            labels = callback.labels(data)
            assert labels is not None  # or there would be a reason why not
            views += len(labels) / callback.every_n_epochs
        if isinstance(callback, OnlineQuality) and callback.why_not(cli.trainer, data) is None:
            assert data.unseen is not None  # or there would be a reason why not
            views += 2 * min(callback.images, len(data.unseen[1])) / callback.every_n_epochs
        if isinstance(callback, Dashboard) and callback.every_n_epochs:
            views += 3 * min(callback.images, len(data.test or data.train)) / callback.every_n_epochs
    whole, first = cli.model.hparams.image_size**2, cli.model.views.pixels(0)  # pixels: of an image, and in a step
    return views * pace.seconds / data.batch_size * whole / first / 3


def record(cli: "TrainCLI") -> None:
    """Put what was chosen into the settings that config.yaml states."""
    for name in (name for name in _MODEL if name in cli.config.model):
        cli.config.model[name] = cli.model.hparams[name]
    cli.config.data.batch_size = cli.datamodule.batch_size
    cli.config.data.held_out = cli.datamodule.held_out
    if cli.datamodule.channels != 3:
        cli.config.data.bits = cli.datamodule.bits
    cli.config.trainer.precision = cli.trainer.precision
    if cli.config.probe.train_dir:
        cli.config.probe.train_dir = stored(cli.config.probe.train_dir)  # from the root, as folders of images
    cli.config.minutes = None  # the run has its length


def remarks(cli: "TrainCLI") -> list[str]:
    """What to know before the run starts: that it is too short to learn, or longer than one would wait."""
    data, trainer, pace, steps = cli.datamodule, cli.trainer, cli.pace, cli.length.steps
    found = [*data.notes, *_of_channels(cli), *(pace.notes if pace else ())]
    starting = cli.model.run.starting
    if starting is not None and (otherwise := starting.fed_otherwise(cli.model.hparams)):
        found.append(otherwise)
    if (of_size := remark(cli.model.hparams)) is not None:
        found.append(of_size)
    if steps < FEWEST_STEPS and not cli.resumed:
        smaller = f", --data.batch_size {max(32, data.batch_size // 4)}" if data.batch_size > 32 else ""
        found.append(
            f"{steps} steps are few: on a thousand photographs, a hundred steps ended 2 points above raw pixels, three "
            "hundred 5, and nine hundred 10. Train longer "
            f"(--trainer.max_epochs, --minutes){smaller and ' or in smaller batches (' + smaller[2:] + ')'}."
        )
    whole = _step_seconds_in_all(cli, pace) if pace and pace.seconds else 0.0
    if whole > _LONG and trainer.strategy.root_device.type == "cpu":
        found.append(
            f"this run takes about {duration(whole)} on this CPU. A smaller network (--model.encoder auto), fewer "
            "epochs (--minutes 60 sets them) or a GPU end sooner."
        )
    return found


def _of_channels(cli: "TrainCLI") -> list[str]:
    """What is not done to images without colours."""
    if cli.datamodule.channels == 3:
        return []
    gray = "gray" if cli.datamodule.channels == 1 else f"{cli.datamodule.channels} channels"
    return [
        f"images of {gray} have no colours: the jitter changes brightness and contrast, not saturation and hue, and "
        "model.gray_prob is 0."
    ]


def pace_line(cli: "TrainCLI") -> str:
    """What a step and the whole run take, as measured; empty if nothing was."""
    if not (cli.pace and cli.pace.seconds):
        return ""
    seconds, grows = cli.pace.seconds, cli.model.hparams.get("start_size") is not None
    step = f"{1000 * seconds:.0f} ms" if seconds < 1 else duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
    measured = f"measured at {cli.model.views.size(0)} px" if grows else "measured"
    whole = duration(_step_seconds_in_all(cli, cli.pace) + cli.pace.starting)
    return f"{step} a step as {measured}, about {whole} in all"


def _step_seconds_in_all(cli: "TrainCLI", pace: Pace) -> float:
    """Of the whole run: steps of later epochs take longer where views grow."""
    assert pace.seconds is not None  # measured
    return pace.seconds * cli.length.batches * cli.model.views.work(cli.length.in_epochs)
