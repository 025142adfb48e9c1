"""The loss beside its rivals and beside its own matrix products: time, memory and error, all in one run.

    python benchmarks/nt_xent.py                           # one CPU thread, N = 256 to 32 768: half an hour
    python benchmarks/nt_xent.py --quick                   # N = 4 096 alone: a minute
    python benchmarks/nt_xent.py --device cuda             # N = 4 096, 32 768 and 65 536, one round

Measured is one forward and backward of the loss of N images, normalisation included, from projections of width 128 in
float32 at temperature 0.1. Every measurement has a process of its own, so that nothing is left from another; within a
round ours is measured first and last and compared with what ran in between. Printed are the median over rounds and
repeats with the range, on a CPU of seconds of the process, which other programs disturb less than the clock. Memory is
the most that the first call takes beyond its inputs. What would not fit is named with the bytes that it needs.

A fast wrong loss is worth nothing: the same process compares value and gradient with a matrix in float64.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.container import processor

TEMPERATURE = 0.1
WIDTH = 128
CHECK_N = 200  # not a power of two, and beyond what `simclr.nt_xent` gives to its dense form
CHUNK = 512  # rows of the matrix that the checkpointed form has at a time
OURS, FLOOR = "ours", "its matrix products alone"
SIZES = {"cpu": [256, 2048, 4096, 8192, 16384, 32768], "cuda": [4096, 32768, 65536]}
RIVALS_TO = 8192  # the largest N of the rivals on a CPU: minutes each beyond
LEAST_SECONDS = 0.3  # of repeats: where one is milliseconds, a few say little
EXACT, ROUNDED = 1e-4, 5e-3  # the errors up to which float32, and rounded operands, are right


def main() -> None:
    """Read the options, measure all rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="images in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="of a measurement, at least, after one to warm up")
    parser.add_argument("--rounds", type=int, help="of all measurements: 3, one beyond N = 8 192 on a CPU; 1 on CUDA")
    parser.add_argument("--seconds", type=float, default=10.0, help="after these a measurement is not repeated")
    parser.add_argument("--quick", action="store_true", help="one round of N = 4 096")
    parser.add_argument("--compile", action="store_true", help="the full matrix by torch.compile too")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(CONTENDERS)[1:], help="contenders to leave out")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what is printed there too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a process of one measurement: its arguments as JSON
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here.")
    if options.quick:
        options.sizes, options.rounds, options.repeats = options.sizes or [4096], 1, 3
    options.sizes = options.sizes or SIZES[options.device]
    # On CUDA most of a measurement is the start of its process, with libraries and kernels to build.
    options.rounds = options.rounds or {"cpu": 3, "cuda": 1}[options.device]
    absent = left_out(options)
    measured = {n: rounds_of(n, [name for name in CONTENDERS if name not in absent], options) for n in options.sizes}
    lines = [*heading(absent, options), "", *table(measured, options.device), "", *bars(measured, options.device)]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


# Contenders: (z1, z2) -> loss.


def ours(operands: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`simclr.nt_xent` with its operands rounded as named."""
    from simclr import nt_xent

    return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE, operands=operands)


def lightly() -> Callable[[Tensor, Tensor], Tensor]:
    """lightly's NTXentLoss."""
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # it would ask a server
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def metric_learning() -> Callable[[Tensor, Tensor], Tensor]:
    """pytorch-metric-learning's NTXentLoss."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z1, z2: loss(torch.cat((z1, z2)), torch.arange(len(z1), device=z1.device).repeat(2))


def full_matrix(z1: Tensor, z2: Tensor) -> Tensor:
    """All pairs at once and cross-entropy: views (n, D) each to a scalar."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = z @ z.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def checkpointed(z1: Tensor, z2: Tensor) -> Tensor:
    """The same by chunks of rows, made again in backward: views (n, D) each to a scalar."""
    from torch.utils.checkpoint import checkpoint

    def of_rows(rows: Tensor, z: Tensor, first: int) -> Tensor:
        logits = rows @ z.T / TEMPERATURE
        logits.diagonal(first).fill_(-torch.inf)
        positives = (torch.arange(len(rows), device=z.device) + first + len(z) // 2) % len(z)
        return F.cross_entropy(logits, positives, reduction="sum")

    z = F.normalize(torch.cat((z1, z2)), dim=1)
    starts = range(0, len(z), CHUNK)
    return sum(checkpoint(of_rows, z[i : i + CHUNK], z, i, use_reentrant=False) for i in starts) / len(z)


def linear_cross_entropy(z1: Tensor, z2: Tensor) -> Tensor:
    """By torch's chunked `linear_cross_entropy`, which everyone has: views (n, D) each to a scalar.

    Its logarithm of the sum holds each anchor's pair with itself, which is taken out of it: at small temperatures that
    is nearly all there is, and float32 loses the rest.
    """
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    other = torch.arange(len(z), device=z.device).roll(len(z1))
    options = torch.nn.LinearCrossEntropyOptions()
    positive, itself = (z * z[other]).sum(1) / TEMPERATURE, (z * z).sum(1) / TEMPERATURE
    lse = F.linear_cross_entropy(z / TEMPERATURE, z, other, reduction="none", options=options) + positive
    return (lse + torch.log1p(-torch.exp(itself - lse)) - positive).mean()


def inf_cl() -> Callable[[Tensor, Tensor], Tensor]:
    """inf-cl's ring loss (Cheng et al. 2024), which compares view 1 with view 2 only: half the pairs of NT-Xent."""
    from inf_cl import cal_flash_loss

    return lambda z1, z2: cal_flash_loss(
        F.normalize(z1, dim=1), F.normalize(z2, dim=1), scale=torch.tensor(1 / TEMPERATURE, device=z1.device)
    )


# How each is made, and the bytes that it takes for M = 2N: measured once, to know what will not fit.
CONTENDERS: dict[str, tuple[Callable[[], Any] | None, Callable[[int], float]]] = {
    OURS: (lambda: ours("float32"), lambda m: 64 * m * WIDTH),
    "ours, tf32": (lambda: ours("tf32"), lambda m: 64 * m * WIDTH),
    "ours, bfloat16": (lambda: ours("bfloat16"), lambda m: 64 * m * WIDTH),
    "lightly": (lightly, lambda m: 16 * m**2),
    "pytorch-metric-learning": (metric_learning, lambda m: 18 * m**3),
    "full matrix": (lambda: full_matrix, lambda m: 13 * m**2),
    "full matrix, torch.compile": (lambda: torch.compile(full_matrix), lambda m: 5 * m**2),
    "row chunks, checkpointed": (lambda: checkpointed, lambda m: 16 * CHUNK * m + 64 * m * WIDTH),
    "torch's linear_cross_entropy": (lambda: linear_cross_entropy, lambda m: 64 * m * WIDTH + 4 * m**2),
    "inf-cl (half the pairs)": (inf_cl, lambda m: 64 * m * WIDTH),
    FLOOR: (None, lambda m: 8 * m * WIDTH),
}


def left_out(options: argparse.Namespace) -> dict[str, str]:
    """The contenders that this run has not, and why."""
    reasons = dict.fromkeys(options.skip, "by --skip")
    for name, package in {"lightly": "lightly", "pytorch-metric-learning": "pytorch_metric_learning"}.items():
        if not importlib.util.find_spec(package):
            reasons[name] = "not installed: pip install -e '.[benchmarks]'"
    if options.device == "cpu":
        reasons["ours, tf32"] = reasons["inf-cl (half the pairs)"] = "CUDA only"
    elif not importlib.util.find_spec("inf_cl"):
        reasons["inf-cl (half the pairs)"] = "not installed: pip install inf-cl"
    if not hasattr(F, "linear_cross_entropy"):
        reasons["torch's linear_cross_entropy"] = "torch 2.13 and later"
    compiler = options.device == "cuda" or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not options.compile:
        reasons["full matrix, torch.compile"] = "asked for by --compile"
    elif not compiler:
        reasons["full matrix, torch.compile"] = "no C++ compiler"
    return reasons


# One measurement, in a process of its own.


def measure(name: str, n: int, device: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Seconds of each repeat by process and by clock, bytes over the inputs, errors of value and gradient."""
    torch.set_num_threads(1)
    make, needs = CONTENDERS[name]
    if needs(2 * n) > 0.7 * free_bytes(device):  # the rest is others'
        return {"needs": needs(2 * n), "free": free_bytes(device)}
    result: dict[str, Any] = {}
    if make:
        loss = make()
        result["errors"] = errors(loss, device)  # also loads the libraries, and compiles
        views = projections(n, device)

        def step() -> None:
            for view in views:
                view.grad = None
            loss(*views).backward()
    else:
        matrix_products(CHECK_N, device)()
        step = matrix_products(n, device)
    result["bytes"] = peak_bytes(step, device)
    result["process"], result["clock"] = [], []
    began = time.perf_counter()
    while not result["clock"] or time.perf_counter() - began < seconds:
        if len(result["clock"]) >= repeats and time.perf_counter() - began > LEAST_SECONDS:
            break
        process, clock = time.process_time(), time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        result["process"].append(time.process_time() - process)
        result["clock"].append(time.perf_counter() - clock)
    return result


def projections(n: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two views of n images, (n, WIDTH) each, with gradients; the same numbers on every device."""
    z = torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(n))
    return [view.to(device, dtype).requires_grad_() for view in z]


def errors(loss: Callable[[Tensor, Tensor], Tensor], device: str) -> tuple[float, float]:
    """Relative differences of value and gradient to the full matrix in float64."""
    views, exact = projections(CHECK_N, device), projections(CHECK_N, device, torch.float64)
    value, expected = loss(*views), full_matrix(*exact)
    grads = torch.cat(torch.autograd.grad(value, views)).double()
    expected_grads = torch.cat(torch.autograd.grad(expected, exact))
    return (
        ((value - expected) / expected).abs().item(),
        ((grads - expected_grads).norm() / expected_grads.norm()).item(),
    )


def matrix_products(n: int, device: str) -> Callable[[], None]:
    """The floor of `simclr.nt_xent`: the same products of the same tiles in the same order, and nothing else."""
    from simclr.contrast import tiles
    from simclr.precision import rounding

    z = F.normalize(torch.cat(projections(n, device)).detach(), dim=1)
    m, total = len(z), torch.zeros_like(z)
    height, width = (min(side, m) for side in tiles.tile_shape(z.device))
    buffer = z.new_zeros(height * max(height, width))

    def visit(backward: bool) -> None:
        for rows, band in tiles.bands(m, m, 0, (0, n), (height, width)):
            z_i, total_i = z[rows], total[rows]
            for columns, mirror, _ in band:
                z_j = z[columns]
                logits = buffer[: len(z_i) * len(z_j)].view(len(z_i), len(z_j))
                torch.mm(z_i, z_j.T, out=logits)
                if backward:
                    total_i.addmm_(logits, z_j)
                    if mirror:
                        total[mirror].addmm_(logits.T, z_i)

    def step() -> None:
        with rounding("float32"):
            visit(backward=False)
            total.zero_()
            visit(backward=True)

    return step


def peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """The most bytes that are in use during a step, over those in use before it; None where there is no telling."""
    if device == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        step()
        return None
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what the small call has freed must not serve this one unseen
    reset.write_text("5")
    before = in_status(status, "VmRSS")
    step()
    return in_status(status, "VmHWM") - before


def in_status(file: Path, key: str) -> int:
    """Bytes, from a line of /proc in KiB."""
    return next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(key + ":"))


def free_bytes(device: str) -> int:
    """Memory that is free on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if Path("/proc/meminfo").exists():
        return in_status(Path("/proc/meminfo"), "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# Rounds, and what they say.


def rounds_of(n: int, names: list[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each contender measured at this size, round by round; ours twice in each: first, and again at the end."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    if options.device == "cpu" and n > RIVALS_TO:
        results = {name: [] for name in names if name == FLOOR or name.startswith(OURS)}
    for turn in range(options.rounds if n <= RIVALS_TO or options.device == "cuda" else 1):
        for name in [*results, OURS]:
            if results[name] and "clock" not in results[name][-1]:
                continue  # what did not fit or failed once does so again
            print(f"N = {n}, round {turn + 1}: {name} ...", file=sys.stderr, flush=True)
            results[name].append(in_fresh_process(name, n, options))
    return results


def in_fresh_process(name: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contender's measurement, by this file in a process of one thread; `failed` says why there is none."""
    arguments = {"name": name, "n": n, "device": options.device}
    arguments |= {"repeats": options.repeats, "seconds": options.seconds}
    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(result: dict[str, Any], device: str) -> list[float]:
    """Of each repeat: CPU time of the process, or time by the clock on CUDA."""
    return result["process" if device == "cpu" else "clock"]


def ratios(results: dict[str, list[dict[str, Any]]], name: str, device: str) -> list[float]:
    """The time of ours over that of `name`, in each round: of ours the mean of before and after."""
    if any("clock" not in result for result in results[OURS]):
        return []
    medians = [statistics.median(seconds_of(result, device)) for result in results[OURS]]
    around = [statistics.mean(pair) for pair in zip(medians[::2], medians[1::2], strict=True)]
    others = [statistics.median(seconds_of(result, device)) for result in results[name]]
    return [mine / other for mine, other in zip(around, others, strict=True)]


def table(measured: dict[int, dict[str, list[dict[str, Any]]]], device: str) -> list[str]:
    """Markdown, a row for each size and contender."""
    unit, scale, memory, byte = ("s", 1, "MB", 1e6) if device == "cpu" else ("ms", 1e3, "MiB", 2**20)
    own = f" process {unit} |" if device == "cpu" else ""
    lines = [
        f"| N | |{own} clock {unit} | n | ours / it | {memory} over inputs | error of value, gradient |",
        "|---|---|---|---|---|---|---|" + ("---|" if own else ""),
    ]
    for n, results in measured.items():
        for name, found in results.items():
            start = f"| {n:,} | {name} |"
            if "clock" not in found[-1]:
                lines.append(f"{start} {why_not(found[-1])} |" + " |" * (6 if own else 5))
                continue
            kinds = ("process", "clock") if own else ("clock",)
            times = [spread([s * scale for result in found for s in result[kind]], three_digits) for kind in kinds]
            count = sum(len(result["clock"]) for result in found)
            beside = "1" if name == OURS else spread(ratios(results, name, device), three_digits)
            taken = [result["bytes"] / byte for result in found if result["bytes"] is not None]
            held = spread(taken, three_digits) if taken else "not measured"
            lines.append(f"{start} {' | '.join(times)} | {count} | {beside} | {held} | {verdict(name, found)} |")
    return lines


def why_not(result: dict[str, Any]) -> str:
    """Why there is no measurement, for a cell."""
    if "needs" in result:
        return f"needs {result['needs'] / 1e9:,.1f} GB of {result['free'] / 1e9:,.1f} free"
    return f"failed: {result['failed']}".replace("|", "/")


def verdict(name: str, found: list[dict[str, Any]]) -> str:
    """The errors of value and gradient, marked if they are too large."""
    if name == FLOOR:
        return "-"
    worst = [max(result["errors"][i] for result in found) for i in (0, 1)]
    wrong = max(worst) > (ROUNDED if name.endswith(("tf32", "bfloat16")) else EXACT)
    return f"{worst[0]:.0e}, {worst[1]:.0e}" + (" **wrong**" if wrong else "")


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Median and range."""
    if not values:
        return "-"
    middle, low, high = (form(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def three_digits(value: float) -> str:
    """A number for a cell."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bars(measured: dict[int, dict[str, list[dict[str, Any]]]], device: str) -> list[str]:
    """The bars of one CPU core, each with what this run found."""
    if device != "cpu":
        return ["No bars are set for CUDA."]
    lines = ["| | N | bar | here | |", "|---|---|---|---|---|"]
    limits = {"lightly": 0.20, "full matrix": 0.30, FLOOR: 1.25}
    for name, limit in limits.items():
        for n in (4096, 8192):
            found = measured.get(n, {}).get(name)
            here = ratios(measured[n], name, device) if found and "clock" in found[-1] else []
            lines.append(bar(f"time, ours / {name}", n, limit, here, "", three_digits))
    for n, limit in {8192: 64, 32768: 256}.items():
        peaks = [result["bytes"] for result in measured.get(n, {}).get(OURS, []) if "clock" in result]
        here = [peak / 1e6 for peak in peaks if peak is not None]
        lines.append(bar("memory over the inputs", n, limit, here, " MB", three_digits))
    return lines


def bar(what: str, n: int, limit: float, here: list[float], unit: str, form: Callable[[float], str]) -> str:
    """A row of the table of bars."""
    end = ("met" if statistics.median(here) <= limit else "missed") if here else "not measured"
    return f"| {what} | {n:,} | <= {limit:g}{unit} | {spread(here, form) + unit if here else '-'} | {end} |"


def heading(absent: dict[str, str], options: argparse.Namespace) -> list[str]:
    """Machine, versions and command: what a figure needs beside it."""
    versions = [f"torch {torch.__version__}"]
    for package in ("simclr", "lightly", "pytorch-metric-learning"):
        if importlib.util.find_spec(package.replace("-", "_")):
            versions.append(f"{package} {metadata.version(package)}")
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    written = ["--markdown", str(options.markdown)]
    arguments = [a for a in sys.argv[1:] if a not in written]
    missing = [f"{name} ({why})" for name, why in absent.items()]
    return [
        f"Machine: {machine(options.device)}. {', '.join(versions)}; commit {commit.stdout.strip() or 'unknown'}.",
        f"Command: `{' '.join(['python benchmarks/nt_xent.py', *arguments])}`, rounds: {options.rounds}, of "
        f"{options.repeats} repeats or more in {options.seconds:g} s, each in a process of its own; median (range).",
        f"Left out: {', '.join(missing) or 'nothing'}.",
    ]


def machine(device: str) -> str:
    """What the figures are of."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{platform.system()} {platform.machine()}, {processor()}, 1 thread, {cores} cores usable{load}"


if __name__ == "__main__":
    main()
