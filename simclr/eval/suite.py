"""Many protocols on features that are computed once, each beside its yardsticks, as one record: `eval.json`.

docs/evaluation.md states what the record holds.
"""

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import fsum
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from simclr.checkpoint import Checkpoint, load_encoder, new_encoder, read_checkpoint
from simclr.checks import listed, out_of_range, refuse
from simclr.data import EvalLoader, ImageData
from simclr.distributed import from_rank_0
from simclr.eval.distill import build_student
from simclr.eval.duplicates import HashedImages, copies
from simclr.eval.evaluation import LoadedImages, data_record, refuse_unseen_classes, versions
from simclr.eval.feature_cache import FeatureCache, images_sha256
from simclr.eval.features import encoder_sha256
from simclr.eval.logreg import NotConverged
from simclr.eval.metrics import bootstrap_interval, mean_per_class, wilson_interval
from simclr.eval.predictions import packed
from simclr.eval.protocol import OF_EVAL, REVISIONS, FrozenFeatures, Outcome, find_protocol, settings_of
from simclr.eval.supervised import METHOD as SUPERVISED
from simclr.eval.supervised import SupervisedNetwork, read_supervised, refuse_seen_images
from simclr.paths import expanded, shown, stored
from simclr.training.method import METHODS, find_method

SCHEMA = "simclr.eval/1"
EVAL = "eval.json"  # in the run folder
STARTING = "starting_encoder.safetensors"  # in the folder of a run that began with weights of its own
LABELLED = "eval_labels"  # in the run folder: lists of the images whose labels were used
YARDSTICKS = ("random_encoder", "raw_pixels", "starting_weights", SUPERVISED)
_WITH_A_FRESH_HEAD = ("random_encoder", "starting_weights")  # as the run began
_PIXELS = 32  # the largest side of which pixels are features


class RawPixels(nn.Module):
    """The yardstick without any encoder: pixel values in [0, 1] as features.

    Args:
        image_size: of the encoder; images above 32 pixels are brought to 32.
        channels: C of the images.
    """

    def __init__(self, image_size: int, channels: int = 3):
        super().__init__()
        self.image_size = min(_PIXELS, image_size)
        self.mean, self.std = (0.0,) * channels, (1.0,) * channels

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, S, S) -> (n, C S S)."""
        return images.flatten(1)


@dataclass(frozen=True, eq=False)
class _Images:
    """What all encoders are measured on."""

    train: HashedImages
    test: HashedImages
    cache: FeatureCache

    def features(
        self, encoder: nn.Module, cache: FeatureCache | None = None, head: nn.Module | None = None
    ) -> FrozenFeatures:
        cache = cache or self.cache
        return FrozenFeatures(
            encoder,
            cache.features(encoder, self.train, "train"),
            cache.features(encoder, self.test, "test"),
            LoadedImages(self.train.loader),
            self.cache.device,
            self.test.loader,
            head,
        )


def evaluate(
    checkpoint: str | Path,
    data: ImageData,
    protocols: Sequence[str] = ("knn", "logreg"),
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    yardsticks: Sequence[str] = YARDSTICKS,
    supervised: str | Path | None = None,
    on: str | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Measure a pretrained encoder, frozen, by several protocols on the same features.

    Several ranks share the images, each calling this; the protocols are run by rank 0, and all return its numbers.

    Args:
        checkpoint: a run folder or a checkpoint file.
        data: labelled images; see `ImageData.eval_loader` for what serves as test where there is no test set.
        protocols: names of `simclr.eval.protocol.OF_EVAL`, or paths of functions.
        settings: of each protocol, by the names of its signature.
        yardsticks: of `YARDSTICKS`; the starting weights where the run has them.
        supervised: a run of the supervised method, the counterpart of this one: its encoder is a yardstick of every
            protocol, and its own classifier is measured on the same test images.
        on: what other images than the run's own are called, in every id; None for its own.
        cache_dir: where features are kept, see `simclr.eval.feature_cache`; None: nowhere.
        device: where to compute.
        command: recorded with the result.
        say: is told what goes on, a line at a time.
    Returns:
        The record, see docs/evaluation.md; and the lists of labelled images of the protocols that use some, by the file
        that the record names for each, an image a line.
    Raises:
        FileNotFoundError, ValueError: for a setting, checkpoint or data that do not serve, naming what is wrong.
        RuntimeError: if the encoder changed while it was measured, or a classifier did not come to an end.
    """
    started = time.perf_counter()
    chosen = _settings(protocols, settings or {})
    refuse([f"yardsticks: {y} is none of {listed(YARDSTICKS)}" for y in yardsticks if y not in YARDSTICKS])
    read = read_checkpoint(checkpoint)
    network = None if supervised is None or SUPERVISED not in yardsticks else read_supervised(supervised)
    encoder = load_encoder(read.path)
    sha256 = encoder_sha256(encoder)
    train, test = data.eval_loader("train"), data.eval_loader("test")
    refuse_unseen_classes(train, test)
    _refuse_for_these_images(chosen, train, encoder)
    if network is not None:
        refuse_seen_images(network, data, test)
    images = _Images(
        HashedImages(train),
        HashedImages(test),
        FeatureCache(None if cache_dir is None else expanded(cache_dir), device, say),
    )
    say(f"features of {len(train.index):,} training and {len(test.index):,} test images")
    deep = any(given.get("from_layer") for given in chosen.values())
    frozen = images.features(encoder, head=_trained_head(read) if deep else None)
    about_data = data_record(data, train, test)
    about_data |= {
        "on": on,
        "split": "holdout" if data.evaluation_note else "test",
        "train_sha256": images_sha256(images.train),
        "test_sha256": images_sha256(images.test),
        "images_sha256": hashlib.sha256(bytes(images.test.digests)).hexdigest(),
    }
    copy_of = copies(images.train.digests, images.test.digests)
    own = copy_of < 0
    results, labelled, labels = [], {}, frozen.test[1]
    for name, given in chosen.items():
        say(f"protocol {name}")
        began = time.perf_counter()
        outcomes = from_rank_0(partial(_run, name, frozen, given))
        seconds = round(time.perf_counter() - began, 2)
        for variant, outcome in outcomes.items():
            own_settings = given if outcome.settings is None else outcome.settings
            about = {"protocol": name, "variant": variant, "settings": dict(own_settings)}
            about["about"] = dict(outcome.about)
            about |= identity(about, read, about_data, sha256)
            results.append({**about, **_numbers(outcome, labels, own), "yardsticks": {}, "seconds": seconds})
            if outcome.labelled is not None:
                results[-1]["labelled"], lines = _list_of(f"{name}-{variant}", _names(train, outcome.labelled))
                labelled[results[-1]["labelled"]] = lines
    if encoder_sha256(encoder) != sha256:
        raise RuntimeError("the encoder changed during its evaluation: the numbers are void.")
    fresh = _fresh_head(read) if deep else None
    encoders = {y: _yardstick_encoder(y, read, network) for y in yardsticks}
    measured = [y for y in yardsticks if encoders[y] is not None]
    with_labels: dict[str, Any] | None = None
    for yardstick in measured:
        say(f"yardstick: {yardstick.replace('_', ' ')}")
        head = fresh if yardstick in _WITH_A_FRESH_HEAD else None
        other = _measure_yardstick(yardstick, encoders[yardstick], head, images, chosen, results, labels, say)
        if yardstick == SUPERVISED and network is not None:
            with_labels = _of_supervised(network, read, other, test, about_data, own)
    record = {
        "schema": SCHEMA,
        "encoder": read.model["encoder"],
        "encoder_sha256": sha256,
        "checkpoint": stored(read.path),
        "epoch": read.epochs,
        "global_step": read.global_step,
        "total_steps": read.run.get("total_steps"),
        "finished": read.finished,
        "preprocessing": preprocessing(read),
        "protocols": chosen,
        "yardsticks": measured,
        "results": results,
        "summaries": summaries(results),
        "supervised": with_labels,
        "data": about_data,
        "duplicates": {"test_images": int((~own).sum())},
        "labels": packed(labels),
        "device": str(device),
        "command": command,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    record["sha256"] = record_sha256(record)
    return record, labelled


def identity(
    about: Mapping[str, Any], read: Checkpoint, data: Mapping[str, Any], encoder_sha256: str
) -> dict[str, str]:
    """What a number is of, for people, `id`, and for machines, `hash`: equal where encoder, images and settings are
    (and the protocol's revision).

    Args:
        about: protocol, variant and settings.
        read: the checkpoint.
        data: what the record says of the images.
        encoder_sha256: of the encoder.
    """
    stands = (
        f"epoch{read.epochs}" if read.finished is not False else f"step{read.global_step}of{read.run['total_steps']}"
    )
    said = {k: v for k, v in about["settings"].items() if v is not None}
    settings = ",".join(f"{k}={_short(v)}" for k, v in said.items())
    parts = [
        f"{about['protocol']}@{read.path.stem}",
        stands,
        f"split={data['split']}",
        f"n={data['test_images']}",
        *([f"on={data['on']}"] if data.get("on") else []),
        f"res{read.model['image_size']}",
        *filter(None, [about["variant"], settings]),
    ]
    hashed = {key: about[key] for key in ("protocol", "variant", "settings")}
    if about["protocol"] in REVISIONS:
        hashed["revision"] = REVISIONS[about["protocol"]]
    hashed |= {
        "encoder": encoder_sha256,
        "preprocessing": preprocessing(read),
        "train": data["train_sha256"],
        "test": data["test_sha256"],
    }
    return {"id": "/".join(parts), "hash": _sha256(hashed)[:16]}


def preprocessing(read: Checkpoint) -> dict[str, Any]:
    """What is done to an image before the encoder sees it, as JSON has it."""
    model = read.model
    found = {"image_size": model["image_size"], "mean": list(model["mean"]), "std": list(model["std"])}
    return found | ({"bits": read.data["bits"]} if read.data.get("bits", 8) not in (None, 8) else {})


def _short(value: Any) -> str:
    items = [f"{item:g}" if isinstance(item, float) else str(item) for item in _as_list(value)]
    return f"{items[0]}..{items[-1]}x{len(items)}" if len(items) > 3 else "+".join(items)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def summaries(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and number of the results that differ in their draw only; `std` is the sample's, None of one.

    Args:
        results: of a record.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        variant, drawn, _ = result["variant"].partition("/draw=")
        if drawn:
            groups.setdefault((result["protocol"], variant), []).append(result)
    return [
        {
            "protocol": protocol,
            "variant": variant,
            "id": re.sub("/draw=[^/]*", f"/draws={len(found)}", found[0]["id"]),
            "hash": _sha256([result["hash"] for result in found])[:16],
            "draws": len(found),
            "top1_mean": _mean([result["top1"] for result in found]),
            "top1_std": stdev(result["top1"] for result in found) if len(found) > 1 else None,
            "mean_per_class_mean": _mean([result["mean_per_class"] for result in found]),
            "yardsticks": {
                name: _mean([result["yardsticks"][name]["top1"] for result in found])
                if all(result["yardsticks"][name] for result in found)
                else None
                for name in found[0]["yardsticks"]
            },
        }
        for (protocol, variant), found in groups.items()
    ]


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def record_sha256(record: Mapping[str, Any]) -> str:
    """A hash of all that a record says, so that an edited one is known."""
    return _sha256({key: value for key, value in record.items() if key != "sha256"})


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def refuse_unknown_protocols(protocols: Sequence[str]) -> None:
    """Refuse names of no protocol, before images are looked for.

    Raises:
        ValueError: naming one.
    """
    for name in protocols:
        find_protocol(name, OF_EVAL)


def _settings(protocols: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of each protocol asked for, as JSON has them, checked before anything is computed."""
    if not protocols:
        raise ValueError(f"no protocol is named. Use some of {listed(OF_EVAL)}.")
    if twice := sorted({name for name in protocols if list(protocols).count(name) > 1}):
        raise ValueError(f"protocols name {listed(twice)} more than once.")
    chosen = {name: settings_of(name, settings.get(name, {}), OF_EVAL) for name in protocols}
    chosen = json.loads(json.dumps(chosen))
    counts = ("epochs", "batch_size", "max_iterations", "draws", "teacher_epochs")
    refuse(
        [
            f"{name}.{problem}"
            for name, given in chosen.items()
            for problem in out_of_range(
                given,
                counts=counts,
                positive=("base_lr", "temperature", "teacher_base_lr"),
                not_negative=("weight_decay", "from_layer"),
            )
        ]
    )
    return chosen


def _refuse_for_these_images(chosen: Mapping[str, Mapping[str, Any]], train: EvalLoader, encoder: nn.Module) -> None:
    """What no protocol could do with the training images, before their features are computed."""
    present = train.labels.unique()
    if len(present) < 2:
        raise ValueError(f"{train.source.name} has images of {len(present)} class: evaluation needs two or more.")
    ks = _as_list(chosen.get("knn", {}).get("k"))
    refuse([f"knn.k={k} is not 1 or more" for k in ks if k is not None and k < 1])
    if large := [k for k in ks if k is not None and k > len(train.index)]:
        raise ValueError(
            f"knn.k={large[0]} is more than the {len(train.index)} training images. "
            "Use fewer, or leave it out: it then follows from the sizes of the classes."
        )
    if given := chosen.get("distill"):  # built once more then, but not after hours of other work
        mean: Any = encoder.mean
        options = {name: given[name] for name in ("width", "depth", "phi", "stem")}
        build_student(given["student"], encoder, len(mean), **options)


def _run(name: str, frozen: FrozenFeatures, settings: Mapping[str, Any]) -> Mapping[str, Outcome]:
    found = find_protocol(name, OF_EVAL)(frozen, **settings)
    return {"": found} if isinstance(found, Outcome) else found


def _run_if_possible(
    name: str, frozen: FrozenFeatures, settings: Mapping[str, Any]
) -> tuple[Mapping[str, Outcome], str | None]:
    """As `_run`, or why there is nothing: features that are hard to fit must not cost the encoder its number."""
    try:
        return _run(name, frozen, settings), None
    except RuntimeError as error:
        if not isinstance(error, NotConverged) and "diverged" not in str(error):
            raise
        return {}, str(error)


def _numbers(outcome: Outcome, labels: Tensor, own: Tensor) -> dict[str, Any]:
    right = outcome.predictions == labels
    correct, without = int(right.sum()), int(own.sum())
    return {
        "top1": correct / len(labels),
        "ci95": list(wilson_interval(correct, len(labels))),
        "top5": outcome.top5,
        "mean_per_class": mean_per_class(outcome.predictions, labels),
        "mean_per_class_ci95": list(bootstrap_interval(outcome.predictions, labels)),
        "top1_without_duplicates": int(right[own].sum()) / without if without else None,
        "n_test": len(labels),
        "predictions": packed(outcome.predictions),
    }


def _of_supervised(
    network: SupervisedNetwork,
    read: Checkpoint,
    frozen: FrozenFeatures,
    test: EvalLoader,
    data: Mapping[str, Any],
    own: Tensor,
) -> dict[str, Any]:
    """The supervised counterpart and what its own classifier reaches, as a result; no numbers for other classes."""
    about = network.about(read)
    outcome = network.predict(frozen.test[0], test)
    if outcome is None:
        return {**about, "top1": None}
    of = {"protocol": SUPERVISED, "variant": "", "settings": {}}
    return {**about, **identity(of, network.read, data, about["encoder_sha256"]), **_numbers(outcome, test.labels, own)}


def _measure_yardstick(
    yardstick: str,
    encoder: nn.Module | None,
    head: nn.Module | None,
    images: _Images,
    chosen: Mapping[str, Mapping[str, Any]],
    results: list[dict[str, Any]],
    labels: Tensor,
    say: Callable[[str], None],
) -> FrozenFeatures:
    """What every protocol comes to on features that pretraining had no part in; None where it comes to nothing.

    Returns:
        Those features.
    """
    assert encoder is not None  # it is measured
    # Pixels are read faster than features are.
    cache = FeatureCache(None, images.cache.device) if yardstick == "raw_pixels" else None
    frozen = images.features(encoder, cache, head)
    for name, given in chosen.items():
        outcomes, problem = from_rank_0(partial(_run_if_possible, name, frozen, given))
        if problem:
            say(f"no number of {name} for this yardstick: {problem}")
        for result in results:
            if result["protocol"] == name:
                outcome = outcomes.get(result["variant"])
                result["yardsticks"][yardstick] = outcome and {
                    "top1": int((outcome.predictions == labels).sum()) / len(labels),
                    "mean_per_class": mean_per_class(outcome.predictions, labels),
                }
    return frozen


def _yardstick_encoder(yardstick: str, read: Checkpoint, network: SupervisedNetwork | None) -> nn.Module | None:
    """What makes the features of a yardstick; None where this run has none of the kind."""
    if yardstick == SUPERVISED:
        return None if network is None else network.encoder
    if yardstick == "raw_pixels":
        return RawPixels(read.model["image_size"], read.model.get("channels", 3))
    if yardstick == "starting_weights":
        path = read.run_dir / STARTING
        return load_encoder(path) if path.is_file() else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(read.model["seed"])  # the weights the run began with
        return new_encoder(read)


def _trained_head(read: Checkpoint) -> nn.Module:
    """The projection head of a run, whose layers a protocol trains from.

    Raises:
        ValueError: if it has none.
    """
    head = _fresh_head(read)
    head.load_state_dict({k.removeprefix("head."): v for k, v in read.state_dict.items() if k.startswith("head.")})
    return head.eval()


def _fresh_head(read: Checkpoint) -> nn.Module:
    """A head as a run of this kind begins with."""
    names = [name for name in read.state_dict if name.startswith("head.layers.")]
    if not names or read.method not in METHODS:
        raise ValueError(
            f"from_layer: a run of method={read.method} has no projection head to train from. Leave it out."
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(read.model["seed"])
        model: Any = find_method(read.method)(**read.model)
    return model.head


def _list_of(name: str, lines: list[str]) -> tuple[str, list[str]]:
    """A file for a list of images, named after what it is of and its content: no later one takes its place."""
    name = re.sub(r"[^\w.=-]+", "_", name)
    return f"{LABELLED}/{name}-{_sha256(lines)[:8]}.txt", lines


def _names(loader: EvalLoader, places: Tensor) -> list[str]:
    """Images of a loader by their files, or by their numbers where they are from none."""
    numbers = loader.index[places].tolist()
    paths = loader.source.paths
    return [str(number) if paths is None else shown(paths[number]) for number in numbers]
