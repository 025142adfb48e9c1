"""Runs the cells of an experiment: by the command line, each in a process and folder of its own, several at a time."""

import ctypes
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simclr.ablate.counts import count
from simclr.ablate.experiment import Cell, Experiment
from simclr.ablate.responses import responses_at_start
from simclr.ablate.results import RESULT_VERSION, Result, read_result, write_result
from simclr.files import hold

OUTCOME = "outcome.json"  # in a cell's folder: what the last of its programs has measured
LOG = "log.txt"  # and what all of them have said
_BUILT_IN_IMAGES = 8192  # which the epochs of the default form are meant for
_ROUNDING = 0.1  # by which whole epochs of other images may be more or fewer than meant
_WARM_UP = 1.0  # of these epochs, as the recipes of the built-in images have it


@dataclass(frozen=True)
class Place:
    """Where and on what cells are computed.

    Attributes:
        out: folder of the experiment.
        device: "cpu" or "cuda".
        images: folder with `train` and `test`, or None for the built-in images.
        training_images: how many lie in it.
        jobs: cells at a time.
        gpus: that they are spread over.
        recipes: the contents of `configs/pretrain` by name.
    """

    out: Path
    device: str = "cpu"
    images: Path | None = None
    training_images: int = _BUILT_IN_IMAGES
    jobs: int = 1
    gpus: int = 0
    recipes: Mapping[str, Any] = field(default_factory=dict)


def run_cells(
    experiment: Experiment, seeds: int, place: Place, say: Callable[[str], None] = print
) -> dict[tuple[str, int], Result]:
    """Compute what is not there yet.

    A cell that is done, with these settings and by this version, is skipped. One that was stopped goes on. One that
    fails is named, and the others are computed.

    Args:
        experiment: whose cells.
        seeds: 0 .. seeds - 1, of each cell.
        place: see `Place`.
        say: is told what goes on, a line at a time.
    Returns:
        The results by cell and seed, failures among them.
    Raises:
        ValueError: if another process computes the same experiment in this folder.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once the processes of the cells have ended.
    """
    place.out.mkdir(parents=True, exist_ok=True)
    try:
        release = hold(place.out)
    except BlockingIOError as error:
        raise ValueError(
            f"{place.out} is being computed by another process. Wait for it, or give another --out."
        ) from error
    try:
        return _Runner(experiment, place, say).run(seeds)
    finally:
        release()


def settings_of(experiment: Experiment, cell: Cell, seed: int, place: Place) -> dict[str, Any]:
    """All that decides a cell's numbers, as its result records it."""
    settings = dict(cell.settings)
    if place.images is not None and not experiment.full:
        # As many views as of the built-in images, and as many of them while the rate warms up.
        share = _BUILT_IN_IMAGES / place.training_images
        if "trainer.max_epochs" in settings:
            settings |= _length(settings["trainer.max_epochs"] * share, cell, place)
            settings.setdefault("model.warmup_epochs", round(_WARM_UP * share, 4))
        if epochs := settings.get("probe.options", {}).get("epochs"):
            settings["probe.options"] = {**settings["probe.options"], "epochs": max(1, round(epochs * share))}
    source = {} if place.images is None else {"images": str(place.images)}
    settings |= {"work": cell.work, "recipe": cell.recipe, "seed": seed, **source}
    if cell.recipe is not None and cell.recipe in place.recipes:
        settings["of_recipe"] = place.recipes[cell.recipe]
    if cell.start is not None:
        settings["start"] = settings_of(experiment, experiment.cell(cell.start), seed, place)
    return settings


def _length(epochs: float, cell: Cell, place: Place) -> dict[str, int]:
    """Whole epochs where these are about as many, else steps."""
    whole = round(epochs)
    if abs(whole - epochs) <= _ROUNDING * epochs:
        return {"trainer.max_epochs": whole}
    batch = cell.settings.get("data.batch_size") or place.recipes[str(cell.recipe)]["data"]["batch_size"]
    steps = epochs * place.training_images / batch / cell.settings.get("trainer.accumulate_grad_batches", 1)
    return {"trainer.max_epochs": -1, "trainer.max_steps": max(1, round(steps))}


def folder_of(cell: Cell, seed: int, settings: Mapping[str, Any], place: Place) -> Path:
    """Of a cell and seed. Other settings, and other versions, have another folder: no run goes on as what it is not."""
    name = re.sub(r"[^\w.=+-]+", "-", cell.name)
    digest = _digest({**settings, "version": RESULT_VERSION})
    return place.out / "cells" / name / f"seed-{seed}-{digest}"


def train_command(cell: Cell, seed: int, run: Path, settings: Mapping[str, Any], place: Place) -> list[str]:
    """The command line that pretrains a cell, and goes on with it when given again."""
    flags = {k: v for k, v in settings.items() if "." in k and not k.startswith("probe.")} | method_of(settings)
    command = [
        sys.executable,
        "-m",
        "simclr",
        "train",
        f"--run_dir={run}",
        "--resume=auto",
        f"--seed_everything={seed}",
    ]
    if cell.recipe:
        command += [f"--config={cell.recipe}"]
    command += [f"--{key}={as_flag(value)}" for key, value in flags.items()]
    if place.images is not None:
        command += ["--data.source=folder", f"--data.train_dir={place.images / 'train'}"]
        command += [f"--data.test_dir={place.images / 'test'}"]
    accelerator = "cpu" if place.device == "cpu" else "gpu"
    return [*command, f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]


def method_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `simclr train` without a group that a cell may have."""
    return {key: settings[key] for key in ("method", "minutes") if key in settings}


def as_flag(value: Any) -> str:
    """A value of YAML as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


class _Runner:
    def __init__(self, experiment: Experiment, place: Place, say: Callable[[str], None]):
        self.experiment, self.place, self.say = experiment, place, say
        self.running: set[subprocess.Popen] = set()
        self.lock, self.here = threading.Lock(), threading.Lock()
        self.stopped = False
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(place.jobs):
            self.slots.put(slot)

    def run(self, seeds: int) -> dict[tuple[str, int], Result]:
        cells = self.experiment.cells
        results: dict[tuple[str, int], Result] = {}
        in_main = threading.current_thread() is threading.main_thread()
        # SIGHUP: of a terminal that is closed; nohup has it ignored.
        known = (signal.SIGTERM, signal.SIGHUP) if in_main else ()
        ends = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, _interrupt) for number in ends}
        try:
            # Those that measure another cell's run come after it.
            for later in (False, True):
                wanted = [cell for cell in cells if (cell.start is not None) == later]

                def one(cell_and_seed: tuple[Cell, int]) -> tuple[tuple[str, int], Result]:
                    return self._one(*cell_and_seed, results)

                with ThreadPoolExecutor(self.place.jobs) as pool:
                    try:
                        for key, result in pool.map(one, itertools.product(wanted, range(seeds))):
                            results[key] = result
                    except BaseException:
                        self._stop()
                        pool.shutdown(cancel_futures=True)
                        raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return results

    def _stop(self) -> None:
        self.stopped = True
        with self.lock:
            for process in self.running:
                process.terminate()  # training saves and ends

    def _one(self, cell: Cell, seed: int, results: Mapping[tuple[str, int], Result]) -> tuple[tuple[str, int], Result]:
        settings = settings_of(self.experiment, cell, seed, self.place)
        folder = folder_of(cell, seed, settings, self.place)
        found, reason = read_result(folder, settings)
        name = f"{cell.name}, seed {seed}"
        if found is not None:
            self.say(f"skipped: {name}: done")
            return (cell.name, seed), found
        if reason:
            self.say(f"again: {name}: {reason}")
        started = time.monotonic()
        device, date = self.place.device, datetime.now(UTC).isoformat(timespec="seconds")
        try:
            if self.stopped:
                raise _CellFailed("stopped")
            start = results.get((cell.start, seed)) if cell.start else None
            if start is not None and start.status != "done":
                raise _CellFailed(f"it measures {cell.start}, which failed")
            outcome = self._compute(cell, seed, settings, folder)
            seconds = round(time.monotonic() - started, 1)
            done = Result(cell.name, seed, "done", **outcome, seconds=seconds)
        except (_CellFailed, ValueError, OSError) as error:
            done = Result(cell.name, seed, "failed", why=str(error))
        except Exception as error:  # such as a setting that a network does not have: the other cells go on
            done = Result(cell.name, seed, "failed", why=f"{type(error).__name__}: {' '.join(str(error).split())}")
        result = replace(done, settings=settings, device=device, date=date)
        if not self.stopped:
            write_result(result, folder)
            end = f"failed: {name}: {result.why}" if result.status == "failed" else f"done: {name}: {_numbers(result)}"
            self.say(end)
        return (cell.name, seed), result

    def _compute(self, cell: Cell, seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        if cell.work in ("counts", "responses"):
            with self.here:  # one at a time: torch's random numbers are one stream for all threads
                if cell.work == "counts":
                    return {"metrics": count(**cell.settings)}
                metrics, curves = responses_at_start(**cell.settings, seed=seed)
                return {"metrics": metrics, "curves": curves}
        folder.mkdir(parents=True, exist_ok=True)
        slot = self.slots.get()
        try:
            for command in self.commands(cell, seed, settings, folder):
                self._process(command, folder, slot)
        finally:
            self.slots.put(slot)
        return json.loads((folder / OUTCOME).read_text())

    def commands(self, cell: Cell, seed: int, settings: dict[str, Any], folder: Path) -> list[list[str]]:
        """The programs of a cell, one after another; the last writes OUTCOME."""
        of_program = [f"--out={folder / OUTCOME}", f"--device={self.place.device}"]
        if cell.work == "supervised":
            images = [] if self.place.images is None else [f"--images={self.place.images}"]
            given = f"--settings={json.dumps({**cell.settings, 'seed': seed})}"
            return [[sys.executable, "-m", "simclr.ablate.supervised", *of_program, *images, given]]
        if cell.start is not None:  # measured in another way, not trained again
            run = folder_of(self.experiment.cell(cell.start), seed, settings["start"], self.place) / "run"
            if not run.is_dir():
                raise _CellFailed(f"the run of {cell.start} is gone. Delete {run.parent}, and it is trained again.")
        else:
            run = folder / "run"
        probe = {key.removeprefix("probe."): v for key, v in settings.items() if key.startswith("probe.")}
        measure = [sys.executable, "-m", "simclr.ablate.probes", f"--run={run}", *of_program]
        measure += [f"--settings={json.dumps(probe)}"]
        train = [] if cell.start is not None else [train_command(cell, seed, run, settings, self.place)]
        return [*train, measure]

    def _process(self, command: list[str], folder: Path, slot: int) -> None:
        environment = dict(os.environ)
        if self.place.gpus:
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.place.gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        elif self.place.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        with (folder / LOG).open("ab") as log:
            begun = log.tell()
            with self.lock:
                if self.stopped:
                    raise _CellFailed("stopped")
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C in the terminal reaches it once, by `_stop`: it saves and ends
                    preexec_fn=_end_with_the_engine,  # one system call, no lock of another thread's
                )
                self.running.add(process)
            try:
                code = process.wait()
            finally:
                with self.lock:
                    self.running.discard(process)
        if code:
            said = (folder / LOG).read_bytes()[begun:].decode(errors="replace").strip().splitlines()
            errors = [line.partition("error: ")[2] for line in said if line.startswith("error: ")]
            raise _CellFailed((errors or said or [f"exit code {code}"])[-1])


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_the_engine() -> None:
    """In a program of a cell, before it begins: on Linux it is killed when the thread that waits for it is no more.

    Else one would go on after a kill -9 of the engine, and hold its run when the same command is given again.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _CellFailed(Exception):
    """With the reason, a line."""


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _numbers(result: Result) -> str:
    shown = list(result.metrics.items())[:3]
    return f"{', '.join(f'{name} {value:.2f}' for name, value in shown)} ({result.seconds:.0f} s)"


def _digest(settings: Mapping[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
