"""The supervised counterpart of a run as a yardstick: its own classifier on the same test images, and its encoder.

It is a run of `simclr.supervised.Supervised`: the same network, images and budget, trained with labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simclr.checkpoint import Checkpoint, load_encoder, read_checkpoint
from simclr.data import EvalLoader, ImageData
from simclr.eval.classifier import score_classifier
from simclr.eval.features import encoder_sha256
from simclr.eval.metrics import wilson_interval
from simclr.eval.predictions import packed
from simclr.eval.protocol import Outcome
from simclr.paths import stored

METHOD = "supervised"  # of `simclr.training.method.METHODS`
# What need not be equal for two runs to have had the same chances.
_NO_MATTER = ("compile_encoder", "compile_views", "channels_last", "micro_batch_size", "mean", "std")
_OF_DATA = ("source", "train_dir", "data_dir", "leave_out", "shapes_train", "load_size")


@dataclass(frozen=True, eq=False)
class SupervisedNetwork:
    """A network that was trained with labels.

    Attributes:
        read: its checkpoint.
        encoder: in eval mode, with its preprocessing.
        weight, bias: (C, F) and (C,) of the classifier on h.
        classes: C names, in the order of their numbers.
    """

    read: Checkpoint
    encoder: nn.Module
    weight: Tensor
    bias: Tensor
    classes: list[str]

    def predict(self, features: Tensor, test: EvalLoader) -> Outcome | None:
        """What its own classifier says of test images; None if they are of other classes than it knows.

        Args:
            features: (M, F) of the encoder.
            test: the images.
        """
        if test.source.classes != self.classes:
            return None
        probe = score_classifier(self.weight, self.bias, features, test.labels, method="sgd", iterations=0)
        return Outcome(probe.predictions, probe.top5)

    def differs(self, run: Checkpoint) -> dict[str, list[Any]]:
        """The settings in which it differs from a run, beyond the method: name -> the run's value and its own."""
        pairs = {
            name: [run.model[name], value]
            for name, value in self.read.model.items()
            if name in run.model and name not in _NO_MATTER
        }
        pairs["epochs"] = [run.epochs, self.read.epochs]
        pairs |= {f"data.{name}": [run.data.get(name), self.read.data.get(name)] for name in _OF_DATA}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def about(self, run: Checkpoint) -> dict[str, Any]:
        """Which network it is, for a record, in plain types."""
        return {
            "checkpoint": stored(self.read.path),
            "encoder": self.read.model["encoder"],
            "encoder_sha256": encoder_sha256(self.encoder),
            "epoch": self.read.epochs,
            "global_step": self.read.global_step,
            "total_steps": self.read.run.get("total_steps"),
            "finished": self.read.finished,
            "differs": self.differs(run),
        }


def read_supervised(path: str | Path) -> SupervisedNetwork:
    """A network that was trained with labels, from a run folder or a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a run of another method, or not whole.
    """
    read = read_checkpoint(path)
    if read.method != METHOD:
        raise ValueError(
            f"supervised={path} is a run of method={read.method}. Give one that was trained with labels: simclr "
            "supervised RUN trains it."
        )
    parts = [read.state_dict.get(f"classifier.{name}") for name in ("weight", "bias")]
    classes = read.about.get("classes")
    if parts[0] is None or parts[1] is None or not classes or len(classes) != len(parts[0]):
        raise ValueError(f"{read.path} holds no classifier with the names of its classes: it is damaged.")
    return SupervisedNetwork(read, load_encoder(read.path), parts[0], parts[1], list(classes))


def refuse_seen_images(network: SupervisedNetwork, data: ImageData, test: EvalLoader) -> None:
    """Refuse test images that are a part of the training folder, where the network was trained on that part.

    Args:
        network: the yardstick.
        data: set up.
        test: the test images.
    Raises:
        ValueError: with what to do.
    """
    own = network.read.data
    if data.evaluation_note is None or own.get("train_dir") != data.hparams.train_dir:
        return
    kept, wanted = network.read.about.get("kept_as_test", 0), len(test.index)
    if kept != wanted or own.get("holdout") != data.holdout:
        raise ValueError(
            f"{wanted} images of the training folder are the test here, and the supervised run {network.read.path} "
            f"learned their labels: it kept {kept} (data.holdout={own.get('holdout')}, here {data.holdout}). Give the "
            "test images that it was trained beside."
        )


def supervised_record(
    network: SupervisedNetwork, run: Checkpoint, features: Tensor, test: EvalLoader
) -> tuple[float | None, dict[str, Any]]:
    """What a linear evaluation says of the counterpart: the accuracy of its own classifier, and what it is of.

    Args:
        network: the yardstick.
        run: that is measured.
        features: (M, F) of the network's encoder.
        test: the images.
    Returns:
        The accuracy, None where its classifier knows other classes; and plain types.
    """
    about, outcome = network.about(run), network.predict(features, test)
    if outcome is None:
        return None, about
    labels = test.labels.cpu()
    correct = int((outcome.predictions == labels).sum())
    about |= {"ci95": list(wilson_interval(correct, len(labels))), "predictions": packed(outcome.predictions)}
    return correct / len(labels), about


def supervised_in_words(about: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know of the counterpart beside its number, a line each.

    Args:
        about: as `SupervisedNetwork.about` gives it; None where there was none.
    """
    found = []
    if about and about["finished"] is False:
        step, total = about["global_step"], about["total_steps"]
        found.append(f"the supervised run was not finished: it stands at step {step} of {total}")
    if about and about["differs"]:
        pairs = [f"{name} {other} (the run: {own})" for name, (own, other) in about["differs"].items()]
        more = f" and {len(pairs) - 6} more" if len(pairs) > 6 else ""
        found.append(f"the supervised run had other settings: {', '.join(pairs[:6])}{more}")
    return found
