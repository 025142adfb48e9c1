"""Weights for an encoder to begin with, from torchvision, timm, a file, a run or an export: all of them fit, or none.

Nothing is downloaded but for a source that names a library's weights, and no code is run that a file might carry.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simclr.checkpoint import mismatches, read_encoder, sha256_of, some
from simclr.efficientnet import encoder_in_words, published_name
from simclr.encoders import RESNETS, choose_stem
from simclr.export.card import CARD
from simclr.export.reading import SETTINGS, exported_file, runs_by_itself
from simclr.image_sizes import first_line_of
from simclr.intact import load
from simclr.model_zoo import torchvision_names
from simclr.paths import expanded, stored

# The first names of classifiers in the networks of torchvision and timm, auxiliary ones too.
_CLASSIFIERS = ("fc", "classifier", "head", "heads", "head_dist", "aux1", "aux2", "AuxLogits")
# Under which names programs keep a network's weights in their checkpoints; the first that is there counts, so that of a
# teacher and a student the teacher is taken, as DINO's own evaluation does.
_NESTS = ("state_dict", "model_state_dict", "model", "teacher", "student", "network", "net", "encoder", "backbone")
_LIBRARIES = ("torchvision:", "timm:")
_OF_A_NETWORK = ("encoder", "stem", "width", "depth", "phi", "shortcut", "norm")
_UNSAID: Mapping[str, Any] = {"depth": 1.0, "phi": None}  # of files from before there were these settings
_COUNTER = (
    "num_batches_tracked"  # of BatchNorm; files of torch before 0.4.1 lack it, and with a momentum nothing reads it
)


@dataclass(frozen=True, eq=False)
class StartingWeights:
    """What an encoder begins with.

    Attributes:
        source: as it was given.
        weights: the encoder's whole state dict, in its own types.
        dropped: names in the source that the encoder does not take: classifiers, and what stands beside a prefix.
        inside: where in the source the weights stand, for people: a name in a nested file, a prefix; may be empty.
        fed: `mean` and `std` of the images that the weights were trained on, where that is known.
        adapted: for people: which weights of RGB were made those of other channels, and how; empty if none was.
    """

    source: str
    weights: dict[str, Tensor]
    dropped: list[str]
    inside: str = ""
    fed: Mapping[str, Any] = field(default_factory=dict)
    adapted: str = ""

    @property
    def sha256(self) -> str:
        """Of the weights as the encoder takes them: names, types, shapes and bytes."""
        return sha256_of(self.weights)

    @property
    def record(self) -> dict[str, Any]:
        """For a checkpoint, in plain types."""
        found = {"source": self.source, "sha256": self.sha256, "dropped": list(self.dropped)}
        return found | ({"adapted": self.adapted} if self.adapted else {})

    @property
    def text(self) -> str:
        """For people: the source, how many weights it gave, and what was dropped."""
        inside = f" ({self.inside})" if self.inside else ""
        dropped = f"; dropped: {_grouped(self.dropped)}" if self.dropped else ""
        adapted = f"; {self.adapted}" if self.adapted else ""
        return f"{self.source}{inside}, {len(self.weights)} tensors{dropped}{adapted}"

    def fed_otherwise(self, settings: Mapping[str, Any]) -> str | None:
        """For people: that a run of these settings shows the encoder images normalised in another way; None if not."""
        fed = {name: _of_channels(self.fed[name], len(settings[name])) for name in self.fed if settings.get(name)}
        pairs = [(f"model.{name}", fed.get(name), settings.get(name)) for name in ("mean", "std")]
        known = [(name, list(was), list(now)) for name, was, now in pairs if was is not None and now is not None]
        if all(torch.allclose(torch.tensor(was), torch.tensor(now), atol=1e-3) for _, was, now in known):
            return None
        wanted = " ".join(f"--{name} '{[round(float(value), 4) for value in was]}'" for name, was, _ in known)
        return f"the starting weights were trained on images normalised otherwise. As they were: {wanted}"


@dataclass(frozen=True)
class _Found:
    """What a source holds: names and values, where they stand in it, the settings of the encoder if it tells them."""

    content: Mapping[str, Any]
    inside: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def stored_source(source: str) -> str:
    """A source as a run keeps it: a path from the root, so that it means the same from any other folder."""
    return source if source.startswith(_LIBRARIES) or "://" in source else stored(source)


def read_starting_weights(
    source: str, encoder: nn.Module, settings: Mapping[str, Any], prefix: str | None = None
) -> StartingWeights:
    """Read weights for an encoder to begin with, and see that they are its own, all of them.

    Args:
        source: `torchvision:NAME`, which downloads the weights that torchvision has by this name for the encoder's
            network unless they are in torch's cache; `timm:NAME`, likewise a model of timm; a file (a state dict of
            torch's or safetensors, or a checkpoint with one inside); a run folder, a checkpoint of ours or an export.
        encoder: to be begun; it is not changed.
        settings: of its method: `encoder`, and what there is of `stem`, `width`, `depth`, `phi`, `shortcut`, `norm`.
        prefix: what the names of the encoder's weights begin with in the source; other names there are dropped.
    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: for a model of timm without timm.
        ValueError: if the source cannot be read, or if a weight is missing, unexpected, of another shape or kind, or
            not finite, by name, with what would help.
    """
    found, expected = _read(source, settings), encoder.state_dict()
    content, inside, dropped = {str(name): value for name, value in found.content.items()}, found.inside, []
    if prefix is not None:
        prefix = f"{prefix.rstrip('.')}."
        begins = [name for name in content if name.startswith(prefix)]
        if not begins:
            first = ", ".join(f"{name}." for name in list(dict.fromkeys(_first(name) for name in content))[:6])
            raise ValueError(f"model.weights_prefix={prefix}: no name in {source} begins so. They begin with {first}")
        dropped = [name for name in content if not name.startswith(prefix)]
        content = {name.removeprefix(prefix): content[name] for name in begins}
        inside = ", ".join(part for part in (inside, f"prefix {prefix}") if part)
    classifiers = [name for name in content if _first(name) in _CLASSIFIERS and name not in expected]
    dropped += [f"{prefix or ''}{name}" for name in classifiers]
    weights = {name: value for name, value in content.items() if name not in classifiers}
    weights |= {name: value for name, value in expected.items() if name not in weights and name.endswith(_COUNTER)}
    _refuse_other_channels(source, found.settings, settings)
    adapted = _adapt(weights, expected, settings)
    _refuse_unfit(source, weights, expected, settings, found, prefix)
    own = {name: weights[name].detach().to("cpu", value.dtype).clone() for name, value in expected.items()}
    fed = {name: found.settings[name] for name in ("mean", "std") if found.settings.get(name) is not None}
    return StartingWeights(source, own, dropped, inside, fed, adapted)


def _of_channels(values: Sequence[float], channels: int) -> list[float]:
    """What is known of RGB for other channels, the mean for each; what is of as many channels as it is."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _refuse_other_channels(source: str, theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a run or an export whose images have other channels, but for RGB, whose weights can be adapted."""
    taken = theirs.get("channels", 3 if "encoder" in theirs else None)
    wanted = settings.get("channels", 3)
    if taken not in (None, 3, wanted):
        many = "1 channel" if taken == 1 else f"{taken} channels"
        raise ValueError(
            f"model.weights={source} is of images of {many}, where data.channels={wanted}. Give --data.channels "
            f"{taken}, or weights of RGB, which can be adapted."
        )


def _adapt(weights: dict[str, Any], expected: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Make a first convolution's weights of RGB those of other channels, in place; what was done, for people.

    Each channel gets the mean of the three, times three over the number of channels: where all channels are alike, the
    network answers as it did to gray. For one channel that is the sum, as in timm.
    """
    channels = settings.get("channels", 3)
    if channels == 3:
        return ""
    for name, value in expected.items():
        theirs = weights.get(name)
        if value.ndim != 4 or value.shape[1] != channels or not isinstance(theirs, Tensor) or theirs.ndim != 4:
            continue
        if theirs.shape != (value.shape[0], 3, *value.shape[2:]) or not theirs.is_floating_point():
            continue
        weights[name] = (theirs.mean(1, keepdim=True) * (3 / channels)).expand(-1, channels, -1, -1).contiguous()
        how = "the sum over" if channels == 1 else f"for each of {channels} channels 3/{channels} of the mean over"
        return f"{name} adapted: {how} red, green and blue"
    return ""


def _first(name: str) -> str:
    return name.partition(".")[0]


def _grouped(names: list[str]) -> str:
    """Names for people: all of a few, else how many begin with each first name."""
    if len(names) <= 4:
        return ", ".join(names)
    return ", ".join(f"{name} ({count} tensors)" for name, count in Counter(map(_first, names)).items())


def _read(source: str, settings: Mapping[str, Any]) -> _Found:
    kind, _, name = source.partition(":")
    if kind == "torchvision" and name:
        return _of_torchvision(source, name, settings)
    if kind == "timm" and name:
        return _of_timm(source, name)
    if "://" in source:
        raise ValueError(f"model.weights={source}: nothing is downloaded from an address. Download it, give the file.")
    path = expanded(source)
    if not path.exists():
        encoder, name = published_name(settings), path.name
        known = torchvision.models.get_model_weights(encoder).__members__ if encoder in torchvision_names() else ()
        library = (
            f" For torchvision's weights of that name: --model.weights torchvision:{name}." if name in known else ""
        )
        raise FileNotFoundError(f"model.weights={source}: there is no such file or folder.{library}")
    if runs_by_itself(path := exported_file(path)):
        raise ValueError(f"model.weights={source} is a graph, which runs but cannot be trained. Give the run it is of.")
    if path.is_dir():
        return _of_ours(path)
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def _of_ours(path: Path) -> _Found:
    _, weights, settings = read_encoder(path)
    return _Found(weights, settings=settings)


def _of_torchvision(source: str, name: str, settings: Mapping[str, Any]) -> _Found:
    encoder = published_name(settings)
    if encoder not in torchvision_names():
        own = encoder_in_words(settings)
        raise ValueError(f"model.weights={source}: torchvision has no {own}, of which these would be the weights.")
    known = torchvision.models.get_model_weights(encoder)
    if name not in known.__members__:
        raise ValueError(f"model.weights={source}: for {encoder} torchvision has {', '.join(known.__members__)}.")
    entry: Any = known[name]
    content = _fetched(source, lambda: entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    presets = entry.transforms()
    return _Found(content, settings={"mean": getattr(presets, "mean", None), "std": getattr(presets, "std", None)})


def _of_timm(source: str, name: str) -> _Found:
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(f"model.weights={source} needs timm: pip install 'simclr[timm]'.") from error
    if not timm.is_model(name):
        raise ValueError(f"model.weights={source}: timm has no model {name}. timm.list_pretrained() lists its weights.")
    with torch.random.fork_rng(devices=[]):  # it initialises what it then overwrites
        model: Any = _fetched(source, lambda: timm.create_model(name, pretrained=True))
    about = model.pretrained_cfg
    return _Found(model.state_dict(), settings={"mean": about.get("mean"), "std": about.get("std")})


def _fetched(source: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:  # of the network, of the file that came, of the library's own
        raise ValueError(
            f"model.weights={source} could not be fetched: {first_line_of(error)}. Without a network, bring the file "
            "here and give its path."
        ) from error


def _of_safetensors(path: Path) -> _Found:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            ours = SETTINGS in (file.metadata() or {}) or (path.parent / CARD).is_file()
            content = {} if ours else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: it is damaged, or no safetensors file ({error}).") from error
    return _of_ours(path) if ours else _Found(content)


def _of_torch(path: Path) -> _Found:
    try:
        content = load(path)
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        known = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(
            f"{path} cannot be read as weights: it is damaged{known}, no file of torch's, or holds more than weights. "
            "Where it is sound, save the weights alone in its own program: torch.save(model.state_dict(), FILE)."
        ) from error
    if isinstance(content, Mapping):
        hparams = content.get("hyper_parameters")
        if isinstance(hparams, Mapping) and {"encoder", "image_size", "mean", "std"} <= hparams.keys():
            return _of_ours(path)
        if (found := _state_dict_in(content)) is not None:
            inside, weights = found
            return _Found(weights, f"its {inside}" if inside else "")
    holds = f"it holds {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else "it is no mapping"
    raise ValueError(f"{path} has no weights in it that could be found: {holds or 'it is empty'}.")


def _state_dict_in(content: Mapping[str, Any], inside: str = "") -> tuple[str, Mapping[str, Any]] | None:
    """Where in a file's content the weights stand, and they."""
    for name in _NESTS:
        nested = content.get(name)
        if isinstance(nested, Mapping) and (found := _state_dict_in(nested, f"{inside}.{name}".lstrip("."))):
            return found
    return (inside, content) if any(isinstance(value, Tensor) for value in content.values()) else None


def _refuse_unfit(
    source: str,
    weights: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    found: _Found,
    prefix: str | None,
) -> None:
    """Raise a ValueError for weights that are not an encoder's, with the setting that would help if one does."""
    strange = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    problems = [f"{name} is no tensor" for name in strange]
    problems += [problem for problem in mismatches(tensors, dict(expected)) if problem.split()[0] not in strange]
    both = [(name, tensors[name], value) for name, value in expected.items() if name in tensors]
    problems += [
        f"{name} is {str(value.dtype).removeprefix('torch.')} where {str(own.dtype).removeprefix('torch.')} is needed"
        for name, value, own in both
        if value.is_floating_point() != own.is_floating_point() or value.is_complex()
    ]
    problems += [
        f"{name} is not finite" for name, value, _ in both if value.is_floating_point() and not value.isfinite().all()
    ]
    if not problems:
        return
    for advice in (_prefixes(found, expected, prefix), _network(found, settings), _stem(tensors, expected, settings)):
        if advice:
            raise ValueError(f"model.weights={source} does not fit encoder {settings['encoder']}: {advice}")
    raise ValueError(f"model.weights={source} does not fit encoder {settings['encoder']}: {some(problems)}.")


def _prefixes(found: _Found, expected: Mapping[str, Tensor], given: str | None) -> str | None:
    """The prefixes with which all names would be there."""
    needed = [name for name in expected if not name.endswith(_COUNTER)]
    names = {str(name) for name in found.content}
    possible = [name.removesuffix(needed[0]) for name in names if name.endswith(f".{needed[0]}")]
    fitting = sorted(prefix for prefix in possible if all(f"{prefix}{name}" in names for name in needed))
    if not fitting or given in fitting:
        return None
    begin = f"its names begin with {' or '.join(fitting)}"
    return f"{begin} Give {' or '.join(f'--model.weights_prefix {prefix}' for prefix in fitting)}"


def _network(found: _Found, settings: Mapping[str, Any]) -> str | None:
    """The settings of a network that a run or an export has otherwise."""
    if "encoder" not in found.settings:
        return None
    theirs, ours = {**_UNSAID, **found.settings}, {**_UNSAID, **settings}
    ours["stem"] = choose_stem(ours["encoder"], ours.get("stem", "auto"), ours.get("image_size"))
    both = [name for name in _OF_A_NETWORK if name in theirs and name in ours]
    differ = {name: theirs[name] for name in both if theirs[name] != ours[name]}
    if not differ:
        return None
    is_of = ", ".join(f"{name}={value} and not {ours[name]}" for name, value in differ.items())
    flags = (f"--model.{name} {'null' if value is None else value}" for name, value in differ.items())
    return f"it is of {is_of}. Give {' '.join(flags)}"


def _stem(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str | None:
    """The stem whose first convolution has the kernel of the weights."""
    name = "conv1.weight"
    if settings["encoder"] not in RESNETS or name not in tensors or name not in expected or tensors[name].ndim != 4:
        return None
    theirs, ours = tensors[name].shape[-1], expected[name].shape[-1]
    stem = {7: "imagenet", 3: "small"}.get(theirs)
    if theirs == ours or stem is None:
        return None
    return f"its {name} is {theirs} x {theirs} where this stem has {ours} x {ours}. Give --model.stem {stem}"
