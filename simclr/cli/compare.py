"""`simclr compare`: runs beside each other, in the terminal and as one page."""

import sys
from pathlib import Path

from simclr.cli.messages import fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.compare import (
    Comparison,
    as_csv,
    as_markdown,
    compare_runs,
    neighbours_beside,
    print_comparison,
    write_page,
)
from simclr.compare.text import printable
from simclr.files import write_atomically
from simclr.paths import expanded


@in_a_line
def compare(argv: list[str] | None = None) -> None:
    """Show runs beside each other: settings that differ, results, curves. See `simclr compare --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config = guarded(lambda: compare_parser().parse_args(args))
    if config.neighbours < 0:
        fail(f"neighbours={config.neighbours} is negative. Use 0 for none.")
    wanted = {"html": None if config.text else config.html, "markdown": config.markdown, "csv": config.csv}
    files = {kind: expanded(path) for kind, path in wanted.items() if path is not None}
    found = guarded(lambda: _compared(config.runs, files))
    print_comparison(found)
    remarks = [f"left out: {path}: {why}" for path, why in found.left_out] + [f"note: {note}" for note in found.notes]
    for remark in remarks:
        print(printable(remark, sys.stdout.encoding))
    guarded(lambda: _write(found, files, config.neighbours, config.device))
    for path in files.values():
        print(f"written to {path}")


def _compared(runs: list[str], files: dict[str, Path]) -> Comparison:
    """Compare, unless what is to be written would replace a file of a run.

    Raises:
        ValueError: naming the file.
    """
    found = compare_runs(runs)
    for kind, path in files.items():
        if any(run.path.resolve() in path.resolve().parents for run in found.runs):
            raise ValueError(f"{kind}={path} lies in the folder of a run that is compared. Choose another place.")
        if path.is_dir():
            raise ValueError(f"{kind}={path} is a folder. Give the name of a file.")
    if len({path.resolve() for path in files.values()}) < len(files):
        raise ValueError("html, markdown and csv name the same file. Give each its own.")
    return found


def _write(found: Comparison, files: dict[str, Path], neighbours: int, device: str) -> None:
    for kind, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "html":
            beside = None
            if neighbours > 1:
                beside = neighbours_beside(found, most=neighbours, device=device_named(device), say=_say)
            write_page(found, path, beside)
        else:
            write_atomically(path, (as_markdown if kind == "markdown" else as_csv)(found).encode())


def _say(text: str) -> None:
    print(printable(text, sys.stdout.encoding), flush=True)


def compare_parser() -> Parser:
    """The settings of a comparison."""
    parser = Parser(
        command="compare", description="Show runs beside each other: settings that differ, results, curves."
    )
    parser.add_argument(
        "--runs", type=list[str], required=True, help="Run folders, or folders that hold some; RUN RUN ..., by itself."
    )
    parser.add_argument("--html", type=str, default="compare.html", help="The page, one file that works offline.")
    parser.add_argument("--markdown", type=str | None, default=None, help="Write the tables as Markdown too.")
    parser.add_argument("--csv", type=str | None, default=None, help="Write a row for each run too.")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=8,
        help="Runs of the table, from the first, whose encoders find the nearest images of the same queries for the "
        "page; 0 for none.",
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to find them: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--text", action="store_true", help="Only print: write no page.")
    return parser
