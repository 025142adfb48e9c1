"""The same images as several encoders see them: their nearest neighbours beside each other."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.compare.rows import Comparison
from simclr.eval import nearest
from simclr.report.pictures import data_uri, to_picture
from simclr.report.run import data_of
from simclr.report.sample import Sample, choose_queries, take_samples

_QUERIES, _NEIGHBOURS = 6, 8
_TEST_IMAGES, _LARGE = 500, 64  # among which queries are chosen; and from how many pixels on images are large
_BANK, _BANK_OF_LARGE = 2000, 500
_SIDE = 64  # pixels of a picture


def neighbours_beside(
    found: Comparison,
    *,
    most: int,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Queries, and for each the nearest images by the encoder of each row's first run.

    Only encoders on the same images stand beside each other: those of the first that can be shown.

    Args:
        found: the runs.
        most: rows whose encoders are loaded, from the first.
        device: where to compute features.
        say: is told what goes on, and which row cannot be shown, and why.
    Returns:
        `queries`: each a picture, its class, and of each encoder (row, name, pictures with whether they are of the
        query's class); `test`, `bank`, `k`. None where fewer than two encoders can be shown.
    """
    shown: list[tuple[int, Sample, Sample]] = []
    for number, row in enumerate(found.rows[:most]):
        name = row.runs[0].name
        try:
            checkpoint = read_checkpoint(row.runs[0].path)
            encoder, data = load_encoder(checkpoint.path), data_of(checkpoint)
            large = checkpoint.model["image_size"] > _LARGE
            bank_images = _BANK_OF_LARGE if large else _BANK
            test, bank = take_samples(encoder, data, test_images=_TEST_IMAGES, bank_images=bank_images, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            say(f"{name}: no neighbours: {' '.join(str(error).split())}")
            continue
        if shown and _images(test, bank) != _images(*shown[0][1:]):
            say(f"{name}: no neighbours beside the others: it was trained on other images")
            continue
        say(f"{name}: features of {len(test.index) + len(bank.index):,} images")
        shown.append((number, test, bank))
    if len(shown) < 2:
        return None
    test, bank = shown[0][1:]
    k = min(_NEIGHBOURS, len(bank.index))
    queries = []
    for place in choose_queries(test, _QUERIES).tolist():
        answers = []
        for number, own_test, own_bank in shown:
            near = nearest(own_test.features[place : place + 1], own_bank.features, k)[0].tolist()
            tiles = [_tile(bank, other, _label(test, place)) for other in near]
            answers.append({"row": number, "name": found.rows[number].runs[0].name, "tiles": tiles})
        queries.append({**_tile(test, place, None), "answers": answers})
    return {"queries": queries, "test": test, "bank": bank, "k": k}


def _images(test: Sample, bank: Sample) -> tuple[Any, ...]:
    """Equal for the same choice of the same images, as far as their numbers and names tell."""
    return tuple((s.name, s.whole, s.index.tolist(), s.paths) for s in (test, bank))


def _label(sample: Sample, place: int) -> int | None:
    return None if sample.labels is None else int(sample.labels[place])


def _tile(sample: Sample, place: int, of_query: int | None) -> dict[str, Any]:
    picture = to_picture(sample.pixels[place])
    if picture.width > _SIDE:
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    label = _label(sample, place)
    return {
        "source": data_uri(picture, "jpeg"),
        "is_small": picture.width < _SIDE,
        "name": sample.classes[label] if label is not None and sample.classes else "",
        "wrong": of_query is not None and label is not None and label != of_query,
    }
