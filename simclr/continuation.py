"""Continuing a run: which settings may change, what a change does, and what is said and recorded of it.

A setting is applied, or it is refused by name with both values. None is taken over silently.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.utilities import GradClipAlgorithmType

from simclr.checkpoint import Checkpoint, end_epoch, refuse_mismatch, refuse_unfit
from simclr.data import ImageData
from simclr.data.module import images_of_run
from simclr.seeding import ORDER_VERSION
from simclr.training.method import name_of


class Rule(Enum):
    """What becomes of a setting that differs when a run is continued."""

    FIXED = "decides what is learned: refused"
    ROUNDING = "the same training in other roundings: applied and said"
    LENGTH = "where the run ends: applied and said, the learning rate planned anew from the step it goes on from"
    IMAGES = "where the images lie: applied if they are the same, else refused; see `ImageData.compare_images`"
    FREE = "nothing that is learned depends on it: applied"


# Every setting of the command line has its place here.
RULES: dict[str, dict[Rule, str]] = {
    "model": {
        Rule.FIXED: """encoder image_size start_size grow_epochs stem width depth phi shortcut zero_init norm channels
            weights weights_prefix
            head hidden_dim projection_dim head_layers head_batch_norm
            loss temperature margin semi_hard views small_crops small_crop_size small_crop_scale pairs
            micro_batch_size optimizer base_lr lr_scaling weight_decay momentum warmup_epochs batch_size seed
            strength crop_scale crop_ratio flip_prob jitter_prob gray_prob blur_prob blur_sigma rotation_prob
            solarize_prob solarize_threshold cutout_prob cutout_size noise_prob noise_std sobel_prob
            augment_second_view mean std
            predictor target_decay num_classes""",
        Rule.ROUNDING: "channels_last compile_encoder compile_views",
    },
    "data": {
        Rule.FIXED: "source load_size batch_size image_size seed shapes_train sixteen_bit_max channels bits held_out",
        Rule.IMAGES: "train_dir data_dir leave_out",
        Rule.FREE: """test_dir shapes_test holdout workers memory_limit_gb cache_dir download on_error
            read_timeout_s max_pixels allow_changed_images""",
    },
    "trainer": {
        Rule.FIXED: """precision accumulate_grad_batches gradient_clip_val gradient_clip_algorithm
            limit_train_batches overfit_batches sync_batchnorm""",
        Rule.ROUNDING: "accelerator strategy devices num_nodes deterministic benchmark plugins",
        Rule.LENGTH: "max_epochs max_steps",
        Rule.FREE: """logger callbacks fast_dev_run min_epochs min_steps max_time
            limit_val_batches limit_test_batches limit_predict_batches val_check_interval check_val_every_n_epoch
            num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar enable_model_summary
            inference_mode use_distributed_sampler profiler detect_anomaly barebones reload_dataloaders_every_n_epochs
            default_root_dir enable_autolog_hparams model_registry""",
    },
    "knn": {Rule.FREE: "every_n_epochs images k temperature"},
    "probe": {Rule.FREE: "every_n_epochs images regularization train_dir"},
    "quality": {Rule.FREE: "every_n_epochs images"},
    "dashboard": {Rule.FREE: "every_n_epochs images"},
    "checkpoint": {Rule.FREE: "every_n_steps every_minutes keep"},
    "": {
        Rule.FIXED: "seed_everything method",
        Rule.FREE: """config run_dir ckpt_path resume on_nonfinite check_memory minutes wandb wandb_project wandb_entity
            wandb_group wandb_tags wandb_notes wandb_id log_artifact rank_timeout resume_with""",
    },
}

# Of what is FIXED, that which can be changed on purpose (`--resume_with`): weights, the optimiser's state and the order
# of the images stay what they were. With the rest a run would not be one that goes on.
_ON_PURPOSE = {
    "model": """loss temperature margin semi_hard views small_crops small_crop_size small_crop_scale pairs
        micro_batch_size
        base_lr lr_scaling weight_decay momentum warmup_epochs
        strength crop_scale crop_ratio flip_prob jitter_prob gray_prob blur_prob blur_sigma rotation_prob
        solarize_prob solarize_threshold cutout_prob cutout_size noise_prob noise_std sobel_prob augment_second_view""",
    "trainer": "precision gradient_clip_val gradient_clip_algorithm sync_batchnorm",
}
ON_PURPOSE = {f"{group}.{name}" for group, names in _ON_PURPOSE.items() for name in names.split()}

Changes = dict[str, tuple[Any, Any]]  # a setting's full name: what it was, what it is


def rule_of(name: str) -> Rule:
    """The rule for a setting, named as on the command line: `model.temperature`."""
    group, _, own = name.rpartition(".")
    known = (rule for rule, names in RULES[group].items() if own in names.split())
    return next(known, Rule.FIXED)  # what a method has of its own decides what is learned


def names_under(rule: Rule, group: str) -> list[str]:
    """The settings of a group ("model", "data", "trainer", ...) under a rule."""
    return RULES[group].get(rule, "").split()


def trainer_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What of a Trainer decides the bits of a run, as resolved, in plain types: what a checkpoint keeps of it."""
    clip = trainer.gradient_clip_val or None
    algorithm = trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
    clipping = {"gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm))} if clip else {}
    return {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": clip,
        **clipping,
        # As text: 1 is one batch, 1.0 all of them.
        "limit_train_batches": repr(trainer.limit_train_batches),
        "overfit_batches": repr(trainer.overfit_batches),
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "devices": trainer.world_size,
        "accelerator": trainer.strategy.root_device.type,
        "batch_norm_group": module.run.batch_norm_group(module, trainer),
    }


def planned_steps(run: Mapping[str, Any], step: int, steps_per_epoch: int, max_epochs: int, max_steps: int) -> int:
    """The optimiser steps that a run will have taken when it ends, from where a checkpoint of it stands.

    Args:
        run: `Checkpoint.run`.
        step: optimiser steps taken.
        steps_per_epoch: of the epochs to come.
        max_epochs, max_steps: the run's length; -1 for no limit.
    """
    left = (max_epochs - run["epochs"]) * steps_per_epoch - min(run["steps_inside"], steps_per_epoch)
    limits = [step + left] if max_epochs != -1 else []
    return min([*limits, max_steps] if max_steps != -1 else limits)


def refuse_changes(changes: Changes, where: str, on_purpose: Collection[str] = ()) -> None:
    """Refuse to go on with settings that decide what is learned and differ.

    Args:
        changes: the settings that differ.
        where: the checkpoint, for people.
        on_purpose: those among them that are meant to.
    Raises:
        ValueError: naming the settings, with both values.
    """
    fixed = [name for name in changes if rule_of(name) is Rule.FIXED and name not in on_purpose]
    if {"model.micro_batch_size", "model.views"} & set(on_purpose) and "trainer.sync_batchnorm" in fixed:
        fixed.remove("trainer.sync_batchnorm")  # other groups for BatchNorm follow
    if fixed[1:] and "trainer.sync_batchnorm" in fixed:  # another batch, say, is divided into other groups
        fixed.remove("trainer.sync_batchnorm")
    if fixed:
        text = ", ".join(f"{name}={changes[name][1]} but the checkpoint has {changes[name][0]}" for name in fixed)
        # Linked on the command line, where there is no data.seed.
        text = text.replace("data.seed=", "data.seed (seed_everything)=")
        meant = " ".join(f"--resume_with {name}={changes[name][1]}" for name in fixed)
        hint = f" change it on purpose ({meant})," if ON_PURPOSE.issuperset(fixed) else ""
        raise ValueError(f"{where} cannot be continued: {text}. Restore the setting,{hint} or begin another run.")


def refuse_purpose(names: Collection[str], architecture: Collection[str] = ()) -> None:
    """Refuse to change on purpose what no run can go on with, or what needs no such request.

    Args:
        names: settings, named as on the command line.
        architecture: those of the method, without `model.`, that decide the shapes of its weights.
    Raises:
        ValueError: with what to do.
    """
    for name in names:
        group, _, own = name.rpartition(".")
        of_method = group == "model" and not any(own in part.split() for part in RULES["model"].values())
        if own in architecture and group == "model":
            raise ValueError(
                f"resume_with {name}: it decides the shapes of the weights, and those of the checkpoint would not fit "
                "others. Begin another run."
            )
        if name in ON_PURPOSE or of_method:
            continue
        if group in RULES and any(own in part.split() for part in RULES[group].values()):
            if rule_of(name) is not Rule.FIXED:
                raise ValueError(f"resume_with {name}: a run goes on with another one anyway. Give --{name}.")
            raise ValueError(
                f"resume_with {name}: it decides the shapes of the weights, the order of the images or what the "
                "optimiser remembers; with another one nothing would go on. Begin another run."
            )


def model_changes(hparams: Mapping[str, Any], was: Mapping[str, Any]) -> Changes:
    """The settings of a method that differ from a checkpoint's."""
    names = [name for rule in (Rule.FIXED, Rule.ROUNDING) for name in names_under(rule, "model")]
    names += [name for name in hparams if name not in names]
    # A run from before there were these settings began at random, on RGB, no deeper than usual, with large views alone.
    unsaid: dict[str, Any] = {"weights": None, "weights_prefix": None, "channels": 3, "depth": 1.0, "phi": None}
    unsaid |= {"small_crops": 0, "small_crop_size": None, "small_crop_scale": None, "pairs": "all"}
    return _differences("model", names, {**unsaid, **was}, hparams)


def trainer_changes(now: Mapping[str, Any], was: Mapping[str, Any]) -> Changes:
    """What `trainer_settings` tell apart; batch normalisation over other groups only on as many devices."""
    names = [name for name in now if name != "batch_norm_group"]
    changes = _differences("trainer", names, was, now)
    groups = was.get("batch_norm_group"), now["batch_norm_group"]
    if was and groups[0] != groups[1] and "trainer.devices" not in changes:
        changes["trainer.sync_batchnorm"] = (f"BatchNorm over {groups[0]} views", f"BatchNorm over {groups[1]} views")
    return changes


def data_changes(data: LightningDataModule, was: Mapping[str, Any]) -> Changes:
    """The settings of `ImageData` that decide the images of a step, those left to it as it resolves them."""
    names = names_under(Rule.FIXED, "data")
    # A run from before there were the settings held nothing out, and 8-bit RGB.
    return _differences(
        "data", names, {"held_out": 0, "channels": 3, "bits": 8, **_resolved(was)}, _resolved(data.hparams)
    )


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    data = images_of_run(settings)
    settings = {**settings, **{name: getattr(data, name) for name in ("source", "load_size") if name in settings}}
    if settings.get("source") != "shapes":
        settings.pop("shapes_train", None)
    if settings.get("bits", 8) is None:  # left open, as what the run has
        settings.pop("bits")
    return settings


def _differences(group: str, names: list[str], was: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The settings that both have and that differ."""
    both = [name for name in names if name in was and name in now]
    return {f"{group}.{name}": (was[name], now[name]) for name in both if was[name] != now[name]}


@dataclass
class Continuation:
    """How a run goes on from a checkpoint.

    Attributes:
        step: optimiser steps taken.
        total: those it will have taken when it ends; None if the checkpoint does not tell.
        length: how much of the run is done, for people: "25 of 25 epochs".
        changes: the settings that differ from the checkpoint's.
        images: what `ImageData.compare_images` found, if other images were allowed.
        said: what people are told of it, a line each.
    """

    step: int
    total: int | None
    length: str
    changes: Changes
    images: dict[str, int] | None = None
    said: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.total is not None and self.step >= self.total


def check_resume(
    checkpoint: Checkpoint,
    module: LightningModule,
    data: LightningDataModule | None = None,
    trainer: Trainer | None = None,
    on_purpose: Collection[str] = (),
) -> Continuation:
    """Refuse to continue a run with other weights, with a setting that decides what is learned, or with other images.

    Args:
        checkpoint: where to go on from.
        module: the `SimCLR` to go on with; settings that it leaves open become the checkpoint's.
        data: the images to go on with; not looked at if None, or if the checkpoint names no images.
        trainer: what to go on with; not looked at if None, or if the checkpoint does not tell.
        on_purpose: settings that are meant to differ, though they decide what is learned: some of `ON_PURPOSE`.
    Returns:
        What is different where that is allowed.
    Raises:
        ValueError: naming the settings that differ with both values, or else the weights, or the images.
    """
    if checkpoint.method != name_of(module):
        raise ValueError(
            f"{checkpoint.path} is a run of method={checkpoint.method}, which cannot be continued as {name_of(module)}."
        )
    refuse_purpose(on_purpose, module.architecture)
    module.run.on_purpose = frozenset(on_purpose)
    refuse_unfit(checkpoint.unfit, checkpoint.path)
    module.run.adopt(checkpoint.model)
    changes = model_changes(module.hparams, checkpoint.model)
    architecture = {name: pair for name, pair in changes.items() if name.removeprefix("model.") in module.architecture}
    reason = ", ".join(f"{name}={now} but the checkpoint has {was}" for name, (was, now) in architecture.items())
    what = f"{checkpoint.path} is of another architecture{reason and f' ({reason})'}"
    refuse_mismatch(checkpoint.state_dict, module.state_dict(), what)
    if data is not None and checkpoint.data:
        of_data = data_changes(data, checkpoint.data)
        # Said once: the command line links them.
        twins = {name: pair for name, pair in of_data.items() if changes.get(name.replace("data.", "model.")) == pair}
        changes = {name: pair for name, pair in changes.items() if name.replace("model.", "data.") not in twins}
        changes |= of_data
    run = checkpoint.run
    now = trainer_settings(trainer, module) if trainer is not None else {}
    if now:
        changes |= trainer_changes(now, run)
    refuse_changes(changes, str(checkpoint.path), on_purpose)
    images = data.check_images(checkpoint.images) if data is not None and checkpoint.images else None
    total = None
    if now and run.get("total_steps"):
        steps_per_epoch = run["steps_per_epoch"]
        if data is not None and images is not None:
            steps_per_epoch = steps_in((images["now"] - data.held_out) // data.batch_size, trainer)
        total = planned_steps(run, checkpoint.global_step, steps_per_epoch, now["max_epochs"], now["max_steps"])
        _refuse_shorter(checkpoint, total, now)
    found = Continuation(checkpoint.global_step, total, _length(checkpoint, total, now), changes, images)
    found.said = describe(found, checkpoint, now)
    return found


def steps_in(batches: int, trainer: Trainer) -> int:
    """The optimiser steps of an epoch of so many batches, under a Trainer's limit and accumulation."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def end_shorter_epoch(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Other images may leave fewer steps in an epoch than have been taken in the one begun: then that one has ended.

    Args:
        checkpoint: the whole content, of which `loops` and `run` are changed.
        trainer: with the data to go on with.
    """
    data, run = trainer.datamodule, checkpoint.get("run", {})
    files = data.fingerprint() if run.get("steps_inside") and isinstance(data, ImageData) else {}
    if files and run["steps_inside"] >= steps_in((len(files["files"]) - data.held_out) // data.batch_size, trainer):
        end_epoch(checkpoint["loops"]["fit_loop"])
        run["epochs"], run["steps_inside"] = run["epochs"] + 1, 0


def _length(checkpoint: Checkpoint, total: int | None, now: Mapping[str, Any]) -> str:
    if now.get("max_steps", -1) != -1 or checkpoint.run.get("steps_inside"):
        return f"{checkpoint.global_step} of {total} steps"
    return f"{checkpoint.epochs} of {now.get('max_epochs')} epochs"


def _refuse_shorter(checkpoint: Checkpoint, total: int, now: Mapping[str, Any]) -> None:
    if total >= checkpoint.global_step:
        return
    limit = "max_steps" if now["max_steps"] != -1 and now["max_steps"] < checkpoint.global_step else "max_epochs"
    raise ValueError(
        f"trainer.{limit}={now[limit]} ends before {checkpoint.path}, which stands at {checkpoint.stands}. "
        "Give a longer one."
    )


def describe(found: Continuation, checkpoint: Checkpoint, now: Mapping[str, Any]) -> list[str]:
    """What a continuation does that is not as the run began, for people, a line each; `now` is `trainer_settings`."""
    run, lines = checkpoint.run, []
    meant = [f"{name}={now}, was {was}" for name, (was, now) in found.changes.items() if rule_of(name) is Rule.FIXED]
    if meant:
        lines.append(f"{', '.join(meant)}: changed on purpose, so from step {found.step} on it is another run")
    for name, (was, value) in found.changes.items():
        if rule_of(name) is Rule.ROUNDING:
            batch_norm = ""
            if name == "trainer.devices" and now["batch_norm_group"] != run["batch_norm_group"]:
                batch_norm = f", BatchNorm over {now['batch_norm_group']} views, {run['batch_norm_group']} before"
            lines.append(f"{name}={value}, was {was}: the same batches and views{batch_norm}, but not the same bits")
    order = run.get("order", 1)
    if run and order != ORDER_VERSION and not found.finished:
        lines.append(
            f"the images' order is that of version {ORDER_VERSION} of this project's, was {order}: "
            f"from step {found.step} on other batches than the run would have had"
        )
    if found.images is not None:
        inside = f"; of the epoch begun, {run['steps_inside']} steps stay done" if run["steps_inside"] else ""
        count = ", ".join(f"{found.images[kind]} {kind}" for kind in ("added", "removed", "changed"))
        lines.append(
            f"other images: {found.images['was']} before, {found.images['now']} now, {count}; "
            f"the order is that of the new set{inside}"
        )
    if found.total is not None and found.total != run["total_steps"]:
        lengths = [name for name in found.changes if rule_of(name) is Rule.LENGTH]
        why = ", ".join(f"{name}={found.changes[name][1]}, was {found.changes[name][0]}" for name in lengths)
        lines.append(
            f"{why or 'another length'}: from step {found.step} on the learning rate follows the schedule of "
            f"{found.total} steps, before it that of {run['total_steps']}"
        )
    return lines
