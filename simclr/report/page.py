"""`report.html`: a page that needs nothing beside it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.data import ImageData
from simclr.data.module import folders_of_run
from simclr.eval import encoder_sha256
from simclr.files import write_atomically
from simclr.report import sections
from simclr.report.charts import Times
from simclr.report.run import (
    data_of,
    read_clock,
    read_config,
    read_evaluations,
    read_metrics,
    read_results,
    steps_per_epoch,
)
from simclr.report.sample import take_samples
from simclr.report.settings import settings

REPORT = "report.html"  # in the run folder
_SECTIONS = {  # content -> where it stands and what it is called in the list of contents
    "protocols": ("protocols", "By protocol"),
    "curves": ("learned", "How it learned"),
    "quality": ("quality", "Without labels"),
    "atlas": ("map", "Atlas"),
    "neighbours": ("neighbours", "Neighbours"),
    "alike": ("alike", "Near-duplicates"),
    "confusion": ("confusion", "Confusions"),
    "views": ("views", "Views"),
    "usage": ("use", "Use it"),
    "settings": ("settings", "Settings"),
    "provenance": ("from", "Where from"),
}


def write_report(
    run_dir: str | Path,
    *,
    data: ImageData | None = None,
    device: torch.device | str = "cpu",
    bank_images: int | None = None,
    map_images: int = 2000,
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
        map_images: test images on the map, at most; 65 535 are the most.
        say: is told what goes on, a line at a time.
    Returns:
        The file written.
    Raises:
        FileNotFoundError: if there is no such run, saying what there is.
        ValueError: if a file of the run or an image cannot be read, naming it.
    """
    if (bank_images is not None and bank_images < 1) or map_images < 1 or map_images >= 2**16:
        raise ValueError(
            f"bank_images={bank_images} and map_images={map_images}: needed 1 or more, a map 65 535 at most."
        )
    checkpoint = read_checkpoint(run_dir)
    folder = checkpoint.run_dir
    encoder = load_encoder(checkpoint.path)
    results = read_results(folder)
    evaluations = read_evaluations(folder)
    per_epoch = checkpoint.run.get("steps_per_epoch") or steps_per_epoch(folder)
    history = read_metrics(folder, per_epoch)
    sha256 = encoder_sha256(encoder)
    test = bank = missing = None
    try:
        data = data or data_of(checkpoint)
        with folders_of_run(data, checkpoint.data):
            data.setup()
    except ValueError as error:
        say(f"no images to show: {error}")
        missing = str(error)
    else:
        side: Any = encoder.image_size
        bank_images = bank_images or (10_000 if side <= 64 else 2_000)
        test, bank = take_samples(
            encoder, data, test_images=map_images, bank_images=bank_images, device=device, say=say
        )
    said = sections.predictions_of(results, checkpoint, test)
    times = Times(
        folder.resolve().name,
        steps=per_epoch,
        images=(per_epoch and per_epoch * (checkpoint.model.get("batch_size") or 0)) or None,
        clock=read_clock(folder, per_epoch) or None if per_epoch else None,
    )
    content = {
        "protocols": sections.protocols(evaluations, sha256),
        "curves": sections.curves(history, checkpoint.objective, test, folder, times),
        "quality": sections.quality(history, checkpoint.objective, encoder),
        "atlas": test and sections.atlas(test, folder, said),
        "neighbours": test and bank and sections.neighbours(test, bank, folder),
        "alike": test and bank and sections.alike(test, bank),
        "confusion": sections.confusion(results, test, said),
        "views": sections.views(folder),
    }
    page = render(
        title=f"{folder.resolve().name}: {checkpoint.model['encoder']}",
        headline=sections.headline(checkpoint, results, sha256, history, test, evaluations),
        missing=missing,
        with_labels=sections.learned_labels(checkpoint),
        usage=sections.usage(checkpoint, encoder),
        settings=settings(checkpoint, encoder, read_config(folder)),
        provenance=sections.provenance(checkpoint, results, sha256, evaluations),
        **content,
    )
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT


def _with_options(text: str) -> Markup:
    """Text with the options of the command line in it as code, which no line breaks."""
    return Markup(re.sub(r"--[a-z][\w.-]*\w", r'<code class="option">\g<0></code>', str(escape(text))))


def render(**content: Any) -> str:
    """The page of `templates/page.html`. Whatever is put into it is text, escaped, unless it is markupsafe's Markup.

    Raises:
        jinja2.UndefinedError: for a value that a template asks for and does not get.
    """
    environment = Environment(
        loader=PackageLoader("simclr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": sections.percent, "thousands": "{:,}".format, "options": _with_options}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    contents = [place for name, place in _SECTIONS.items() if content.get(name)]
    return environment.get_template("page.html").render(content, contents=contents)
