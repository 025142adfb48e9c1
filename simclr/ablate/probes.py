"""The program that measures the run of a cell: `python -m simclr.ablate.probes --run RUN --out FILE`.

Linear probes on h and z, by logistic regression, and how well a small network tells from h or z what was done to an
image (Chen et al. 2020, Table 3). They compare the cells of an experiment, on a part of the training images; for an
encoder by itself there is `simclr linear-eval`.
"""

import csv
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr.ablate.program import Outcome, arguments, labels_sha256, run_program
from simclr.augment import SimCLRAugmentation
from simclr.checkpoint import Checkpoint, new_encoder, read_checkpoint
from simclr.data import EvalLoader
from simclr.data.module import images_of_run
from simclr.data.splits import stratified_split
from simclr.eval.features import encode, extract_features, frozen
from simclr.eval.logreg import linear_probe
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
        transformations: whether to ask what was done to an image.
    """

    train: int = 8192
    test: int = 10_000
    z: bool = False
    random: bool = False
    labels: float = 1.0
    transformations: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run, and write the outcome."""
    given = arguments(argv, run=True, start=False)
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
    outcome = Outcome()
    networks: dict[str, nn.Module] = {"linear_top1": model.encoder}
    if settings.z:
        networks["linear_top1_z"] = WithHead(model)
    if settings.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(checkpoint.model["seed"])
            networks["random_top1"] = new_encoder(checkpoint)
    kept = torch.arange(len(train.index))
    if settings.labels < 1:
        kept = stratified_split(train.labels, settings.labels, seed=checkpoint.model["seed"])[1]
    for name, network in networks.items():
        features, labels = extract_features(network, train, device=device)
        tested, wanted = extract_features(network, test, device=device)
        found = linear_probe(features[kept], labels[kept], tested, wanted, max_iterations=3000, device=device)
        outcome.add_images(name, found.predictions == wanted, labels_sha256(wanted, test.source.name))
        if name == "linear_top1":
            outcome.metrics["spread_h"] = spread(tested)
    if settings.transformations:
        for name, options in TRANSFORMATIONS.items():
            for place, network in (("h", model.encoder), ("z", WithHead(model))):
                hits, wanted = tell_what_was_done(network, name, options, train, test, device)
                outcome.add_images(f"{name}_{place}", hits, labels_sha256(wanted, f"{test.source.name} {name}"))
    outcome.metrics |= last_figures(run / "metrics.csv")
    return outcome


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
    with frozen(network):
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
