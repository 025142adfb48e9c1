"""What stands in each section of a report: plain values for its template, or None for a section that is left out."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from simclr.checkpoint import Checkpoint
from simclr.eval import nearest
from simclr.eval.duplicates import duplicates_in_words
from simclr.eval.evaluation import grid_end_in_words
from simclr.files import write_atomically
from simclr.report.pictures import (
    MOST_NAMES,
    confusion_picture,
    data_uri,
    data_uri_of,
    draw_curves,
    draw_map,
    neighbour_picture,
    png_bytes,
    save_chart,
    to_picture,
)
from simclr.report.sample import Sample, choose_queries, tsne
from simclr.training.objective import Objective

Content = dict[str, Any]  # what a template may ask for, by name
History = dict[str, list[tuple[float, float]]]  # as `read_metrics` gives it

_QUERIES, _NEIGHBOURS = 10, 8
_FEWEST_ON_MAP = 30  # images
_PROTOCOLS = {
    "lbfgs": "L\u2011BFGS, regularisation chosen on a split of the training images",
    "sgd": "SGD, last epoch",
}
_DATA_SHOWN = ("source", "train_dir", "test_dir", "data_dir", "shapes_train", "shapes_test")


def percent(fraction: float) -> str:
    """`83.1 %`, with a space that no line breaks at."""
    return f"{100 * fraction:.1f}\u00a0%"


def headline(
    checkpoint: Checkpoint, results: list[Content], sha256: str, history: History, test: Sample | None
) -> Content:
    """The one thing that matters, first: what a linear classifier reaches, and on what it stands."""
    content = {
        "run": checkpoint.run_dir.resolve().name,
        "stands": checkpoint.stands if checkpoint.finished is False else None,
        "how_to_measure": shlex.join(["python", "linear_eval.py", "--checkpoint", str(checkpoint.run_dir)]),
        "epochs": checkpoint.epochs,
        "result": results[0] if results else None,
    }
    if not results:
        knn = history.get("knn_top1")
        return content | {
            "encoder": checkpoint.model["encoder"],
            "knn": knn[-1][1] if knn else None,
            "has_labels": test is None or test.labels is not None,
        }
    result = results[0]
    copies = duplicates_in_words(result)
    return content | {
        "interval": [100 * bound for bound in result["ci95"]],
        "ahead": _ahead(result),
        "of_another_encoder": result.get("encoder_sha256") not in (None, sha256),
        "copies": copies and copies[0].upper() + copies[1:],
        "bars": _bars(result),
        "guessing": _guessing(result.get("confusion_matrix")),
        **_fine_print(result),
    }


def _ahead(result: Content) -> list[tuple[float, str]]:
    """By how many points the encoder is ahead of each yardstick that has a number: one may not have converged."""
    names = {"raw_pixels_top1": "raw pixels", "random_encoder_top1": "a random encoder"}
    known = {name: result[key] for key, name in names.items() if result[key] is not None}
    return [(100 * (result["linear_top1"] - value), name) for name, value in known.items()]


def _bars(result: Content) -> list[tuple[str, float, str]]:
    """The encoder and its yardsticks: (name, top-1, classes of the bar)."""
    bars = [("linear classifier", result["linear_top1"], "ours")]
    if "knn_top1" in result:
        bars.append((f"kNN, k = {result.get('knn_k', '?')}", result["knn_top1"], "ours light"))
    yardsticks = {"random encoder": result["random_encoder_top1"], "raw pixels": result["raw_pixels_top1"]}
    return bars + [(name, value, "") for name, value in yardsticks.items() if value is not None]


def _guessing(matrix: list[list[int]] | None) -> float | None:
    """The accuracy of always saying the largest class."""
    return max(map(sum, matrix)) / sum(map(sum, matrix)) if matrix else None


def _fine_print(result: Content) -> Content:
    data = result.get("data", {})
    many = len(result.get("confusion_matrix", ())) > 5  # of five classes top-5 is 1
    return {
        "data": data,
        "top5": result.get("linear_top5") if many else None,
        "protocol": _PROTOCOLS.get(result.get("protocol", "")),
        "notes": [note for note in (data.get("note"), grid_end_in_words(result)) if note],
    }


def curves(history: History, objective: Objective, test: Sample | None, folder: Path) -> Content | None:
    """How the loss fell, and online kNN rose where it was measured."""
    values = history.get("train_loss_epoch") or history.get("train_loss")
    if not values:
        return None
    classes = len(test.classes) if test is not None and test.classes else None
    figure = draw_curves(history, objective.title, objective.chance, classes)
    knn = [value for _, value in history.get("knn_top1", ())]
    return {
        "chart": save_chart(figure, "curves", folder, "loss and online kNN against epochs"),
        "first": values[0][1],
        "last": values[-1][1],
        "knn": {"last": knn[-1], "best": max(knn)} if knn else None,
    }


def neighbours(test: Sample, bank: Sample, folder: Path) -> Content:
    """Queries with their nearest training images, and how often a neighbour is of the query's class."""
    k = min(_NEIGHBOURS, len(bank.index))
    places = choose_queries(test, _QUERIES)
    near = nearest(test.features[places], bank.features, k)  # (n, k)
    wrong = share = None
    if test.labels is not None and bank.labels is not None:
        wrong = bank.labels[near] != test.labels[places][:, None]
        closest = nearest(test.features, bank.features, k)
        share = (bank.labels[closest] == test.labels[:, None]).float().mean().item()
    picture = neighbour_picture(test.pixels[places], bank.pixels[near], wrong)
    write_atomically(folder / "neighbours.png", png_bytes(picture))
    tiles = []
    for row, place in enumerate(places.tolist()):
        tiles.append(_tile(test, place, "query"))
        for column, other in enumerate(near[row].tolist()):
            is_wrong = wrong is not None and wrong[row, column]
            tiles.append(_tile(bank, other, "neighbour wrong" if is_wrong else "neighbour"))
    return {"k": k, "tiles": tiles, "test": test, "bank": bank, "share_of_own_class": share}


def _tile(sample: Sample, place: int, kind: str) -> Content:
    pixels = sample.pixels[place]
    picture = to_picture(pixels)
    if pixels.shape[-1] > 128:
        picture = picture.resize((128, 128), Image.Resampling.LANCZOS)
    is_small = picture.width <= 64
    return {
        "kind": kind,
        "number": int(sample.index[place]),
        "name": sample.classes[int(sample.labels[place])] if sample.labels is not None and sample.classes else "",
        "is_small": is_small,
        "source": data_uri(picture, "png" if is_small else "jpeg"),
    }


def confusion(results: list[Content]) -> Content | None:
    """Which classes the linear classifier takes for which: the matrix, and the worst pairs in words."""
    matrix = results[0].get("confusion_matrix") if results else None
    if not matrix:
        return None
    names = results[0].get("data", {}).get("classes") or [str(i) for i in range(len(matrix))]
    sizes = [max(1, sum(row)) for row in matrix]
    mistakes = [
        (count / sizes[i], i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count
    ]
    mistakes.sort(key=lambda mistake: (-mistake[0], mistake[1], mistake[2]))
    worst = [
        {"true": names[i], "taken_for": names[j], "share": share, "count": matrix[i][j], "of": sizes[i]}
        for share, i, j in mistakes[:5]
    ]
    content = {"worst": worst, "classes": names, "rows": None, "picture": None}
    if len(matrix) > MOST_NAMES:
        return content | {"picture": data_uri(confusion_picture(matrix, sizes))}
    rows = [[_cell(i == j, count / sizes[i]) for j, count in enumerate(row)] for i, row in enumerate(matrix)]
    return content | {"rows": list(zip(names, rows, strict=True))}


def _cell(is_right: bool, share: float) -> Content:
    """A cell of the table: its number, and how strongly it is coloured, in percent."""
    strength = min(100, round(100 * share if is_right else 200 * share))  # mistakes are rarer: twice as strong
    return {"colour": "accent" if is_right else "wrong", "strength": strength, "share": share}


def feature_map(test: Sample, folder: Path) -> Content | None:
    """The test images as points; too few make no map."""
    if len(test.index) < _FEWEST_ON_MAP:
        return None
    figure = draw_map(tsne(test.features), test.labels, test.classes)
    return {"chart": save_chart(figure, "map", folder, "map of the test images"), "test": test}


def views(folder: Path) -> Content | None:
    """The picture of views that training has left.

    Raises:
        ValueError: if it cannot be read.
    """
    path = folder / "views.png"
    if not path.exists():
        return None
    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    if picture.width <= 1600:
        return {"source": data_uri_of(path.read_bytes())}
    size = 1600, round(picture.height * 1600 / picture.width)
    return {"source": data_uri(picture.resize(size, Image.Resampling.LANCZOS), "jpeg")}


def settings(checkpoint: Checkpoint, encoder: nn.Module, config: Content) -> Content:
    """The settings that a reader asks for first.

    Args:
        checkpoint: of the run.
        encoder: loaded from it.
        config: the run's config.yaml, or {}.
    """
    model, data = checkpoint.model, checkpoint.data
    trainer = config.get("trainer") or {}
    million = sum(p.numel() for p in encoder.parameters()) / 1e6
    used = [name for name in ("rotation", "cutout", "noise", "sobel") if model.get(f"{name}_prob")]
    rows = {
        "encoder": f"{model['encoder']}, stem {model.get('stem')}, width {model.get('width', 1):g}; "
        f"{million:.2f} M parameters, h of {encoder.feature_dim}",
        "projection head": f"{model.get('head')}, z of {model.get('projection_dim')}",
        "loss": checkpoint.objective.text,
        "batch and length": f"{model.get('batch_size')} images; {checkpoint.epochs} epochs, "
        f"{checkpoint.global_step:,} steps",
        "optimiser": f"{model.get('optimizer')}, base learning rate {_number(model.get('base_lr'))} "
        f"({model.get('lr_scaling')} scaling), weight decay {_number(model.get('weight_decay'))}, "
        f"warm-up {_number(model.get('warmup_epochs'))} epochs",
        "views": f"{_view_size(model)}, crop {' to '.join(f'{v:g}' for v in model.get('crop_scale', ()))} of the "
        f"area, colour strength {model.get('strength'):g}, grey {model.get('gray_prob'):g}, "
        f"blur {model.get('blur_prob'):g}, flip {model.get('flip_prob'):g}"
        + "".join(f", {name} {model[f'{name}_prob']:g}" for name in used),
        "data": " ".join(f"{k}={v}" for k, v in data.items() if k in _DATA_SHOWN and v not in (None, "auto"))
        or data.get("source", "not recorded"),
        "seed": str(model.get("seed")),
        "machine": f"precision {trainer.get('precision') or '32-true'}, devices {trainer.get('devices')}"
        if trainer
        else "",
    }
    return {"rows": {name: value for name, value in rows.items() if value}, "has_config": bool(config)}


def _number(value: float | None) -> str:
    """A setting for people; one that was left open when the checkpoint was written is the default's."""
    return "default" if value is None else f"{value:g}"


def _view_size(model: Content) -> str:
    size = f"{model['image_size']} px"
    grows = model.get("start_size") is not None
    return f"{model['start_size']} px, growing to {size} over {model['grow_epochs']} epochs" if grows else size


def provenance(checkpoint: Checkpoint, results: list[Content], sha256: str) -> Content:
    """Where the numbers are from: the files, the commands, the versions; and the evaluations before the newest."""
    rows = {"checkpoint": str(checkpoint.path), "encoder sha256": sha256}
    if results:
        rows |= {
            "evaluated by": results[0].get("command", ""),
            "evaluated on": _time(results[0]),
            "versions": ", ".join(f"{k} {v}" for k, v in results[0].get("versions", {}).items()),
        }
    rows["this page"] = datetime.now(UTC).isoformat(" ", timespec="seconds")
    earlier = [
        {
            "top1": result["linear_top1"],
            "epoch": result.get("epoch"),
            "protocol": result.get("protocol"),
            "date": _time(result),
        }
        for result in results[1:]
    ]
    return {"rows": {name: value for name, value in rows.items() if value}, "earlier": earlier}


def _time(result: Content) -> str:
    return result.get("date", "").replace("T", " ")
