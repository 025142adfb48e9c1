"""Speed of the augmentation beside its rivals, measured in turn in one run.

    python benchmarks/augmentation.py                            # one CPU core, a few minutes
    python benchmarks/augmentation.py --device cuda              # and its share of a ResNet-50 step at 224 px
    python benchmarks/augmentation.py --markdown results.md  # the table also to a file

Images per second, where two views of an image count as two. uint8 images in memory become two batches of normalised
float32 views: decoding and copies to a device are not counted. Rivals draw the same augmentation with the same
probabilities, and are left out by name where they are not installed (pip install -e '.[benchmarks]').

On a CPU one thread works, and the time is that thread's CPU time, so that a neighbour on the machine changes little.
On a GPU the time is the wall clock's, with the device waited for before and after.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from simclr import SimCLRAugmentation
from simclr.container import processor

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CONTENDERS = ("ours, compiled", "ours", "Kornia", "lightly", "torchvision v2")
BASELINE = "Kornia"


@dataclass
class Setting:
    """What is measured in one column; kernel_size is the blur's, in pixels."""

    image_size: int
    strength: float
    blur_prob: float
    batch_size: int
    kernel_size: int

    def __str__(self) -> str:
        blur = f"blur k={self.kernel_size}" if self.blur_prob else "no blur"
        return f"{self.image_size} px, s={self.strength}, {blur}, batch {self.batch_size}"


def settings(device: str) -> list[Setting]:
    """The columns of the table."""
    small, large = (512, 64) if device == "cpu" else (1024, 256)
    return [Setting(32, 0.5, 0.0, small, 3), Setting(32, 0.5, 0.5, small, 3), Setting(224, 1.0, 0.5, large, 23)]


def pictures(count: int, size: int) -> Tensor:
    """Smooth random pictures, (count, 3, size, size) uint8: noise alone would have no gray or saturated areas."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (smooth * 1.4 - 0.2).clamp(0, 1).mul(255).to(torch.uint8)


def contender(name: str, setting: Setting, images: Tensor) -> Callable[[], object]:
    """A function that makes two views of every image. Raises ImportError or RuntimeError for a rival that cannot."""
    size, s, on_cpu = setting.image_size, setting.strength, images.device.type == "cpu"
    if name.startswith("ours"):
        augmentation = SimCLRAugmentation(
            size,
            strength=s,
            crop_scale=(0.08, 1.0),
            blur_prob=setting.blur_prob,
            mean=MEAN,
            std=STD,
            compile_views="compiled" in name,
        )
        index = torch.arange(len(images))
        return lambda: augmentation(images, index)

    if name == "Kornia":
        import kornia.augmentation as K

        pipeline = K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
            K.RandomGrayscale(p=0.2),
            *([K.RandomGaussianBlur((setting.kernel_size,) * 2, (0.1, 2.0), p=0.5)] if setting.blur_prob else []),
            K.Normalize(MEAN, STD),
            data_keys=["input"],
        )

        def two_views() -> object:
            x = images.float() / 255
            return pipeline(x), pipeline(x)

        return two_views

    if not on_cpu:
        raise RuntimeError("works image by image on the CPU")
    if name == "lightly":
        from lightly.transforms import SimCLRTransform
        from torchvision.transforms.functional import to_pil_image

        transform = SimCLRTransform(
            input_size=size,
            cj_strength=s,
            gaussian_blur=setting.blur_prob,
            sigmas=(0.1, 2.0),
            normalize={"mean": list(MEAN), "std": list(STD)},
        )
        files = [to_pil_image(image) for image in images]

        def by_image() -> object:
            first, second = zip(*(transform(file) for file in files), strict=True)
            return torch.stack(first), torch.stack(second)

        return by_image

    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(setting.kernel_size, (0.1, 2.0))], p=setting.blur_prob),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda: [torch.stack([transform(image) for image in images]) for _ in range(2)]


def seconds(function: Callable[[], object], device: str) -> float:
    """How long one call takes."""
    if device == "cpu":
        start = time.thread_time()
        function()
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions in turn, after two calls to warm up (and to compile)."""
    for function in functions.values():
        function(), function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def training_step(images: Tensor) -> Callable[[], object]:
    """Forward and backward of a ResNet-50 on two views of every image, in bf16: the step that the views are made for.

    The weights stay as they are: an optimiser and the loss would only make the step longer.
    """
    from torchvision.models import resnet50

    device = images.device.type
    encoder = resnet50().to(device, memory_format=torch.channels_last)
    views = torch.randn(2 * len(images), *images.shape[1:], device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        encoder.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            out = encoder(views)
        out.float().square().mean().backward()

    return step


def cell(times: list[float], images: int, baseline: list[float] | None) -> str:
    """Median images/s, half the distance between its quartiles, and the ratio to the baseline."""
    rates = [images / t for t in times]
    low, _, high = quantiles(rates, n=4)
    rate = median(rates)
    ratio = f", {rate / median(images / t for t in baseline):.1f}x" if baseline else ""
    return f"{rate:,.0f} ±{(high - low) / 2 / rate:.0%}{ratio}".replace(",", " ", rate >= 1000)


def describe(device: str) -> str:
    """Command, commit, machine and versions."""
    import kornia

    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"one core of {processor()}"
    return (
        f"`python {shlex.join(sys.argv)}`, commit {commit}, {machine}, torch {torch.__version__}, "
        f"kornia {kornia.__version__}. Images/s: median, ± half the distance of the quartiles, ratio to {BASELINE}."
    )


def main() -> None:
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each, at least 2")
    parser.add_argument("--batch_size", type=int, help="in place of each setting's own, to try it out")
    parser.add_argument("--step", action="store_true", help="the share of a ResNet-50 step on a CPU too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats {arguments.repeats} gives no spread. Use 2 or more.")
    device = arguments.device
    torch.set_num_threads(1)

    columns, lines = settings(device), []
    cells = {name: [] for name in CONTENDERS}
    for setting in columns:
        setting.batch_size = arguments.batch_size or setting.batch_size
        images = pictures(setting.batch_size, setting.image_size).to(device)
        functions = {}
        for name in CONTENDERS:
            try:
                functions[name] = contender(name, setting, images)
            except (ImportError, RuntimeError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        print(f"{setting} ...", file=sys.stderr)
        with torch.no_grad():
            times = measure(functions, device, arguments.repeats)
        for name in CONTENDERS:
            counted = 2 * setting.batch_size
            cells[name].append(cell(times[name], counted, times.get(BASELINE)) if name in times else "-")
        if setting.image_size == 224 and (device == "cuda" or arguments.step):
            step = median(measure({"step": training_step(images)}, device, arguments.repeats)["step"])
            shares = ", ".join(f"{name} {median(times[name]) / step:.1%}" for name in times)
            lines.append(
                f"A ResNet-50 step in bf16 (forward and backward of two views) takes {step * 1e3:.1f} ms; making "
                f"the views beforehand, not beside it, adds: {shares}."
            )

    table = [f"| | {' | '.join(map(str, columns))} |", f"|---|{'---|' * len(columns)}"]
    table += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    text = "\n".join([*table, "", *lines, describe(device)])
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
