"""Whether a checkpoint is what was written: its bytes, its parts, their types. What is not is refused by name.

torch stores a checksum of every part of its files and never looks at them: a flipped bit is read as another weight.
"""

import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIVERGED = "Lower base_lr, lengthen warmup_epochs, or use bf16 in place of fp16."
_ZIP = b"PK\x03\x04"  # how one begins, by which torch tells them too
_PROGRESS = {"total": {"ready": int, "completed": int}, "current": {"ready": int, "completed": int}}
_OF_BATCHES = {name: {**keys, "started": int, "processed": int} for name, keys in _PROGRESS.items()}
_OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"
# What a run goes on by, as Lightning and `PretrainingRun.save` write it: names and types, however deep.
_LOOP = {
    "epoch_progress": _OF_BATCHES,
    "epoch_loop.batch_progress": {**_OF_BATCHES, "is_last_batch": bool},
    "epoch_loop.state_dict": {"_batches_that_stepped": int},
    _OPTIMIZER: {"optimizer": {"step": _PROGRESS}},
}
_TRAINING = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "loops": {"fit_loop": _LOOP},
    "optimizer_states": list,
    "lr_schedulers": list,
}
_OURS = {"epoch_loss": list, "run": dict, "method": {"name": str, "objective": dict}}
_RUN = {"epochs": int, "steps_inside": int, "total_steps": int, "steps_per_epoch": int}
# What every reader takes for granted, where it is there.
_READ = {"epoch": int, "global_step": int, "datamodule_hyper_parameters": dict, "run": dict, "ImageData": dict}
_READ |= {"method": dict}
_SETTINGS = {"encoder": str, "image_size": int, "mean": (list, tuple), "std": (list, tuple), "seed": int}


def refuse_flipped_bits(path: Path) -> None:
    """Compare the checksums in a file that torch has written with its content; 0.14 s for 220 MB.

    Args:
        path: the file; one that is no zip, as torch wrote them before its version 1.6, has none and passes.
    Raises:
        ValueError: naming the part that has other bytes than were written.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if part is not None:
        raise ValueError(f"{part} has other bytes than were written")


def load(path: Path) -> Any:
    """What a file of torch's holds, on the CPU, its checksums compared, without running any code it might carry.

    Raises:
        Exception: of many kinds, if it is damaged or holds more than tensors and plain types.
    """
    refuse_flipped_bits(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wonders aloud at what is no file of its own
        return torch.load(path, map_location="cpu", weights_only=True)


def wrong_parts(content: Mapping[str, Any]) -> list[str]:
    """What in a checkpoint is of another type than every reader of it needs, a few words each.

    Args:
        content: of a checkpoint, with its `state_dict` and `hyper_parameters`.
    """
    found = _differences(content, {name: kind for name, kind in _READ.items() if name in content})
    settings = content["hyper_parameters"]
    found += _differences(settings, {name: kind for name, kind in _SETTINGS.items() if name in settings})
    weights = content["state_dict"]
    found += [f"state_dict[{key!r}] is no tensor" for key, value in weights.items() if not isinstance(value, Tensor)]
    return found


def unfit_to_continue(content: Mapping[str, Any]) -> list[str]:
    """Why a run cannot go on from a checkpoint to where it would have come, a few words each; empty if it can.

    Args:
        content: of a checkpoint. One that another tool wrote need not have what ours adds, but all of Lightning's.
    """
    ours = any(name in content for name in _OURS)
    found = _differences(content, _TRAINING | (_OURS if ours else {}))
    if found:
        return found
    if ours and content["run"]:
        found += _differences(content["run"], _RUN, "run.")
    step = content["loops"]["fit_loop"][_OPTIMIZER]["optimizer"]["step"]["total"]["completed"]
    if step != content["global_step"]:
        found.append(f"loops count {step} steps, global_step is {content['global_step']}")
    shapes = Counter(value.shape for value in content["state_dict"].values() if isinstance(value, Tensor))
    states, schedules = content["optimizer_states"], content["lr_schedulers"]
    found += [] if states else ["optimizer_states is empty"]
    found += [] if schedules or not (ours and content["run"]) else ["lr_schedulers is empty"]
    for number, schedule in enumerate(schedules):
        found += _differences(schedule, {"last_epoch": int}, f"lr_schedulers[{number}].")
    for number, state in enumerate(states):
        found += _of_optimizer(state, shapes, f"optimizer_states[{number}]")
    tensors = content["run"].get("optimizer_tensors") if ours else None
    if not found and tensors not in (None, count := count_tensors(states)):
        found.append(f"optimizer_states has {count} tensors of {tensors}")
    return found


def count_tensors(states: list[dict[str, Any]]) -> int:
    """How many tensors the states of some optimisers hold."""
    return sum(
        isinstance(value, Tensor) for state in states for kept in state["state"].values() for value in kept.values()
    )


def not_finite(module: nn.Module, states: Iterable[dict[str, Any]] = ()) -> list[str]:
    """The names of weights that hold NaN or infinity: ruined, and not to take the place of good ones.

    Args:
        module: whose parameters and running statistics are looked at. Other buffers may hold infinities on purpose.
        states: of optimisers, whose tensors are looked at too.
    """
    kept: dict[str, Tensor] = dict(module.named_parameters())
    kept |= {name: value for name, value in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    for state in states:
        of_one = state["state"].items()
        kept |= {f"{key} of parameter {number}": v for number, found in of_one for key, v in found.items()}
    return [name for name, value in kept.items() if isinstance(value, Tensor) and not value.isfinite().all()]


def refuse_ruined(names: list[str], step: int) -> None:
    """Refuse to save weights that are not finite.

    Args:
        names: of those that are not; "" for those of another rank.
        step: after which they were found.
    Raises:
        FloatingPointError: naming the first.
    """
    if names:
        which = f" ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if names[0] else ""
        raise FloatingPointError(f"weights are not finite after step {step}{which}: they are not saved. {DIVERGED}")


def _of_optimizer(state: Any, shapes: Counter, where: str) -> list[str]:
    found = _differences(state, {"state": dict, "param_groups": list}, f"{where}.")
    if found:
        return found
    for number, group in enumerate(state["param_groups"]):
        found += _differences(group, {"params": list, "lr": Real}, f"{where}.param_groups[{number}].")
    if found:
        return found
    known = {number for group in state["param_groups"] for number in group["params"]}
    if not all(isinstance(kept, dict) for kept in state["state"].values()):
        return [f"{where}.state is not by parameter"]
    if not set(state["state"]) <= known:
        return [f"{where}.state is of parameters that are in none of its groups"]
    kept = [(key, value) for of_one in state["state"].values() for key, value in of_one.items()]
    found += [f"{where}: {key} is a {type(v).__name__}" for key, v in kept if not isinstance(v, Tensor | Real | None)]
    sized = [(key, value.shape) for key, value in kept if isinstance(value, Tensor) and value.dim()]
    for key in sorted({key for key, _ in sized}):
        other = Counter(shape for name, shape in sized if name == key) - shapes
        found += [f"{where}: {key} has shapes that no weight has"] if other else []
    return found


def _differences(content: Any, expected: Mapping[str, Any], where: str = "") -> list[str]:
    """Names that are missing or of another type than expected."""
    found = []
    for name, kind in expected.items():
        if name not in content:
            found.append(f"{where}{name} is missing")
        elif isinstance(kind, Mapping):
            value = content[name]
            inside = _differences(value, kind, f"{where}{name}.") if isinstance(value, Mapping) else None
            found += [f"{where}{name} is a {type(value).__name__}"] if inside is None else inside
        elif not isinstance(content[name], kind) or (kind is int and not _counts(content[name])):
            found.append(f"{where}{name} is {_short(content[name])}")
    return found


def _counts(value: int) -> bool:
    return not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    return (
        repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 40 else f"a {type(value).__name__}"
    )
