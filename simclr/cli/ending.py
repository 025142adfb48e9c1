"""What a run has reached, in words, when it ends."""

from pytorch_lightning import Callback, Trainer

from simclr.data import ImageData
from simclr.online_accuracy import OnlineAccuracy
from simclr.online_quality import BEFORE, RETRIEVAL, OnlineQuality


def reached(trainer: Trainer) -> list[str]:
    """The figures of the last epoch, each beside its yardstick, a line for each kind; empty where nothing was logged.

    Args:
        trainer: that has trained.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    lines = []
    quality = next((callback for callback in _measured(trainer) if isinstance(callback, OnlineQuality)), None)
    if "train_loss_epoch" in metrics:
        held = ""
        if quality is not None and "heldout_loss" in metrics:
            batch = trainer.lightning_module.hparams.batch_size
            few = f", in one batch of {quality.measured_images}" if quality.measured_images < batch else ""
            held = f"; on {_images(trainer.datamodule)}s, in eval mode{few}, {metrics['heldout_loss']:.3f}"
        lines.append(f"loss {metrics['train_loss_epoch']:.3f} in the last epoch{held}")
    if quality is not None:
        given = trainer.lightning_module.run.began_with is not None
        yardstick = (
            f", {'starting weights' if given else 'untrained network'} {metrics[BEFORE]:.1%}"
            if BEFORE in metrics
            else ""
        )
        lines.append(
            f"the other view of a {_images(trainer.datamodule)} is the nearest of {quality.measured_images:,}: "
            f"{metrics[RETRIEVAL]:.1%}{yardstick}".replace("%", " %")
        )
    accuracies = [callback for callback in _measured(trainer) if isinstance(callback, OnlineAccuracy)]
    if accuracies:
        lines.append(", ".join(f"{a.title} {100 * metrics[a.figures[0]]:.1f} %" for a in accuracies))
    return lines


def _measured(trainer: Trainer) -> list[Callback]:
    """The callbacks that have measured something in this process, and whose numbers the metrics hold."""
    return [callback for callback in trainer.callbacks if getattr(callback, "measured_epoch", None) is not None]


def _images(data: object) -> str:
    return "held-out image" if isinstance(data, ImageData) and data.held_out else "test image"
