"""Labelled images to evaluate on, by one word: a folder, a table of paths and labels, or a set of torchvision.

photos                    class folders, or a folder with train/ and test/ (or val/) of class folders
labels.csv                rows of path,label, and a column split where it has both parts
torchvision:Flowers102    a labelled set that torchvision reads, below `root`
"""

import csv
import difflib
import inspect
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from simclr.checks import listed
from simclr.data.decode import pixels_of, to_square
from simclr.data.module import FOLDERS, ImageData, images_of_run
from simclr.data.sources import Folder, ImageSet, MemoryImages, PackedPaths, fingerprint_of
from simclr.paths import expanded, stored
from simclr.seeding import epoch_order

LIBRARY = "torchvision:"
METRICS = ("top1", "mean_per_class")
_TESTS = ("test", "val", "valid", "validation")  # names of the folder beside train
_TRAINS, _TESTED = ("train", "training", "trainval"), (*_TESTS, "testing")  # words of the column split
_DRAW = 20200213  # seed of a split that a paper draws, which no run's seed may change
_MOST_NAMED = 3


@dataclass(frozen=True)
class NamedSet:
    """How a set of torchvision is evaluated on.

    Attributes:
        train, test: options of its class for each part that is joined; no test part where it has none of its own.
        metric: of the papers (Kornblith et al. 2019, table 1; Chen et al. 2020, appendix B.8).
        per_class: where a paper draws its training images, so many of each class; the others are the test.
    """

    train: tuple[Mapping[str, Any], ...] = ({},)
    test: tuple[Mapping[str, Any], ...] = ()
    metric: str = "top1"
    per_class: int | None = None


def _splits(train: str, test: str, metric: str = "top1", **more: Any) -> NamedSet:
    """Of the option `split`; several training parts are joined by +."""
    return NamedSet(
        tuple({"split": part, **more} for part in train.split("+")), ({"split": test, **more},), metric=metric
    )


_BY_TRAIN = NamedSet(({"train": True},), ({"train": False},))
SETS = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS"), _BY_TRAIN),
    "EMNIST": NamedSet(({"split": "balanced", "train": True},), ({"split": "balanced", "train": False},)),
    **dict.fromkeys(("SVHN", "STL10", "Food101", "StanfordCars", "GTSRB", "PCAM"), _splits("train", "test")),
    "RenderedSST2": _splits("train", "test"),
    "DTD": _splits("train+val", "test"),
    "Country211": _splits("train+valid", "test"),
    "Flowers102": _splits("train+val", "test", "mean_per_class"),
    "OxfordIIITPet": _splits("trainval", "test", "mean_per_class"),
    "FGVCAircraft": _splits("trainval", "test", "mean_per_class"),
    "Caltech101": NamedSet(metric="mean_per_class", per_class=30),
    **dict.fromkeys(("Imagenette", "CLEVRClassification"), _splits("train", "val")),
    **dict.fromkeys(("Caltech256", "SUN397", "EuroSAT", "SEMEION"), NamedSet()),
}


class LabelledData(ImageData):
    """Labelled images of a table or of a set of torchvision, as `ImageData` gives them to an evaluation.

    Args:
        dataset: a CSV file of path,label (paths from its folder or from the root; a column split of train and test is
            understood), or `torchvision:NAME`.
        test: another table, of the test images.
        root: where torchvision's sets are kept.
        **settings: of `ImageData`. Only with `download` a set is fetched.
    """

    def __init__(self, dataset: str, test: str | None = None, root: str | None = None, **settings: Any):
        named = dataset.startswith(LIBRARY)
        if not named:
            dataset = stored(dataset)
        test, root = (value and stored(value) for value in (test, root))
        super().__init__(source="folder", **settings)
        self.hparams.update(dataset=dataset, test=test, root=root)
        for name in ("source", "train_dir", "test_dir", "data_dir"):
            self.hparams[name] = None
        self.source = "torchvision" if named else "table"  # type: ignore[assignment]
        self.dataset, self.tested, self.root = dataset, test, root
        self.in_pretraining = False
        self._rows: dict[str, LabelTable] = {}

    @property
    def metric(self) -> str:
        """By which papers compare on these images."""
        return SETS[self._name].metric if self.source == "torchvision" else "top1"

    @property
    def _name(self) -> str:
        return self.dataset.removeprefix(LIBRARY)

    def _where(self) -> str:
        return self.dataset

    def _find_source(self) -> tuple[list[str], int | None]:
        found = self._setting_problems()
        try:
            if self.source == "torchvision":
                self._check_name()
                return found, 2  # how many there are is in its files
            tables = [self._table(path) for path in (self.dataset, self.tested) if path]
            if len(tables) == 2 and (shared := set(tables[0].paths) & set(tables[1].paths)):
                found.append(f"{tables[1].name} and {tables[0].name} share {len(shared)} images: {_some(shared)}.")
            return found, len(tables[0].parts()[0].paths)
        except (ValueError, OSError) as error:
            return [*found, str(error)], None

    def refuse_unlabelled(self, *each: str) -> None:
        """Nothing: every row has a label."""

    # A table

    def _table(self, path: str) -> "LabelTable":
        if path not in self._rows:
            self._rows[path] = read_table(path)
        return self._rows[path]

    def _read_named(self) -> tuple[ImageSet, ImageSet | None, ImageSet | None]:
        if self.source == "torchvision":
            train, test = self._read_set()
            return train, test, None
        table = self._table(self.dataset)
        parts = table.parts()
        if self.tested:
            parts = table, self._table(self.tested)
        names = parts[0].names
        if parts[1] and (unseen := set(parts[1].names) - set(names)):
            raise ValueError(
                f"{parts[1].name} has classes of which {parts[0].name} has no image: {listed(sorted(unseen))}."
            )
        train = self._of_table(parts[0], names)
        return train, self._of_table(parts[1], names) if parts[1] else None, None

    def _of_table(self, table: "LabelTable", names: list[str]) -> ImageSet:
        number = {name: i for i, name in enumerate(names)}
        labels = torch.tensor([number[label] for label in table.labels])
        mark = fingerprint_of(table.paths)
        return self._files(Folder(table.name, PackedPaths(table.paths), names, labels, mark, Counter()), names, labels)

    # A set of torchvision

    def _check_name(self) -> None:
        if self._name not in SETS:
            near = difflib.get_close_matches(self._name.lower(), [name.lower() for name in SETS], n=1)
            meant = [f" Did you mean {LIBRARY}{name}?" for name in SETS if name.lower() in near]
            raise ValueError(f"{self.dataset} is none of the sets that are known: {', '.join(SETS)}.{''.join(meant)}")
        if self.root is None:
            raise ValueError(f"{self.dataset} needs --root, the folder where torchvision's sets are kept.")
        if not self.hparams.download and not Path(self.root).is_dir():
            raise ValueError(f"root={self.root} does not exist. Nothing is fetched without --data.download true.")

    def _read_set(self) -> tuple[ImageSet, ImageSet | None]:
        known = SETS[self._name]
        train, test = self._joined(known.train, "train"), self._joined(known.test, "test") if known.test else None
        if known.per_class is None:
            return train, test
        labels = train.labels
        assert labels is not None  # every image has one
        order = epoch_order(_DRAW, 0, len(labels))
        drawn = torch.cat([order[labels[order] == c][: known.per_class] for c in labels.unique()]).sort().values
        others = torch.ones(len(labels), dtype=torch.bool)
        others[drawn] = False
        return self._chosen(train, drawn, "train"), self._chosen(train, others.nonzero().flatten(), "test")

    def _chosen(self, images: ImageSet, index: Tensor, split: str) -> ImageSet:
        labels = images.labels
        assert labels is not None  # every image has one
        return MemoryImages(f"{self.dataset} ({split})", images.images(index), labels[index], images.classes)

    def _joined(self, parts: Sequence[Mapping[str, Any]], split: str) -> ImageSet:
        kind = getattr(torchvision.datasets, self._name)
        taken = inspect.signature(kind).parameters
        options: dict[str, Any] = {}
        if "download" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            options["download"] = bool(self.hparams.download)  # some would fetch by default
        files = "loader" in taken
        if files:
            options["loader"] = str  # paths, so that files are read as everywhere
        try:
            sets = [kind(self.root, **part, **options) for part in parts]
        except (RuntimeError, OSError, ValueError, ModuleNotFoundError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            how = "" if self.hparams.download else " Nothing is fetched without --data.download true."
            raise ValueError(f"{self.dataset} in {self.root}: {reason}.{how}") from error
        items = [pair for part in sets for pair in _pairs(part, lambda image: image)] if files else []
        classes = list(map(str, getattr(sets[0], "classes", None) or getattr(sets[0], "categories", None) or ()))
        name = f"{self.dataset} ({split})"
        if files:
            paths, numbers = [path for path, _ in items], torch.tensor([label for _, label in items])
            names = classes or [str(i) for i in range(int(numbers.max()) + 1)]
            folder = Folder(name, PackedPaths(paths), names, numbers, fingerprint_of(paths), Counter())
            return self._files(folder, names, numbers)
        size, needed = sum(map(len, sets)), 3 * self.load_size**2 / 1e9
        if size * needed > self.memory_limit_gb:
            raise ValueError(
                f"{name} has {size:,} images, which take {size * needed:.1f} GB at {self.load_size} px and are held in "
                f"memory: more than data.memory_limit_gb={self.memory_limit_gb:g}. Raise it, or take a smaller "
                "--data.load_size."
            )
        squares = [pair for part in sets for pair in _pairs(part, self._square)]
        numbers = torch.tensor([label for _, label in squares])
        names = classes or [str(i) for i in range(int(numbers.max()) + 1)]
        return MemoryImages(name, torch.stack([pixels for pixels, _ in squares]), numbers, names)

    def _square(self, picture: Any) -> Tensor:
        return to_square(pixels_of(picture, self.rules), self.load_size)


def _pairs(images: Any, of_image: Any) -> list[tuple[Any, int]]:
    return [(of_image(image), int(label)) for image, label in (images[i] for i in range(len(images)))]


@dataclass(frozen=True)
class LabelTable:
    """Rows of path and label.

    Attributes:
        name: of the file, for messages.
        paths: from the root.
        labels: as they stand there.
        splits: train or test for each row; empty where the table does not say.
    """

    name: str
    paths: list[str]
    labels: list[str]
    splits: list[str]

    @property
    def names(self) -> list[str]:
        """The classes: numbers in their order, words in the alphabet's."""
        found = set(self.labels)
        return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)

    def parts(self) -> "tuple[LabelTable, LabelTable | None]":
        """Its training and test rows; all rows and None where it does not tell them apart."""
        if "test" not in self.splits:
            return self, None
        rows = list(zip(self.paths, self.labels, self.splits, strict=True))
        train, test = (
            LabelTable(
                f"{self.name} ({part})", [p for p, _, s in rows if s == part], [n for _, n, s in rows if s == part], []
            )
            for part in ("train", "test")
        )
        if not train.paths:
            raise ValueError(f"{self.name} has no row whose split is train.")
        return train, test


def read_table(path: str | os.PathLike) -> LabelTable:
    """A CSV file of path,label and perhaps split, with a header or without; the first columns where there is none.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming the rows that do not serve.
    """
    file = expanded(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file: a table of path,label is needed, or a folder.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text, newline="")), 1) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table of path,label: {error}.") from error
    if not rows:
        raise ValueError(f"{path} holds no rows: needed path,label.")
    head = [cell.strip().lower() for cell in rows[0][1]]
    has_head = {"path", "label"} <= set(head)
    if not has_head and len(head) not in (2, 3):
        raise ValueError(f"{path} has {len(head)} columns and no header with path and label. Needed: path,label.")
    columns = head if has_head else ["path", "label", "split"][: len(head)]
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    wrong, seen = list[str](), dict[str, str]()
    for number, row in rows[1:] if has_head else rows:
        cells = dict(zip(columns, (cell.strip() for cell in row), strict=False))
        given, label, split = (cells.get(name, "") for name in ("path", "label", "split"))
        place = stored(file.parent / given)
        part = "train" if split.lower() in ("", *_TRAINS) else "test" if split.lower() in _TESTED else ""
        problem = (
            f"has {len(row)} cells, not {len(columns)}"
            if len(row) != len(columns)
            else "has no path"
            if not given
            else f"has no label for {given}"
            if not label
            else f"has split {split}, which is neither train nor test"
            if not part
            else f"names {given}, which is not there"
            if not os.path.isfile(place)
            else f"names {given} again"
            if place in seen
            else ""
        )
        if problem:
            wrong.append(f"row {number} {problem}")
        seen[place] = label
        for values, value in zip(found, (place, label, part), strict=True):
            values.append(value)
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED:,} more" if len(wrong) > _MOST_NAMED else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:_MOST_NAMED])}{more}.")
    if not found[0]:
        raise ValueError(f"{path} holds a header and no rows.")
    return LabelTable(str(path), found[0], found[1], found[2] if "split" in columns else [])


def labelled_data(
    dataset: str | os.PathLike,
    test: str | os.PathLike | None = None,
    root: str | os.PathLike | None = None,
    **settings: Any,
) -> ImageData:
    """The images meant by a word.

    Args:
        dataset: a folder, a table or `torchvision:NAME`; see above.
        test: a folder or table of the test images, if they are apart.
        root: where torchvision's sets are kept.
        **settings: of `ImageData`.
    Raises:
        ValueError: for a word that is none of these, or options that do not go with it.
    """
    word, apart = os.fspath(dataset), None if test is None else os.fspath(test)
    if word.startswith(LIBRARY):
        if apart is not None:
            raise ValueError(f"{word} has test images of its own: leave {apart} out.")
        return LabelledData(word, None, None if root is None else os.fspath(root), **settings)
    if expanded(word).is_dir():
        if apart is not None and not expanded(apart).is_dir():
            raise ValueError(f"{word} is a folder, and so must be its test images: {apart} is none.")
        train, own = _parts_of(word)
        data = ImageData(source="folder", train_dir=train, test_dir=apart or own, **settings)
        data.in_pretraining = False
        return data
    if not expanded(word).exists() and word in SETS:
        raise ValueError(f"{word} is a set of torchvision. Use {LIBRARY}{word}.")
    if not expanded(word).exists():
        raise ValueError(f"{word} is neither a folder, nor a table of path,label, nor {LIBRARY}NAME.")
    return LabelledData(word, apart, None, **settings)


def _parts_of(folder: str) -> tuple[str, str | None]:
    """A folder's training and test folder: train/ and test/ or val/ in it, or itself and none."""
    top = expanded(folder)
    names = {entry.name.lower(): entry.name for entry in top.iterdir() if entry.is_dir()}
    other = next((names[name] for name in _TESTS if name in names), None)
    if "train" not in names or not set(names) <= {"train", *_TESTS}:
        return folder, None
    return str(Path(folder) / names["train"]), None if other is None else str(Path(folder) / other)


def images_of_record(settings: Mapping[str, Any], **changed: Any) -> ImageData:
    """The images of an evaluation, by the settings that its record holds.

    Args:
        settings: `data.settings` of the record.
        changed: settings to take in place of those.
    """
    if "dataset" not in settings:
        return images_of_run(settings, **changed)
    own: dict[str, Any] = {name: settings.get(name) for name in ("dataset", "test", "root")}
    known = {n: settings[n] for n in inspect.signature(ImageData).parameters if n in settings and n not in FOLDERS}
    known |= {"cache_dir": settings.get("cache_dir"), "batch_size": 2}
    known.pop("source", None)
    known |= {name: value for name, value in changed.items() if name not in ("train_dir", "test_dir", "data_dir")}
    own |= {ours: changed[name] for ours, name in (("dataset", "train_dir"), ("test", "test_dir"), ("root", "data_dir"))
            if changed.get(name)}  # fmt: skip
    return LabelledData(**own, **known)


def _some(paths: set[str]) -> str:
    return f"{', '.join(sorted(paths)[:_MOST_NAMED])}{' ...' if len(paths) > _MOST_NAMED else ''}"
