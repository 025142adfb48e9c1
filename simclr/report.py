"""A run as one page: what its encoder is worth, how it learned, what it sees as alike.

`write_report` reads a run folder and writes `report.html`, which needs nothing beside it, and the pictures as PNG.
"""

import base64
import csv
import html
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from simclr.charts import (
    ACCENT,
    COLOUR_NAMES,
    MOST_NAMES,
    WRONG,
    draw_curves,
    draw_map,
    neighbour_picture,
    to_picture,
    tsne,
)
from simclr.checkpoint import Checkpoint, load_encoder, read_checkpoint, write_atomically
from simclr.data import FileImages, ImageData, ImageSet
from simclr.data.decode import read_images
from simclr.data.module import folders_of_run, folders_shown
from simclr.eval import encoder_sha256, extract_features
from simclr.eval.duplicates import duplicates_in_words
from simclr.eval.evaluation import RESULT, grid_end_in_words
from simclr.seeding import epoch_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"  # in the run folder
_QUERIES, _NEIGHBOURS = 10, 8
_CHOICE = 20210312  # seed of the images shown, the same for every run on the same data


@dataclass(frozen=True)
class Part:
    """Some images of a set, and what the encoder makes of them.

    Attributes:
        name: of the set.
        index: (n,) int64, the images' numbers in the set.
        pixels: (n, 3, S, S) uint8.
        features: (n, F) float32.
        labels: (n,) int64 into `classes`, or None.
        classes: names, or None.
        whole: images in the set that these were chosen from.
    """

    name: str
    index: Tensor
    pixels: Tensor
    features: Tensor
    labels: Tensor | None
    classes: list[str] | None
    whole: int


def write_report(
    run_dir: str | Path,
    *,
    data: ImageData | None = None,
    device: torch.device | str = "cpu",
    bank_images: int | None = None,
    map_images: int = 1500,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write `report.html` of a run, one page that works offline, with `curves.png`, `neighbours.png` and `map.png`.

    What a run does not have (labels, an evaluation, its images where they were) is left out, and the page says so. A
    report of the same run written earlier is replaced.

    Args:
        run_dir: the run folder, or a checkpoint in it.
        data: the images to show; by default those that the run was trained on.
        device: where to compute features.
        bank_images: training images among which neighbours are sought; by default 10 000 of up to 64 px, else 2 000.
        map_images: test images on the map, at most.
        say: is told what goes on, a line at a time.
    Returns:
        The file written.
    Raises:
        FileNotFoundError: if there is no such run, saying what there is.
        ValueError: if a file of the run or an image cannot be read, naming it.
    """
    if (bank_images is not None and bank_images < 1) or map_images < 1:
        raise ValueError(f"bank_images={bank_images} and map_images={map_images}: needed at least 1.")
    checkpoint = read_checkpoint(run_dir)
    folder = checkpoint.run_dir
    encoder = load_encoder(checkpoint.path)
    results = read_results(folder)
    history = read_metrics(folder)
    sha256 = encoder_sha256(encoder)
    test, alike, atlas = None, "", ""
    try:
        data = data or _data_of(checkpoint)
        with folders_of_run(data, checkpoint.data):
            data.setup()
    except ValueError as error:
        say(f"no images to show: {error}")
        alike = _section("What it sees as alike", f"<p>No images to show: {_text(error)}</p>")
    else:
        bank_images = bank_images or (10_000 if encoder.image_size <= 64 else 2_000)
        test, bank = look(encoder, data, test_images=map_images, bank_images=bank_images, device=device, say=say)
        alike, atlas = _neighbours_section(test, bank, folder), _map_section(test, folder)
    sections = [
        _headline(checkpoint, results, sha256, history, test),
        _curves_section(history, checkpoint, test, folder),
        alike,
        _confusion_section(results),
        atlas,
        _views_section(folder),
        _settings_section(checkpoint, encoder, folder),
        _provenance_section(checkpoint, results, sha256),
    ]
    page = _page(f"{folder.resolve().name}: {checkpoint.model['encoder']}", "\n".join(filter(None, sections)))
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT


# Reading


def read_metrics(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """What `metrics.csv` of a run holds, for drawing: name -> [(epochs done, value)], in the order of time.

    Whatever was logged stands where its step does: the loss, learning rate, contrastive top-1 and cosines of single
    steps inside an epoch, `train_loss_epoch` and `knn_top1` at its end. Empty without the file, or without an epoch.

    Raises:
        ValueError: if the file is not a run's metrics.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        # An epoch that was cut short has fewer steps than the others.
        ends = [(int(row["step"]) + 1) / (int(row["epoch"]) + 1) for row in rows if row["train_loss_epoch"]]
        found: dict[str, dict[float, float]] = {}
        for row in rows if ends else ():
            time = (int(row["step"]) + 1) / max(ends)
            for name in row.keys() - {"step", "epoch"}:
                if row[name]:
                    found.setdefault(name, {})[time] = float(row[name])  # a continued run writes some steps again
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as metrics of a run: {error!r}.") from error
    return {name: sorted(values.items()) for name, values in found.items()}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The linear evaluations of a run, the newest first.

    Raises:
        ValueError: naming a file that is not one.
    """
    stem = RESULT.removesuffix(".json")
    numbers = [int(m[1]) for p in folder.glob(f"{stem}.*.json") if (m := re.fullmatch(rf"{stem}\.(\d+)\.json", p.name))]
    paths = [folder / RESULT, *(folder / f"{stem}.{number}.json" for number in sorted(numbers, reverse=True))]
    results = []
    for path in filter(Path.exists, paths):
        try:
            record = json.loads(path.read_text())
            missing = [k for k in ("linear_top1", "ci95", "random_encoder_top1", "raw_pixels_top1") if k not in record]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        if missing:
            raise ValueError(f"{path} is not a linear evaluation: it has no {' and no '.join(missing)}.")
        results.append(record)
    return results


def _data_of(checkpoint: Checkpoint) -> ImageData:
    """The images a run was trained on, read from where they were."""
    if not checkpoint.data:
        raise ValueError("the run was not trained on an ImageData, so its images are not known.")
    # Nothing is decoded ahead, and no cache is built anew: a report shows a few of the images.
    ahead = {"memory_limit_gb": 0.0, "cache_dir": None}
    settings = {**folders_shown(checkpoint.data), "image_size": checkpoint.model["image_size"], **ahead}
    return ImageData(**settings)


# Looking


def look(
    encoder: nn.Module,
    data: ImageData,
    *,
    bank_images: int,
    test_images: int,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Part, Part]:
    """A fixed pseudo-random choice of test and of training images, with their features.

    Test images are those that an evaluation tests on. Without labels they are of the test folder, or else a fifth of
    the training images, which are then kept out of the other part.

    Returns:
        The test part and the training part (the bank).
    Raises:
        ValueError: if the images cannot be read.
    """
    data.setup()
    if data.has_labels:
        loaders = data.eval_loader("test"), data.eval_loader("train")
        chosen = [(loader.source, loader.index) for loader in loaders]
    elif data.test is not None:
        chosen = [(data.test, torch.arange(len(data.test))), (data.train, torch.arange(len(data.train)))]
    else:
        order = epoch_order(_CHOICE, 1, len(data.train))
        fifth = max(1, len(order) // 5)
        chosen = [(data.train, order[:fifth]), (data.train, order[fifth:])]
    parts = []
    for (source, index), limit in zip(chosen, (test_images, bank_images), strict=True):
        say(f"features of {min(limit, len(index)):,} images of {source.name}")
        parts.append(_part(encoder, source, index, limit, device))
    return parts[0], parts[1]


def _part(encoder: nn.Module, source: ImageSet, pool: Tensor, limit: int, device: torch.device | str) -> Part:
    index = pool[epoch_order(_CHOICE, 0, len(pool))[:limit].sort().values]
    if isinstance(source, FileImages):
        pixels = read_images([source.paths[i] for i in index.tolist()], source.side, threads=os.cpu_count() or 1)
    else:
        pixels = source.images(index).cpu()
    # extract_features hands back each image's label; their numbers do where there are no labels.
    batches = zip(pixels.split(256), index.split(256), strict=True)
    features, _ = extract_features(encoder, batches, device=device)
    labels = None if source.labels is None else source.labels[index]
    return Part(source.name, index, pixels, features, labels, source.classes, len(pool))


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """The k rows of `bank` (N, F) of highest cosine similarity to each of `queries` (n, F), nearest first: (n, k).

    Of equally near rows the earlier comes first.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # (n, N)
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]


def choose_queries(part: Part, count: int) -> Tensor:
    """Places in a part of images to show: one of each class as far as they go, in the order of the classes."""
    order = epoch_order(_CHOICE, 2, len(part.index))
    if part.labels is None:
        return order[:count]
    first = {}
    for place in order.tolist():
        first.setdefault(int(part.labels[place]), place)
    rest = [place for place in order.tolist() if place not in first.values()]
    one_each = [first[label] for label in sorted(first)]
    step = max(1.0, len(one_each) / count)  # of many classes, some from all along the alphabet
    shown = [one_each[int(i * step)] for i in range(min(count, len(one_each)))]
    return torch.tensor((shown + rest)[:count])


# Sections


def _headline(
    checkpoint: Checkpoint,
    results: list[dict[str, Any]],
    sha256: str,
    history: dict[str, list[tuple[float, float]]],
    test: Part | None,
) -> str:
    """The one thing that matters, first: what a linear classifier reaches, and on what it stands."""
    title = f'<p class="run">{_text(checkpoint.run_dir.resolve().name)}</p>'
    if checkpoint.finished is False:
        title += f'<p class="warning">The checkpoint stands at {_text(checkpoint.stands)}.</p>'
    if not results:
        return f"<header>{title}{_unmeasured(checkpoint, history, test)}</header>"
    result = results[0]
    low, high = (f"{100 * bound:.1f}" for bound in result["ci95"])
    sentence = (
        f'A linear classifier on the frozen features reaches <b class="number">{_percent(result["linear_top1"])}</b>'
        f' <span class="interval">(95&nbsp;% interval {low} to {high})</span>{_comparison(result)}.'
    )
    parts = [f"<header>{title}<h1>{sentence}</h1>"]
    measured = result.get("encoder_sha256")
    if measured is not None and measured != sha256:
        parts.append(
            f'<p class="warning">These numbers are of another encoder (epoch {result.get("epoch", "unknown")}) than '
            f"the checkpoint now holds (epoch {checkpoint.epochs}). Measure again: {_how_to_measure(checkpoint)}</p>"
        )
    if copies := duplicates_in_words(result):
        parts.append(f'<p class="warning">{_text(copies[0].upper() + copies[1:])}.</p>')
    return "\n".join([*parts, _bars(result), _fine_print(result), "</header>"])


def _unmeasured(checkpoint: Checkpoint, history: dict[str, list[tuple[float, float]]], test: Part | None) -> str:
    epochs = checkpoint.epochs
    sentence = f"{epochs} epoch{'s' if epochs > 1 else ''} of {_text(checkpoint.model['encoder'])}, not yet measured."
    if knn := history.get("knn_top1"):
        sentence = (
            f"{epochs} epoch{'s' if epochs > 1 else ''} of {_text(checkpoint.model['encoder'])}: online kNN "
            f'<b class="number">{_percent(knn[-1][1])}</b> on training images, not yet measured on test images.'
        )
    if test is not None and test.labels is None:
        return f"<h1>{sentence}</h1><p>These images have no labels, so there is no accuracy to measure.</p>"
    return f"<h1>{sentence}</h1><p>Linear evaluation: {_how_to_measure(checkpoint)}, then write this page again.</p>"


def _how_to_measure(checkpoint: Checkpoint) -> str:
    return f"<code>{_text(shlex.join(['python', 'linear_eval.py', '--checkpoint', str(checkpoint.run_dir)]))}</code>"


def _comparison(result: dict[str, Any]) -> str:
    """By how much the encoder is ahead of each yardstick that has a number: one may not have converged."""
    names = {"raw_pixels_top1": "raw pixels", "random_encoder_top1": "a random encoder"}
    known = {name: result[key] for key, name in names.items() if result[key] is not None}
    words = [f"{_ahead(result['linear_top1'] - value)} {name}" for name, value in known.items()]
    return f", {' and '.join(words)}" if words else ""


def _ahead(difference: float) -> str:
    return f"{abs(100 * difference):.1f}&nbsp;points {'above' if difference >= 0 else 'below'}"


def _bars(result: dict[str, Any]) -> str:
    """The encoder beside its yardsticks, from 0 to 100 %, with the interval and the rate of guessing."""
    rows = [("linear classifier", result["linear_top1"], "ours")]
    if "knn_top1" in result:
        rows.append((f"kNN, k = {result.get('knn_k', '?')}", result["knn_top1"], "ours light"))
    yardsticks = {"random encoder": result["random_encoder_top1"], "raw pixels": result["raw_pixels_top1"]}
    rows += [(name, value, "") for name, value in yardsticks.items() if value is not None]
    lines = []
    for number, (name, value, kind) in enumerate(rows):
        low, high = (100 * bound for bound in result["ci95"])
        whisker = f'<i class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>' if number == 0 else ""
        lines.append(
            f'<div class="name">{_text(name)}</div><div class="track"><i class="bar {kind}" '
            f'style="width:{100 * value:.2f}%"></i>{whisker}</div><div class="value">{_percent(value)}</div>'
        )
    matrix = result.get("confusion_matrix")
    guess = ""
    if matrix:
        rate = max(map(sum, matrix)) / sum(map(sum, matrix))
        guess = f'<i class="guess" style="left:{100 * rate:.2f}%"><span>guessing {_percent(rate)}</span></i>'
    axis = f'<div></div><div class="axis">{guess}<span>100&nbsp;%</span></div><div class="unit">top-1</div>'
    return f'<div class="bars">{"".join(lines)}{axis}</div>'


def _fine_print(result: dict[str, Any]) -> str:
    data = result.get("data", {})
    notes = []
    if data:
        notes.append(
            f"{data['test_images']:,} test images of {data['test']}; classifiers trained on {data['train_images']:,}."
        )
    if result.get("linear_top5") is not None and len(result.get("confusion_matrix", ())) > 5:  # older ones have 1
        notes.append(f"Top-5 {_percent(result['linear_top5'])}.".replace("&nbsp;", " "))
    protocol = {
        "lbfgs": "L\u2011BFGS, regularisation chosen on a split of the training images",
        "sgd": "SGD, last epoch",
    }
    if result.get("protocol") in protocol:
        notes.append(f"Protocol: {protocol[result['protocol']]}.")
    notes.append("The random encoder is the same network before its first step.")
    notes += [f"Note: {note}." for note in (data.get("note"), grid_end_in_words(result)) if note]
    return f'<p class="caption">{_text(" ".join(notes))}</p>'


def _curves_section(
    history: dict[str, list[tuple[float, float]]], checkpoint: Checkpoint, test: Part | None, folder: Path
) -> str:
    values = history.get("train_loss_epoch") or history.get("train_loss")
    if not values:
        return ""
    classes = len(test.classes) if test is not None and test.classes else None
    figure = draw_curves(history, checkpoint.objective.title, checkpoint.objective.chance, classes)
    caption = f"Loss {values[0][1]:.2f} after the first epoch, {values[-1][1]:.2f} after the last; thin: single steps."
    if knn := history.get("knn_top1"):
        best, last = max(value for _, value in knn), knn[-1][1]
        caption += f" Online kNN, on training images held back from its bank, ends at {_percent(last)}"
        caption += f" (highest {_percent(best)})." if best > last else "."
    return _section("How it learned", _chart(figure, "curves", folder, "loss and online kNN against epochs"), caption)


def _neighbours_section(test: Part, bank: Part, folder: Path) -> str:
    """Queries with their nearest training images, and how often a neighbour is of the query's class."""
    k = min(_NEIGHBOURS, len(bank.index))
    places = choose_queries(test, _QUERIES)
    near = nearest(test.features[places], bank.features, k)  # (n, k)
    labelled = test.labels is not None and bank.labels is not None
    wrong = bank.labels[near] != test.labels[places][:, None] if labelled else None
    picture = neighbour_picture(test.pixels[places], bank.pixels[near], wrong)
    write_atomically(folder / "neighbours.png", _png(picture))
    rows = []
    for row, place in enumerate(places.tolist()):
        cells = [_tile(test, place, "query"), "<i></i>"]
        for column, other in enumerate(near[row].tolist()):
            kind = "neighbour wrong" if wrong is not None and wrong[row, column] else "neighbour"
            cells.append(_tile(bank, other, kind))
        rows.append("".join(cells))
    grid = f'<div class="neighbours" style="--neighbours:{k}">{"".join(rows)}</div>'
    chosen = f" a fixed choice of {len(bank.index):,} of" if len(bank.index) < bank.whole else f" {bank.whole:,}"
    chosen = chosen + (f" {bank.whole:,}" if len(bank.index) < bank.whole else "")
    caption = f"Left: images of {test.name}. Right: their {k} nearest, by cosine similarity of features, among{chosen}"
    caption += f" images of {bank.name}."
    if labelled:
        share = (bank.labels[nearest(test.features, bank.features, k)] == test.labels[:, None]).float().mean().item()
        caption += (
            f" Framed and struck: of another class. Over {len(test.index):,} test images, {_percent(share)} of the "
            f"{k} nearest are of the image's own class."
        )
    return _section("What it sees as alike", grid, caption)


def _tile(part: Part, place: int, kind: str) -> str:
    number = int(part.index[place])
    name = part.classes[int(part.labels[place])] if part.labels is not None and part.classes else ""
    pixels = part.pixels[place]
    picture = to_picture(pixels)
    if pixels.shape[-1] > 128:
        picture = picture.resize((128, 128), Image.Resampling.LANCZOS)
    small = " pixelated" if picture.width <= 64 else ""
    source = _data_uri(_png(picture), "png") if small else _data_uri(_jpeg(picture), "jpeg")
    caption = f"<figcaption>{_text(name)}</figcaption>" if name else ""
    return (
        f'<figure class="{kind}" data-number="{number}"><img class="tile{small}" src="{source}" '
        f'alt="{_text(name) or "image"} {number}">{caption}</figure>'
    )


def _map_section(test: Part, folder: Path) -> str:
    if len(test.index) < 30:
        return ""
    figure = draw_map(tsne(test.features), test.labels, test.classes)
    caption = (
        f"{len(test.index):,} of {test.whole:,} images of {test.name}, by t-SNE of their features (cosine, perplexity "
        "30): near images have near features; distances between groups say little."
    )
    if test.labels is not None:
        caption += " Colours are the classes, which training never saw."
    return _section("A map of the test images", _chart(figure, "map", folder, "map of the test images"), caption)


def _confusion_section(results: list[dict[str, Any]]) -> str:
    """Which classes the linear classifier takes for which: the matrix, and the worst pairs in words."""
    matrix = results[0].get("confusion_matrix") if results else None
    if not matrix:
        return ""
    names = results[0].get("data", {}).get("classes") or [str(i) for i in range(len(matrix))]
    sizes = [max(1, sum(row)) for row in matrix]
    pairs = [
        (matrix[i][j] / sizes[i], i, j)
        for i in range(len(matrix))
        for j in range(len(matrix))
        if i != j and matrix[i][j]
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    words = [
        f"<li><b>{_text(names[i])}</b> taken for <b>{_text(names[j])}</b>: {_percent(share)} "
        f"({matrix[i][j]:,} of {sizes[i]:,})</li>"
        for share, i, j in pairs[:5]
    ]
    table = _heat_table(matrix, sizes, names) if len(matrix) <= MOST_NAMES else _heat_picture(matrix, sizes)
    worst = f"<p>Taken for each other most often:</p><ul>{''.join(words)}</ul>" if words else "<p>No mistakes.</p>"
    caption = "Rows: the true class. Columns: what the linear classifier says. Percent of the row, blank below 0.5 %."
    return _section("What it confuses", f"{table}{worst}", caption)


def _heat_table(matrix: list[list[int]], sizes: list[int], names: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><span>{_text(name)}</span></th>' for name in names)
    rows = []
    for i, row in enumerate(matrix):
        cells = []
        for j, count in enumerate(row):
            share = count / sizes[i]
            colour = "accent" if i == j else "wrong"
            strength = min(100, round(100 * share if i == j else 200 * share))  # mistakes are rarer: twice as strong
            shown = f"{100 * share:.0f}" if share >= 0.005 else ""
            strong = ' class="strong"' if strength > 55 else ""
            mix = f"color-mix(in srgb,var(--{colour}) {strength}%,transparent)"
            cells.append(f'<td{strong} style="background:{mix}">{shown}</td>')
        rows.append(f'<tr><th scope="row">{_text(names[i])}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table class="confusion"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'


def _heat_picture(matrix: list[list[int]], sizes: list[int]) -> str:
    """Many classes: one pixel a cell, the diagonal in the accent colour, mistakes in the other."""
    share = torch.tensor(matrix).float() / torch.tensor(sizes)[:, None]
    own = torch.eye(len(matrix), dtype=torch.bool)
    alpha = torch.where(own, share, 5 * share).clamp(max=1)
    rgb = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (WRONG, ACCENT)])[own.long()]  # (C, C, 3)
    pixels = torch.cat((rgb, (255 * alpha)[..., None].long()), dim=-1).byte().numpy()
    source = _data_uri(_png(Image.fromarray(pixels, "RGBA")), "png")
    return f'<img class="matrix pixelated" src="{source}" alt="confusion matrix of {len(matrix)} classes">'


def _views_section(folder: Path) -> str:
    path = folder / "views.png"
    if not path.exists():
        return ""
    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    if picture.width > 1600:
        picture = picture.resize((1600, round(picture.height * 1600 / picture.width)), Image.Resampling.LANCZOS)
        source = _data_uri(_jpeg(picture), "jpeg")
    else:
        source = _data_uri(path.read_bytes(), "png")
    caption = (
        "On top the images; below, exactly the views that the network saw of them in the first epochs. It learns to "
        "tell that the views below each other are of one image."
    )
    return _section("What it was shown", f'<img class="views" src="{source}" alt="images and their views">', caption)


def _settings_section(checkpoint: Checkpoint, encoder: nn.Module, folder: Path) -> str:
    model, data = checkpoint.model, checkpoint.data
    config = _read_config(folder)
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
    lines = [f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in rows.items() if value]
    remark = "All settings are in config.yaml beside this page." if config else ""
    return _section("Settings", f"<dl>{''.join(lines)}</dl>", remark)


def _number(value: float | None) -> str:
    """A setting for people; one that was left open when the checkpoint was written is the default's."""
    return "default" if value is None else f"{value:g}"


def _view_size(model: dict[str, Any]) -> str:
    size = f"{model['image_size']} px"
    grows = model.get("start_size") is not None
    return f"{model['start_size']} px, growing to {size} over {model['grow_epochs']} epochs" if grows else size


_DATA_SHOWN = ("source", "train_dir", "test_dir", "data_dir", "shapes_train", "shapes_test")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    return config if isinstance(config, dict) else {}


def _provenance_section(checkpoint: Checkpoint, results: list[dict[str, Any]], sha256: str) -> str:
    rows = {"checkpoint": str(checkpoint.path), "encoder sha256": sha256}
    earlier = ""
    if results:
        rows |= {
            "evaluated by": results[0].get("command", ""),
            "evaluated on": results[0].get("date", "").replace("T", " "),
            "versions": ", ".join(f"{k} {v}" for k, v in results[0].get("versions", {}).items()),
        }
        for result in results[1:]:
            line = f"{_percent(result['linear_top1'])}, epoch {result.get('epoch')}, {_text(result.get('protocol'))}"
            earlier += f"<li>{line}, {_text(result.get('date', '').replace('T', ' '))}</li>"
    rows["this page"] = datetime.now(UTC).isoformat(" ", timespec="seconds")
    lines = [f"<dt>{name}</dt><dd><code>{_text(value)}</code></dd>" for name, value in rows.items() if value]
    earlier = earlier and f"<p>Earlier evaluations of this run:</p><ul>{earlier}</ul>"
    return _section("Where it is from", f"<dl>{''.join(lines)}</dl>{earlier}")


# Charts


def _chart(figure: "Figure", name: str, folder: Path, title: str) -> str:
    """Write a chart as NAME.png, for use elsewhere, and return it as SVG that takes its colours from the page."""
    import matplotlib

    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=180, facecolor="white")
    write_atomically(folder / f"{name}.png", png.getvalue())
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    for colour, variable in COLOUR_NAMES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)  # several charts share the page
    return f'<div class="chart">{text.replace("<svg", f"""<svg role="img" aria-label="{_text(title)}" """, 1)}</div>'


# Page


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}&nbsp;%"


def _section(title: str, body: str, caption: str = "") -> str:
    # A caption is plain text but for the non-breaking spaces of its numbers.
    caption = caption and f'<p class="caption">{_text(caption).replace("&amp;nbsp;", "&nbsp;")}</p>'
    return f"<section><h2>{_text(title)}</h2>{body}{caption}</section>"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #667080; --grid: #e4e7eb; --paper: #fefefe;
  --accent: #2460c8; --wrong: #d4541a; --yardstick: #a9b1bb; --panel: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #9aa3af; --grid: #333a44; --paper: #14171b;
  --accent: #6ea3ff; --wrong: #ff8a4c; --yardstick: #5d6672; --panel: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 56px 24px 96px; }
.run { margin: 0 0 10px; color: var(--muted); font-size: 15px; letter-spacing: .01em; overflow-wrap: anywhere; }
h1 { margin: 0 0 34px; font-size: 30px; line-height: 1.32; font-weight: 500; letter-spacing: -.012em;
  text-wrap: pretty; }
h1 .number { color: var(--accent); font-weight: 700; }
h1 .interval { color: var(--muted); font-size: .72em; white-space: nowrap; }
h2 { margin: 0 0 18px; font-size: 20px; font-weight: 600; letter-spacing: -.005em; }
section { margin-top: 64px; }
p { margin: 14px 0; }
.caption { max-width: 46em; margin: 16px 0 0; color: var(--muted); font-size: 14px; text-wrap: pretty; }
.warning { padding: 12px 16px; border-left: 4px solid var(--wrong); background: var(--panel); }
code { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
p code { padding: 2px 6px; border-radius: 4px; background: var(--panel); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 10px 16px; align-items: center; }
.bars .name { text-align: right; color: var(--muted); }
.bars .name:first-child, .bars .value { font-weight: 600; color: var(--ink); }
.bars .value, .confusion { font-variant-numeric: tabular-nums; }
.bars .value { text-align: right; }
.track { position: relative; height: 30px; background: var(--panel); border-radius: 4px; }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--yardstick); border-radius: 4px; }
.bar.ours { background: var(--accent); }
.bar.light { background: color-mix(in srgb, var(--accent) 55%, var(--panel)); }
.whisker { position: absolute; top: 9px; height: 12px; border: solid var(--ink); border-width: 0 2px; }
.whisker::before { content: ""; position: absolute; inset: 5px 0 auto; border-top: 2px solid var(--ink); }
.axis { position: relative; height: 20px; color: var(--muted); font-size: 13px; }
.axis > span { position: absolute; right: 0; }
.unit { color: var(--muted); font-size: 13px; text-align: right; }
.guess { position: absolute; bottom: 4px; height: 176px; border-left: 1.5px dashed var(--muted); }
.guess span { position: absolute; bottom: -5px; left: 6px; white-space: nowrap; font-style: normal; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg text { font-family: inherit !important; }
.neighbours { display: grid; grid-template-columns: 1fr 4px repeat(var(--neighbours), 1fr); gap: 10px 6px; }
.neighbours figure { margin: 0; min-width: 0; }
.neighbours figcaption { overflow: hidden; color: var(--muted); font-size: 12px; line-height: 1.5; text-align: center;
  text-overflow: ellipsis; white-space: nowrap; }
.neighbours .query figcaption { color: var(--ink); font-weight: 600; }
.tile { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; object-fit: cover; }
.pixelated { image-rendering: pixelated; }
.wrong .tile { outline: 3px solid var(--wrong); outline-offset: -3px; }
.neighbours .wrong figcaption { color: var(--wrong); text-decoration: line-through; }
.views { display: block; width: 100%; padding: 12px; border: 1px solid var(--grid); border-radius: 8px;
  background: #fff; }
.matrix { display: block; width: min(100%, 640px); border: 1px solid var(--grid); }
.wide { overflow-x: auto; }
.confusion { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed; font-size: 13px; }
.confusion td { height: 38px; padding: 0; border-radius: 3px; text-align: center; }
.confusion .strong { color: var(--paper); font-weight: 600; }
.confusion th { overflow: hidden; padding: 0 6px; color: var(--muted); font-weight: 500; text-align: right;
  text-overflow: ellipsis; white-space: nowrap; }
.confusion th[scope=col] { padding: 0 1px 4px; font-size: 12px; text-align: center; }
.confusion tr:first-child td { width: 92px; }
ul { padding-left: 20px; }
li { margin: 4px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 24px; margin: 0; font-size: 15px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 32px 16px 64px; } h1 { font-size: 23px; }
  dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; } .neighbours figcaption { display: none; } }
"""
