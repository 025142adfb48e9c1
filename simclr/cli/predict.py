"""`simclr predict`: what images show, by a classifier of `simclr fit`."""

import csv
import io
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simclr.checks import out_of_range, refuse
from simclr.cli.embed import placed, progress_bar, workers_for
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser, device_named
from simclr.cli.ranks import on_launched_ranks
from simclr.cli.search import writable
from simclr.data.sources import list_folder
from simclr.distributed import rank
from simclr.files import write_atomically
from simclr.paths import expanded, shown, stored
from simclr.use.classify import UNLIKE, features_of, read_classifier
from simclr.use.embed import OnError
from simclr.use.embedded import in_a_line as of_one_line
from simclr.use.source import reopen

_ROWS = 40  # on the screen


@in_a_line
@on_launched_ranks
def predict(argv: list[str] | None = None) -> None:
    """Say what images show. See `simclr predict --help`."""
    quiet()
    config = guarded(lambda: predict_parser().parse_args(sys.argv[1:] if argv is None else argv))
    try:
        rows, skipped = guarded(lambda: _predicted(config))
    except KeyboardInterrupt:
        stop("stopped: nothing is written")
    except (BrokenProcessPool, EOFError, ConnectionError):  # one that decodes, or the one that starts them
        fail("a process that decodes has died, mostly of too little memory. Try --workers 0.", FAILED)
    if rank() > 0:
        return
    if config.csv is not None:
        guarded(lambda: write_atomically(expanded(config.csv), _as_csv(rows)))
    _print(rows, config.csv)
    for line in skipped[:3]:
        print(f"note: {len(skipped):,} could not be read: {of_one_line(line)}")
    if config.csv is not None:
        print(f"written to {config.csv}")


def predict_parser() -> Parser:
    """The settings of a prediction."""
    parser = Parser(
        command="predict",
        description="The class of images by a classifier of simclr fit, and whether they are of the kind it knows: the "
        "distance to the nearest training image, and the share of training images that have a nearer one.",
    )
    parser.add_argument(
        "--images", type=list[str], required=True, help="Images, or folders of them; IMAGE IMAGE ..., by itself."
    )
    parser.add_argument("--classifier", type=str, required=True, help="A file of simclr fit, or the run it lies in.")
    parser.add_argument("--csv", type=str | None, default=None, help="A file for all rows.")
    parser.add_argument("--on_error", type=OnError, default="raise", help="Of an image that cannot be read.")
    parser.add_argument(
        "--encoder", type=str | None, default=None, help="The encoder used, if it lies elsewhere by now."
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--workers", type=int | None, default=None, help="Processes that decode; 0 on a CPU if not set."
    )
    return parser


def _predicted(config: Any) -> tuple[list[dict[str, Any]], list[str]]:
    refuse(out_of_range(config.as_dict(), not_negative=("workers",)))
    writable(config, "csv")
    paths = _paths(config.images)
    classifier = read_classifier(config.classifier)
    source = reopen(classifier.about["encoder"], config.encoder)
    device = placed(source, device_named(config.device), config.device)
    with progress_bar("images") as advance:
        features, kept, skipped = features_of(
            paths, source, workers=workers_for(device, config.workers), on_error=config.on_error, advance=advance
        )
    if rank() > 0:
        return [], []
    found = classifier.predict(features)
    columns = (found.classes, found.probability, found.distance, found.quantile)
    rows = [
        {
            "path": shown(paths[file]),
            "class": classifier.classes[label],
            "probability": probability,
            "distance": max(0.0, distance),
            "quantile": quantile,
        }
        for file, label, probability, distance, quantile in zip(
            kept.tolist(), *(column.tolist() for column in columns), strict=True
        )
    ]
    return rows, skipped


def _paths(words: list[str]) -> list[str]:
    paths: list[str] = []
    for word in words:
        path = expanded(word)
        if path.is_dir():
            found = list_folder(word, "images").paths
            paths += [found[i] for i in range(len(found))]
        elif path.is_file():
            paths.append(stored(path))
        else:
            raise ValueError(f"images={word} is neither a file nor a folder.")
    if not paths:
        raise ValueError("images is empty. Give images, or folders of them.")
    return paths


def _as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _print(rows: list[dict[str, Any]], file: str | None) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("image", "class", "probability", "distance", "quantile", ""):
        table.add_column(name, overflow="fold", justify="left" if name in ("image", "class", "") else "right")
    for row in rows[:_ROWS]:
        unlike = "unlike the training images" if row["quantile"] >= UNLIKE else ""
        numbers = (f"{100 * row['probability']:.1f} %", f"{row['distance']:.3f}", f"{row['quantile']:.2f}")
        table.add_row(Text(of_one_line(row["path"])), Text(of_one_line(row["class"])), *numbers, unlike)
    Console(width=max(120, Console().width)).print(table)
    if len(rows) > _ROWS:
        print(f"and {len(rows) - _ROWS:,} more{'' if file else ': --csv FILE for all of them'}")
    if far := sum(row["quantile"] >= UNLIKE for row in rows):
        print(
            f"note: {far:,} of {len(rows):,} {'is' if far == 1 else 'are'} farther from the nearest training image "
            f"than {100 * UNLIKE:.0f} % of these are from each other: what the classifier says of them is worth little"
        )
