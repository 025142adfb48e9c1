"""`simclr check-data`: what a folder of images holds, and whether training can read all of it."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser
from simclr.cli.search import writable
from simclr.container import cores
from simclr.data.alike import nearly_equal
from simclr.data.decode import DEEPEST, RULES, ReadingRules
from simclr.data.depth import bits_of, low_range_text
from simclr.data.scan import Scanned, scan
from simclr.data.sources import Folder, list_folder, match_classes, may_be_skipped, refuse_shared
from simclr.eval.duplicates import copies
from simclr.files import write_atomically
from simclr.paths import expanded, shown, stored

_NAMED = 5  # files of a kind in the table


@in_a_line
def check_data(argv: list[str] | None = None) -> None:
    """Decode every image of a folder and say what is there. See `simclr check-data --help`."""
    quiet()
    config = guarded(lambda: check_data_parser().parse_args(sys.argv[1:] if argv is None else argv))
    folders = guarded(lambda: _folders(config))
    rules = guarded(lambda: rules_of(config, folders.values()))
    try:
        scanned = {
            part: scan_folder(folder, config.load_size, config.workers or cores(), rules)
            for part, folder in folders.items()
        }
    except KeyboardInterrupt:
        stop("stopped: not all images were looked at")
    except (BrokenProcessPool, EOFError, ConnectionError):  # one that decodes, or the one that starts them
        fail("a process that decodes has died, mostly of too little memory. Try --workers 1.", FAILED)
    record = record_of(folders, scanned, rules, config.workers or cores())
    guarded(lambda: _write(config, record, folders))
    Console(width=max(100, Console().width)).print(draw(record))
    if any(part["unreadable"] for part in record["folders"].values()):
        sys.exit(FAILED)


def check_data_parser() -> Parser:
    """The settings of a check."""
    parser = Parser(command="check-data", description="Decode every image of a folder, and say what is there.")
    parser.add_argument("--train_dir", type=str, required=True, help="A folder of images; FOLDER, by itself.")
    parser.add_argument("--test_dir", type=str | None, default=None, help="Test images, looked for among the others.")
    parser.add_argument("--load_size", type=int, default=224, help="Side at which images are compared, in pixels.")
    parser.add_argument("--workers", type=int | None, default=None, help="Processes that decode; all cores if not set.")
    parser.add_argument("--json", type=str | None, default=None, help="A file for all that was found, for programs.")
    parser.add_argument(
        "--bad", type=str | None, default=None, help="A list of the unreadable images, for training's data.leave_out."
    )
    parser.add_argument(
        "--copies",
        type=str | None,
        default=None,
        help="A list of the images that (nearly) equal an earlier one, for training's data.leave_out.",
    )
    parser.add_argument(
        "--max_pixels", type=int | None, default=RULES.max_pixels, help="As training's data.max_pixels."
    )
    parser.add_argument(
        "--sixteen_bit_max", type=int, default=RULES.sixteen_bit_max, help="As training's data.sixteen_bit_max."
    )
    add_channels(parser)
    return parser


def add_channels(parser: Parser) -> None:
    """What images are: the options of training that say so."""
    parser.add_argument("--channels", type=int, default=RULES.channels, help="As training's data.channels.")
    parser.add_argument("--bits", type=Literal[8, 16] | None, default=None, help="As training's data.bits.")


def rules_of(config: Any, folders: Iterable[Folder]) -> ReadingRules:
    """How training would read the images of some folders, by the options of `add_channels` and others of its names.

    Raises:
        ValueError: for channels that are not 1 or more.
    """
    if config.channels < 1:
        raise ValueError(f"channels={config.channels} is not a positive number.")
    bits = config.bits or (8 if config.channels == 3 else max(map(bits_of, folders)))
    given = {name: config[name] for name in ("max_pixels", "sixteen_bit_max") if name in config}
    return ReadingRules(**given, channels=config.channels, bits=bits)


def _folders(config: Any) -> dict[str, Folder]:
    """The folders to look at, as training would list them.

    Raises:
        ValueError: as training would refuse them, and for settings that cannot serve.
    """
    for name in ("load_size", "workers", "max_pixels"):
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"{name}={config[name]} is not a positive number.")
    if not 1 <= config.sixteen_bit_max <= DEEPEST:
        raise ValueError(f"sixteen_bit_max={config.sixteen_bit_max} is not between 1 and {DEEPEST}.")
    writable(config, "json", "bad", "copies")
    found = {"train": list_folder(config.train_dir, "train_dir")}
    if config.test_dir is not None:
        found["test"] = list_folder(config.test_dir, "test_dir")
        refuse_shared(found["train"], found["test"])
        match_classes(found["train"], found["test"])
    return found


def scan_folder(folder: Folder, side: int, processes: int, rules: ReadingRules) -> list[Scanned]:
    """What the images of a folder are, with a bar on a terminal; see `simclr.data.scan.scan`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        return list(
            progress.track(
                scan(folder.paths, side, processes, rules),
                len(folder.paths),
                description=folder.root,
            )
        )


def record_of(
    folders: dict[str, Folder], scanned: dict[str, list[Scanned]], rules: ReadingRules = RULES, threads: int = 1
) -> dict[str, Any]:
    """All that was found, for JSON.

    Args:
        folders: `train` and, if it was given, `test`.
        scanned: what each of their images is.
        rules: how files are read.
        threads: how many decode those again that look alike.
    """
    parts = {part: _record(folder, scanned[part]) for part, folder in folders.items()}
    record: dict[str, Any] = {"folders": parts, "read_as": {"channels": rules.channels, "bits": rules.bits}}
    _add_near(record, folders, scanned, rules, threads)
    if "test" in folders:
        train, test = ([i for i, found in enumerate(scanned[part]) if not found.error] for part in ("train", "test"))
        digests = [b"".join(scanned[part][i].digest for i in of) for part, of in (("train", train), ("test", test))]
        pairs = [(test[i], train[place]) for i, place in enumerate(copies(*digests).tolist()) if place >= 0]
        named = [[folders["test"].paths[i], folders["train"].paths[j]] for i, j in pairs]
        record["test_images_in_train"] = [[shown(path) for path in pair] for pair in named]
    return record


def _add_near(
    record: dict[str, Any],
    folders: dict[str, Folder],
    scanned: dict[str, list[Scanned]],
    rules: ReadingRules,
    threads: int,
) -> None:
    """Images that look like an earlier one, of the same folder or of the other, and do not equal it.

    Blank ones, which have nothing to show, are no part of it.
    """
    good = [(part, i) for part in folders for i, found in enumerate(scanned[part]) if not (found.error or found.blank)]
    of = [scanned[part][i] for part, i in good]
    paths = [folders[part].paths[i] for part, i in good]
    pairs, left = nearly_equal(paths, [found.picture for found in of], rules, threads)
    record["alike_not_looked_at"] = left
    for part in folders:
        record["folders"][part]["nearly_equal"] = []
    if "test" in folders:
        record["test_images_nearly_in_train"] = []
    for i, j in pairs:
        if of[i].digest == of[j].digest:
            continue  # equal, and told as such
        across = good[i][0] != good[j][0]
        lines = record["test_images_nearly_in_train"] if across else record["folders"][good[i][0]]["nearly_equal"]
        lines.append([shown(paths[i]), shown(paths[j])])


def _record(folder: Folder, scanned: list[Scanned]) -> dict[str, Any]:
    paths = [shown(path) for path in folder.paths]
    good = [i for i, found in enumerate(scanned) if not found.error]
    digests = b"".join(scanned[i].digest for i in good)
    first = [good[place] for place in copies(digests, digests).tolist()]
    sizes = Counter((scanned[i].width, scanned[i].height) for i in good)
    known = sorted((size for size in sizes if all(size)), key=lambda size: size[0] * size[1])
    classes = None
    if folder.classes is not None and folder.labels is not None:
        count = Counter(folder.labels.tolist())
        classes = {name: count[i] for i, name in enumerate(folder.classes)}
    return {
        "root": folder.root,
        "images": len(scanned),
        "classes": classes,
        "unreadable": [{"file": paths[i], "reason": found.error} for i, found in enumerate(scanned) if found.error],
        "duplicates": [[paths[i], paths[j]] for i, j in zip(good, first, strict=True) if i != j],
        "blank": [paths[i] for i in good if scanned[i].blank],
        "sizes": {"different": len(known), "smallest": known[0], "largest": known[-1]} if known else None,
        "formats": dict(Counter(scanned[i].kind for i in good).most_common()),
        "modes": dict(Counter(scanned[i].mode for i in good).most_common()),
        "channels": _numbers(found.channels for found in scanned),
        "bit_depths": _numbers(found.bits for found in scanned),
        **_statistics([scanned[i] for i in good]),
        "turned": sum(scanned[i].turned for i in good),
        "animated": sum(scanned[i].frames > 1 for i in good),
        "sixteen_bit_peak": max((peak for i in good if (peak := scanned[i].peak) is not None), default=None),
        "not_taken": folder.left_out_text,
        "notes": folder.notes,
    }


def _numbers(values: Iterable[int]) -> dict[str, int]:
    """How many images have each number, the most frequent first; those without one are left out."""
    return {str(value): count for value, count in Counter(values).most_common() if value}


def _statistics(scanned: list[Scanned]) -> dict[str, list[float] | None]:
    """Mean and standard deviation of each channel over all images, for values in [0, 1]; None without images."""
    if not scanned:
        return {"mean": None, "std": None}
    mean = np.mean([found.mean for found in scanned], axis=0)
    spread = np.sqrt(np.maximum(np.mean([found.square for found in scanned], axis=0) - mean**2, 0))
    return {"mean": [round(value, 4) for value in mean.tolist()], "std": [round(value, 4) for value in spread.tolist()]}


def _write(config: Any, record: dict[str, Any], folders: dict[str, Folder]) -> None:
    if config.json is not None:
        write_atomically(expanded(config.json), (json.dumps(record, indent=2) + "\n").encode())
    if config.bad is not None:
        bad = {part: [line["file"] for line in found["unreadable"]] for part, found in record["folders"].items()}
        write_list(config.bad, bad, folders)
    if config.copies is not None:
        copied = {
            part: sorted({pair[0] for kind in ("duplicates", "nearly_equal") for pair in found[kind]})
            for part, found in record["folders"].items()
        }
        write_list(config.copies, copied, folders)


def write_list(path: str, files: dict[str, list[str]], folders: dict[str, Folder]) -> None:
    """Write a list as `data.leave_out` takes it: training images by paths below their folder, others from the root.

    Args:
        path: the file.
        files: `train` and perhaps `test`: names that people see.
        folders: where `train` lies.
    """
    train = Path(stored(folders["train"].root))
    lines = [Path(stored(file)).relative_to(train).as_posix() for file in files["train"]]
    lines += [stored(file) for file in files.get("test", [])]
    write_atomically(expanded(path), os.fsencode("".join(f"{line}\n" for line in lines)))


def draw(record: dict[str, Any]) -> Group:
    """The record as a table with what to do below it, for people."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    parts = record["folders"]
    for part in parts.values():
        table.add_column(Text(part["root"]), overflow="fold")
    for name, words in _ROWS.items():
        table.add_row(name, *(Text(words(part)) for part in parts.values()))
    if pairs := record.get("test_images_in_train"):
        table.add_row("test in train", "", Text(_listed(len(pairs), [f"{test} is {train}" for test, train in pairs])))
    elif pairs is not None:
        table.add_row("test in train", "", "none")
    if near := record.get("test_images_nearly_in_train"):
        alike = [f"{test} looks like {train}" for test, train in near]
        table.add_row("test nearly in train", "", Text(_listed(len(near), alike)))
    read_as = record["read_as"]
    notes = [Text(note) for part in parts.values() for note in [*part["notes"], *_notes(part, read_as)]]
    if left := record["alike_not_looked_at"]:
        notes.append(Text(f"{left:,} more pairs look alike by their hashes; their pixels were not compared."))
    if bad := sum(len(part["unreadable"]) for part in parts.values()):
        are = "1 image cannot" if bad == 1 else f"{bad:,} images cannot"
        few = all(may_be_skipped(len(part["unreadable"]), part["images"]) for part in parts.values())
        way = (
            ", or leave them out: simclr train ... --data.on_error skip"
            if few
            else ", or leave them out by a list: --bad bad.txt here, --data.leave_out bad.txt there."
        )
        notes.append(Text(f"{are} be read, and training stops there. Repair or remove{way}", style="bold yellow"))
    return Group(table, *([Text(), *notes] if notes else []))


def _listed(count: int, lines: list[str]) -> str:
    more = ["..."] if count > _NAMED else []
    return "\n".join([f"{count:,}", *lines[:_NAMED], *more]) if count else "none"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"


def _by_number(found: dict[str, int]) -> str:
    """One number, or how many images have each."""
    return next(iter(found)) if len(found) == 1 else ", ".join(f"{n:,} of {key}" for key, n in found.items()) or "none"


def _values(values: list[float] | None) -> str:
    return "none" if values is None else ", ".join(f"{value:.4g}" for value in values)


def _classes(part: dict[str, Any]) -> str:
    if part["classes"] is None:
        return "none: no labels"
    counts = part["classes"].values()
    least, most = min(counts), max(counts)
    return (
        f"{len(counts):,}, of {least:,} images each" if least == most else f"{len(counts):,}, of {least:,} to {most:,}"
    )


def _sizes(part: dict[str, Any]) -> str:
    if part["sizes"] is None:
        return "unknown"
    (w, h), (width, height) = part["sizes"]["smallest"], part["sizes"]["largest"]
    return f"{w} x {h}" if (w, h) == (width, height) else f"{w} x {h} to {width} x {height}"


_ROWS = {
    "images": lambda part: f"{part['images']:,}",
    "classes": _classes,
    "sizes": _sizes,
    "formats": lambda part: _counts(part["formats"]),
    "colour modes": lambda part: _counts(part["modes"]),
    "channels": lambda part: _by_number(part["channels"]),
    "bit depths": lambda part: _by_number(part["bit_depths"]),
    "mean": lambda part: _values(part["mean"]),
    "std": lambda part: _values(part["std"]),
    "unreadable": lambda part: _listed(
        len(part["unreadable"]), [f"{bad['file']} ({bad['reason']})" for bad in part["unreadable"]]
    ),
    "duplicates": lambda part: _listed(len(part["duplicates"]), [f"{a} is {b}" for a, b in part["duplicates"]]),
    "nearly equal": lambda part: _listed(
        len(part["nearly_equal"]), [f"{a} looks like {b}" for a, b in part["nearly_equal"]]
    ),
    "blank": lambda part: _listed(len(part["blank"]), part["blank"]),
    "not taken": lambda part: part["not_taken"] or "none",
}


def _notes(part: dict[str, Any], read_as: dict[str, int]) -> list[str]:
    """What decoding makes of images that are not 8-bit RGB, upright and still."""
    modes, rgb = part["modes"], read_as["channels"] == 3
    deep = sum(n for mode, n in modes.items() if mode.endswith("bit"))
    kinds = {
        "have 16 bits a channel, brought to 8": deep if read_as["bits"] == 8 else 0,
        "have an alpha channel, which is dropped": sum(modes.get(mode, 0) for mode in ("RGBA", "LA", "PA")) * rgb,
        "are gray: all three channels are the same (or one: --channels 1)": sum(
            modes.get(mode, 0) for mode in ("L", "1")
        )
        * rgb,
        "are CMYK, turned into RGB": modes.get("CMYK", 0),
        "are turned upright by their EXIF orientation": part["turned"],
        "have several frames or pages, of which the first is taken": part["animated"]
        if read_as["channels"] <= 3
        else 0,
    }
    found = [f"{count:,} of {part['images']:,} in {part['root']} {what}." for what, count in kinds.items() if count]
    if (peak := part["sixteen_bit_peak"]) is not None and (low := low_range_text(peak, "The 16-bit ones")):
        found.append(low)
    return found
