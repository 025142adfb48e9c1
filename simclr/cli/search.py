"""`simclr search`: the images of an embedded folder that are nearest to one."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simclr.checks import out_of_range, refuse
from simclr.cli.embed import placed
from simclr.cli.messages import guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.data.decode import read_images
from simclr.files import write_atomically
from simclr.paths import expanded, stored
from simclr.use.embedded import in_a_line as of_one_line
from simclr.use.embedded import read_embedded
from simclr.use.index import LARGE, has_faiss, indexed_rows, need_faiss
from simclr.use.search import contact_sheet, nearest_rows
from simclr.use.source import reopen

_K = 12  # found where nobody says how many
_DRAWN_BY = b"simclr search"  # in a contact sheet
_BEGINS = {"json": b"{", "csv": b"path,class,"}  # what commands write under options of these names


@in_a_line
def search(argv: list[str] | None = None) -> None:
    """Find the images that are nearest to one. See `simclr search --help`."""
    quiet()
    config = guarded(lambda: search_parser().parse_args(sys.argv[1:] if argv is None else argv))
    record = guarded(lambda: _search(config))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("", "cosine", "image"):
        table.add_column(name, overflow="fold")
    for place, hit in enumerate(record["hits"], 1):
        table.add_row(str(place), f"{hit['cosine']:.4f}", Text(of_one_line(hit["name"])))
    Console(width=max(100, Console().width)).print(table)
    if record["note"]:
        print(f"note: {record['note']}")
    print(f"written to {record['sheet']}")


def search_parser() -> Parser:
    """The settings of a search."""
    parser = Parser(command="search", description="The images of an embedded folder that are nearest to one.")
    parser.add_argument("--image", type=str, required=True, help="An image file; IMAGE, by itself.")
    parser.add_argument("--in", type=str, required=True, help="A folder that simclr embed has written.")
    parser.add_argument(
        "--k", type=int | None, default=None, help=f"How many to find; {_K}, or all where there are fewer, if not set."
    )
    parser.add_argument(
        "--png", type=str | None, default=None, help="The contact sheet; search.png beside the features."
    )
    parser.add_argument("--json", type=str | None, default=None, help="A file for what was found, for programs.")
    parser.add_argument(
        "--encoder", type=str | None, default=None, help="The encoder used, if it lies elsewhere by now."
    )
    parser.add_argument(
        "--exact",
        type=bool | None,
        default=None,
        help="Look at every row. false: at a part of them, by an index of faiss that the first search makes. If not "
        "given, every row to a million, and beyond where faiss is not installed.",
    )
    parser.add_argument("--device", type=str, default="cpu", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    return parser


def writable(config: Any, *options: str) -> None:
    """Refuse files that could not be written or hold what is not this command's, before anything is computed.

    Args:
        config: the settings.
        options: those that name a file; None where there is none to write.
    """
    for name in options:
        if config[name] is None:
            continue
        path = expanded(config[name])
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{name}={config[name]} cannot be written. Name a file in a folder that exists.")
        if path.is_file() and not _is_own(name, path):
            raise ValueError(f"{name}={config[name]} is there already and holds something else. Name another file.")


def _is_own(option: str, path: Path) -> bool:
    """Whether a file may be written anew: it is empty, or begins as what the option of this name is for."""
    with path.open("rb") as file:
        head = file.read(4096)
    if option == "png":
        return not head or _DRAWN_BY in head
    return not head or (head.startswith(_BEGINS[option]) if option in _BEGINS else b"\0" not in head)


def _search(config: Any) -> dict[str, Any]:
    refuse(out_of_range(config.as_dict(), counts=("k",)))
    writable(config, "png", "json")
    if not os.path.isfile(stored(config.image)):
        raise ValueError(f"image={config.image} is no file. Give an image.")
    found = read_embedded(config["in"])
    if config.k is not None and config.k > len(found.features):
        raise ValueError(f"k={config.k} is more than the {len(found.features):,} images in {config['in']}. Use fewer.")
    large = len(found.features) > LARGE
    exact = not (large and has_faiss()) if config.exact is None else config.exact
    if not exact:
        need_faiss()
    source = reopen(found.about["encoder"], config.encoder)
    placed(source, device_named(config.device), config.device)
    square = read_images([stored(config.image)], source.side, rules=source.rules)
    hits = (nearest_rows if exact else indexed_rows)(found, source.features(square)[0], config.k or _K)
    named = [(found.path(row), found.names[row], cosine) for row, cosine in hits]
    path = expanded(config.png) if config.png else found.folder / "search.png"
    buffer = io.BytesIO()
    info = PngInfo()
    info.add_text("Software", _DRAWN_BY.decode())
    contact_sheet(stored(config.image), named, source.rules).save(buffer, "PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
    record = {"query": stored(config.image), "folder": stored(found.folder), "sheet": str(path)}
    note = None if exact else "by an index that misses some of the nearest now and then; of all rows: --exact true"
    if exact and large and config.exact is None:
        note = f"looked at all {len(found.features):,} rows; pip install 'simclr[faiss]' for an index, which takes less"
    lines = [{"path": path, "name": name, "row": row, "cosine": cosine}
             for (path, name, cosine), (row, _) in zip(named, hits, strict=True)]  # fmt: skip
    record_of_hits: dict[str, Any] = {**record, "exact": exact, "note": note, "hits": lines}
    if config.json is not None:
        write_atomically(expanded(config.json), (json.dumps(record_of_hits, indent=2) + "\n").encode())
    return record_of_hits
