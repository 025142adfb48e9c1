"""The command line: `simclr <command>`, `python -m simclr`, `python train.py` and `python linear_eval.py`.

Each command has a file here. This one imports none of them, nor torch: help, a version and a mistyped name are answered
at once.
"""

import importlib
import os
import sys

from simclr import __version__
from simclr.cli.hints import unknown_command
from simclr.cli.messages import fail, quiet

__all__ = ["main", "quiet"]

# Before torch is there: it prints stacks of its C++ on the ranks that live, of one that died.
if not os.environ.get("SIMCLR_TRACEBACK"):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Command: its file and function, and what it does.
COMMANDS = {
    "train": ("simclr.cli.train", "train", "Pretrain an encoder. See `python train.py --help`."),
    "supervised": (
        "simclr.cli.supervised",
        "supervised",
        "Train the same network with labels, to compare with. See `simclr supervised --help`.",
    ),
    "linear-eval": (
        "simclr.cli.linear_eval",
        "linear_eval",
        "Measure a pretrained encoder. See `python linear_eval.py --help`.",
    ),
    "eval": (
        "simclr.cli.eval",
        "eval_command",
        "Measure an encoder by several protocols at once. See `simclr eval --help`.",
    ),
    "verify": (
        "simclr.cli.verify",
        "verify",
        "Compute a run's numbers again: equal or not. See `simclr verify --help`.",
    ),
    "report": (
        "simclr.cli.report",
        "report",
        "Write a run's page: curves, views, neighbours, a map. See `simclr report --help`.",
    ),
    "profile": (
        "simclr.cli.profile",
        "profile",
        "Say where the time of a training step goes. See `simclr profile --help`.",
    ),
    "compare": (
        "simclr.cli.compare",
        "compare",
        "Show runs beside each other: settings, results, curves. See `simclr compare --help`.",
    ),
    "ablate": (
        "simclr.cli.ablate",
        "ablate",
        "Run a paper's finding again, and say whether it held. See `simclr ablate --help`.",
    ),
    "export": (
        "simclr.cli.export",
        "export",
        "Write an encoder for torchvision, timm, ONNX or torch.export. See `simclr export --help`.",
    ),
    "embed": (
        "simclr.cli.embed",
        "embed",
        "Write the features of all images of a folder. See `simclr embed --help`.",
    ),
    "search": (
        "simclr.cli.search",
        "search",
        "Find the images of an embedded folder that are nearest to one. See `simclr search --help`.",
    ),
    "duplicates": (
        "simclr.cli.duplicates",
        "duplicates",
        "Find images that are there twice, or nearly. See `simclr duplicates --help`.",
    ),
    "fit": (
        "simclr.cli.fit",
        "fit",
        "Fit a classifier on an encoder's features to class folders. See `simclr fit --help`.",
    ),
    "predict": (
        "simclr.cli.predict",
        "predict",
        "Say what images show, by such a classifier. See `simclr predict --help`.",
    ),
    "check-data": (
        "simclr.cli.check_data",
        "check_data",
        "Decode every image of a folder and say what is there. See `simclr check-data --help`.",
    ),
    "replay": (
        "simclr.cli.replay",
        "replay",
        "Compute a step that was not finite again, and say why. See `simclr replay --help`.",
    ),
}

# Commands whose work ranks share, `torchrun --nproc_per_node 2 -m simclr eval RUN`; any other is rank 0's alone.
SHARED = {"train", "supervised", "profile", "linear-eval", "eval", "embed", "duplicates", "fit", "predict"}


def main(argv: list[str] | None = None) -> None:
    """`simclr <command>`: reaches every command of the project."""
    args = sys.argv[1:] if argv is None else argv
    if not SHARED.intersection(args[:1]) and os.environ.get("WORLD_SIZE"):  # of a launcher
        from simclr.distributed import left_to_this_rank  # not above: it brings torch

        if not left_to_this_rank():
            return
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {text}" for name, (_, _, text) in COMMANDS.items()]
        print("usage: simclr <command> [options]\n\n" + "\n".join(lines))
        return
    if args[0] == "--version":
        print(f"simclr {__version__}")
        return
    if args[0] not in COMMANDS:
        fail(unknown_command(args[0], COMMANDS))
    module, function, _ = COMMANDS[args[0]]
    getattr(importlib.import_module(module), function)(args[1:])
