"""`simclr duplicates`: images of a folder that are there twice, or nearly."""

import json
import os
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.text import Text

from simclr.cli.check_data import add_channels, record_of, rules_of, scan_folder, write_list
from simclr.cli.embed import placed, progress_bar, workers_for
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser, device_named
from simclr.cli.ranks import on_launched_ranks
from simclr.cli.search import writable
from simclr.container import cores
from simclr.data.scan import Scanned
from simclr.data.sources import Folder, list_folder
from simclr.distributed import rank
from simclr.files import write_atomically
from simclr.paths import expanded, shown, stored
from simclr.use.alike import alike_by_features, groups_of
from simclr.use.embed import embed_folder, help_to_embed, images_digest
from simclr.use.embedded import Embedded, read_embedded
from simclr.use.embedded import in_a_line as of_one_line
from simclr.use.source import Source, open_source

_NAMED = 10  # groups of a kind on the screen
_MANY = 0.1  # of the images: so many that look alike are no duplicates
_KINDS = {"exact": "the same pixels", "near": "nearly the same pixels", "features": "nearly the same features"}


@in_a_line
@on_launched_ranks
def duplicates(argv: list[str] | None = None) -> None:
    """Find images that are there twice, or nearly. See `simclr duplicates --help`."""
    quiet()
    config = guarded(lambda: duplicates_parser().parse_args(sys.argv[1:] if argv is None else argv))
    folder, embedded, note = guarded(lambda: _opened(config))
    try:
        if rank() > 0:
            guarded(lambda: _help(config, folder))
            return
        rules = guarded(lambda: rules_of(config, [folder]))
        scanned = scan_folder(folder, config.load_size, config.workers or cores(), rules)
        guarded(lambda: _refuse_unreadable(folder, scanned))
        found = record_of({"train": folder}, {"train": scanned}, rules, config.workers or cores())
        pairs = guarded(lambda: _by_features(config, folder, embedded))
    except KeyboardInterrupt:
        stop("stopped: not all images were looked at")
    except (BrokenProcessPool, EOFError, ConnectionError):  # one that decodes, or the one that starts them
        fail("a process that decodes has died, mostly of too little memory. Try --workers 1.", FAILED)
    record = _record(folder, found["folders"]["train"], pairs, found["alike_not_looked_at"])
    guarded(lambda: _write(config, record, folder))
    console = Console(width=max(100, Console().width))
    for line in lines_of(record, config.min_cosine):
        console.print(Text(line))
    if note:
        print(f"note: {note}")
    if config.copies is not None:
        print(f"written to {config.copies}: {len(record['copies']):,} files, for training's --data.leave_out")


def duplicates_parser() -> Parser:
    """The settings of a search for duplicates."""
    parser = Parser(
        command="duplicates",
        description="Images of a folder with the same pixels, nearly the same, and, given features or an encoder, "
        "nearly the same features.",
    )
    parser.add_argument("--folder", type=str, required=True, help="A folder of images; FOLDER, by itself.")
    parser.add_argument("--in", type=str | None, default=None, help="Its features, as simclr embed has written them.")
    parser.add_argument("--encoder", type=str | None, default=None, help="Or the encoder to make them with: a run.")
    parser.add_argument(
        "--min_cosine",
        type=float,
        default=0.98,
        help="From which cosine on features are alike; each encoder has its own.",
    )
    parser.add_argument(
        "--copies", type=str | None, default=None, help="A list of all but the first of each group, for data.leave_out."
    )
    parser.add_argument("--json", type=str | None, default=None, help="A file for all that was found, for programs.")
    parser.add_argument("--load_size", type=int, default=224, help="Side at which pixels are compared.")
    add_channels(parser)
    parser.add_argument("--workers", type=int | None, default=None, help="Processes that decode; all cores if not set.")
    parser.add_argument("--device", type=str, default="auto", help="Where an encoder computes: auto, cpu, cuda ...")
    return parser


def _opened(config: Any) -> tuple[Folder, Embedded | None, str]:
    for name in ("load_size", "workers"):
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"{name}={config[name]} is not a positive number.")
    if not 0 < config.min_cosine <= 1:
        raise ValueError(f"min_cosine={config.min_cosine} is not above 0 and at most 1.")
    if config["in"] is not None and config.encoder is not None:
        raise ValueError("in and encoder: give one of them.")
    writable(config, "copies", "json")
    folder = list_folder(config.folder, "folder")
    if config.encoder is not None:
        open_source(config.encoder)  # refused before an hour of decoding, not after
    embedded = read_embedded(config["in"]) if config["in"] is not None else None
    return folder, embedded, _note_of_others(config, folder, embedded) if embedded is not None else ""


def _note_of_others(config: Any, folder: Folder, embedded: Embedded) -> str:
    """What to say where the folder changed after its features were made; those of another folder are refused."""
    if _names(folder).isdisjoint(embedded.names):
        raise ValueError(f"in={config['in']} has features of {embedded.root}, of no image in {config.folder}.")
    if embedded.about["images_digest"] == images_digest(folder):
        return ""
    if embedded.root != stored(folder.root):
        raise ValueError(
            f"in={config['in']} has features of {embedded.root}, whose images have the names of those in "
            f"{config.folder} and are others. Use simclr embed {config.folder}."
        )
    return f"the images have changed since {config['in']} was made: embed them again to compare them as they are"


def _refuse_unreadable(folder: Folder, scanned: list[Scanned]) -> None:
    if all(found.error for found in scanned):
        raise ValueError(f"none of the {len(scanned):,} images in {folder.root} can be read: {scanned[0].error}.")


def _names(folder: Folder) -> set[str]:
    top = len(os.path.join(stored(folder.root), ""))
    return {path[top:].replace(os.sep, "/") for path in folder.paths}


def _by_features(config: Any, folder: Folder, embedded: Embedded | None) -> list[tuple[str, str, float]] | None:
    """Pairs of names whose features are alike; None where there are none to compare."""
    if embedded is not None:
        return _pairs(embedded, _names(folder), config.min_cosine)
    if config.encoder is None:
        return None
    source, workers = _encoder(config)
    with tempfile.TemporaryDirectory() as place, progress_bar(config.folder) as advance:
        made = embed_folder(
            config.folder,
            source,
            os.path.join(place, "features"),
            workers=workers,
            on_error="skip",
            advance=advance,
        )
        return _pairs(made, _names(folder), config.min_cosine)


def _help(config: Any, folder: Folder) -> None:
    """What ranks other than the first do: their share of the features."""
    if config.encoder is not None:
        help_to_embed(folder, *_encoder(config))


def _encoder(config: Any) -> tuple[Source, int]:
    """The encoder on its device, and how many processes decode for it."""
    source = open_source(config.encoder)
    return source, workers_for(placed(source, device_named(config.device), config.device), None)


def _pairs(embedded: Embedded, own: set[str], min_cosine: float) -> list[tuple[str, str, float]]:
    names = embedded.names
    found = [(names[i], names[j], cosine) for i, j, cosine in alike_by_features(embedded.features, min_cosine)]
    return [pair for pair in found if pair[0] in own and pair[1] in own]


def _record(
    folder: Folder, part: dict[str, Any], pairs: list[tuple[str, str, float]] | None, left: int
) -> dict[str, Any]:
    """All that was found, for JSON; files by the names that people see."""
    exact = [(a, b) for a, b in part["duplicates"]]
    near = [(a, b) for a, b in part["nearly_equal"]]
    known = {frozenset(pair) for pair in (*exact, *near)}
    kinds: dict[str, Any] = {"exact": groups_of(exact), "near": groups_of(near)}
    copies = {a for a, _ in (*exact, *near)}
    record: dict[str, Any] = {"folder": folder.root, "images": part["images"], "groups": kinds, "features": None}
    if pairs is not None:
        named = [(_shown(folder, a), _shown(folder, b), cosine) for a, b, cosine in pairs]
        record["features"] = [[a, b, cosine] for a, b, cosine in named if frozenset((a, b)) not in known]
        kinds["features"] = groups_of((a, b) for a, b, _ in record["features"])
        copies |= {a for a, _, _ in named}
    return {**record, "unreadable": part["unreadable"], "copies": sorted(copies), "not_looked_at": left}


def _shown(folder: Folder, name: str) -> str:
    return shown(os.path.join(stored(folder.root), *name.split("/")))


def _write(config: Any, record: dict[str, Any], folder: Folder) -> None:
    if config.json is not None:
        write_atomically(expanded(config.json), (json.dumps(record, indent=2) + "\n").encode())
    if config.copies is not None:
        write_list(config.copies, {"train": record["copies"]}, {"train": folder})


def _number(copies: int, groups: list[list[str]]) -> str:
    if not groups:
        return "none"
    where = "its group" if len(groups) == 1 else f"{len(groups):,} groups"
    return f"{copies:,} beside the first of {where}"


def lines_of(record: dict[str, Any], min_cosine: float) -> list[str]:
    """What was found, for people."""
    lines = [f"{record['images']:,} images in {record['folder']}"]
    for kind, groups in record["groups"].items():
        count = sum(len(group) - 1 for group in groups)
        what = f"{_KINDS[kind]}{f' (cosine {min_cosine:g} or more)' if kind == 'features' else ''}"
        lines.append(f"{what}: {_number(count, groups)}")
        lines += [
            f"    {', '.join(map(of_one_line, group[:6]))}{' ...' if len(group) > 6 else ''}"
            for group in groups[:_NAMED]
        ]
        lines += ["    ..."] if len(groups) > _NAMED else []
    if record["features"] and len(record["features"]) > _MANY * record["images"]:
        lines.append(
            f"note: {len(record['features']):,} are many: of this encoder a cosine of {min_cosine:g} tells no copies. "
            "Raise --min_cosine."
        )
    if record["unreadable"]:
        count = len(record["unreadable"])
        are = "1 image" if count == 1 else f"{count:,} images"
        lines.append(f"note: {are} cannot be read: simclr check-data names them")
    if record["not_looked_at"]:
        lines.append(f"note: {record['not_looked_at']:,} more pairs look alike by their hashes and were not compared")
    return lines
