"""What stands in each section of a report: plain values for its template, or None for a section that is left out."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from simclr.checkpoint import ENCODER, Checkpoint
from simclr.eval import nearest
from simclr.eval.duplicates import duplicates_in_words
from simclr.eval.evaluation import grid_end_in_words
from simclr.eval.predictions import unpacked
from simclr.eval.tables import name_of, shown_results, top1_of, yardsticks_of
from simclr.eval.tables import notes as notes_of
from simclr.eval.tables import table as table_of
from simclr.files import write_atomically
from simclr.online_quality import BEFORE, FIGURES, RETRIEVAL
from simclr.pace import FEWEST_STEPS
from simclr.paths import shown
from simclr.report.alike import CORRELATION, COSINE, find_alike
from simclr.report.atlas import atlas_data
from simclr.report.charts import Panel, Series, Times, chart_data
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
from simclr.report.run import is_going_on
from simclr.report.sample import Sample, choose_queries, pixels_of, tsne
from simclr.training.objective import Objective

Content = dict[str, Any]  # what a template may ask for, by name
History = dict[str, list[tuple[float, float]]]  # as `read_metrics` gives it

_QUERIES, _NEIGHBOURS, _MISTAKES = 10, 8, 8
_FEWEST_ON_MAP = 30  # images
_STRONGEST = 54  # percent of colour in a cell, on which its number has a contrast of 4.5 in both themes
_FIRST = ("linear", "logreg", "heads", "knn")  # protocols of which one stands for all
_PROTOCOLS = {
    "lbfgs": "L\u2011BFGS, regularisation chosen on a split of the training images",
    "sgd": "SGD, last epoch",
}


def percent(fraction: float) -> str:
    """`83.1 %`, with a space that no line breaks at."""
    return f"{100 * fraction:.1f}\u00a0%"


def learned_labels(checkpoint: Checkpoint) -> bool:
    """Whether a run was trained on classes, as `simclr supervised` does."""
    return checkpoint.model.get("num_classes") is not None


def headline(
    checkpoint: Checkpoint,
    results: list[Content],
    sha256: str,
    history: History,
    test: Sample | None,
    evaluations: list[Content],
) -> Content:
    """The one thing that matters, first: what a linear classifier reaches, and on what it stands."""
    content = {
        "run": checkpoint.run_dir.resolve().name,
        "stands": _stands(checkpoint),
        "how_to_measure": shlex.join(["simclr", "linear-eval", str(checkpoint.run_dir)]),
        "epochs": checkpoint.epochs,
        "result": results[0] if results else None,
        "advice": advice(checkpoint, results, history),
    }
    if not results:
        knn = history.get("knn_top1")
        return content | {
            "encoder": checkpoint.model["encoder"],
            "knn": knn[-1][1] if knn else None,
            "evaluated": _first_protocol(evaluations[0]) if evaluations else None,
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


def _stands(checkpoint: Checkpoint) -> str | None:
    """How far a run has come that has not come to its end, or that goes on; None for one that has ended."""
    if is_going_on(checkpoint.run_dir):
        return f"{checkpoint.stands.removesuffix(', the run not finished')}, and the run goes on"
    return checkpoint.stands if checkpoint.finished is False else None


def _ahead(result: Content) -> list[tuple[float, str]]:
    """By how many points the encoder is ahead of each yardstick that has a number: one may not have converged."""
    names = {"raw_pixels_top1": "raw pixels", "random_encoder_top1": "a random encoder"}
    names |= {"starting_weights_top1": "the weights it began with", "supervised_top1": "the supervised network"}
    known = {name: result[key] for key, name in names.items() if result.get(key) is not None}
    return [(100 * (result["linear_top1"] - value), name) for name, value in known.items()]


def _first_protocol(record: Content) -> Content:
    """The result that stands for an evaluation by several: of a linear classifier, if there is one."""
    found = shown_results(record)
    result = min(found, key=lambda r: _FIRST.index(r["protocol"]) if r["protocol"] in _FIRST else len(_FIRST))
    names = {"raw_pixels": "raw pixels", "random_encoder": "a random encoder"}
    names |= {"starting_weights": "the weights it began with"}
    top1, others = top1_of(result), yardsticks_of(result)
    return {
        "name": name_of(result),
        "top1": top1,
        "interval": [100 * bound for bound in result["ci95"]] if "ci95" in result else None,
        "draws": result.get("draws"),
        "ahead": [(100 * (top1 - others[key]), name) for key, name in names.items() if key in others],
    }


def protocols(records: list[Content], sha256: str) -> Content | None:
    """The newest evaluation by several protocols, each beside its yardsticks, and of what each number is.

    Args:
        records: of `simclr eval`, the newest first.
        sha256: of the run's encoder.
    """
    if not records:
        return None
    record = records[0]
    head, rows = table_of(record)
    return {
        "head": head,
        "rows": rows,
        "ids": [{"hash": result["hash"], "id": result["id"]} for result in shown_results(record)],
        "notes": notes_of(record),
        "data": record["data"],
        "epoch": record["epoch"],
        "of_another_encoder": record["encoder_sha256"] != sha256,
        "began_with": "starting_weights" in record["yardsticks"],
        "earlier": len(records) - 1,
    }


def _bars(result: Content) -> list[tuple[str, float, str]]:
    """The encoder and its yardsticks: (name, top-1, classes of the bar)."""
    bars = [("linear classifier", result["linear_top1"], "ours")]
    if "knn_top1" in result:
        bars.append((f"kNN, k = {result.get('knn_k', '?')}", result["knn_top1"], "ours light"))
    yardsticks = {"random encoder": result["random_encoder_top1"]}
    yardsticks |= {"starting weights": result.get("starting_weights_top1"), "raw pixels": result["raw_pixels_top1"]}
    yardsticks |= {"supervised network": result.get("supervised_top1")}
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
        "began_with": (result.get("starting_weights") or {}).get("source"),
        "notes": [note for note in (data.get("note"), grid_end_in_words(result)) if note],
    }


def curves(history: History, objective: Objective, test: Sample | None, folder: Path, times: Times) -> Content | None:
    """How the loss fell, beside that of images never trained on, and what else was measured on the way."""
    values = history.get("train_loss_epoch") or history.get("train_loss")
    if not values:
        return None
    classes = len(test.classes) if test is not None and test.classes else None
    save_chart(draw_curves(history, objective.title, objective.chance, classes), folder / "curves.png")
    knn = [value for _, value in history.get("knn_top1", ())]
    probe = [value for _, value in history.get("probe_top1", ())]
    heldout = history.get("heldout_loss")
    return {
        "data": chart_data(_panels(history, objective, classes), [times], legend=True),
        "loss": f"{objective.title} loss:",
        "first": values[0][1],
        "last": values[-1][1],
        "heldout": heldout[-1][1] if heldout else None,
        "knn": {"last": knn[-1], "best": max(knn)} if knn else None,
        "probe": {"last": probe[-1], "best": max(probe)} if probe else None,
    }


def _panels(history: History, objective: Objective, classes: int | None) -> list[Panel]:
    """Panels of what was logged; one without a curve is left out."""

    def series(*wanted: tuple[str, str, str, bool]) -> list[Series]:
        return [
            Series(title, history[name], colour, faint) for name, title, colour, faint in wanted if history.get(name)
        ]

    before = history.get(BEFORE)
    chance = [] if objective.chance is None else [(objective.chance, "chance")]
    found = [
        Panel(
            f"{objective.title} loss",
            series(
                ("train_loss", "single steps", "accent", True),
                ("train_loss_epoch", "training", "accent", False),
                ("heldout_loss", "held-out", "wrong", False),
            ),
            chance,
        ),
        Panel(
            "contrastive top-1, %",
            series(("contrast_top1", "training steps", "accent", False), ("heldout_top1", "held-out", "wrong", False)),
            zero=True,
            scale=100,
        ),
        Panel(
            "accuracy on training images, %",
            series(("train_top1", "training steps", "accent", False)),
            [(1 / classes, "guessing")] if classes else [],
            zero=True,
            scale=100,
        ),
        Panel(
            "online accuracy, %",
            series(("knn_top1", "kNN", "accent", False), ("probe_top1", "linear probe", "wrong", False)),
            [(1 / classes, "guessing")] if classes else [],
            zero=True,
            scale=100,
        ),
        Panel(
            "retrieval of the other view, %",
            series((RETRIEVAL, "held-out", "wrong", False)),
            [(before[-1][1], "untrained network")] if before else [],
            zero=True,
            scale=100,
        ),
        Panel("effective rank of h", series(("rankme", "held-out", "wrong", False)), zero=True),
        Panel(
            "mean cosine of z",
            series(
                ("positive_cosine", "two views", "accent", False), ("negative_cosine", "two images", "muted", False)
            ),
            zero=True,
        ),
        Panel("learning rate", series(("lr", "learning rate", "muted", False)), zero=True),
    ]
    return [panel for panel in found if panel.series]


def _hundredths(value: float) -> str:
    """Two digits, of which zero has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def quality(history: History, objective: Objective, encoder: nn.Module) -> Content | None:
    """The figures that need no labels, each with what it says; None where none was measured."""
    last = {name: values[-1] for name, values in history.items() if values}
    if not last.keys() & set(FIGURES):
        return None
    level = "" if objective.chance is None else f" About {objective.chance:.2f} if no image were told from another."
    training = f" On training images {last['train_loss_epoch'][1]:.2f}." if "train_loss_epoch" in last else ""
    width = encoder.feature_dim
    rows = [
        (RETRIEVAL, "retrieval", percent, "How often the other view of an image is nearer than any view of another."),
        ("heldout_loss", "held-out loss", "{:.2f}".format, f"The {objective.title} loss of batches.{training}{level}"),
        ("heldout_top1", "held-out top-1", percent, "How often the loss finds the other view first, in a batch."),
        ("rankme", "effective rank", "{:.1f}".format, f"In about how many of {width} dimensions h varies (RankMe)."),
        ("alignment", "alignment", "{:.2f}".format, "Mean squared distance of two views of an image: 0 is the same."),
        ("uniformity", "uniformity", _hundredths, "How evenly z fills the sphere: 0 is one point, -4 even."),
        ("z_spread", "spread of z", "{:.2f}".format, "1 where z fills the sphere, near 0 where it has collapsed."),
    ]
    figures = [
        {
            "name": title,
            "value": written(last[name][1]),
            "before": percent(last[BEFORE][1]) if name == RETRIEVAL and BEFORE in last else None,
            "says": says,
        }
        for name, title, written, says in rows
        if name in last
    ]
    epoch = max(last[name][0] for name in FIGURES if name in last)
    return {"figures": figures, "epoch": f"{epoch:g}"}


def advice(checkpoint: Checkpoint, results: list[Content], history: History) -> str | None:
    """One sentence for a run that is below a yardstick, or was too short to be judged; None for another."""
    steps = checkpoint.global_step
    few = f"{steps:,} steps are few: fewer than {FEWEST_STEPS} seldom lead far from an untrained network. "
    longer = "Train longer (--trainer.max_epochs) before you judge the settings."
    learning = "look at the loss above: where it does not fall, lower --model.base_lr; where it does, train longer"
    if results:
        low = [name for points, name in _ahead(results[0]) if points <= 0]
        if low and steps >= FEWEST_STEPS:
            return f"The encoder is not above {' and '.join(low)}: {learning}, or weaken the views (--model.strength)."
    last = {name: values[-1][1] for name, values in history.items() if values}
    if steps < FEWEST_STEPS:
        return few + longer
    # Where classes were learned, views of two images of one are to be alike.
    if not learned_labels(checkpoint) and last.get(RETRIEVAL, 1.0) <= last.get(BEFORE, 0.0):
        return f"The other view of an image is found no more often than by the untrained network: {learning}."
    return None


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
    tile = _picture(sample.pixels[place])
    return tile | {
        "kind": kind,
        "number": int(sample.index[place]),
        "name": _class_of(sample, place),
    }


def _picture(pixels: Tensor, most: int = 128) -> Content:
    """An image for a page: where it is read from, and whether it is so small that its pixels may be seen."""
    picture = to_picture(pixels)
    if pixels.shape[-1] > most:
        picture = picture.resize((most, most), Image.Resampling.LANCZOS)
    is_small = picture.width <= 64
    return {"is_small": is_small, "source": data_uri(picture, "png" if is_small else "jpeg")}


def _class_of(sample: Sample, place: int) -> str:
    return sample.classes[int(sample.labels[place])] if sample.labels is not None and sample.classes else ""


def _names_of(sample: Sample, place: int) -> Content:
    """An image for people: its file, or its number, and how it is called inside its set."""
    name = shown(sample.paths[place]) if sample.paths is not None else f"{sample.name} {int(sample.index[place])}"
    name = name.encode(errors="replace").decode()  # what a page cannot write is replaced
    return {"label": name, "short": name.removeprefix(f"{shown(sample.name)}/")}


def alike(test: Sample, bank: Sample) -> Content:
    """Images that are there twice, or nearly."""
    samples = [test, bank]
    found = find_alike(samples)
    pairs = []
    for pair in found.pairs:
        (first, i), (second, j) = pair.a, pair.b
        one, other = _class_of(samples[first], i), _class_of(samples[second], j)
        tiles = [_picture(samples[n].pixels[place], 96) | _names_of(samples[n], place) for n, place in (pair.a, pair.b)]
        pairs.append(
            {
                "a": tiles[0],
                "b": tiles[1],
                "same": pair.same,
                "cosine": pair.cosine,
                "across": first != second,
                "differ": f"{one} and {other}" if one != other else "",
            }
        )
    counts = {"images": found.images, "same": found.same, "same_across": found.same_across, "near": found.near}
    return {"pairs": pairs, "cosine": COSINE, "correlation": CORRELATION, **counts}


def predictions_of(results: list[Content], checkpoint: Checkpoint, test: Sample | None) -> Tensor | None:
    """The class given to each image of the test sample's pool by the newest evaluation: (whole,) int64.

    None where the record has none, or is of other images: then another number of them, or other labels.
    """
    kept = results[0].get("predictions") if results else None
    if not kept or test is None or test.pool is None or test.source is None or test.source.labels is None:
        return None
    try:
        said, labels = unpacked(kept["linear"]), unpacked(kept["labels"])
    except (KeyError, TypeError, ValueError):
        return None
    evaluated = (results[0].get("data") or {}).get("settings") or {}
    same = ("source", "train_dir", "test_dir", "data_dir", "shapes_test", "holdout")
    if any(evaluated.get(name) != checkpoint.data.get(name) for name in same):
        return None
    own = test.source.labels[test.pool]
    return said if len(said) == len(own) and torch.equal(labels, own) else None


def confusion(results: list[Content], test: Sample | None = None, said: Tensor | None = None) -> Content | None:
    """Which classes the linear classifier takes for which: accuracy by class, the worst pairs, and the matrix.

    Args:
        results: evaluations, the newest first.
        test: the images that were classified, if they are at hand.
        said: as `predictions_of` gives it; with it the worst pairs are shown as pictures.
    """
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
        {
            "true": names[i],
            "taken_for": names[j],
            "share": share,
            "count": matrix[i][j],
            "of": sizes[i],
            "tiles": _mistaken(test, said, i, j),
        }
        for share, i, j in mistakes[:5]
    ]
    accuracies = [_accuracy(names, row, i, sizes[i]) for i, row in enumerate(matrix) if sum(row)]
    accuracies.sort(key=lambda row: row["share"])
    content = {"worst": worst, "classes": names, "rows": None, "picture": None}
    content |= {"accuracies": accuracies[:MOST_NAMES], "classes_left_out": len(accuracies) > MOST_NAMES}
    if len(matrix) > MOST_NAMES:
        return content | {"picture": data_uri(confusion_picture(matrix, sizes))}
    rows = [[_cell(i == j, count / sizes[i]) for j, count in enumerate(row)] for i, row in enumerate(matrix)]
    return content | {"rows": list(zip(names, rows, strict=True))}


def _accuracy(names: list[str], row: list[int], own: int, size: int) -> Content:
    """A class: how often it is right, and what it is taken for most often otherwise."""
    others = [(count, -j) for j, count in enumerate(row) if j != own and count]
    return {"name": names[own], "share": row[own] / size, "taken_for": names[-max(others)[1]] if others else None}


def _mistaken(test: Sample | None, said: Tensor | None, true: int, taken_for: int) -> list[Content]:
    """Some images of a class that were taken for another."""
    if test is None or said is None or test.source is None or test.pool is None or test.source.labels is None:
        return []
    index = test.pool[(test.source.labels[test.pool] == true) & (said == taken_for)][:_MISTAKES]
    paths = test.source.paths
    labels = [shown(paths[i]) if paths is not None else f"{test.name} {i}" for i in index.tolist()]
    pixels = pixels_of(test.source, index)
    return [
        _picture(image) | {"label": label.encode(errors="replace").decode()}
        for image, label in zip(pixels, labels, strict=True)
    ]


def _cell(is_right: bool, share: float) -> Content:
    """A cell of the table: its number, and how strongly it is coloured, in percent."""
    strength = round(_STRONGEST * min(1.0, share if is_right else 2 * share))  # mistakes are rarer: twice as strong
    return {"colour": "accent" if is_right else "wrong", "strength": strength, "share": share}


def atlas(test: Sample, folder: Path, said: Tensor | None) -> Content | None:
    """The test images where their features put them; too few make no map.

    Args:
        test: the images.
        folder: of the run, where map.png is written.
        said: as `predictions_of` gives it.
    """
    if len(test.index) < _FEWEST_ON_MAP:
        return None
    places = tsne(test.features)
    save_chart(draw_map(places, test.labels, test.classes), folder / "map.png")
    own = said[test.places] if said is not None and test.places is not None else None
    return atlas_data(test, places, own, f"{folder.resolve().name}-chosen")


def usage(checkpoint: Checkpoint, encoder: nn.Module) -> Content:
    """What to write in a program to use the encoder."""
    weights = (checkpoint.run_dir / ENCODER).with_suffix(".safetensors")
    path = weights if weights.is_file() else checkpoint.run_dir
    image = "photo.jpg" if checkpoint.model.get("channels", 3) in (1, 3) else "image.tif"
    return {"path": repr(str(path)), "feature_dim": encoder.feature_dim, "image": image}


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


def provenance(checkpoint: Checkpoint, results: list[Content], sha256: str, evaluations: list[Content]) -> Content:
    """Where the numbers are from: the files, the commands, the versions; and the evaluations before the newest."""
    rows = {"checkpoint": str(checkpoint.path), "encoder sha256": sha256}
    if results:
        rows |= {
            "evaluated by": results[0].get("command", ""),
            "evaluated on": _time(results[0]),
            "versions": ", ".join(f"{k} {v}" for k, v in results[0].get("versions", {}).items()),
        }
    if evaluations:
        newest = evaluations[0]
        rows |= {"by protocol, by": newest.get("command", ""), "by protocol, on": _time(newest)}
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
