"""Options of Lightning's Trainer that cannot serve a pretraining run, refused before anything is written.

Lightning finds most of them in `fit`, when the run has a folder, and some never.
"""

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder

from simclr.online_quality import FIGURES

# What callbacks may watch: of the epoch, and of single steps.
LOGGED = (
    "train_loss_epoch",
    "knn_top1",
    *FIGURES,
    "train_loss",
    "lr",
    "contrast_top1",
    "positive_cosine",
    "negative_cosine",
)


def check_trainer(trainer: Trainer, val_check_interval: float | None = None) -> None:
    """Refuse what Lightning would refuse later, or carry out to no purpose.

    Args:
        trainer: as built from the options.
        val_check_interval: as given.
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
    problems += filter(None, map(_problem_of, trainer.callbacks))
    if problems:
        raise ValueError("\n".join(problems))


def _problem_of(callback: Callback) -> str | None:
    name = type(callback).__name__
    if isinstance(callback, BatchSizeFinder):
        return f"trainer.callbacks={name}: another batch is another loss. Set --data.batch_size."
    if isinstance(callback, LearningRateFinder):
        return f"trainer.callbacks={name}: a contrastive loss does not tell a good rate early. Set --model.base_lr."
    monitor = getattr(callback, "monitor", None)
    if isinstance(monitor, str) and monitor not in (*LOGGED, "gradient_cache_error", "epoch", "step"):
        return f"trainer.callbacks={name} watches {monitor}, which is not logged. Watch one of {', '.join(LOGGED)}."
    return None
