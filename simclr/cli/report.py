"""`simclr report`: a run as one page."""

import sys
from pathlib import Path

from simclr.checkpoint import read_checkpoint
from simclr.cli.messages import guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.report import write_report
from simclr.wandb_run import known_run, rejoined


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
    print(f"written to {path}", flush=True)
    log_report(path)


def log_report(path: Path) -> None:
    """Add a report to its run on W&B, where that takes files; see `--log_artifact` of a training.

    Args:
        path: the file, in the run folder.
    """
    known = known_run(path.parent)
    if known is None or not known.get("log_artifact"):
        return
    steps = read_checkpoint(path.parent).global_step
    with rejoined(path.parent, steps, "report") as run:
        if run is not None:
            run.log_files("report", "report", [path], ["latest"], {"global_step": steps})


def report_parser() -> Parser:
    """The settings of a report."""
    parser = Parser(command="report", description="Write report.html of a run, one page that works offline.")
    parser.add_argument("--run_dir", type=str, required=True, help="The run folder; RUN, by itself.")
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    return parser
