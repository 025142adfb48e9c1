"""Time to an accuracy: pretraining by a recipe, seed by seed, and the linear accuracy of what it leaves behind.

    python benchmarks/time_to_accuracy.py --images cifar10                     # ResNet-18, 100 epochs, three seeds
    python benchmarks/time_to_accuracy.py --images cifar10 --seeds 0           # one of them; the others later
    python benchmarks/time_to_accuracy.py --images cifar10 --epochs 400 --model.compile_encoder reduce-overhead
    python benchmarks/time_to_accuracy.py --rehearse                           # tiny, on the CPU: a minute

Each seed is a run of `simclr train`, a process of its own. Its time is that of the process by the clock, from start to
end: libraries, reading the images, compiling and every epoch, without evaluation. Then the encoder of the last epoch,
frozen, is measured by a linear classifier (L-BFGS, regularisation chosen on a part of the training images). A run that
is there already is not trained again: its time is read from its folder, so that three seeds may be three commands.

Options that are not named below are those of `simclr train`.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from simclr import load_encoder
from simclr.checkpoint import LAST, read_checkpoint
from simclr.container import processor
from simclr.data.module import images_of_run
from simclr.eval import extract_features, linear_probe

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain" / "cifar10_resnet18.yaml"
TINY = {"data.source": "shapes", "data.shapes_train": 256, "data.shapes_test": 128, "data.batch_size": 64}
TINY |= {"model.encoder": "resnet8", "model.width": 0.25, "model.projection_dim": 16, "model.warmup_epochs": 1}
TINY |= {"trainer.precision": "32-true", "trainer.accelerator": "cpu"}
SECONDS = "seconds.json"  # in a run's folder: what its training took


def train(run_dir: Path, seed: int, epochs: int, options: list[str]) -> float:
    """Seconds of a whole pretraining, now or, of a run that is there, then.

    Raises:
        ValueError: if the folder holds a run of other settings, or one that did not end.
        RuntimeError: if training fails.
    """
    arguments = ["train", *options, "--seed_everything", str(seed), "--trainer.max_epochs", str(epochs)]
    record = run_dir / SECONDS
    if record.exists():
        content = json.loads(record.read_text())
        if content["arguments"] != arguments:
            raise ValueError(f"{run_dir} holds a run of {shlex.join(content['arguments'])}. Give another --runs_dir.")
        return content["seconds"]
    if run_dir.exists():
        raise ValueError(f"{run_dir} holds a run that did not end. Remove it, or give another --runs_dir.")
    say(f"seed {seed}: simclr {shlex.join(arguments)}")
    started = time.perf_counter()
    program = "from simclr.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--run_dir", str(run_dir)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise RuntimeError(f"the training of seed {seed} failed: see above.")
    seconds = time.perf_counter() - started
    record.write_text(json.dumps({"seconds": seconds, "arguments": arguments}))
    return seconds


def evaluate(run_dir: Path, device: str) -> tuple[float, tuple[float, float], int]:
    """Linear accuracy of the last epoch's encoder, its 95 % interval, and the epochs trained."""
    checkpoint = read_checkpoint(run_dir / LAST)
    data = images_of_run(checkpoint.data)
    encoder = load_encoder(checkpoint.path)
    train, test = (extract_features(encoder, data.eval_loader(split), device=device) for split in ("train", "test"))
    probe = linear_probe(*train, *test, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()  # the next seed trains in a process of its own
    return probe.accuracy, probe.ci95, checkpoint.epoch + 1


def table(rows: list[dict[str, Any]], target: float) -> list[str]:
    """Markdown: a row for each seed, then mean, spread and the verdict."""
    lines = ["| seed | epochs | training, min | linear accuracy | 95 % interval |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ci95"]
        interval = f"{low:.3f} to {high:.3f}"
        lines.append(f"| {row['seed']} | {row['epochs']} | {row['minutes']:.2f} | {row['accuracy']:.4f} | {interval} |")
    accuracy, minutes = ([row[name] for row in rows] for name in ("accuracy", "minutes"))
    met = "reached" if statistics.mean(accuracy) >= target else "**missed**"
    mean = f"Mean of n = {len(rows)}: accuracy {spread(accuracy, 4)}, training {spread(minutes, 2)} min; "
    return [*lines, "", f"{mean}{target:g} {met}."]


def spread(values: list[float], digits: int) -> str:
    """Mean and, of two values or more, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def describe(device: str) -> str:
    """Command, commit, machine and versions."""
    git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip() or "unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "pytorch-lightning"))
    return f"`python {shlex.join(sys.argv)}`, commit {commit}, {kind}, {cores} cores, {versions}."


def say(text: str) -> None:
    """To the terminal, not into the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Read the options, train and evaluate seed by seed, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", help="a folder with train/ and test/, class folders of images in both")
    parser.add_argument("--config", default=str(CONFIG), help="the recipe")
    parser.add_argument("--epochs", type=int, help="100; of --rehearse 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.9, help="the accuracy to reach, a fraction")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="to train and to evaluate on")
    parser.add_argument("--runs_dir", type=Path, help="of the runs; runs/time_to_accuracy_EPOCHS if not given")
    parser.add_argument("--rehearse", action="store_true", help="the same, tiny, on the CPU and the built-in images")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what is printed there too")
    asked, options = parser.parse_known_args()
    asked.epochs = asked.epochs or (1 if asked.rehearse else 100)
    device = "cpu" if asked.rehearse else asked.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device. --rehearse runs the same on the CPU.")
    if not (asked.images or asked.rehearse):
        parser.error("--images is needed: a folder with train/ and test/, as CIFAR-10's.")
    settings = {"trainer.accelerator": {"cpu": "cpu", "cuda": "gpu"}[device], "trainer.devices": 1}
    settings |= {"knn.every_n_epochs": 0}  # what it measures on the way is not part of training
    if asked.rehearse:
        settings |= TINY
    else:
        folder = Path(asked.images).resolve()
        settings |= {"data.train_dir": str(folder / "train"), "data.test_dir": str(folder / "test")}
    fixed = ["--config", asked.config, *(f"--{name}={value}" for name, value in settings.items()), *options]
    with tempfile.TemporaryDirectory() as scratch:
        runs_dir = asked.runs_dir or Path("runs") / f"time_to_accuracy_{asked.epochs}"
        runs_dir = Path(scratch) if asked.rehearse and not asked.runs_dir else runs_dir
        rows = []
        for seed in asked.seeds:
            try:
                seconds = train(runs_dir / f"seed{seed}", seed, asked.epochs, fixed)
            except (ValueError, RuntimeError) as error:
                parser.error(str(error))
            accuracy, ci95, epochs = evaluate(runs_dir / f"seed{seed}", device)
            row = {"seed": seed, "epochs": epochs, "minutes": seconds / 60, "accuracy": accuracy, "ci95": ci95}
            rows.append(row)
            say(f"seed {seed}: {seconds / 60:.2f} min, linear accuracy {accuracy:.4f}")
    text = [*table(rows, asked.target), "", describe(device)]
    print("\n".join(text))
    if asked.markdown:
        asked.markdown.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
