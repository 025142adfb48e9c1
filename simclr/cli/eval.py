"""`simclr eval`: a pretrained encoder by several protocols on features that are computed once."""

import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ActionConfigFile, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from simclr.allocator import keep_freed_memory
from simclr.cli.linear_eval import add_images, parse_evaluation
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.eval.evaluation import write_result
from simclr.eval.protocol import OF_EVAL, find_protocol, settings_in
from simclr.eval.suite import EVAL, YARDSTICKS, evaluate
from simclr.eval.tables import append_csv, as_markdown, notes, refuse_foreign_csv, shown_results, table
from simclr.evaluation_figures import show_protocols
from simclr.files import write_atomically
from simclr.paths import expanded

_FEATURES = "features"  # in the run folder


@in_a_line
def eval_command(argv: list[str] | None = None) -> None:
    """Measure a pretrained encoder by several protocols. See `simclr eval --help`."""
    quiet()
    keep_freed_memory()
    args = sys.argv[1:] if argv is None else argv
    config, data, checkpoint = guarded(lambda: parse_evaluation(eval_parser(), args))
    if config.csv is not None:
        guarded(lambda: refuse_foreign_csv(config.csv))
    names = guarded(lambda: _names(config.protocols))
    run_dir = checkpoint.run_dir
    device = guarded(lambda: device_named(config.device))
    try:
        record, labelled = guarded(
            lambda: evaluate(
                checkpoint.path,
                data,
                names,
                settings={name: _settings(config, name) for name in names if name in OF_EVAL},
                yardsticks=[] if config.yardsticks == "none" else _names(config.yardsticks),
                cache_dir=(config.cache_dir or run_dir / _FEATURES) if config.cache else None,
                device=device,
                command=shlex.join(["simclr", "eval", *args]),
                say=lambda text: print(text, flush=True),
            )
        )
    except RuntimeError as error:  # the encoder changed, or a classifier came to nothing: there is no number
        fail(str(error), FAILED)
    print_evaluation(record)
    for path in guarded(lambda: _write(record, labelled, run_dir, config.csv)):
        print(f"written to {path}", flush=True)
    show_protocols(record, run_dir)


def _write(record: dict[str, Any], labelled: dict[str, list[str]], run_dir: Path, csv: str | None) -> list[Path]:
    for name, lines in labelled.items():
        path = expanded(run_dir) / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    files = [write_result(record, run_dir, EVAL)]
    files.append(files[0].with_suffix(".md"))
    write_atomically(files[-1], as_markdown(record).encode())
    return [*files, append_csv(record, csv)] if csv is not None else files


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
    head, rows = table(record)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    data = record["data"]
    console = Console(width=max(100, Console().width))
    console.print(f"{record['encoder']}, epoch {record['epoch']}; accuracies in percent", highlight=False)
    console.print(shown)
    print(f"{data['test_images']:,} test images of {data['test']}; {data['train_images']:,} training images")
    for result in shown_results(record):
        print(f"{result['hash']}  {result['id']}")
    for note in notes(record):
        print(f"note: {note}")
