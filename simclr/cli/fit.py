"""`simclr fit`: a classifier on an encoder's features."""

import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from simclr.cli.embed import add_computing, add_encoder, encoder_of, progress_bar, workers_for
from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet, stop
from simclr.cli.parsing import Parser
from simclr.cli.ranks import on_launched_ranks
from simclr.cli.search import writable
from simclr.distributed import rank
from simclr.eval.logreg import NotConverged
from simclr.paths import expanded
from simclr.use.classify import fit_classifier, save_classifier
from simclr.use.embed import OnError
from simclr.use.embedded import in_a_line as of_one_line


@in_a_line
@on_launched_ranks
def fit(argv: list[str] | None = None) -> None:
    """Fit a classifier to class folders. See `simclr fit --help`."""
    quiet()
    config = guarded(lambda: fit_parser().parse_args(sys.argv[1:] if argv is None else argv))
    out = guarded(lambda: _out(config))
    source, device = guarded(lambda: encoder_of(config))
    folder = config.data.train_dir
    try:
        with progress_bar(folder) as advance:
            classifier, skipped = guarded(
                lambda: fit_classifier(
                    folder,
                    source,
                    batch_size=config.batch_size,
                    workers=workers_for(device, config.workers),
                    on_error=config.on_error,
                    seed=config.seed,
                    advance=advance,
                )
            )
    except KeyboardInterrupt:
        stop("stopped: nothing is written")
    except NotConverged as error:
        fail(str(error), FAILED)
    except (BrokenProcessPool, EOFError, ConnectionError):  # one that decodes, or the one that starts them
        fail("a process that decodes has died, mostly of too little memory. Try --workers 0.", FAILED)
    if rank() > 0:
        return
    guarded(lambda: save_classifier(classifier, out))
    held, about = classifier.about["held_out"], classifier.about
    low, high = (f"{100 * bound:.1f}" for bound in held["ci95"])
    print(
        f"{len(about['classes'])} classes, {about['train_images']:,} images; accuracy on {held['images']:,} held-out "
        f"images {100 * held['accuracy']:.1f} % (95 % interval {low} to {high}), regularisation "
        f"{about['regularization']:.3g} chosen without them"
    )
    if about["regularization_end"]:
        print(f"note: that is the {about['regularization_end']} of those tried")
    for line in [*skipped[:3], *(["..."] if len(skipped) > 3 else [])]:
        print(f"note: {len(skipped):,} could not be read: {of_one_line(line)}")
    print(f"written to {out}; next: simclr predict IMAGES --classifier {out}")


def fit_parser() -> Parser:
    """The settings of a fit."""
    parser = Parser(
        command="fit", description="Fit a logistic regression on an encoder's features to images in class folders."
    )
    parser.add_argument(
        "--data.train_dir", type=str, required=True, help="A folder with a folder of images for each class."
    )
    add_encoder(parser)
    parser.add_argument(
        "--out", type=str | None, default=None, help="The file; classifier.safetensors in the run's folder, or here."
    )
    parser.add_argument("--on_error", type=OnError, default="raise", help="Of an image that cannot be read.")
    parser.add_argument("--seed", type=int, default=0, help="Of which fifth of the images is held out.")
    add_computing(parser)
    return parser


def _out(config: Any) -> Path:
    folder = expanded(config.encoder)
    out = expanded(config.out) if config.out else (folder if folder.is_dir() else Path()) / "classifier.safetensors"
    if out.exists():
        raise ValueError(f"out={out} is there already. Name another file, or remove it.")
    writable(config, "out")
    return out
