"""A run that does not learn is told so in words, early and once, with the likely cause and the setting to change."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

# A run is looked at after a tenth of it, but no fewer than _FEWEST steps of the optimiser, and, where nothing was said
# and that was earlier, again after _LAST: by then the learning rate of most runs has been up for a while.
_FEWEST, _LAST = 20, 200
_ENOUGH = 100  # steps before which a few noisy losses, or views that are not yet nearer to each other, say nothing
# Of the weights' norm. After 200 steps of the built-in shapes: 1.00 by LARS, 1.12 by AdamW, 1.33 by SGD and 1.41 by SGD
# in batches of 16, which learn; 16 by LARS, 14 by AdamW and 3.4 to 3.7 by SGD at a hundred times those rates, and while
# such a rate is still being warmed up, 3.9 by LARS and 5.5 by AdamW.
_FASTEST_GROWTH = 2.5


class Signs(NamedTuple):
    """What the first steps of a run have shown, each a mean over the later half of them.

    Attributes:
        loss: of the global batch.
        first_loss: of the first step.
        top1: contrastive accuracy.
        positive_cosine, negative_cosine: mean cosines of the views of one image, and of two images.
        waiting: the share of the time spent waiting for images.
        warming: whether the learning rate was below half of its height.
        steps: taken.
        growth: of the weights' norm since the first step, as a factor.
    """

    loss: float
    first_loss: float
    top1: float
    positive_cosine: float
    negative_cosine: float
    waiting: float
    warming: bool = False
    steps: int = 0
    growth: float = 1.0


def verdict(signs: Signs, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with a run, a sentence and its remedy each; empty for one that learns.

    Args:
        signs: of the early steps.
        settings: the method's; `batch_size`, the global batch, among them.
    """
    found = [text for text in (_learning(signs, settings), _data(signs)) if text]
    return found


def _learning(signs: Signs, settings: Mapping[str, Any]) -> str | None:
    small = 0 if settings.get("pairs") == "large" else settings.get("small_crops") or 0
    others = (settings.get("views", 2) + small) * settings["batch_size"] - 1
    temperature = settings.get("temperature", 0.2)
    lower = "a lower --model.base_lr, a longer --model.warmup_epochs"
    if settings.get("loss") == "nt_xent" and _reach(others, temperature) < 0.1:
        return (
            f"divided by a temperature of {temperature:g}, cosines hardly differ: the loss can fall by "
            f"{100 * _reach(others, temperature):.0f} % at most. Try a --model.temperature of 0.1 to 0.5."
        )
    if signs.positive_cosine == 0:  # exactly, which no other projections have
        return f"all projections are zero: the projection head is dead. Try {lower}, --model.head_batch_norm true."
    if signs.negative_cosine > 0.95:
        same = f"the mean cosine of two images is {signs.negative_cosine:.3f}"
        return f"the projections have collapsed: {same}. Try {lower}."
    if signs.steps >= _ENOUGH and signs.loss > signs.first_loss + 0.1 * abs(signs.first_loss):
        return f"the loss rises, from {signs.first_loss:.3g} to {signs.loss:.3g}: the run diverges. Try {lower}."
    if signs.growth > _FASTEST_GROWTH:
        return (
            f"the weights have grown to {signs.growth:.3g} times their size in {signs.steps} steps, too large to learn "
            f"by. Try {lower}."
        )
    apart = signs.positive_cosine - signs.negative_cosine
    if not signs.warming and signs.steps >= _ENOUGH and apart < 0.02 and signs.top1 < 3 / others:
        return (
            f"two views of an image are no nearer to each other than to other images ({signs.positive_cosine:.3f} and "
            f"{signs.negative_cosine:.3f}, mean cosines). Try {lower}, weaker views (--model.strength 0.5)."
        )
    if signs.top1 > 0.95 and settings["batch_size"] >= 32:
        return (
            f"{100 * signs.top1:.0f} % of the images are told from all others already: the views are too alike to "
            "teach more. Try stronger ones (--model.strength 1, --model.crop_scale [0.08,1.0])."
        )
    return None


def _reach(others: int, temperature: float) -> float:
    """By what part NT-Xent can fall, from all cosines equal to positives of 1 among negatives of 0."""
    return 1 - math.log1p((others - 1) * math.exp(-1 / temperature)) / math.log(others)


def _data(signs: Signs) -> str | None:
    if signs.waiting < 0.5:
        return None
    return (
        f"{100 * signs.waiting:.0f} % of the time is spent waiting for images. Try more --data.workers, a "
        "--data.memory_limit_gb that holds them, or --data.cache_dir."
    )


class Diagnosis(Callback):
    """Looks at the steps that are logged, once or twice, gives its verdict, and then looks no more.

    Nothing here waits for a device but in a step whose numbers are logged anyway.

    Args:
        say: takes a sentence.
    """

    def __init__(self, say: Callable[[Trainer, str], None]):
        self.say = say
        self._rows: list[tuple[int, Mapping[str, Any]]] = []  # optimiser step, what it logged
        self._losses: list[Any] = []  # of each batch, on its device
        self._seen: object = None
        self._looked = self._done = False
        self._waited = self._worked = 0.0  # seconds
        self._clock = 0.0  # of the end of the last batch, or of the start of this one
        self._begun = False
        self._norm = 0.0  # of the weights at the start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that goes on has had its verdict."""
        self._done = trainer.global_step > 0 or not trainer.is_global_zero
        self._begun = False
        if not self._done:
            self._norm = _norm(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The images are there."""
        if self._begun and batch_idx > 0:  # an epoch's first batch waits for workers that begin
            self._waited += time.perf_counter() - self._clock
        self._clock, self._begun = time.perf_counter(), True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down what was logged; the verdict, when there is enough of it."""
        if self._done:
            return
        now, logged = time.perf_counter(), pl_module.step_log.logged
        if trainer.global_step > 1:  # the first step pays for what is set up
            self._worked += now - self._clock
        else:
            self._waited = 0.0
        self._clock = now
        self._losses.append(pl_module.step_log.loss)
        if logged and logged is not self._seen:
            self._take_down(trainer, logged)
        total = pl_module.run.total_steps or math.inf
        if not self._rows or trainer.global_step < (_LAST if self._looked else max(_FEWEST, min(_LAST, total / 10))):
            return
        signs = self._signs(_highest_rate(pl_module), _norm(pl_module) / max(self._norm, 1e-12))
        said = verdict(signs, pl_module.hparams) if signs is not None else []
        for text in said:
            self.say(trainer, text)
        self._done = signs is None or bool(said) or trainer.global_step >= _LAST or total < _LAST
        self._looked = True

    def _take_down(self, trainer: Trainer, logged: Mapping[str, Any]) -> None:
        self._seen = logged
        row = {name: float(value) for name, value in logged.items()}
        if math.isfinite(row.get("train_loss", math.nan)):  # else the step was skipped
            self._rows.append((trainer.global_step, row))

    def _signs(self, highest: float, growth: float) -> Signs | None:
        last = self._rows[-1][0]
        later = [row for step, row in self._rows if step > last / 2]
        means = {name: sum(row[name] for row in later) / len(later) for name in later[0]}
        if "contrast_top1" not in means:  # of a method that compares nothing
            return None
        self._losses = [loss for loss in map(float, self._losses) if math.isfinite(loss)]
        half = self._losses[len(self._losses) // 2 :]
        return Signs(
            sum(half) / len(half),
            self._losses[0],
            means["contrast_top1"],
            means["positive_cosine"],
            means["negative_cosine"],
            self._waited / max(self._waited + self._worked, 1e-9),
            means["lr"] < 0.5 * highest,
            last,
            growth,
        )


def _highest_rate(module: LightningModule) -> float:
    """The learning rate between warm-up and cosine; 0 where another schedule than ours is used."""
    schedule = module.lr_schedulers()
    return max(getattr(schedule, "base_lrs", [0.0]))


def _norm(module: LightningModule) -> float:
    """Of all weights, without biases and normalisation, which start from nothing."""
    weights = [parameter.detach().float() for parameter in module.parameters() if parameter.ndim > 1]
    return float(torch.stack([weight.square().sum() for weight in weights]).sum().sqrt()) if weights else 0.0
