"""`simclr embed`: the features of a folder of images."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simclr.allocator import keep_freed_memory
from simclr.checks import out_of_range, refuse
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser, device_named
from simclr.cli.ranks import on_launched_ranks
from simclr.container import cores
from simclr.distributed import rank
from simclr.use.embed import OnError, embed_folder
from simclr.use.embedded import Embedded
from simclr.use.embedded import in_a_line as in_a_line_of
from simclr.use.source import Source, open_source
from simclr.use.tables import Table, need_packages, write_table

_MOST_WORKERS = 8  # processes that decode, where nobody says how many: for one GPU


@in_a_line
@on_launched_ranks
def embed(argv: list[str] | None = None) -> None:
    """Write the features of all images of a folder. See `simclr embed --help`."""
    quiet()
    keep_freed_memory()
    config = guarded(lambda: embed_parser().parse_args(sys.argv[1:] if argv is None else argv))
    source, device = guarded(lambda: _source(config))
    begun, worked = time.monotonic(), [0]
    try:
        with progress_bar(config.images) as advance:

            def count(done: int, files: int) -> None:
                worked.append(done)
                advance(done, files)

            found: Embedded = guarded(
                lambda: embed_folder(
                    config.images,
                    source,
                    config.out,
                    batch_size=config.batch_size,
                    workers=workers_for(device, config.workers),
                    on_error=config.on_error,
                    advance=count,
                )
            )
    except KeyboardInterrupt:
        stop(f"stopped after {worked[-1]:,} files; the same command goes on")
    except (BrokenProcessPool, EOFError, ConnectionError):  # one that decodes, or the one that starts them
        fail("a process that decodes has died, mostly of too little memory. Try --workers 0.", FAILED)
    if rank() > 0:
        return
    seconds, computed = time.monotonic() - begun, worked[-1] - (worked[1] if len(worked) > 1 else worked[-1])
    rows, width = found.features.shape
    speed = f", {computed / seconds:,.0f} images/s" if computed else ""
    what = "written to" if len(worked) > 1 else "was whole already:"
    print(f"features of {rows:,} images, {width} numbers each, {what} {found.folder}{speed}")
    for line in _remarks(found):
        print(line)
    if config.format != "npy":
        print(f"written to {guarded(lambda: write_table(found, config.format))}", flush=True)


def embed_parser() -> Parser:
    """The settings of an embedding."""
    parser = Parser(
        command="embed",
        description="Write the features of all images of a folder, of any sizes: features.npy, paths.txt, about.json. "
        "Killed at any time, the same command goes on and ends in the same bits.",
    )
    parser.add_argument("--images", type=str, required=True, help="A folder of images; FOLDER, by itself.")
    parser.add_argument("--out", type=str, required=True, help="A folder of its own for the features.")
    add_encoder(parser)
    parser.add_argument("--format", type=Table, default="npy", help="A file for other programs beside features.npy.")
    parser.add_argument(
        "--on_error", type=OnError, default="raise", help="Of an image that cannot be read. skip: it is listed."
    )
    add_computing(parser)
    return parser


def add_encoder(parser: Parser) -> None:
    """The options that name an encoder, one of others' networks too."""
    parser.add_argument(
        "--encoder",
        type=str,
        required=True,
        help="A run, what simclr export wrote, encoder.safetensors; or torchvision:NAME or timm:NAME.",
    )
    parser.add_argument(
        "--weights", type=str | None, default=None, help="Of torchvision:NAME or timm:NAME: a state dict in a file."
    )
    parser.add_argument("--prefix", type=str, default="", help="Of the weights that are taken; cut from their names.")
    parser.add_argument(
        "--random_weights", type=bool, default=False, help="Of torchvision:NAME or timm:NAME: none, as a yardstick."
    )
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="Of torchvision:NAME or timm:NAME, if not as published."
    )


def add_computing(parser: Parser) -> None:
    """Where features are computed, and how many at a time."""
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="Images at a time; by their size if not set."
    )
    parser.add_argument(
        "--workers", type=int | None, default=None, help="Processes that decode ahead; 0 on a CPU if not set."
    )


def encoder_of(config: Any) -> tuple[Source, str]:
    """The encoder that the options name, on the device that they name, and that device.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: for what cannot serve.
    """
    refuse(out_of_range(config.as_dict(), counts=("batch_size", "image_size"), not_negative=("workers",)))
    device = device_named(config.device)
    source = open_source(
        config.encoder,
        weights=config.weights,
        prefix=config.prefix,
        random_weights=config.random_weights,
        image_size=config.image_size,
    )
    return source, placed(source, device, config.device)


def placed(source: Source, device: str, asked: str) -> str:
    """Bring an encoder to a device, and say which; a graph stays on the CPU unless another was asked for."""
    if asked == "auto":
        try:
            source.to(device)
        except ValueError:
            return "cpu"
        return device
    source.to(device)
    return device


def workers_for(device: str, asked: int | None) -> int:
    """Processes that decode: none beside a CPU that encodes, which has its hands full."""
    if asked is not None:
        return asked
    return 0 if device.startswith("cpu") else max(1, min(_MOST_WORKERS, cores() - 1))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal that is told how many are done, of how many."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not console.is_terminal or rank() > 0
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _source(config: Any) -> tuple[Source, str]:
    need_packages(config.format)
    source, device = encoder_of(config)
    if source.dropped:
        print(f"note: {', '.join(source.dropped)} of {config.weights} belong to a classifier and are left out")
    return source, device


def _remarks(found: Embedded) -> list[str]:
    bad, notes = found.about["unreadable"], []
    if bad:
        named = "; ".join(in_a_line_of(f"{name} ({why})") for name, why in bad[:3])
        more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
        notes.append(f"note: {len(bad):,} could not be read and have no row, see about.json: {named}{more}")
    if found.about["not_taken"]:
        notes.append(f"note: not taken: {in_a_line_of(found.about['not_taken'])}")
    return notes
