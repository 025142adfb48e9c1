"""Options of Lightning's Trainer that cannot serve a pretraining run, refused before anything is written.

Lightning finds most of them in `fit`, when the run has a folder, and some never.
"""

from collections.abc import Sequence

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder

from simclr.nonfinite.watch import METRIC
from simclr.online_quality import FIGURES
from simclr.step_figures import FIGURES as OF_STEPS

# What callbacks may watch: of the epoch, and of single steps.
LOGGED = (
    "train_loss_epoch",
    "knn_top1",
    "probe_top1",
    *FIGURES,
    "train_loss",
    "lr",
    "contrast_top1",
    "positive_cosine",
    "negative_cosine",
    *OF_STEPS,  # not what the machine decides, by which each rank would decide otherwise
)


# Those that a training with labels has in place of some.
LOGGED_WITH_LABELS = tuple(
    {"contrast_top1": "train_top1"}.get(name, name)
    for name in LOGGED
    if name not in ("positive_cosine", "negative_cosine", "knn_top1", "heldout_loss", "heldout_top1")
)

_MOST = 10**12  # epochs or steps: three decades of steps of a millisecond, so a slip of the hand


def check_devices(accelerator: object, devices: object, num_nodes: object = 1) -> None:
    """Refuse devices that are not there, in the words of the options, before Lightning does in those of its classes.

    Args:
        accelerator, devices, num_nodes: as given.
    Raises:
        ValueError: with what to use.
    """
    cuda = torch.cuda.is_available()
    gpu = cuda or torch.backends.mps.is_available()
    if (accelerator == "cuda" and not cuda) or (accelerator == "gpu" and not gpu):
        built = "built for CPUs only" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise ValueError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__}, {built}, finds no GPU on this machine. "
            "Look at nvidia-smi and the driver's version, or leave it out to train on what there is."
        )
    for name, given in (("devices", devices), ("num_nodes", num_nodes)):
        number = int(given) if isinstance(given, int | str) and str(given).lstrip("-").isdecimal() else 1
        all_gpus = name == "devices" and number == -1 and gpu and accelerator != "cpu"
        if number < 1 and not all_gpus:
            raise ValueError(f"trainer.{name}={given} is not 1 or more. Leave it out for the default.")


def check_trainer(trainer: Trainer, val_check_interval: float | None = None, logged: Sequence[str] = LOGGED) -> None:
    """Refuse what Lightning would refuse later, or carry out to no purpose.

    Args:
        trainer: as built from the options.
        val_check_interval: as given.
        logged: what callbacks may watch.
    Raises:
        ValueError: with every problem and what to use.
    """
    problems = []
    if val_check_interval is not None:
        problems.append(
            f"trainer.val_check_interval={val_check_interval}: a pretraining run has no validation loop. Leave it out; "
            "--knn.every_n_epochs sets how often the encoder is measured."
        )
    if trainer.limit_train_batches == 0:
        problems.append("trainer.limit_train_batches=0 leaves no step. Use 1 or more, or leave it out.")
    if trainer.accumulate_grad_batches < 1:
        problems.append(f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not 1 or more.")
    if (trainer.gradient_clip_val or 0) < 0:
        problems.append(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val:g} is negative. Leave it out not to clip."
        )
    if getattr(trainer, "log_every_n_steps", 0) < 0:
        problems.append(f"trainer.log_every_n_steps={trainer.log_every_n_steps} is negative. Use 1 or more.")
    for name in ("max_epochs", "max_steps"):
        if getattr(trainer, name) == 0:
            problems.append(f"trainer.{name}=0 trains nothing. Use 1 or more.")
        if (getattr(trainer, name) or 0) > _MOST:
            problems.append(f"trainer.{name}={getattr(trainer, name)} is more than a run can take: {_MOST:,} at most.")
    problems += filter(None, (_problem_of(callback, logged) for callback in trainer.callbacks))
    if problems:
        raise ValueError("\n".join(problems))


def _problem_of(callback: Callback, logged: Sequence[str]) -> str | None:
    name = type(callback).__name__
    if isinstance(callback, BatchSizeFinder):
        return f"trainer.callbacks={name}: another batch is another loss. Set --data.batch_size."
    if isinstance(callback, LearningRateFinder):
        return f"trainer.callbacks={name}: a contrastive loss does not tell a good rate early. Set --model.base_lr."
    monitor = getattr(callback, "monitor", None)
    if isinstance(monitor, str) and monitor not in (*logged, "gradient_cache_error", METRIC, "epoch", "step"):
        return f"trainer.callbacks={name} watches {monitor}, which is not logged. Watch one of {', '.join(logged)}."
    return None
