"""`simclr eval`: a pretrained encoder by several protocols on features that are computed once."""

import inspect
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ActionConfigFile, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from simclr.allocator import keep_freed_memory
from simclr.checkpoint import Checkpoint
from simclr.cli.linear_eval import add_images, add_supervised, image_settings, parse_evaluation
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.cli.ranks import echo, on_launched_ranks
from simclr.data import ImageData
from simclr.data.labelled import labelled_data
from simclr.data.module import folders_shown
from simclr.distributed import rank
from simclr.eval.evaluation import write_result
from simclr.eval.protocol import OF_EVAL, find_protocol, settings_in
from simclr.eval.suite import EVAL, YARDSTICKS, evaluate, record_sha256, refuse_unknown_protocols
from simclr.eval.tables import append_csv, as_markdown, identities, markdown_table, notes, refuse_foreign_csv, table
from simclr.eval.transfer import FOLDER, TABLE, SuiteEntry, default_name, read_suite, suite_table
from simclr.evaluation_figures import show_protocols
from simclr.files import write_atomically
from simclr.paths import expanded

_FEATURES = "features"  # in the run folder


@in_a_line
@on_launched_ranks
def eval_command(argv: list[str] | None = None) -> None:
    """Measure a pretrained encoder by several protocols. See `simclr eval --help`."""
    quiet()
    keep_freed_memory()
    args = sys.argv[1:] if argv is None else argv
    config, own, checkpoint = guarded(lambda: parse_evaluation(eval_parser(), args))
    if config.csv is not None:
        guarded(lambda: refuse_foreign_csv(config.csv))
    device = guarded(lambda: device_named(config.device))
    on = guarded(lambda: _chosen_images(config, own, checkpoint))
    command = shlex.join(["simclr", "eval", *args])
    run_dir = checkpoint.run_dir
    records = {}
    for name, (entry, data) in on.items():
        if name:
            print(f"{name}: {entry.data}", flush=True)
        protocols = entry.protocols or _names(config.protocols)
        record, labelled = guarded(partial(_measured, config, checkpoint, data, protocols, name, device, command))
        if rank() > 0:
            continue
        if entry.metric:
            record["data"]["metric"] = entry.metric
            record["sha256"] = record_sha256(record)
        if not config.suite:
            print_evaluation(record)
        records[name] = record
        for path in guarded(partial(_write, record, labelled, run_dir, name)):
            print(f"written to {path}", flush=True)
        if not name:  # of the run's own images
            show_protocols(record, run_dir)
    if rank() > 0:
        return
    if config.suite:
        _print_suite(records)
        table = expanded(run_dir) / TABLE
        guarded(lambda: write_atomically(table, _suite_markdown(records).encode()))
        print(f"written to {table}", flush=True)
    if config.csv is not None:
        print(f"written to {guarded(lambda: append_csv(config.csv, *records.values()))}", flush=True)


def _chosen_images(
    config: Namespace, own: ImageData, checkpoint: Checkpoint
) -> dict[str, tuple[SuiteEntry, ImageData]]:
    """The images to measure on, by name, checked before any is read; those of the run have none."""
    if config.suite and config.on:
        raise ValueError("on is given beside suite, which names the data sets itself. Give one of them.")
    if not config.suite and not config.on:
        for name in ("on_test", "root"):
            if config[name]:
                raise ValueError(f"{name}={config[name]} is for other images: give --on or --suite too.")
        return {"": (SuiteEntry("", ""), own)}
    for name in ("train_dir", "test_dir"):
        if getattr(config.data, name) not in (None, folders_shown(checkpoint.data).get(name)):
            raise ValueError(f"data.{name} is given beside {'suite' if config.suite else 'on'}. Give one of them.")
    if config.suite:
        entries = read_suite(config.suite, config.root)
    else:
        entries = [SuiteEntry(default_name(config.on), config.on, config.on_test, config.root)]
    settings, found = image_settings(config, checkpoint), {}
    for entry in entries:
        where = f"{entry.name}: " if config.suite else ""
        try:
            refuse_unknown_protocols(entry.protocols or [])
            data = labelled_data(entry.data, entry.test, entry.root, **settings)
            data.validate()
            data.refuse_unlabelled(*(("train_dir", "test_dir") if entry.test is not None else ()))
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}{error}") from error
        found[entry.name] = entry, data
    return found


def _measured(
    config: Namespace,
    checkpoint: Checkpoint,
    data: ImageData,
    protocols: list[str],
    on: str,
    device: str,
    command: str,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    try:
        return evaluate(
            checkpoint.path,
            data,
            protocols,
            settings={name: _settings(config, name) for name in protocols if name in OF_EVAL},
            supervised=config.supervised,
            yardsticks=[] if config.yardsticks == "none" else _names(config.yardsticks),
            on=on or None,
            cache_dir=(config.cache_dir or checkpoint.run_dir / _FEATURES) if config.cache else None,
            device=device,
            command=command,
            say=lambda text: print(text, flush=True),
        )
    except RuntimeError as error:  # the encoder changed, or a classifier came to nothing: there is no number
        if echo(error) is not None:
            raise
        fail(str(error), FAILED)


def _write(record: dict[str, Any], labelled: dict[str, list[str]], run_dir: Path, on: str) -> list[Path]:
    for name, lines in labelled.items():
        path = expanded(run_dir) / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    if on:
        (expanded(run_dir) / FOLDER).mkdir(exist_ok=True)
    files = [write_result(record, run_dir, f"{FOLDER}/{on}.json" if on else EVAL)]
    files.append(files[0].with_suffix(".md"))
    write_atomically(files[-1], as_markdown(record).encode())
    return files


def _print_suite(records: dict[str, dict[str, Any]]) -> None:
    """One table of all data sets, with what each number is of below."""
    _print_table(*suite_table(records), left=2)
    for name, record in records.items():
        for key, text in identities(record):
            print(f"{key}  {text}")
        for note in notes(record):
            print(f"note: {name}: {note}")


def _suite_markdown(records: dict[str, dict[str, Any]]) -> str:
    first = next(iter(records.values()))
    lines = [f"# {first['encoder']}, epoch {first['epoch']}, on {len(records)} data sets", ""]
    lines += markdown_table(*suite_table(records), left=3)
    for record in records.values():
        lines += ["", *(f"- `{key}` {text}" for key, text in identities(record))]
    lines += ["", *(f"- {name}: {note}" for name, record in records.items() for note in notes(record))]
    return "\n".join(lines).rstrip() + "\n"


def _names(given: str | list[str]) -> list[str]:
    """Names as a shell has them, `knn,logreg`, or as a list."""
    words = given.strip("[]").split(",") if isinstance(given, str) else given
    return [word.strip() for word in words if word.strip()]


def _settings(config: Namespace, name: str) -> dict[str, Any]:
    return {setting: config[f"{name}.{setting}"] for setting in settings_in(find_protocol(name, OF_EVAL))}


def eval_parser() -> Parser:
    """The settings of an evaluation by several protocols."""
    parser = Parser(command="eval", description="A pretrained encoder by several protocols, beside its yardsticks.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file with any of these settings.")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="A run folder or a checkpoint file; RUN, by itself."
    )
    parser.add_argument(
        "--protocols",
        type=str | list[str],
        default="knn,logreg",
        help=f"Which, separated by commas: {', '.join(OF_EVAL)}; or the path of a function, package.module.function.",
    )
    parser.add_argument(
        "--yardsticks",
        type=str | list[str],
        default=",".join(YARDSTICKS),
        help="What every protocol measures too, separated by commas; none for none.",
    )
    add_supervised(parser)
    parser.add_argument(
        "--on",
        type=str | None,
        default=None,
        help="Other images than the run's own: a folder of class folders (or of train/ and test/), a CSV file of "
        "path,label and perhaps split, or torchvision:NAME, a labelled set below --root.",
    )
    parser.add_argument("--on_test", type=str | None, default=None, help="Their test images, if they are apart.")
    parser.add_argument("--root", type=str | None, default=None, help="Where torchvision's sets are kept.")
    parser.add_argument(
        "--suite", type=str | None, default=None, help="A YAML file with a list of datasets: one table of all."
    )
    parser.add_argument("--csv", type=str | None, default=None, help="Append a row for each number to this file.")
    parser.add_argument(
        "--cache", type=bool, default=True, help="Keep features, and take those that are kept if nothing has changed."
    )
    parser.add_argument(
        "--cache_dir", type=str | None, default=None, help="Where features are kept; if not given, RUN/features."
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    for name in OF_EVAL:
        protocol = find_protocol(name, OF_EVAL)
        described = docstring_parser.parse(inspect.getdoc(protocol) or "")
        said = {p.arg_name: p.description for p in described.params}
        group = parser.add_argument_group((described.short_description or name).removeprefix("The protocol: "))
        for setting, parameter in settings_in(protocol).items():
            group.add_argument(
                f"--{name}.{setting}", type=parameter.annotation, default=parameter.default, help=said[setting]
            )
    add_images(parser)
    return parser


def print_evaluation(record: dict[str, Any]) -> None:
    """The results as a table for people, in percent, with what each number is of below."""
    data = record["data"]
    print(f"{record['encoder']}, epoch {record['epoch']}; accuracies in percent")
    _print_table(*table(record))
    print(f"{data['test_images']:,} test images of {data['test']}; {data['train_images']:,} training images")
    for key, text in identities(record):
        print(f"{key}  {text}")
    for note in notes(record):
        print(f"note: {note}")


def _print_table(head: list[str], rows: list[list[str]], left: int = 1) -> None:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, name in enumerate(head):
        if place < left:  # where all does not fit, names are broken, and not numbers
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name if len(name) < 9 else "\n".join(name.rsplit(" ", 1)), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console(width=max(100, Console().width)).print(shown)
