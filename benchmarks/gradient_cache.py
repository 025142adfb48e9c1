"""What the exact gradient of a large batch costs: steps in micro-batches beside the plain step, in one run.

    python benchmarks/gradient_cache.py                     # one CPU core, two minutes
    python benchmarks/gradient_cache.py --device cuda       # and ResNet-50 at 224 px, batch 4 096 and 16 384
    python benchmarks/gradient_cache.py --markdown FILE     # the table also to a file

Whole training steps under the Trainer, images in memory: views, encoder, head, NT-Xent of the whole batch, backward,
optimiser. The plain step and those in micro-batches take turns; the ratio is that of a round. A batch that the device
cannot hold at once has no plain step beside it. "gap" is the largest difference between a projection of the first pass
and of the second, over all steps: 0, or rounding, says that the gradient was exact.
"""

import argparse
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from pytorch_lightning import Callback, Trainer

from simclr import SimCLR
from simclr.cli import quiet
from simclr.container import processor
from simclr.memory import estimate

WARM_UP, BAR = 2, 0.72


class Case:
    """A network and a batch.

    Args:
        name: for the table.
        batch: images.
        micro: sizes of micro-batches to compare; None, the plain step, first if the device holds it.
        size: side of an image and of a view.
        precision: Lightning's.
        settings: of SimCLR.
    """

    def __init__(self, name: str, batch: int, micro: tuple[int | None, ...], size: int, precision: str, **settings):
        self.name, self.batch, self.micro, self.size, self.precision = name, batch, micro, size, precision
        self.settings = settings


SMALL = {"encoder": "resnet8", "stem": "small_stride2", "width": 2, "strength": 0.5, "blur_prob": 0.0}


def cases(device: str) -> list[Case]:
    """What is measured on a CPU core, or on a GPU."""
    if device == "cpu":
        return [
            Case("ResNet-8 x 2, 32 px, float32", 512, (None, 256, 128, 64), 32, "32-true", **SMALL),
            Case("ResNet-8 x 2, 32 px, bf16-mixed", 512, (None, 256, 128, 64), 32, "bf16-mixed", **SMALL),
        ]
    large = {"encoder": "resnet50", "temperature": 0.1}
    return [
        Case("ResNet-18, 32 px", 2048, (None, 1024, 512), 32, "bf16-mixed", encoder="resnet18", blur_prob=0.0),
        Case("ResNet-50, 224 px", 256, (None, 128, 64), 224, "bf16-mixed", **large),
        Case("ResNet-50, 224 px", 4096, (256,), 224, "bf16-mixed", **large),
        Case("ResNet-50, 224 px", 16384, (256,), 224, "bf16-mixed", **large),
    ]


class OneBatch:
    """The same images again and again."""

    def __init__(self, images: torch.Tensor, times: int):
        self.batch, self.times = (images, torch.arange(len(images))), times

    def __len__(self) -> int:
        return self.times

    def __iter__(self):
        return iter([self.batch] * self.times)


class Clock(Callback):
    """Seconds of each step after the warm-up, and the largest gap."""

    def __init__(self):
        self.seconds, self.gap = [], 0.0

    def on_train_batch_end(self, trainer, *args):
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if trainer.global_step > WARM_UP:
            self.seconds.append(now - self.last)
        self.last = now
        self.gap = max(self.gap, float(trainer.callback_metrics.get("gradient_cache_error", 0.0)))


def run(case: Case, micro: int | None, steps: int, device: str) -> tuple[list[float], float, float]:
    """Seconds of each step, the largest gap, and on CUDA the peak in GB."""
    torch.manual_seed(0)
    settings = {"image_size": case.size, "optimizer": "sgd", "base_lr": 0.01, "warmup_epochs": 0, **case.settings}
    model = SimCLR(batch_size=case.batch, micro_batch_size=micro, **settings)
    side = case.size if case.size <= 64 else case.size * 8 // 7
    images = torch.randint(0, 256, (case.batch, 3, side, side), dtype=torch.uint8, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=case.precision,
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        log_every_n_steps=1,
        callbacks=[clock],
        use_distributed_sampler=False,
        **off,
    )
    trainer.fit(model, OneBatch(images, WARM_UP + steps))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    return clock.seconds, clock.gap, peak


def measure(case: Case, steps: int, rounds: int, device: str) -> list[str]:
    """The table's lines of a case, printed as they are known; its micro-batches take turns."""
    seconds: dict[int | None, list[float]] = {micro: [] for micro in case.micro}
    gaps, peaks = dict.fromkeys(case.micro, 0.0), dict.fromkeys(case.micro, 0.0)
    for _ in range(rounds if None in case.micro else 1):  # without a plain step there is no ratio, and steps are long
        for micro in case.micro:
            taken, gap, peak = run(case, micro, steps, device)
            seconds[micro].append(median(taken))
            gaps[micro], peaks[micro] = max(gaps[micro], gap), peak
    lines = []
    for micro, taken in seconds.items():
        model = SimCLR(image_size=case.size, batch_size=case.batch, micro_batch_size=micro, **case.settings)
        need = estimate(model, case.batch, micro, precision=case.precision).activations / 1e9
        ratios = [plain / part for plain, part in zip(seconds.get(None, []), taken, strict=False)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
        speed = f"{case.batch / median(taken):,.0f}"
        peak = f"{peaks[micro]:.1f}" if device == "cuda" else "-"
        gap = "-" if micro is None else f"{gaps[micro]:.0e}"
        part = "all at once" if micro is None else f"{case.batch // micro} x {micro}"
        lines.append(f"| {case.name} | {case.batch:,} | {part} | {speed} | {ratio} | {need:.2f} | {peak} | {gap} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Read the options, measure all cases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=3, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of one step of a small batch, to see it run")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here. Leave out --device cuda.")
    quiet()
    warnings.filterwarnings("ignore")
    if args.device == "cpu":
        torch.set_num_threads(1)
    chosen = cases(args.device)
    if args.quick:
        chosen, args.rounds, args.steps = [Case("ResNet-8", 64, (None, 16), 32, "32-true", **SMALL)], 1, 1
    head = [
        "| network | batch | in parts | images/s | of the plain step | activations, GB (estimate) | peak, GB | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    lines = head + [line for case in chosen for line in measure(case, args.steps, args.rounds, args.device)]
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"one core of {processor()}"
    git = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    about = f"{where}, torch {torch.__version__}, commit {commit}; {args.rounds} rounds of {args.steps} steps; median "
    about += f"(range). Bar: {BAR} of the plain step."
    if args.device == "cpu":
        about += f" Peak memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB."
    print(f"\n{about}")
    if args.markdown:
        args.markdown.write_text("\n".join([*lines, "", about, ""]))


if __name__ == "__main__":
    main()
