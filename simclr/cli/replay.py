"""`simclr replay`: a step whose numbers were not finite, computed again."""

import json
import math
import sys
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from simclr.cli.messages import FAILED, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser, device_named
from simclr.files import write_atomically
from simclr.nonfinite.dump import Dump, read_dump
from simclr.nonfinite.replay import replay_step
from simclr.paths import expanded

_LAYERS = 5  # in the table


@in_a_line
def replay(argv: list[str] | None = None) -> None:
    """Compute a step that was not finite again. See `simclr replay --help`."""
    quiet()
    config = guarded(lambda: replay_parser().parse_args(sys.argv[1:] if argv is None else argv))
    dump = guarded(lambda: _read(config))
    try:
        record = guarded(
            lambda: replay_step(
                dump, device_named(config.device), config.method, lambda text: print(text, file=sys.stderr, flush=True)
            )
        )
    except (KeyboardInterrupt, SystemExit) as stopped:  # the second is Lightning's answer to the first
        if isinstance(stopped, SystemExit) and stopped.code != FAILED:
            raise
        stop("stopped: nothing is known")
    if config.json is not None:
        content = json.dumps(_plain(record), indent=2) + "\n"
        guarded(lambda: write_atomically(expanded(config.json), content.encode()))
    Console(width=max(100, Console().width)).print(draw(record))
    if not record["finite"]:
        sys.exit(FAILED)


def replay_parser() -> Parser:
    """The settings of a replay."""
    parser = Parser(
        command="replay",
        description="Compute a step whose loss or gradient was not finite again, in the run's precision and in finer "
        "ones. Exit code 0 if the run's precision gives finite numbers here, 1 if not.",
    )
    parser.add_argument("--dump", type=str, required=True, help="RUN/nonfinite_step_N.pt, or the run; DUMP, by itself.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--method", type=str | None, default=None, help="Of a dump of a method of your own: its path, whose code runs."
    )
    parser.add_argument("--json", type=str | None, default=None, help="A file for all that was found, for programs.")
    return parser


def _read(config: Any) -> Dump:
    if config.json is not None:
        path = expanded(config.json)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"json={config.json} cannot be written. Name a file in a folder that exists.")
    return read_dump(config.dump)


def _plain(value: Any) -> Any:
    """As strict JSON has it: NaN and infinity as text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def draw(record: dict[str, Any]) -> Group:
    """The record as tables with the verdict below, for people."""
    run = record["run"]
    rank = "" if record["rank"] is None else f", rank {record['rank']}"
    head = f"step {record['step']}, epoch {record['epoch'] + 1}{rank}, {record['images_in_step']} images"
    table = Table(
        title=head, title_justify="left", title_style="", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for name in ("", "loss", "gradient", "not finite in", "first layer not finite"):
        table.add_column(name, no_wrap=True)
    ruined = [name for name, value in run.get("gradients", {}).items() if not math.isfinite(value)]
    losses = run.get("loss", [])
    table.add_row(f"the run ({run['precision']}, {run['device']})", _losses(losses), "", _count(ruined, run), "")
    refused: list[str] = []
    for precision, found in record["precisions"].items():
        if found["refused"]:
            table.add_row(precision, "not here", "", "", "")
            refused.append(f"{precision} cannot be computed here: {found['refused']}")
            continue
        gradient = "" if found["gradient"] is None else f"{found['gradient']:.4g}"
        many = {"gradients": dict.fromkeys(range(found["parameters"]))}
        first = Text(found["first_layer"] or "none")
        table.add_row(precision, _losses(found["loss"]), gradient, _count(found["ruined"], many), first)
    said = [Text(f"{text[0].upper()}{text[1:]}.", style="" if record["finite"] else "bold yellow")
            for text in record["verdict"]]  # fmt: skip
    return Group(table, Text(), *_layers(record), *map(Text, refused), *said)


def _losses(losses: list[float]) -> str:
    return ", ".join("none" if loss is None else f"{loss:.4g}" for loss in losses[:4]) + (" ..." if losses[4:] else "")


def _count(ruined: list[str], found: dict[str, Any]) -> str:
    total = len(found.get("gradients", {}))
    return f"{len(ruined)} of {total} parameters" if total else ""


def _layers(record: dict[str, Any]) -> list[Any]:
    """The layers with the largest outputs, where one precision is not finite and another is."""
    computed = {name: found["largest"] for name, found in record["precisions"].items() if found["largest"]}
    sound = [name for name in computed if record["precisions"][name]["finite"]]
    if not sound or len(sound) == len(computed):
        return []
    sizes = computed[sound[0]]
    chosen = sorted(sizes, key=lambda name: -sizes[name])[:_LAYERS]
    table = Table(title="largest outputs", title_justify="left", title_style="", box=box.SIMPLE_HEAD, show_edge=False,
                  pad_edge=False)  # fmt: skip
    for name in ("layer", *computed):
        table.add_column(name)
    for layer in chosen:
        table.add_row(Text(layer), *(f"{largest.get(layer, math.nan):.4g}" for largest in computed.values()))
    return [table, Text()]
