"""A step that was written down, computed again: in the run's precision and in finer ones, image by image.

The step is a training step under Lightning's own loop, as the run's was, with its views, which are pure functions.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from simclr.augment import SimCLRAugmentation
from simclr.nonfinite.dump import Batch, Dump
from simclr.paths import shown
from simclr.training.method import DEFAULT_METHOD, METHODS, find_method

_FINER = ("32-true", "64-true")
_BITS = {"16": "float16", "bf": "bfloat16", "32": "float32", "64": "float64"}
_MOST_TRIES = 48  # training steps to find the images by
_MOST_NAMED = 8  # images that are named; where more fail by themselves, it is not the images


@dataclass
class Computed:
    """What a step gives in one precision.

    Attributes:
        precision: Lightning's name.
        losses: of each batch.
        gradients: norm by parameter.
        largest: the largest absolute output by layer, in the order in which they ran; infinite or NaN as it is.
        first: the layer whose output is the first that is not finite; None if all are.
        images: whose part of that output is not finite; (batch, place in it).
        bad_views: images whose views are not finite.
        refused: why it could not be computed; empty if it was.
    """

    precision: str
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    first: str | None = None
    images: list[tuple[int, int]] = field(default_factory=list)
    bad_views: list[tuple[int, int]] = field(default_factory=list)
    refused: str = ""

    @property
    def ruined(self) -> list[str]:
        """Parameters whose gradient is not finite."""
        return [name for name, norm in self.gradients.items() if not math.isfinite(norm)]

    @property
    def finite(self) -> bool:
        """Whether all losses and gradients are."""
        return not self.refused and all(map(math.isfinite, self.losses)) and not self.ruined


class _Look(Callback):
    """Watches one step of the optimiser."""

    def __init__(self, found: Computed, dump: Dump):
        self.found, self.dump = found, dump
        self.index: Tensor | None = None  # images of the forward pass at hand
        self.batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be told of views and layers."""
        pl_module.step_log.watched = True
        make, self.hooks = pl_module.views.make, []

        def watched(images: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, ...]:
            views = make(images, index, self.dump.epoch)
            self.index = index
            bad = torch.stack([~view.isfinite().flatten(1).all(1) for view in views]).any(0)
            self.found.bad_views += self._of(bad)
            return views

        pl_module.views.make = watched
        parts = {id(inner) for network in pl_module.networks for inner in network.modules()}
        for name, module in pl_module.named_modules():
            if id(module) in parts and not list(module.children()):
                self.hooks.append(module.register_forward_hook(self._see(name)))

    def _see(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
                return
            largest = float(output.detach().abs().max())
            before = self.found.largest.get(name, 0.0)
            self.found.largest[name] = largest if not math.isfinite(largest) else max(before, largest)
            if math.isfinite(largest) or self.found.first is not None:
                return
            self.found.first = name
            bad = ~output.detach().flatten(1).isfinite().all(1)  # (views * n,), view after view
            if self.index is not None and len(bad) % len(self.index) == 0:
                self.found.images = self._of(bad.view(-1, len(self.index)).any(0))

        return see

    def _of(self, bad: Tensor) -> list[tuple[int, int]]:
        """(batch, place) of the images of this forward pass that are marked."""
        assert self.index is not None  # made before
        places = {int(number): place for place, number in enumerate(self.dump.batches[self.batch].index.tolist())}
        return [(self.batch, places[number]) for number in self.index[bad.cpu()].tolist()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Which batch this is; the epoch is the run's."""
        self.batch = batch_idx
        trainer.fit_loop.epoch_progress.current.completed = self.dump.epoch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss, as the method logs it."""
        told = pl_module.step_log.loss
        self.found.losses.append(float(loss.detach() if told is None else told))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The whole gradient, of which no step is taken."""
        for name, weight in pl_module.named_parameters():
            if weight.grad is not None:
                self.found.gradients[name] = float(weight.grad.double().norm())
                weight.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look no more."""
        for hook in self.hooks:
            hook.remove()


class _Batches:
    """A loader of batches that are there: of a list Lightning would take each element for a loader."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def compute(dump: Dump, precision: str, device: str = "cpu", kind: type | None = None) -> Computed:
    """One training step of a dump, without taking it.

    Args:
        dump: what to compute.
        precision: Lightning's name of it.
        device: `cpu`, `cuda` or `cuda:1`.
        kind: the class of the method; found by its name if not given.
    """
    found = Computed(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's and ours about settings of a run, which this is none of
        module = _build(dump, kind or find_method(dump.method), precision)
        batches = [(batch.images(dump.rules), batch.index) for batch in dump.batches]
        _bring_labels(module, dump)
        kind_of, _, number = device.partition(":")
        place: dict[str, Any] = {"accelerator": "gpu", "devices": [int(number or 0)]}
        place = {"accelerator": "cpu", "devices": 1} if kind_of == "cpu" else place
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        length = {"max_steps": 1, "accumulate_grad_batches": len(batches), "log_every_n_steps": 0}
        try:
            trainer = Trainer(**dict.fromkeys((*off, "use_distributed_sampler"), False), **place, **length,
                              precision=precision, callbacks=[_Look(found, dump)])  # fmt: skip
            if str(trainer.precision) != precision:  # Lightning takes another where a device lacks it
                return replace(found, refused=f"not on this device ({device})")
            trainer.fit(module, _Batches(batches))
        except FloatingPointError as error:  # of a method that raises by itself
            found.losses = found.losses or [math.nan]
            found.refused = "" if not found.finite else str(error)
        except RuntimeError as error:
            found.refused = str(error).splitlines()[0][:200]
    return found


def _build(dump: Dump, kind: Any, precision: str) -> LightningModule:
    """The method with the weights before the step, uncompiled, its BatchNorm over as many images as in the run."""
    settings = dict(dump.settings)
    for name in ("compile_encoder", "compile_views"):
        if name in settings:
            settings[name] = False
    if not dump_is_of_one_group(dump) and settings.get("micro_batch_size", 0) is None:
        settings["micro_batch_size"] = dump.batches[0].share
    taken = dict(inspect.signature(kind).parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        taken |= inspect.signature(SimCLRAugmentation).parameters
    settings = {name: value for name, value in settings.items() if name in taken}  # others were settled by the run
    try:
        module = kind(**settings).double()  # no weight is rounded where the precision does not ask for it
        module.load_state_dict(dump.weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{dump.path} does not fit method={dump.method} of this version: {reason}") from error
    return module if precision.startswith("64") else module.float()


def _bring_labels(module: Any, dump: Dump) -> None:
    """Give a method that learns from labels those of the dump's images, by their numbers in the data set."""
    index = torch.cat([batch.index for batch in dump.batches])
    labels = [batch.labels for batch in dump.batches if batch.labels is not None]
    if len(labels) == len(dump.batches):
        module.labels = torch.zeros(int(index.max()) + 1, dtype=torch.int64)
        module.labels[index] = torch.cat(labels)


def dump_is_of_one_group(dump: Dump) -> bool:
    """Whether BatchNorm's statistics were those of the whole batch, or there is none: one pass computes the same."""
    batch = dump.batches[0]
    group = dump.trainer.get("batch_norm_group")
    return group is None or group >= dump.settings.get("views", 2) * len(batch.index)


def replay_step(
    dump: Dump, device: str = "cpu", method: str | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compute a step again and say what is not finite.

    Args:
        dump: from `read_dump`.
        device: where to compute: `cpu`, `cuda`, `cuda:1`.
        method: the path of the class of a method of one's own, which the dump must name too: a file that came from
            elsewhere does not choose what is imported.
        say: told what is being done.
    Returns:
        Plain types. `step`, `epoch`, `rank`, `run`: what the run saw. `precisions`: of each that was computed, `loss`
        (one a batch), `gradient` (its norm), `ruined` (parameters whose gradient is not finite), `first_layer`,
        `largest` (by layer), `refused`. `weights`: names of those that are not finite before the step. `images`: names
        of those that make it so. `finite`: whether the run's precision gives finite numbers here. `verdict`: sentences.
    Raises:
        ValueError: if the method is another than the dump's, or its weights do not fit.
    """
    kind = _method_of(dump, method)
    say = say or (lambda text: None)
    own = str(dump.trainer.get("precision", "32-true"))
    dump = replace(dump, batches=[replace(batch, pixels=batch.images(dump.rules)) for batch in dump.batches])
    weights = [name for name, value in dump.weights.items() if value.is_floating_point() and not _is_finite(value)]
    pixels = [batch.name(i) for batch in dump.batches for i in _bad_rows(batch.pixels)]
    computed = []
    for precision in dict.fromkeys((own, *_FINER)):
        say(f"computing the step in {precision} ...")
        computed.append(compute(dump, precision, device, kind))
    first = computed[0]
    alone: list[str] | None = []
    judged = next((found for found in computed if not found.refused and not found.finite), None)
    if judged is not None and not weights and not pixels:
        say("looking for the images ...")
        alone = _alone(dump, lambda part: not compute(part, judged.precision, device, kind).finite, judged)
    return {
        "dump": str(dump.path),
        "method": dump.method,
        "step": dump.step,
        "epoch": dump.epoch,
        "rank": dump.rank,
        "images_in_step": sum(len(batch.index) for batch in dump.batches),
        "run": {"precision": own, "device": dump.trainer.get("accelerator"), **dump.found, "versions": dump.versions},
        "device": device,
        "precisions": {found.precision: _record(found) for found in computed},
        "weights": weights,
        "images": pixels or alone or [],
        "finite": first.finite,
        "verdict": verdict(dump, computed, weights, pixels, alone),
    }


def _method_of(dump: Dump, given: str | None) -> type:
    if given is not None and METHODS.get(given, given) != METHODS.get(dump.method, dump.method):
        raise ValueError(f"method={given}, but {dump.path} is of method={dump.method}.")
    if given is None and dump.method not in METHODS:
        raise ValueError(
            f"{dump.path} is of method={dump.method}, a class that is not of simclr. If its code may run, add "
            f"--method {dump.method}."
        )
    return find_method(given or DEFAULT_METHOD)


def _record(found: Computed) -> dict[str, Any]:
    gradient = math.hypot(*found.gradients.values()) if found.gradients else None
    return {
        "loss": found.losses,
        "gradient": gradient,
        "ruined": found.ruined,
        "parameters": len(found.gradients),
        "first_layer": found.first,
        "largest": found.largest,
        "finite": found.finite,
        "refused": found.refused,
    }


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _bad_rows(pixels: Tensor | None) -> list[int]:
    if pixels is None or not pixels.is_floating_point():
        return []
    return (~pixels.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()


def _alone(dump: Dump, bad: Callable[[Dump], bool], found: Computed) -> list[str] | None:
    """The images that make a step not finite with few beside them, by halving; None if it is not up to some images."""
    batches = [
        batch
        for number, batch in enumerate(dump.batches)
        if number >= len(found.losses)
        or not math.isfinite(found.losses[number])
        or all(map(math.isfinite, found.losses))
    ]
    tries = 0

    def test(batch: Batch, places: Sequence[int]) -> bool:
        nonlocal tries
        tries += 1
        return bad(replace(dump, batches=[_part(batch, places)]))

    named: list[str] = []
    for batch in batches:
        good: list[int] = []  # found to be finite
        whole = list(range(len(batch.index)))
        level = [whole] if len(dump.batches) == 1 or test(batch, whole) else []  # parts that are not
        while level:
            halves, ill = [], []
            for places in level:
                if len(places) == 1:
                    named.append(batch.name(places[0]))
                    continue
                pair = [places[: len(places) // 2], places[len(places) // 2 :]]
                # A loss tells an image from others.
                fails = [test(batch, half + (good[:1] if len(half) == 1 else [])) for half in pair]
                good += [place for half, failed in zip(pair, fails, strict=True) if not failed for place in half]
                halves += pair
                ill += [half for half, failed in zip(pair, fails, strict=True) if failed]
                if not any(fails):  # together only
                    named += [batch.name(place) for place in places]
            if tries > _MOST_TRIES or len(named) + len(ill) > _MOST_NAMED or (len(ill) == len(halves) >= _MOST_NAMED):
                return None
            level = ill
    return named


def _part(batch: Batch, places: Sequence[int]) -> Batch:
    assert batch.pixels is not None  # read by `replay_step`
    chosen = list(places)
    names = [batch.names[place] for place in chosen] if batch.names else []
    labels = None if batch.labels is None else batch.labels[chosen]
    return replace(batch, index=batch.index[chosen], pixels=batch.pixels[chosen], names=names, labels=labels)


def verdict(
    dump: Dump, computed: Sequence[Computed], weights: list[str], pixels: list[str], alone: list[str] | None
) -> list[str]:
    """What is wrong, in sentences.

    Args:
        dump: what was computed.
        computed: the step in the run's precision, then in finer ones.
        weights: names of those that are not finite before the step.
        pixels: images that hold values which are not finite.
        alone: images that make the step not finite; None if it is not up to some of them.
    """
    own, said = computed[0], []
    if weights:
        said.append(f"the weights were not finite before this step: {_some(weights)}")
    if pixels:
        said.append(f"pixels are not finite: {_some(pixels)}")
    if weights or pixels:
        return said
    finer = [found for found in computed[1:] if not found.refused]
    if own.refused:
        said.append(f"{own.precision} could not be computed here: {own.refused}")
    if all(found.finite for found in computed if not found.refused):
        said.append(_finite_here(dump, own))
        return said
    sound = next((found for found in finer if found.finite), None)
    ill = next(found for found in computed if not found.refused and not found.finite)
    views = [_name(dump, place) for place in ill.bad_views]
    if views:
        said.append(f"views are not finite: of {_some(list(dict.fromkeys(views)))}")
    elif sound is not None:
        at = f"first in {ill.first}" if ill.first else "in the loss or the gradient"
        size = sound.largest.get(ill.first or "", math.nan)
        reach = f", where {_type(sound.precision)} has up to {size:.3g}" if math.isfinite(size) else ""
        said.append(f"finite in {_type(sound.precision)}: {_type(ill.precision)} overflows, {at}{reach}")
    elif ill.first is not None:
        of = f", of {_some([_name(dump, place) for place in ill.images])}" if _are_some(dump, ill) else ""
        said.append(f"not finite in {_type(ill.precision)} and all finer: first the output of {ill.first}{of}")
    elif any(not math.isfinite(loss) for loss in ill.losses):
        said.append("every layer's output is finite, the loss of them is not: look at the loss")
    else:
        said.append(f"the loss is finite, its gradient is not: of {_some(ill.ruined)}")
    if alone:
        said.append(f"{_some(alone)} {'alone makes' if len(alone) == 1 else 'make'} it so")
    elif alone is None:
        said.append("it is not up to a few images: most parts of the batch give the same")
    return said


def _finite_here(dump: Dump, own: Computed) -> str:
    text = f"all numbers are finite here, in {own.precision} too" if not own.refused else "finite in finer precision"
    there, why = dump.trainer.get("accelerator"), []
    if dump.trainer.get("precision") == "16-mixed":
        why.append("the scale of fp16 is not replayed")
    if any(value > 0 for name, value in dump.settings.items() if "drop" in name and isinstance(value, int | float)):
        why.append("dropout drew others")
    why.append(f"the run was on {there}" if there != "cpu" else "kernels and versions round in other ways")
    return f"{text}: {', '.join(why)}"


def _are_some(dump: Dump, found: Computed) -> bool:
    return 0 < len(found.images) <= sum(len(batch.index) for batch in dump.batches) // 2


def _name(dump: Dump, place: tuple[int, int]) -> str:
    return dump.batches[place[0]].name(place[1])


def _type(precision: str) -> str:
    return _BITS.get(precision[:2], precision)


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(map(shown, names[:3])) + (f" and {more:,} more" if more > 0 else "")
