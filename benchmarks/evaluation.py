"""Evaluating an encoder on a CPU: a sweep of strengths of logistic regression, learning rates as parallel heads, and
the features themselves, each beside what people would use in its place, in one run.

    python benchmarks/evaluation.py                        # everything, on all cores: half an hour, most of it rivals'
    python benchmarks/evaluation.py --parts heads --threads 1
    python benchmarks/evaluation.py --quick                # small, to see it run
    python benchmarks/evaluation.py --markdown FILE        # the tables also to a file

logreg: 50 000 + 10 000 features of 512 numbers and 10 classes, Gaussian classes whose covariance falls as 1 / k, as
that of a network's features does; 45 strengths 10^-6 .. 10^5, chosen on a part of the training data that no fit has
seen, then a fit to all. Everyone gets the same float32 features, standardised, the same parts and the same strengths.
"warm": from strong to weak, each fit from the last one's weights, as ours does; else each from zero, as estimators are
mostly used. "ours, as shipped" ends the path once accuracy has clearly fallen, and chooses on 20 000 images, as `simclr
eval` does; "ours, the whole path" fits all strengths, to as many images as the rivals.
heads: thirteen learning rates at once against one, turn by turn; and against a loop over torch.nn and torch.optim.
features: images in memory -> `extract_features`, and as files -> `embed_folder` -> `features.npy`, against the encoder
alone on batches in memory.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from simclr.allocator import keep_freed_memory
from simclr.container import processor
from simclr.data.splits import stratified_split
from simclr.encoders import build_encoder
from simclr.eval import logreg
from simclr.eval.features import encode, extract_features
from simclr.eval.heads import LEARNING_RATES, train_heads
from simclr.eval.logreg import linear_probe, standardisation
from simclr.inputs import InputTransform, attach_transform
from simclr.seeding import epoch_order
from simclr.use.embed import default_batch_size, embed_folder
from simclr.use.source import Source

STRENGTHS = tuple(10**e for e in np.linspace(5, -6, 45))  # SimCLR's appendix B.8, from strong to weak
RATIO_BARS = {"scikit-learn": 5.0, "scikit-learn-intelex": 1.5}
HEADS_BAR, SECONDS_BAR, FEATURES_BAR = 1.5, 60, 0.9


class Clock:
    """Wall and processor seconds of a block."""

    def __enter__(self) -> "Clock":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *args: object) -> None:
        self.wall, self.cpu = (
            b - a for a, b in zip(self._began, (time.perf_counter(), time.process_time()), strict=True)
        )


def gaussian_classes(size: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (size, width) float32 and labels: classes of one covariance, whose eigenvalues fall as 1 / k.

    The means are drawn from the same spectrum. So small directions tell classes apart as well as large ones do, and
    a linear classifier gains from weak regularisation, and then loses.
    """
    fixed = torch.Generator().manual_seed(0)
    spectrum = (1 / torch.arange(1, width + 1)).sqrt()
    turn = torch.linalg.qr(torch.randn(width, width, generator=fixed)).Q
    # About 80 % of the test images are told apart at 512 numbers and 10 classes.
    means = 2.45 / width**0.5 * torch.randn(classes, width, generator=fixed)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (size,), generator=draw)
    return ((means[labels] + torch.randn(size, width, generator=draw)) * spectrum) @ turn, labels


class Sweep:
    """What a sweep came to.

    Attributes:
        seconds: wall and processor.
        strength: that was chosen.
        top1: on the test features.
        fits: of the sweep, without the last one.
    """

    def __init__(self, clock: Clock, strength: float, top1: float, fits: int):
        self.seconds, self.strength, self.top1, self.fits = (clock.wall, clock.cpu), strength, top1, fits


def ours(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], strengths: tuple[float, ...], whole: bool) -> Sweep:
    """The product's sweep; or the same without its early end and on all images."""
    settings: dict[str, Any] = {"selection_size": len(train[0])} if whole else {}
    shipped = logreg._PAST_THE_BEST
    try:
        logreg._PAST_THE_BEST = len(strengths) if whole else shipped
        with Clock() as clock:
            found = linear_probe(*train, *test, regularization=strengths, **settings)
    finally:
        logreg._PAST_THE_BEST = shipped
    assert found.regularization is not None
    return Sweep(clock, found.regularization, found.accuracy, len(found.validation_accuracy))


def theirs(
    kind: Callable[..., Any],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    strengths: tuple[float, ...],
    warm: bool,
) -> Sweep:
    """The same sweep by an estimator with scikit-learn's interface."""
    with Clock() as clock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weak strengths that have not converged after 1 000 iterations
        features, labels = train
        mean, scale = standardisation(features)
        x, y = ((features - mean) * scale).numpy(), labels.numpy()
        fitted, held = stratified_split(labels, min(0.2, 10_000 / len(labels)), seed=0, limit=len(labels))
        model = kind(max_iter=1000, warm_start=warm)
        scores = []
        for strength in strengths:
            model.set_params(C=1 / strength)
            model.fit(x[fitted], y[fitted])
            scores.append(float((model.predict(x[held]) == y[held]).mean()))
        best = strengths[int(np.argmax(scores))]
        model = kind(max_iter=1000, C=1 / best).fit(x, y)
        right = (model.predict(((test[0] - mean) * scale).numpy()) == test[1].numpy()).mean()
    return Sweep(clock, best, float(right), len(strengths))


def rivals() -> dict[str, Callable[..., Any]]:
    """scikit-learn, and what replaces it on Intel processors where that is installed."""
    found: dict[str, Callable[..., Any]] = {"scikit-learn": LogisticRegression}
    try:
        from sklearnex.linear_model import LogisticRegression as OfIntel

        found["scikit-learn-intelex"] = OfIntel
    except ImportError:
        print("left out: scikit-learn-intelex, which is not installed")
    return found


def sweep_of_strengths(quick: bool, every: int) -> list[str]:
    """The table of logistic regression."""
    size, width, classes = (1_500, 24, 4) if quick else (50_000, 512, 10)
    strengths = STRENGTHS[::9] if quick else STRENGTHS
    train, test = gaussian_classes(size, width, classes, 1), gaussian_classes(size // 5, width, classes, 2)
    linear_probe(*(part[:500] for part in (*train, *test)), regularization=strengths[:2])  # warm: first calls load MKL
    found = {
        "ours, as shipped": ours(train, test, strengths, whole=False),
        "ours, the whole path": ours(train, test, strengths, whole=True),
    }
    print({name: sweep.seconds for name, sweep in found.items()}, file=sys.stderr, flush=True)
    for warm, (kind, rival) in itertools.product((True, False), rivals().items()):
        name = f"{kind}{', warm' if warm else ''}"
        found[name] = theirs(rival, train, test, strengths[::every], warm)
        print(name, found[name].seconds, file=sys.stderr, flush=True)
    head = [
        f"| {size:,} x {width}, {classes} classes | fits | wall, s | processor, s | of ours, as shipped (processor) | "
        "of ours, the whole path | bar | strength | top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    for name, sweep in found.items():
        bar = RATIO_BARS.get(name.partition(",")[0])
        ratios = [
            f"{sweep.seconds[0] / mine.seconds[0]:.1f} x ({sweep.seconds[1] / mine.seconds[1]:.1f} x)" if bar else "-"
            for mine in list(found.values())[:2]
        ]
        lines.append(
            f"| {name} | {sweep.fits} | {sweep.seconds[0]:,.1f} | {sweep.seconds[1]:,.1f} | {' | '.join(ratios)} | "
            f"{f'{bar:g} x' if bar else f'{SECONDS_BAR} s'} | {sweep.strength:.3g} | {sweep.top1:.2%} |"
        )
    if every > 1:
        lines.append(f"\nThe rivals were given one of {every} strengths only: their seconds are of that many fits.")
    return head + lines


def loop_of_heads(features: Tensor, labels: Tensor, lrs: tuple[float, ...], classes: int, batch_size: int) -> None:
    """The same heads one after the other by torch's own layers and optimiser, an epoch."""
    for lr in lrs:
        layer = nn.Linear(features.shape[1], classes)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr * batch_size / 256, momentum=0.9, nesterov=True)
        for index in epoch_order(0, 0, len(features)).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features[index]), labels[index]).backward()
            optimizer.step()


def parallel_heads(quick: bool, rounds: int) -> list[str]:
    """The table of parallel heads."""
    cases = [(512, 10, 256), (512, 10, 4096), (512, 100, 256), (512, 1000, 256), (2048, 10, 256), (2048, 10, 4096)]
    head = [
        "| features | classes | batch | one head, ms a step | thirteen | thirteen / one (bar "
        f"{HEADS_BAR}) | products alone, thirteen - one, ms | a loop of thirteen / thirteen at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    for width, classes, batch_size in [(16, 3, 32)] if quick else cases:
        steps = 2 if quick or classes == 1000 else 8
        draw = torch.Generator().manual_seed(0)
        features = torch.randn(steps * batch_size, width, generator=draw)
        labels = torch.randint(0, classes, (len(features),), generator=draw)
        settings: dict[str, Any] = {"num_classes": classes, "epochs": 1, "batch_size": batch_size}
        work: dict[str, Callable[[], Any]] = {
            "one": lambda f=features, y=labels, s=settings: train_heads(f, y, [0.1], **s),
            "thirteen": lambda f=features, y=labels, s=settings: train_heads(f, y, LEARNING_RATES, **s),
            "loop": lambda f=features, y=labels, c=classes, b=batch_size: loop_of_heads(f, y, LEARNING_RATES, c, b),
        }
        for count in (1, 13):
            weight, p = torch.randn(count * classes, width), torch.randn(count * classes, batch_size)
            x = features[:batch_size]
            work[f"products {count}"] = lambda w=weight, p=p, x=x, s=steps: [(w @ x.T, p @ x) for _ in range(s)]
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(1 if quick else rounds + 1):
            for name, do in work.items():
                with Clock() as clock:
                    do()
                if turn or quick:  # the first turn is a warm-up
                    times[name].append(clock.wall / steps * 1000)
        ms = {name: min(found) for name, found in times.items()}
        ratios = [a / b for a, b in zip(times["thirteen"], times["one"], strict=True)]
        lines.append(
            f"| {width} | {classes} | {batch_size} | {ms['one']:.2f} | {ms['thirteen']:.2f} | "
            f"{ms['thirteen'] / ms['one']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{ms['products 13'] - ms['products 1']:.2f} | {ms['loop'] / ms['thirteen']:.1f} |"
        )
    return head + lines


def write_images(folder: Path, count: int, size: int) -> None:
    """PNGs of smooth noise, in a hundred folders, which compress about as photographs of this size do."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number % 100:02}" / f"{number:06}.png"
        place.parent.mkdir(exist_ok=True, parents=True)
        small = Image.fromarray(random.integers(0, 256, (size // 2, size // 2, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(place)


def features_of_files(quick: bool, images: int, rounds: int) -> list[str]:
    """The table of features."""
    head = [
        "| encoder | images | encoder alone, images/s | of that from memory | from files to features.npy | bar |",
        "|---|---|---|---|---|---|",
    ]
    lines = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        count = 64 if quick else images
        write_images(folder / "images", count, 32)
        for name in ("resnet8",) if quick else ("resnet8", "resnet18"):
            torch.manual_seed(0)
            encoder = build_encoder(name, image_size=32).eval().requires_grad_(False)
            attach_transform(encoder, InputTransform(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
            about = {"source": name, "weights": None, "sha256": "0", "feature_dim": encoder.feature_dim}
            source = Source(encoder, {**about, "preprocessing": {}})
            size = min(default_batch_size(32), count)
            batch = torch.randn(size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
            labels = torch.zeros(count, dtype=torch.int64)
            in_memory = [(pixels[i : i + size], labels[i : i + size]) for i in range(0, count, size)]
            rates: list[tuple[float, float, float]] = []
            for turn in range(rounds + 1):
                with Clock() as files:
                    embed_folder(str(folder / "images"), source, folder / "out")
                shutil.rmtree(folder / "out")
                with Clock() as alone, torch.no_grad():
                    for start in range(0, count, size):
                        encode(encoder, batch[: min(size, count - start)])
                with Clock() as memory:
                    extract_features(encoder, in_memory)
                if turn or quick:
                    rates.append((count / alone.wall, count / memory.wall, count / files.wall))
            shares = [[rate[way] / rate[0] for rate in rates] for way in (1, 2)]
            told = [f"{median(share):.2f} ({min(share):.2f} to {max(share):.2f})" for share in shares]
            alone_rate = median(rate[0] for rate in rates)
            lines.append(f"| {name} | {count:,} | {alone_rate:,.0f} | {' | '.join(told)} | {FEATURES_BAR} |")
    return head + lines


def main() -> None:
    """Read the options, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("logreg", "heads", "features"), default=["logreg", "heads", "features"]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="of heads and features")
    parser.add_argument("--images", type=int, default=50_000, help="files, of features")
    parser.add_argument("--every", type=int, default=1, help="of the strengths are given to the rivals; 3: each third")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as `simclr eval` and `simclr embed` do
    set_threads(args.threads)
    parts: dict[str, Callable[[], list[str]]] = {
        "logreg": lambda: sweep_of_strengths(args.quick, args.every),
        "heads": lambda: parallel_heads(args.quick, args.rounds),
        "features": lambda: features_of_files(args.quick, args.images, 1 if args.quick else args.rounds),
    }
    text: list[str] = []
    for part in args.parts:
        lines = parts[part]()
        print("\n".join([*lines, ""]), flush=True)
        text += [*lines, ""]
    git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    about = f"{args.threads} thread(s) of {processor()}, torch {torch.__version__}, commit {commit}."
    print(about)
    if args.markdown:
        args.markdown.write_text("\n".join([*text, about, ""]))


def set_threads(count: int) -> None:
    """As many threads for everyone: torch, the BLAS of NumPy and SciPy, oneDAL."""
    torch.set_num_threads(count)
    from threadpoolctl import threadpool_limits

    threadpool_limits(count)
    try:
        import daal4py

        daal4py.daalinit(count)
    except ImportError:
        pass


if __name__ == "__main__":
    main()
