"""The program that measures the run of a cell: `python -m simclr.ablate.probes --run RUN --out FILE`.

Linear probes on h and z, by logistic regression, how well a small network tells from h or z what was done to an image
(Chen et al. 2020, Table 3), or a protocol of `simclr eval`. They compare the cells of an experiment, on a part of the
training images; for an encoder by itself there is `simclr linear-eval`.
"""

import csv
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr.ablate.program import Outcome, arguments, labels_sha256, run_program
from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import Checkpoint, new_encoder, read_checkpoint
from simclr.data import EvalLoader
from simclr.data.module import images_of_run
from simclr.eval.evaluation import LoadedImages
from simclr.eval.features import encode, extract_features
from simclr.eval.features import frozen as in_eval_mode
from simclr.eval.few_labels import labelled_part, labels_per_class
from simclr.eval.logreg import linear_probe
from simclr.eval.protocol import OF_EVAL, FrozenFeatures, find_protocol
from simclr.eval.quality import spread
from simclr.training.method import find_method

# What is done, with the probability of the paper's chance level: 80, 25, 50 and 50 %.
TRANSFORMATIONS: dict[str, dict[str, float]] = {
    "gray": {"gray_prob": 0.2},
    "rotation": {"rotation_prob": 1.0},
    "noise": {"noise_prob": 0.5},
    "sobel": {"sobel_prob": 0.5},
}
_PLAIN = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "rotation_prob", "noise_prob", "sobel_prob")


@dataclass(frozen=True)
class ProbeSettings:
    """What a cell may ask for.

    Attributes:
        train, test: images, at most.
        z: whether to measure the projections beside the representations.
        random: whether to measure the encoder before its first step.
        labels: the part of the training images whose labels are used.
        protocol: of `simclr eval`, in place of the probes; its accuracy is `test_top1`.
        options: its settings, but the seed, which is the run's.
        result: what the name of its result begins with, where it comes to several.
        transformations: whether to ask what was done to an image.
    """

    train: int = 8192
    test: int = 10_000
    z: bool = False
    random: bool = False
    labels: float = 1.0
    protocol: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    result: str = ""
    transformations: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run, and write the outcome."""
    given = arguments(argv, run=True)
    measure(given.run, ProbeSettings(**given.settings), given.device).write(given.out)


def measure(run: Path, settings: ProbeSettings, device: str = "cpu") -> Outcome:
    """The numbers of a run.

    Args:
        run: its folder.
        settings: what to measure.
        device: where.
    """
    checkpoint = read_checkpoint(run)
    model = network_of(checkpoint)
    data = images_of_run(checkpoint.data)
    train = data.eval_loader("train", limit=settings.train)
    test = data.eval_loader("test", limit=settings.test)
    outcome, seed = Outcome(), checkpoint.model["seed"]
    of_test = labels_sha256(test.labels, test.source.name)
    if settings.protocol is not None:
        hits = by_protocol(settings.protocol, settings, model, train, test, device)
        outcome.add_images("test_top1", hits, of_test)
        return outcome
    networks: dict[str, nn.Module] = {"linear_top1": model.encoder}
    if settings.z:
        networks["linear_top1_z"] = WithHead(model)
    if settings.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks["random_top1"] = new_encoder(checkpoint)
    kept = torch.arange(len(train.index))
    if settings.labels < 1:
        kept = labelled_part(train.labels, labels_per_class(train.labels, settings.labels), seed=seed, draw=0)
    for name, network in networks.items():
        features, labels = extract_features(network, train, device=device)
        tested, wanted = extract_features(network, test, device=device)
        found = linear_probe(features[kept], labels[kept], tested, wanted, max_iterations=3000, device=device)
        outcome.add_images(name, found.predictions == wanted, of_test)
        if name == "linear_top1":
            outcome.metrics["spread_h"] = spread(tested)
    if settings.transformations:
        for name, options in TRANSFORMATIONS.items():
            for place, network in (("h", model.encoder), ("z", WithHead(model))):
                hits, wanted = tell_what_was_done(network, name, options, train, test, device)
                outcome.add_images(f"{name}_{place}", hits, labels_sha256(wanted, f"{test.source.name} {name}"))
    outcome.metrics |= last_figures(run / "metrics.csv")
    return outcome


def by_protocol(
    name: str, settings: ProbeSettings, model: Any, train: EvalLoader, test: EvalLoader, device: str
) -> Tensor:
    """Which test images a protocol of `simclr eval` classifies as they are labelled: (N,) bool.

    Args:
        name: of the protocol.
        settings: whose options it gets.
        model: the module of a run.
        train, test: images.
        device: where.
    """
    of_train, of_test = (extract_features(model.encoder, images, device=device) for images in (train, test))
    frozen = FrozenFeatures(model.encoder, of_train, of_test, LoadedImages(train), device, test, model.head)
    results = find_protocol(name, OF_EVAL)(frozen, **settings.options, seed=model.hparams["seed"])
    [found] = [result for result_name, result in results.items() if result_name.startswith(settings.result)]
    return found.predictions == of_test[1]


class WithHead(nn.Module):
    """Encoder and projection head as one: images -> z."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder, self.head = model.encoder, model.head
        self.image_size, self.mean, self.std = (getattr(model.encoder, k) for k in ("image_size", "mean", "std"))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def network_of(checkpoint: Checkpoint) -> Any:
    """The module of a run with its weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        model = find_method(checkpoint.method)(**checkpoint.model)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


def tell_what_was_done(
    network: nn.Module, name: str, options: dict[str, float], train: EvalLoader, test: EvalLoader, device: str
) -> tuple[Tensor, Tensor]:
    """Whether a small network on frozen features tells what was done to each test image.

    Args:
        network: images -> features.
        name: of TRANSFORMATIONS.
        options: of the augmentation, beside which nothing is done.
        train, test: images.
        device: where.
    Returns:
        (N,) bool, and (N,) what was done.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    encoder: Any = network
    switched_off: dict[str, Any] = dict.fromkeys(_PLAIN, 0.0)
    augment = SimCLRAugmentation(
        encoder.image_size,
        **{**switched_off, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), **options},
        channels=len(encoder.mean),
        mean=encoder.mean,
        std=encoder.std,
    )
    parts = [_done(network.to(device), name, augment, loader, epoch) for epoch, loader in enumerate((train, test))]
    (features, done), (tested, wanted) = parts
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    classifier = MLPClassifier((256,), early_stopping=True, max_iter=100, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(((features - mean) / scale).numpy(), done.numpy())
    predictions = torch.from_numpy(classifier.predict(((tested - mean) / scale).numpy()))
    return predictions == wanted, wanted


@torch.no_grad()
def _done(
    network: nn.Module, name: str, augment: SimCLRAugmentation, loader: EvalLoader, epoch: int
) -> tuple[Tensor, Tensor]:
    device = next(network.parameters()).device
    features, done = [], []
    with in_eval_mode(network):
        for images, index in _numbered(loader):
            table = augment.draw(index, images.shape[2], images.shape[3], epoch)
            done.append(table["quarter_turns"] if name == "rotation" else table[name].long())
            features.append(encode(network, augment.view(images.to(device), index, epoch)).cpu())
    return torch.cat(features), torch.cat(done)


def _numbered(loader: EvalLoader) -> Iterator[tuple[Tensor, Tensor]]:
    begun = 0
    for images, _ in loader:
        yield images, loader.index[begun : begun + len(images)].cpu()
        begun += len(images)


def last_figures(path: Path, names: Iterable[str] = ("contrast_top1", "train_loss")) -> dict[str, float]:
    """Means of the last ten values that a run has logged of each figure; contrastive accuracy in percent."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in names:
        values = [float(row[name]) for row in rows if row.get(name)][-10:]
        if values:
            found[name] = sum(values) / len(values) * (100 if name == "contrast_top1" else 1)
    return found


if __name__ == "__main__":
    run_program(main)
