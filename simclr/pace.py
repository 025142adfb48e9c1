"""How long a step takes on this machine, measured before a run, and what follows: precision, compiling, length.

What a run leaves unset is chosen once, as it begins, and recorded with its settings: from then on it is a run like any
other of those settings.
"""

import copy
import itertools
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng

from simclr.profile import count_operations
from simclr.torch_internals import cpu_has_fast_bf16
from simclr.training.method import Method

_WARM_UP, _FEW, _MANY = 2, 6, 40  # steps of a measurement: before it counts, and that count, at least and at most
_LONG_ENOUGH = 2.0  # seconds, after which few steps are enough
_PATIENCE = 10.0  # seconds, after which a measurement makes do with the steps it has
_CPU_RATE = 2e11  # operations a second that two fast cores make in float32: what a step takes at least, roughly
# Operations of the encoder in a whole run on a CPU: fewer take a minute or two in float32, not worth a measurement.
# Counted, not timed, so that a short run's choice is the same whatever else the machine does.
_LONG_RUN = 2e13
_REPAYS = 20  # times what compiling takes: a run that long can have it done twice, to be sure
_WORTH_COMPILING = 300  # seconds of a run from which on compiling is tried, which takes a CPU up to a minute
_CLEARLY = 0.95  # of another's time counts as faster
_WAVERS = 1.1  # median over fastest, above which a machine does other work beside
_ALIKE = 1.5  # times that differ by less may have changed places by that other work
_RESERVE = 0.04  # of a budget of time, which steps that differ and the end of a run may take
# A linear classifier's points above raw pixels, on a thousand photographs with the defaults (a ResNet-8 at 64 px,
# cross-validated on the training images, seeds 0 and 1): 2 after 93 steps, 3 after 155, 5 after 310; 10 after 930.
FEWEST_STEPS = 300
_EPOCH_SECONDS = 0.15  # between epochs: the checkpoint, the line
_HALVINGS = 40  # to find the length of a run whose epochs grow


@dataclass(frozen=True)
class Pace:
    """How a run will train, and how fast.

    Attributes:
        precision: Lightning's name.
        compile_encoder, compile_views: as of `SimCLR`.
        seconds: of a step, measured: the median; None if nothing was.
        fastest: of those steps, which other work on the machine disturbs least: what is compared.
        starting: seconds that compiling takes before the first step.
        notes: for people: what was found out about a setting that was asked for.
    """

    precision: str
    compile_encoder: bool | str
    compile_views: bool | None
    seconds: float | None = None
    fastest: float | None = None
    starting: float = 0.0
    notes: tuple[str, ...] = ()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware: a GPU that has it, a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu_has_fast_bf16()
    return False


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def usual_pace(model: Method, device: torch.device, precision: str | None) -> Pace:
    """What is chosen without a measurement: bf16 on a GPU that has it, else float32; nothing is compiled on a CPU."""
    usual = "bf16-mixed" if device.type == "cuda" and has_fast_bf16(device) else "32-true"
    hparams = model.hparams
    return Pace(precision or usual, hparams.get("compile_encoder") or False, hparams.get("compile_views"))


def operations(model: Method, batch_size: int) -> float | None:
    """Floating-point operations of the encoder in a step of a batch; None for a network that cannot be counted."""
    images = min(32, batch_size)
    counted = count_operations(model, images)
    return counted and sum(counted) / images * batch_size


def most_operations(model: Method, batch_size: int) -> float:
    """More operations than a step makes: each weight is used once at each pixel, and twice as often backward."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return 6.0 * weights * model.views.size(0) ** 2 * model.views.count * batch_size


def is_long(model: Method, batch_size: int, steps: float) -> bool:
    """Whether a run on a CPU is worth a measurement before it: by the operations of its encoder."""
    if most_operations(model, batch_size) * steps <= _LONG_RUN:  # counting them would take as long as some steps
        return False
    of_a_step = operations(model, batch_size)
    return of_a_step is None or of_a_step * steps > _LONG_RUN


def measure_pace(
    model: Method,
    data: LightningDataModule,
    device: torch.device,
    *,
    precision: str | None,
    lasts: Callable[[float], float],
    say: Callable[[str], None] = lambda text: None,
) -> Pace:
    """Choose what is unset by training a copy of the model for some steps each way, on one device.

    On a CPU: float32 or, where it has bfloat16 in hardware, bf16-mixed, whichever is faster; compiled views and
    encoder, if they are unset, where the run is long enough to repay compiling. A precision that was asked for is kept,
    and measured against float32.

    Args:
        model: as configured.
        data: its images.
        device: where the run will train.
        precision: Lightning's name; None to choose.
        lasts: seconds of a step -> seconds of the run.
        say: is told what goes on, a line at a time.
    """
    pace, hparams = usual_pace(model, device, precision), model.hparams

    def timed(of: Pace, **changes: Any) -> Pace:
        of = replace(of, **changes)
        seconds, fastest = step_seconds(model, data, device, of)
        return replace(of, seconds=seconds, fastest=fastest)

    least = (operations(model, model.hparams.batch_size) or 0.0) / _CPU_RATE if device.type == "cpu" else 0.0
    large = f": a large network for a CPU, {duration(least)} a step or more" if least > _PATIENCE / 2 else ""
    say(f"measuring a few steps{large} ...")
    if device.type != "cpu":
        return timed(pace)
    pace = plain = timed(pace, precision="32-true")
    if precision not in (None, "32", "32-true", 32):
        pace = timed(plain, precision=precision)
        ratio = _fastest(pace) / _fastest(plain)
        if ratio > 1 / _CLEARLY:
            note = f"precision {precision} takes {ratio:.1f} x the time of float32 on this machine"
            pace = replace(pace, notes=(f"{note}: leave --trainer.precision out.",))
    elif precision is None and has_fast_bf16(device):
        mixed = timed(plain, precision="bf16-mixed")
        if _doubtful(plain, mixed):
            plain, mixed = _again(plain, timed), _again(mixed, timed)
        pace = mixed if _fastest(mixed) < _CLEARLY * _fastest(plain) else plain
    assert pace.seconds is not None  # measured
    unset = None in (hparams.get("compile_encoder", False), hparams.get("compile_views", False))
    if unset and has_compiler() and lasts(pace.seconds) > _WORTH_COMPILING and pace.seconds < _PATIENCE:
        say("compiling, to see whether that is faster ...")
        pace = _compiled(pace, model, lasts(pace.seconds), timed, say)
    return pace


def _compiled(pace: Pace, model: Method, lasts: float, timed: Callable[..., Pace], say: Callable[[str], None]) -> Pace:
    """The pace compiled, where that saves more of the seconds that the run lasts than it costs; else as it was."""
    hparams = model.hparams
    views = hparams.get("compile_views") is not False
    encoder = hparams.get("compile_encoder") is None or hparams.compile_encoder
    began = time.perf_counter()
    try:
        compiled = timed(pace, compile_encoder=encoder, compile_views=views)
    except Exception as error:  # whatever the compilers of a machine make of a network
        say(f"not compiled: {str(error).splitlines()[0][:200]}")
        return pace
    starting = max(0.0, time.perf_counter() - began - _LONG_ENOUGH)
    if _doubtful(pace, compiled) and lasts > _REPAYS * starting:
        say("measuring both again: other work on this machine disturbs them ...")
        pace, compiled = _again(pace, timed), _again(compiled, timed)
    faster = _fastest(compiled) < _CLEARLY * _fastest(pace)
    worth = lasts * (1 - _fastest(compiled) / _fastest(pace)) > starting
    return replace(compiled, starting=starting) if faster and worth else pace


def _doubtful(one: Pace, other: Pace) -> bool:
    """Whether other work on the machine, not the two ways of training, may be what makes one of them faster."""
    wavers = any(of.seconds is not None and of.seconds > _WAVERS * _fastest(of) for of in (one, other))
    return wavers and 1 / _ALIKE < _fastest(one) / _fastest(other) < _ALIKE


def _again(measured: Pace, timed: Callable[[Pace], Pace]) -> Pace:
    """The pace with the faster of two measurements: its own and another."""
    other = timed(measured)
    return min(measured, other, key=_fastest)


def _fastest(measured: Pace) -> float:
    assert measured.fastest is not None
    return measured.fastest


class _Clock(Callback):
    """Ends a training after some steps; knows when each ended.

    Args:
        compiles: whether the first step compiles, and says nothing of the others.
    """

    def __init__(self, compiles: bool) -> None:
        self.first = 2 if compiles else 1  # step that tells a slow network
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends = [self._now(trainer)]

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.ends.append(self._now(trainer))
        counted = self.ends[_WARM_UP:] or self.ends[-1:]
        taken, last = counted[-1] - counted[0], self.ends[-1] - self.ends[-2]
        slow = len(self.ends) > self.first and last > _PATIENCE / 2
        enough = len(counted) > _FEW and taken > _LONG_ENOUGH
        trainer.should_stop = slow or taken > _PATIENCE or (enough and self._steady())

    def _steady(self) -> bool:
        """Whether the steps so far took about the same: else more are needed to see an undisturbed one."""
        median, fastest = self.seconds
        return median < _WAVERS * fastest

    @staticmethod
    def _now(trainer: Trainer) -> float:
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: the median and the fastest, without those to warm up if there are others."""
        each = [end - start for start, end in itertools.pairwise(self.ends)]
        each = each[_WARM_UP:] or each[-1:]
        return statistics.median(each), min(each)


def step_seconds(model: Method, data: LightningDataModule, device: torch.device, pace: Pace) -> tuple[float, float]:
    """Seconds of a training step at a pace, median and fastest: a copy is trained, the random state left as it was."""
    clock = _Clock(compiles=bool(pace.compile_encoder or pace.compile_views))
    trained: Any = copy.deepcopy(model)
    trained.hparams.compile_encoder, trained.hparams.compile_views = pace.compile_encoder, pace.compile_views
    trained.augment.compile_views = pace.compile_views
    if trained.hparams.get("weights") is not None:  # steps take as long with others
        trained.hparams.weights = trained.hparams.weights_prefix = None
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run will say the same
        trainer = Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=pace.precision,
            max_epochs=-1,
            max_steps=_WARM_UP + _MANY,
            log_every_n_steps=0,
            callbacks=[clock],
            **dict.fromkeys(off, False),
        )
        try:
            trainer.fit(trained, data)
        except SystemExit as error:  # Lightning's answer to a KeyboardInterrupt
            raise KeyboardInterrupt from error
    torch.compiler.reset()  # what was compiled here holds the copy
    return clock.seconds


def epochs_within(
    seconds: float,
    pace: Pace,
    steps_per_epoch: int,
    between: float = 0.0,
    work: Callable[[float], float] = lambda epochs: epochs,
) -> float:
    """How many epochs a run of this pace makes in so many seconds, its start included.

    Args:
        seconds: that are left.
        pace: measured, in the first epoch.
        steps_per_epoch: batches.
        between: seconds that an epoch takes beside its steps, in the mean.
        work: of so many epochs, the first one's being 1: `EpochViews.work`. At least as many as there are.
    """
    assert pace.seconds is not None  # measured
    left, of_steps, beside = seconds * (1 - _RESERVE) - pace.starting, steps_per_epoch * pace.seconds, _EPOCH_SECONDS
    low, high = 0.0, max(0.0, left / (of_steps + beside + between))  # as if no epoch took longer than the first
    for _ in range(_HALVINGS if work(high) > high else 0):
        epochs = (low + high) / 2
        fits = of_steps * work(epochs) + (beside + between) * epochs <= left
        low, high = (epochs, high) if fits else (low, epochs)
    return high


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `26 min`, `5 h 20 min`, `3 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 1440:,.0f} days"


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> int:
    """Seconds of a time as people write it: `30m`, `1h30m`, `2d`, `90s`.

    Raises:
        ValueError: for anything else.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text.strip().lower())
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([dhms])\s*", "", text.strip().lower()):
        raise ValueError(f"trainer.max_time={text} is no time. Write 30m, 1h30m, 2d or DD:HH:MM:SS.")
    seconds = round(sum(float(number) * _UNITS[unit] for number, unit in parts))
    if seconds > 10**9:
        raise ValueError(f"trainer.max_time={text} is longer than 30 years. Leave it out for a run without a limit.")
    return seconds
