"""`simclr export`: an encoder as another library opens it."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from simclr.checkpoint import NetworkName, find_checkpoint, read_checkpoint, read_encoder
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser
from simclr.export.formats import FILES, Exported, Format, export_encoder
from simclr.report.run import read_results

_RECIPE = (  # settings that a card tells
    *("optimizer", "base_lr", "lr_scaling", "weight_decay", "warmup_epochs", "batch_size", "strength", "crop_scale"),
    *("head", "projection_dim", "seed"),
)


@in_a_line
def export(argv: list[str] | None = None) -> None:
    """Write an encoder for torchvision, timm, ONNX or torch.export. See `simclr export --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config = guarded(lambda: export_parser().parse_args(args))
    try:
        done: Exported = guarded(lambda: _export(config))
    except RuntimeError as error:
        fail(str(error), FAILED)
    print(
        f"written to {done.file} ({done.file.stat().st_size / 1e6:.1f} MB), with {done.card.name}; opened by "
        f"{done.checked_by}: the same features{f' to {done.difference:.1e}' if done.difference else ''}"
    )


def export_parser() -> Parser:
    """The settings of an export."""
    parser = Parser(command="export", description="Write an encoder as another library opens it, and check it there.")
    parser.add_argument(
        "--encoder", type=str, required=True, help="A run folder, a checkpoint or encoder.safetensors; RUN, by itself."
    )
    parser.add_argument("--format", type=Format, default="safetensors", help=f"One of {', '.join(FILES)}.")
    parser.add_argument(
        "--out", type=str | None, default=None, help="A folder that is not there yet. By default RUN/export/FORMAT."
    )
    parser.add_argument(
        "--preprocessing",
        type=Literal["outside", "inside"],
        default="outside",
        help="Of onnx and torch-export. inside: the file takes bytes of any size.",
    )
    parser.add_argument(
        "--network", type=NetworkName, default="online", help="Of a BYOL run: online, or target, its moving average."
    )
    parser.add_argument("--license", type=str | None, default=None, help="Said in the card.")
    return parser


def _export(config: Any) -> Exported:
    path, _, _ = read_encoder(config.encoder, config.network)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    inside = "-with-preprocessing" if config.preprocessing == "inside" else ""
    of_target = "-target" if config.network == "target" else ""
    out = config.out or folder / "export" / f"{config.format}{inside}{of_target}"
    return export_encoder(
        path,
        config.format,
        out,
        preprocessing=config.preprocessing,
        network=config.network,
        license=config.license,
        about=about_run(folder),
    )


def about_run(folder: Path) -> dict[str, Any]:
    """What a card says of the run in a folder: its data, recipe and results; empty where there is no run.

    Args:
        folder: the run folder. Of the images' folder only the name is told.
    """
    try:
        checkpoint = read_checkpoint(find_checkpoint(folder))
    except FileNotFoundError:
        return {}
    recipe: dict[str, Any] = {"method": checkpoint.method, "objective": checkpoint.objective.text}
    recipe |= {"epochs": checkpoint.epochs, "steps": checkpoint.global_step}
    recipe |= {name: checkpoint.model.get(name) for name in _RECIPE}
    folder_of_images, source = checkpoint.data.get("train_dir"), checkpoint.data.get("source")
    data = {"images": Path(folder_of_images).name if folder_of_images else "built-in shapes"}
    if source not in (None, "auto", "folder", "shapes"):
        data = {"images": source}
    results = [_result(record) for record in read_results(folder)]
    return {"data": _plain(data), "recipe": _plain(recipe), "results": results}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({name: value for name, value in values.items() if value is not None}))


def _result(record: dict[str, Any]) -> dict[str, Any]:
    """A linear evaluation as a row of the card."""
    data = record["data"]
    protocol = f"{record['protocol']}, epoch {record['epoch']}, {data['test_images']} test images of {data['test']}"
    kept = ["ci95", "random_encoder_top1", "raw_pixels_top1", "knn_top1", "encoder_sha256", "date"]
    kept += [name for name in ("starting_weights_top1", "supervised_top1") if name in record]
    return {"protocol": protocol, "top1": record["linear_top1"], **{name: record.get(name) for name in kept}}
