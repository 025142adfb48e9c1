"""`simclr linear-eval`, `python linear_eval.py`: measure a pretrained encoder."""

import inspect
import shlex
import sys
from typing import Any, Literal

import docstring_parser
from jsonargparse import ActionConfigFile, Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from simclr.allocator import keep_freed_memory
from simclr.checkpoint import Checkpoint, read_checkpoint
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, program, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.cli.ranks import echo, on_launched_ranks
from simclr.data import ImageData
from simclr.data.module import folders_of_run, folders_shown
from simclr.distributed import rank
from simclr.eval.evaluation import linear_evaluation, remarks, write_result
from simclr.eval.protocol import find_protocol, settings_in
from simclr.evaluation_figures import show_evaluation

# What images are is the encoder's; the seed orders training images only.
_NOT_ASKED = ("image_size", "channels", "bits", "seed", "batch_size", "held_out")


@in_a_line
@on_launched_ranks
def linear_eval(argv: list[str] | None = None) -> None:
    """Measure a pretrained encoder. See `python linear_eval.py --help`."""
    quiet()
    keep_freed_memory()
    args = sys.argv[1:] if argv is None else argv
    config, data, checkpoint = guarded(lambda: parse_evaluation(evaluation_parser(), args))
    settings = {name: config[name] for name in settings_in(find_protocol("linear"))} if config.protocol == "sgd" else {}
    device = guarded(lambda: device_named(config.device))
    command = shlex.join([*program("linear-eval"), *args])
    try:
        record = guarded(
            lambda: linear_evaluation(
                checkpoint.path,
                data,
                protocol=config.protocol,
                settings=settings,
                supervised=config.supervised,
                knn={name: config[f"knn_{name}"] for name in settings_in(find_protocol("knn"))},
                device=device,
                command=command,
                say=lambda text: print(text, flush=True),
            )
        )
    except RuntimeError as error:  # the encoder changed, or a classifier diverged: there is no number
        if echo(error) is not None:
            raise
        fail(str(error), FAILED)
    if rank() > 0:
        return
    print_result(record)
    print(f"written to {guarded(lambda: write_result(record, checkpoint.run_dir))}", flush=True)
    show_evaluation(record, checkpoint.run_dir)


def evaluation_parser() -> Parser:
    """The settings of a linear evaluation."""
    description = "Linear evaluation of a pretrained encoder, frozen, beside two yardsticks."
    parser = Parser(command="linear-eval", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A YAML file with any of these settings.")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="A run folder or a checkpoint file; RUN, by itself."
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    add_supervised(parser)
    _add_protocols(parser)
    add_images(parser)
    return parser


def add_supervised(parser: Parser) -> None:
    """The counterpart of the run that was trained with labels."""
    parser.add_argument(
        "--supervised",
        type=str | None,
        default=None,
        help="A run trained with labels (simclr supervised RUN): its number stands beside those of this one.",
    )


def add_images(parser: Parser) -> None:
    """The settings of the images to evaluate on."""
    parser.add_class_arguments(ImageData, "data", skip=set(_NOT_ASKED), fail_untyped=False)


def _add_protocols(parser: Parser) -> None:
    """The choice of the classifier, its settings by their names, and those of kNN behind `knn_`."""
    group = parser.add_argument_group("The classifiers, on frozen features")
    group.add_argument(
        "--protocol",
        type=Literal["lbfgs", "sgd"],
        default="lbfgs",
        help="`lbfgs`, fast, regularisation chosen on a split of the training data; or `sgd`, the paper's, on cropped "
        "and flipped images, last epoch.",
    )
    for prefix, protocol in (("", find_protocol("linear")), ("knn_", find_protocol("knn"))):
        described = {p.arg_name: p.description for p in docstring_parser.parse(protocol.__doc__ or "").params}
        for name, setting in settings_in(protocol).items():
            group.add_argument(
                f"--{prefix}{name}", type=setting.annotation, default=setting.default, help=described[name]
            )


def parse_evaluation(parser: Parser, args: list[str]) -> tuple[Namespace, ImageData, Checkpoint]:
    """The settings of an evaluation, with the images that the run was trained on where none are named, looked for.

    Images named in another way (`--on` of eval) are the caller's to find: see `image_settings`.

    Args:
        parser: with `checkpoint` and the settings of `add_images`.
        args: the command line.
    Raises:
        FileNotFoundError, ValueError: for a checkpoint or images that do not serve.
    """
    asked = parser.parse_args(args)
    checkpoint = read_checkpoint(asked.checkpoint)
    known = {f"data.{name}" for name in inspect.signature(ImageData.__init__).parameters}
    known -= {"data.self", *(f"data.{name}" for name in _NOT_ASKED)}
    trained_on = folders_shown(checkpoint.data)
    if asked.data.train_dir is not None:
        trained_on["leave_out"] = None  # names images of the folder trained on
    parser.set_defaults({f"data.{name}": value for name, value in trained_on.items() if f"data.{name}" in known})
    config = parser.parse_args(args)
    held_out = trained_on.get("held_out") or 0
    if any(getattr(config.data, name) != trained_on.get(name) for name in ("train_dir", "data_dir")):
        held_out = 0  # of another folder nothing was
    settings = {**config.data.as_dict(), **_of_encoder(checkpoint), "held_out": held_out}
    data = ImageData(**settings, batch_size=2)
    places = ("source", "train_dir", "data_dir")
    data.in_pretraining = all(getattr(config.data, name) == trained_on.get(name) for name in places)
    if config.get("on") or config.get("suite"):
        return config, data, checkpoint
    with folders_of_run(data, checkpoint.data):
        data.validate()
        data.refuse_unlabelled(*(name for name in ("train_dir", "test_dir") if asked.data.get(name) is not None))
    return config, data, checkpoint


def image_settings(config: Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """How other images than those of a run are to be held: the settings of `ImageData` but for places.

    Args:
        config, checkpoint: as `parse_evaluation` gives them.
    """
    places = ("source", "train_dir", "test_dir", "data_dir", "shapes_train", "shapes_test", "leave_out")
    kept = {name: value for name, value in config.data.as_dict().items() if name not in places}
    return {**kept, **_of_encoder(checkpoint), "held_out": 0, "batch_size": 2}


def _of_encoder(checkpoint: Checkpoint) -> dict[str, Any]:
    """What of `ImageData` follows from the encoder, whatever the images are."""
    channels, bits = checkpoint.model.get("channels", 3), checkpoint.data.get("bits")
    return {"image_size": checkpoint.model["image_size"], "channels": channels, "bits": bits}


def print_result(record: dict[str, Any]) -> None:
    """The result as a small table for people, in percent."""
    low, high = (f"{100 * bound:.1f}" for bound in record["ci95"])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{record['encoder']}, epoch {record['epoch']}")
    table.add_column("top-1", justify="right")
    table.add_column("")
    starting = [("yardstick: starting weights", "starting_weights_top1", "")]
    rows = [
        (f"linear classifier ({record['protocol']})", "linear_top1", f"95 % interval {low} to {high}"),
        (f"kNN (k = {record['knn_k']})", "knn_top1", ""),
        ("yardstick: random encoder", "random_encoder_top1", ""),
        *(starting if "starting_weights_top1" in record else []),
        ("yardstick: raw pixels", "raw_pixels_top1", ""),
        *([("supervised network", "supervised_top1", "")] if "supervised_top1" in record else []),
    ]
    for number, (name, key, remark) in enumerate(rows):
        if record[key] is None:
            why = "knows other classes" if key == "supervised_top1" else "did not converge"
            table.add_row(name, "-", why)
            continue
        ahead = f"{100 * (record['linear_top1'] - record[key]):+.1f} points" if number > 1 else remark
        if key == "linear_top1" and record["linear_top5"] is not None:
            ahead += f", top-5 {100 * record['linear_top5']:.1f} %"
        table.add_row(name, f"{100 * record[key]:.1f} %", ahead, style="bold" if number == 0 else None)
    data = record["data"]
    Console(width=max(80, Console().width)).print(table)
    print(f"{data['test_images']:,} test images of {data['test']}; classifiers trained on {data['train_images']:,}")
    for remark in remarks(record):
        print(f"note: {remark}")
    if record.get("finished") is False:
        print(
            f"note: the run was not finished: the encoder is that of step {record['global_step']} of "
            f"{record['total_steps']}"
        )
