"""`simclr report`: a run as one page."""

import sys

from simclr.cli.messages import guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.report import write_report


@in_a_line
def report(argv: list[str] | None = None) -> None:
    """Write a run's page: curves, views, neighbours, a map. See `simclr report --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config = guarded(lambda: report_parser().parse_args(args))
    path = guarded(
        lambda: write_report(
            config.run_dir, device=device_named(config.device), say=lambda text: print(text, flush=True)
        )
    )
    print(f"written to {path}")


def report_parser() -> Parser:
    """The settings of a report."""
    parser = Parser(command="report", description="Write report.html of a run, one page that works offline.")
    parser.add_argument("--run_dir", type=str, required=True, help="The run folder; RUN, by itself.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    return parser
