"""`report.html`: a page that needs nothing beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from simclr.checkpoint import load_encoder, read_checkpoint
from simclr.data import ImageData
from simclr.data.module import folders_of_run
from simclr.eval import encoder_sha256
from simclr.files import write_atomically
from simclr.report import sections
from simclr.report.run import data_of, read_config, read_metrics, read_results
from simclr.report.sample import take_samples

REPORT = "report.html"  # in the run folder


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
    page = render(
        title=f"{folder.resolve().name}: {checkpoint.model['encoder']}",
        headline=sections.headline(checkpoint, results, sha256, history, test),
        curves=sections.curves(history, checkpoint.objective, test, folder),
        missing=missing,
        neighbours=test and bank and sections.neighbours(test, bank, folder),
        confusion=sections.confusion(results),
        map=test and sections.feature_map(test, folder),
        views=sections.views(folder),
        settings=sections.settings(checkpoint, encoder, read_config(folder)),
        provenance=sections.provenance(checkpoint, results, sha256),
    )
    write_atomically(folder / REPORT, page.encode())
    return folder / REPORT


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
    environment.filters |= {"percent": sections.percent, "thousands": "{:,}".format}
    return environment.get_template("page.html").render(content)
