"""ImageData: the images of a run, as a LightningDataModule."""

import inspect
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from pytorch_lightning import LightningDataModule
from torch import Tensor

from simclr.container import cores
from simclr.data.decode import DEEPEST, RULES, ReadingRules, to_square, unreadable
from simclr.data.depth import bits_of, low_range
from simclr.data.fingerprint import compare_files, digest_files, digest_pixels, fingerprint_files
from simclr.data.held_out import held_out_count, held_out_numbers
from simclr.data.loader import EvalLoader, GlobalBatchSampler, TrainLoader, uneven_batch
from simclr.data.shapes import CLASSES, draw_shapes
from simclr.data.sources import (
    MOST_SKIPPED,
    FileImages,
    Folder,
    ImageSet,
    MemoryImages,
    list_folder,
    match_classes,
    may_be_skipped,
    names_in,
    places_of,
    refuse_shared,
)
from simclr.data.splits import stratified_split
from simclr.paths import shown, stored
from simclr.seeding import check_seed, epoch_order

Source = Literal["auto", "shapes", "folder", "cifar10", "cifar100", "stl10", "imagenet"]

SKIPPED = "skipped_images.txt"  # in the folder of a run
LEFT_OUT = "left_out_images.txt"
FOLDERS = ("train_dir", "test_dir", "data_dir", "cache_dir", "leave_out")  # settings that name a place
_Sets = tuple[ImageSet, ImageSet | None, ImageSet | None]  # for training, for testing; with labels, if not the first
_SUBSETS, _HOLDOUT = 20200619, 20201022  # seeds of choices that no run's seed may change: evaluation compares runs
_STEPS_OF_AN_EPOCH = 30  # at least, by the default batch
_MOST_CHANNELS = 1024  # more than instruments have; memory sets a limit of its own
_MOST_WORKERS = 1024  # more than any machine has cores; each is a process
# The sets torchvision reads: the folder it keeps below data_dir, the images' side, how many are for training.
_NAMED = {
    "cifar10": ("cifar-10-batches-py", 32, 50_000),
    "cifar100": ("cifar-100-python", 32, 50_000),
    "stl10": ("stl10_binary", 96, 100_000),
}


def default_load_size(image_size: int, source: str = "folder") -> int:
    """The side in pixels at which images are held where no `load_size` is given; see `ImageData`.

    Above 64 px it leaves a border to spare: of it, evaluation sees the central image_size, 87.5 % of a side
    (google-research/simclr, data_util.CROP_PROPORTION).
    """
    side = image_size if image_size <= 64 else round(image_size * 8 / 7)
    return min(side, _NAMED[source][1]) if source in _NAMED else side


def folders_shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `ImageData` that a checkpoint holds, with the folders as one would name them from here."""
    return {name: shown(value) if name in FOLDERS and value else value for name, value in settings.items()}


class ImageData(LightningDataModule):
    """The images of a run: a folder, a named set, or the built-in shapes.

    After `setup`, `train` and `test` are image sets (`len`, `.images(index)`, `.labels`, `.classes`, `.name`); `test`
    is None if there is none; `labelled_train` is `train` except for STL-10, which pretrains on its unlabeled images.
    `given` holds the folders as they were named, for messages.

    Args:
        source: where the images are from. "auto": a folder if `train_dir` is given, else the built-in shapes.
        train_dir: a folder of images, nested or flat. If all of them lie in two or more first-level folders, these are
            the classes, for evaluation only.
        test_dir: a folder of test images, with the same class folders or some of them.
        data_dir: where the named sets are kept.
        batch_size: the global batch: images per step over all devices. If not given: by the number of training images,
            see `default_batch_size`.
        image_size: the side of a view in pixels.
        load_size: the side in pixels at which images are held, ready to be cropped. If not given: `image_size` up to
            64, 8/7 of it above (256 for 224), and never more than a named set has. Other images have their central
            square resized to it.
        workers: processes that decode files which memory cannot hold, and threads that fill the memory. If not given:
            the available cores, shared by the processes here, up to 16.
        memory_limit_gb: images that take no more (in 1e9 bytes, per process) are decoded once and held in memory, on
            the GPU if there is one with room.
        cache_dir: a folder that keeps the decoded images of image folders from run to run, N * channels * load_size^2
            bytes each, twice that in 16 bits. They are decoded once and then mapped from its files, whatever
            `memory_limit_gb`; all processes of a machine share the memory. Changed images are decoded again. Files in
            it may be deleted between runs.
        download: fetch a named set that is not in `data_dir`.
        seed: the seed of the order in which images are visited.
        shapes_train: how many of the built-in images to draw for training.
        shapes_test: how many to draw for testing.
        holdout: the fraction of each class's images that serves as test where there is no labelled test set; one image
            of each class at least is kept for training.
        held_out: how many images of the training folder are never trained on, so that figures without labels can be
            measured on them: a number, a fraction below 1, or 0 for none. If not given: 2 000 or 2 %, whichever is
            fewer; none where there are test images, or fewer than 1 000 images. Which they are depends on their names
            alone, and each class gives its share. Evaluation takes the whole folder, as if nothing were held out.
        on_error: what becomes of a file of an image folder that cannot be read. raise: an error that names it. skip:
            every file is decoded once before the run, and those that cannot be read are left out, up to 1 % of them or
            ten; `skipped` names them. A file that can no longer be read later in the run, or is another, ends it with
            either, because the order of the images would change; the error says how to go on. What is held in memory
            or in a cache stays as it was read.
        leave_out: a file that names images, one a line, by their paths below `train_dir` or from the root, as
            `simclr check-data --bad` and `--copies` write it: the run is that of the folder without them.
        read_timeout_s: seconds that reading one image file may take, here, in a thread or in a worker process, before
            it is an error that names it; without limit if 0 or not given.
        max_pixels: a file with more pixels than this is refused before it is decoded; without limit if not given.
        sixteen_bit_max: which value of 16-bit images is white: value v is read as v * 256 / (sixteen_bit_max + 1) of
            255, or where 16 bits are held as v / sixteen_bit_max. 12-bit data needs 4095 to be seen.
        channels: of the images: 3, RGB, which every picture is brought to; 1, gray; or so many as the bands of a TIFF,
            or its pages. Other than 3 need a folder, whose files must have so many (docs/channels.md).
        bits: that a sample is held in, 8 or 16. If not given: 8 for RGB; else 16 where one of the folder's images has
            more than 8, as far as the headers of 64 of them tell.
        allow_changed_images: continue a run although files of its image folder were added, removed or changed since:
            its order is that of the new set from then on.
    """

    def __init__(
        self,
        source: Source = "auto",
        train_dir: str | None = None,
        test_dir: str | None = None,
        data_dir: str | None = None,
        batch_size: int | None = None,
        image_size: int = 32,
        load_size: int | None = None,
        workers: int | None = None,
        memory_limit_gb: float = 4.0,
        cache_dir: str | None = None,
        download: bool = False,
        seed: int = 0,
        shapes_train: int = 8192,
        shapes_test: int = 2048,
        holdout: float = 0.2,
        held_out: int | float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        leave_out: str | None = None,
        read_timeout_s: float | None = 300.0,
        max_pixels: int | None = RULES.max_pixels,
        sixteen_bit_max: int = DEEPEST,
        channels: int = 3,
        bits: Literal[8, 16] | None = None,
        allow_changed_images: bool = False,
    ):
        super().__init__()
        folders = (train_dir, test_dir, data_dir, cache_dir, leave_out)
        self.given = dict(zip(FOLDERS, (path and os.fspath(path) for path in folders), strict=True))
        # A checkpoint keeps them, as text: weights_only loading refuses one that holds a Path. From the root: it is
        # read from other folders too.
        train_dir, test_dir, data_dir, cache_dir, leave_out = (path and stored(path) for path in folders)
        self.save_hyperparameters(logger=False)  # a checkpoint tells what the encoder was trained on
        self.source = source if source != "auto" else ("folder" if train_dir else "shapes")
        self.train_dir, self.test_dir, self.data_dir, self.download = train_dir, test_dir, data_dir, download
        self.batch_size, self.image_size, self.seed, self.holdout = batch_size, image_size, seed, holdout
        self.load_size = load_size if load_size is not None else default_load_size(image_size, self.source)
        self.workers = workers
        self.memory_limit_gb, self.cache_dir = memory_limit_gb, cache_dir
        self.shapes_train, self.shapes_test = shapes_train, shapes_test
        self.held_out, self._held_out_given = held_out, held_out is not None
        self._held_out_numbers: Tensor | None = None
        self.train: ImageSet | None = None
        self.test: ImageSet | None = None
        self.labelled_train: ImageSet | None = None
        self.on_error, self.allow_changed_images = on_error, allow_changed_images
        self.skipped: list[str] = []  # a line for each file that was left out
        self.leave_out, self.read_timeout_s = leave_out, read_timeout_s
        self.max_pixels, self.sixteen_bit_max, self.channels = max_pixels, sixteen_bit_max, channels
        self.bits: int | None = 8 if bits is None and channels == 3 else bits
        self._bits_given = bits is not None
        self._named: dict[str, dict[int, str]] = {}  # by folder: what `leave_out` names there
        self._looked = False
        self._folders: dict[str, Folder] = {}
        self._with_labels = False
        self.in_pretraining = True  # whether a run was trained on these images, for notes
        self._fingerprint: dict[str, Tensor] = {}

    # Checking

    def problems(self, world_size: int = 1) -> list[str]:
        """What stands in the way of training on this many devices, one line each; empty if nothing. Reads no image."""
        found, size = self._source_problems()
        if size is not None and self.held_out and not found:
            wrong = self._held_out_problems(size)
            found, size = found + wrong, None if wrong else size - self._held_out
        if size is not None and self._with_labels and not found:
            size -= len(self.untrained_numbers) - self._held_out
        if self.batch_size is None and size is not None:
            self.choose_batch_size(size, world_size)
        if self.batch_size is None:
            return found  # how many images there are is not known: something is wrong with them
        if self.batch_size < 2:
            found.append(f"data.batch_size={self.batch_size} leaves no image to tell another from. Use 2 at least.")
        elif self.batch_size % world_size:
            found.append(uneven_batch(self.batch_size, world_size))
        if size is not None and self.batch_size > size:
            beside = f", beside {self.held_out} held out" if self.held_out else ""
            found.append(
                f"data.batch_size={self.batch_size} is more than the {size} training images in "
                f"{self._where()}{beside}. Use at most {size // world_size * world_size}."
            )
        return found

    def validate(self, world_size: int = 1) -> None:
        """Raise one ValueError with all problems, a line each, before anything is decoded or written."""
        if found := self.problems(world_size):
            raise ValueError("\n".join(found))

    def _source_problems(self) -> tuple[list[str], int | None]:
        """What `setup` would fail on, by settings and names of files only; and how many training images there are."""
        found, size = self._find_source()
        if size is not None and not found:
            self._settle_held_out(size)
            self._settle_bits()
        return found, size

    def _find_source(self) -> tuple[list[str], int | None]:
        found = self._setting_problems()
        if self.source == "shapes":
            return found, self.shapes_train
        if self.source in _NAMED:
            try:
                self._find_named()
            except ValueError as error:
                found.append(str(error))
            return found, _NAMED[self.source][2]
        listed = []
        for folder in self._folder_paths():
            try:
                listed.append(self._folder(*folder))
            except ValueError as error:
                found.append(str(error))
        if len(listed) == 2:
            try:
                refuse_shared(*listed)
                match_classes(*listed)
            except ValueError as error:
                found.append(str(error))
        if len(listed) == len(self._folder_paths()):
            found += self._unknown_names()
        return found, len(listed[0].paths) if listed and not found else None

    def _setting_problems(self) -> list[str]:
        found = []
        for name in ("image_size", "shapes_train", "shapes_test"):
            if getattr(self, name) < 1:
                found.append(f"data.{name}={getattr(self, name)} is not a positive number.")
        if self.load_size < 1 <= self.image_size:
            found.append(f"data.load_size={self.load_size} is not a positive number.")
        if self.workers is not None and self.workers < 0:
            found.append(f"data.workers={self.workers} is negative. Use 0 to decode in the training process.")
        if self.workers is not None and self.workers > _MOST_WORKERS:
            found.append(f"data.workers={self.workers} is more than {_MOST_WORKERS:,}. Leave it out for one a core.")
        if self.read_timeout_s is not None and not 0 <= self.read_timeout_s < math.inf:
            found.append(f"data.read_timeout_s={self.read_timeout_s} is no number of seconds. Use 0 for no limit.")
        if self.max_pixels is not None and self.max_pixels < 1:
            found.append(f"data.max_pixels={self.max_pixels} is not a positive number. Use null for no limit.")
        if not 1 <= self.sixteen_bit_max <= DEEPEST:
            found.append(f"data.sixteen_bit_max={self.sixteen_bit_max} is not between 1 and {DEEPEST}.")
        if not 1 <= self.channels <= _MOST_CHANNELS:
            found.append(f"data.channels={self.channels} is not between 1 and {_MOST_CHANNELS:,}.")
        elif self.channels != 3 and self.source != "folder":
            found.append(
                f"data.channels={self.channels} is for a folder of images (data.train_dir): those of "
                f"data.source={self.source} are RGB."
            )
        if self.bits not in (None, 8, 16):
            found.append(f"data.bits={self.bits} is neither 8 nor 16.")
        elif self.bits == 16 and self.source not in ("folder", "imagenet"):
            found.append(f"data.bits=16 is not used with data.source={self.source}, whose images have 8. Leave it out.")
        if self.leave_out and self.source not in ("folder", "imagenet"):
            found.append(f"data.leave_out is not used with data.source={self.source}, which has no files of yours.")
        elif self.leave_out and not Path(self.leave_out).is_file():
            found.append(f"data.leave_out={self.given['leave_out']} is not a file: it has to list images, one a line.")
        if not 0 < self.holdout < 1:
            found.append(f"data.holdout={self.holdout} is not a fraction between 0 and 1.")
        held = self.held_out or 0
        if not 0 <= held < math.inf or (held >= 1 and held != int(held)):
            found.append(f"data.held_out={held} is neither a number of images nor a fraction below 1. Use 0 for none.")
        elif held and self.source not in ("folder", "imagenet"):
            found.append(
                f"data.held_out={held} is not used with data.source={self.source}, which has test images. Leave it out."
            )
        if self.cache_dir:
            cache = Path(self.cache_dir)
            if not cache.is_dir() and (cache.exists() or not cache.parent.is_dir()):
                wrong = "is a file" if cache.exists() else f"cannot be made: {cache.parent} does not exist"
                found.append(
                    f"data.cache_dir={self.given['cache_dir']} {wrong}. Give a folder with room for the images."
                )
        try:
            check_seed(self.seed)
        except ValueError as error:
            found.append(f"data.{error}")
        if self.source == "folder" and not self.train_dir:
            found.append("data.source=folder needs data.train_dir, a folder of images.")
        if self.source == "imagenet" and not self.data_dir:
            found.append("data.source=imagenet needs data.data_dir, the folder that holds train/ and val/.")
        if self.source != "folder":
            for name in ("train_dir", "test_dir"):
                if value := self.given[name]:
                    found.append(
                        f"data.{name}={value} is not used with data.source={self.source}. "
                        f"Use data.source=folder with data.train_dir, or leave data.{name} out."
                    )
        return found

    def _settle_held_out(self, images: int) -> None:
        """Make a number of what was given or left out, once it is known how many images there are."""
        if self.held_out is None and len(self._folder_paths()) != 1:  # there are test images, or no folder
            self.held_out = 0
        self.held_out = self.hparams.held_out = held_out_count(self.held_out, images)

    def _settle_bits(self) -> None:
        """Look for 16-bit images where that was left open and 16 bits would be kept."""
        if self.bits is None:
            found = [bits_of(self._folder(*folder)) for folder in self._folder_paths()]
            self.bits = self.hparams.bits = max(found, default=8)

    @property
    def _held_out(self) -> int:
        """How many images are held out, once it is known how many there are."""
        return int(self.held_out or 0)

    def _held_out_problems(self, images: int) -> list[str]:
        """Why so many cannot be held out of these images."""
        if self.held_out == 1:
            return [f"data.held_out=1 of {images} images has none to be told from. Use 2 or more, or 0."]
        if images - self._held_out < 2:
            left = max(0, images - self._held_out)
            return [
                f"data.held_out={self.held_out} leaves {left} of the {images} images in {self._where()} to train on. "
                "Use fewer."
            ]
        return []

    def refuse_unlabelled(self, *each: str) -> None:
        """Refuse image folders without labels, by the names of their files alone.

        Args:
            each: of `train_dir` and `test_dir` those that must have labels themselves, whatever the other has, of
                which a part could serve in their place.
        Raises:
            ValueError: with what is needed.
        """
        folders = [(option, self._folder(path, option, given)) for path, option, given in self._folder_paths()]
        without = [(option, folder) for option, folder in folders if folder.labels is None]
        for option, folder in without:
            if len(without) == len(folders) or option.removeprefix("data.") in each:
                raise ValueError(_unlabelled(folder.root))

    @property
    def metric(self) -> str:
        """By which results on these images are compared: top1, or mean_per_class."""
        return "top1"

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Hold out and keep, where that was left open, what a run that is to be continued does: images, and bits.

        Args:
            settings: `Checkpoint.data`; one without the setting trained on all images.
        """
        if not self._held_out_given:
            self.held_out = self.hparams.held_out = settings.get("held_out") or 0
            self._held_out_numbers = None
        if not self._bits_given and settings.get("bits") is not None:
            self.bits = self.hparams.bits = settings["bits"]

    def _where(self) -> str:
        shown = {"folder": self.given["train_dir"], "shapes": "the built-in shapes"}
        return shown.get(self.source) or self.source

    # Training with labels

    def train_with_labels(self) -> list[str]:
        """Have the images that evaluation takes as test kept from training, because it looks at labels.

        They are those of `eval_loader("test")`: where no labelled test folder is given, `holdout` of each class.

        Returns:
            The names of the classes, in the order of their numbers. Reads no image.
        Raises:
            ValueError: if the training images have no labels or are of one class, or every problem of the settings.
        """
        if found := self._source_problems()[0]:
            raise ValueError("\n".join(found))
        classes = self._classes_of_training()
        if classes is None:
            why = (
                "STL-10 is pretrained on its unlabeled images"
                if self.source == "stl10"
                else "give a folder with two or more class folders, all images in them"
            )
            raise ValueError(f"{self._where()} has no labels, which supervised training needs: {why}.")
        if self.source in ("folder", "imagenet"):
            sizes = self._folder(*self._folder_paths()[0]).labels
            assert sizes is not None  # there are classes
            if len(sizes.unique()) < 2:
                raise ValueError(f"{self._where()} has images of one class: supervised training needs two or more.")
        self._with_labels = True
        return classes

    def _classes_of_training(self) -> list[str] | None:
        if self.source == "shapes":
            return list(CLASSES)
        if self.source in _NAMED:
            return None if self.source == "stl10" else self._names_of_named()
        return self._folder(*self._folder_paths()[0]).classes

    def _names_of_named(self) -> list[str]:
        self.setup()  # the names are in its files
        assert self.train is not None
        return list(self.train.classes or ())

    @property
    def learns_from_labels(self) -> bool:
        """Whether a training with labels has asked for these images."""
        return self._with_labels

    @property
    def kept_as_test(self) -> int:
        """How many images of the training folder a training with labels leaves out, because evaluation tests on them.

        Those held out anyway (`held_out`) count too.
        """
        return len(self._kept_as_test())

    def _kept_as_test(self) -> Tensor:
        """Their numbers, ascending."""
        none = torch.empty(0, dtype=torch.int64)
        paths = self._folder_paths()
        if not self._with_labels or not paths or self.source in ("shapes", *_NAMED):
            return none
        train, *test = (self._folder(*folder) for folder in paths)
        if train.labels is None or any(folder.labels is not None for folder in test):
            return none
        return stratified_split(train.labels, self.holdout, seed=_HOLDOUT)[1].sort().values

    @property
    def untrained_numbers(self) -> Tensor:
        """The numbers in `train` of all images that are not trained on, ascending: held out, or kept as test."""
        kept = self._kept_as_test()
        return torch.cat((self.held_out_numbers, kept)).unique() if len(kept) else self.held_out_numbers

    # Reading

    def setup(self, stage: str | None = None) -> None:
        """Find the images and, where memory allows, decode them. Does nothing the second time.

        Raises:
            ValueError: with every problem of the settings, or naming the files that cannot be read.
        """
        if self.train is not None:
            return
        # Whether the batch fits is asked where batches are made: evaluation reads images too, and trains on none.
        if found := self._source_problems()[0]:
            raise ValueError("\n".join(found))
        read = {"shapes": self._read_shapes, "folder": self._read_folders, "imagenet": self._read_folders}
        train, self.test, labelled = read.get(self.source, self._read_named)()
        self.labelled_train = labelled or train
        self.train = train
        if self.batch_size is None:
            self.choose_batch_size(self.training_images, self.trainer.world_size if self.trainer is not None else 1)

    def choose_batch_size(self, images: int, world_size: int = 1) -> None:
        """Take the default batch of so many training images, if none was given."""
        self.batch_size = self.hparams.batch_size = default_batch_size(images, world_size)

    def _read_shapes(self) -> _Sets:
        train, test = (
            MemoryImages(f"shapes ({name})", *draw_shapes(count, self.load_size, part), CLASSES)
            for part, (name, count) in enumerate((("train", self.shapes_train), ("test", self.shapes_test)))
        )
        return train, test, None

    def _folder_paths(self) -> list[tuple[str, str, str]]:
        """The training folder and, if there is one, the test folder, each with the setting that named it and how."""
        if self.source == "imagenet":  # as its archives unpack: data_dir/train/WNID/*.JPEG and data_dir/val/WNID/*.JPEG
            if not self.data_dir:
                return []
            top, given = self.data_dir, self.given["data_dir"]
            return [(os.path.join(top, part), "data.data_dir", f"{given}/{part}") for part in ("train", "val")]
        named = ((self.train_dir, "train_dir"), (self.test_dir, "test_dir"))
        return [(path, f"data.{name}", self.given[name] or path) for path, name in named if path]

    def _folder(self, path: str, option: str, given: str) -> Folder:
        if path not in self._folders:
            folder = list_folder(path, option, given)
            if self.leave_out and Path(self.leave_out).is_file():
                first = not self._named  # the training images, which names alone are of
                known = {name for names in self._named.values() for name in names.values()}
                names = [name for name in names_in(self.leave_out) if name not in known]
                self._named[path] = places_of(names, folder, path if first else None)
                folder = folder.without(self._named[path])
                if not len(folder.paths):
                    raise ValueError(f"data.leave_out={self.given['leave_out']} names all images of {given}.")
            self._folders[path] = folder
        return self._folders[path]

    def _unknown_names(self) -> list[str]:
        """What `leave_out` names and no folder has, in a line."""
        if not self.leave_out or not Path(self.leave_out).is_file():
            return []
        known = {name for names in self._named.values() for name in names.values()}
        lacking = [name for name in dict.fromkeys(names_in(self.leave_out)) if name not in known]
        if not lacking:
            return []
        many = "1 file that is" if len(lacking) == 1 else f"{len(lacking):,} files that are"
        more = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
        return [
            f"data.leave_out={self.given['leave_out']} names {many} not among the images of {self._where()}: "
            f"{', '.join(lacking[:3])}{more}. Name them by their paths below that folder, or from the root."
        ]

    @property
    def left_out_names(self) -> list[str]:
        """The images that `leave_out` has taken out of the folders, as it names them."""
        return [name for names in self._named.values() for name in names.values()]

    @property
    def rules(self) -> ReadingRules:
        """How image files are read, by these settings."""
        timeout_s = self.read_timeout_s or None
        return ReadingRules(self.max_pixels, self.sixteen_bit_max, timeout_s, self.channels, self.bits or 8)

    def _read_folders(self) -> _Sets:
        self._look_at_all()
        train, *tests = (self._folder(*folder) for folder in self._folder_paths())
        test: ImageSet | None = None
        for folder in tests:
            classes = train.classes if train.classes and folder.classes else folder.classes
            test = self._files(folder, classes, match_classes(train, folder))
        return self._files(train, train.classes, train.labels), test, None

    def _look_at_all(self) -> None:
        """Leave out what cannot be read, once, if that is asked for."""
        if self.on_error == "skip" and not self._looked:
            for folder in self._folder_paths():
                self._skip_unreadable(*folder)
            self._looked = True

    def _skip_unreadable(self, path: str, option: str, given: str) -> None:
        """Go on as if the files that cannot be read were not in a folder."""
        folder = self._folder(path, option, given)
        bad, size = unreadable(folder.paths, self.load_size, max(1, self._processes()), self.rules), len(folder.paths)
        if not may_be_skipped(len(bad), size):
            first = "; ".join(list(bad.values())[:3])
            raise ValueError(
                f"{option}={given}: {len(bad):,} of {size:,} images cannot be read, more than the 1 % or "
                f"{MOST_SKIPPED} that data.on_error=skip leaves out: {first} ..."
            )
        self.skipped += bad.values()
        self._folders[path] = folder.without(bad)

    def _files(self, folder: Folder, classes: list[str] | None, labels: Tensor | None) -> ImageSet:
        files = FileImages(folder.root, folder.paths, self.load_size, labels, classes, folder.fingerprint, self.rules)
        if self.cache_dir:
            # One process builds for all of this machine, so it may use what the others will.
            return files.cached(self.cache_dir, max(1, self.workers if self.workers is not None else min(16, cores())))
        return files.in_memory(max(1, self._processes())) if files.nbytes <= self.memory_limit_gb * 1e9 else files

    def _find_named(self) -> Path:
        if not self.data_dir:
            raise ValueError(f"data.source={self.source} needs data.data_dir, the folder where it is kept.")
        top = Path(self.data_dir)
        if not self.download and not (top / _NAMED[self.source][0]).is_dir():
            raise ValueError(
                f"data.source={self.source} looked for {self.given['data_dir']}/{_NAMED[self.source][0]}, which does "
                f"not exist. Set data.data_dir to the folder that holds it, or data.download=true to fetch it, "
                f"or use data.train_dir with any folder of images."
            )
        return top

    def _read_named(self) -> _Sets:
        top, sets = self._find_named(), torchvision.datasets
        try:
            if self.source == "stl10":
                parts = {
                    split: sets.STL10(top, split, download=self.download) for split in ("unlabeled", "train", "test")
                }
            else:
                reader = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[self.source]
                parts = {split: reader(top, split == "train", download=self.download) for split in ("train", "test")}
        except (RuntimeError, OSError) as error:
            raise ValueError(f"data.source={self.source} in {self.given['data_dir']}: {error}") from error
        held = {split: self._named_part(split, part) for split, part in parts.items()}
        if self.source == "stl10":
            return held["unlabeled"], held["test"], held["train"]
        return held["train"], held["test"], None

    def _named_part(self, split: str, part: torchvision.datasets.VisionDataset) -> MemoryImages:
        pixels = torch.as_tensor(part.data)
        if self.source == "stl10":
            labels = None if split == "unlabeled" else torch.as_tensor(part.labels).to(torch.int64)
        else:
            pixels, labels = pixels.permute(0, 3, 1, 2), torch.tensor(part.targets)
        if pixels.shape[-1] != self.load_size:
            pixels = torch.cat([to_square(block, self.load_size) for block in pixels.split(1024)])
        name = f"{self.source} ({split})"
        return MemoryImages(name, pixels.contiguous(), labels, None if labels is None else part.classes)

    @property
    def left_out(self) -> str:
        """The files that were passed over in the folders of images, by kind; empty if there are none."""
        found = [
            (self._folder(*folder), folder[1])
            for folder in self._folder_paths()
            if self.source in ("folder", "imagenet")
        ]
        said = [(folder.left_out_text, option.removeprefix("data.")) for folder, option in found]
        said = [(text, option) for text, option in said if text]
        return "; ".join(f"{text} in {option}" if len(found) > 1 else text for text, option in said)

    @property
    def notes(self) -> list[str]:
        """What someone who gave these folders may not expect of them, a sentence each."""
        if self.source not in ("folder", "imagenet"):
            return []
        found = [note for folder in self._folder_paths() for note in self._folder(*folder).notes]
        if self.skipped:
            many = "1 image" if len(self.skipped) == 1 else f"{len(self.skipped):,} images"
            found.append(f"left out, because unreadable: {many}, listed in {SKIPPED}; the first is {self.skipped[0]}.")
        if named := self.left_out_names:
            many = "1 image" if len(named) == 1 else f"{len(named):,} images"
            listed = f"listed in {LEFT_OUT}; the first is {named[0]}"
            found.append(f"left out, as data.leave_out={self.given['leave_out']} says: {many}, {listed}.")
        if self.sixteen_bit_max == DEEPEST:
            found += filter(None, (low_range(self._folder(*folder), self.rules) for folder in self._folder_paths()))
        return found

    # Continuing

    def fingerprint(self) -> dict[str, Tensor]:
        """What tells the training images from others, if they are in files; see `simclr.data.fingerprint`."""
        self._look_at_all()
        if not self._fingerprint and (folders := self._folder_paths()):
            self._fingerprint = fingerprint_files(folders[0][0], self._folder(*folders[0]).paths)
        return self._fingerprint

    def digest(self) -> str:
        """The training images at a glance, for comparing those of several ranks: how many, and a hash of samples."""
        self.setup()
        assert self.train is not None
        if folders := self._folder_paths():
            code = digest_files(folders[0][0], self._folder(*folders[0]).paths)
            return f"{len(self.train):,} of {folders[0][2]} (hash {code})"
        assert isinstance(self.train, MemoryImages)
        return f"{len(self.train):,} of {self.train.name} (hash {digest_pixels(self.train.pixels)})"

    def check_images(self, was: dict[str, Tensor]) -> dict[str, int] | None:
        """Compare the training images with those of a checkpoint, by `fingerprint`.

        Returns:
            None if they are the same; else what has become of them, as in `compare_files`.
        Raises:
            ValueError: if they differ, with the counts, unless `allow_changed_images`.
        """
        found = compare_files(was, self.fingerprint()) if was and self._folder_paths() else None
        if found is not None and not self.allow_changed_images:
            raise ValueError(
                f"{self._folder_paths()[0][2]} holds other images than the run began with: {found['was']} then, "
                f"{found['now']} now; {found['added']} added, {found['removed']} removed, {found['changed']} changed. "
                "Restore them, or go on with what is there: --data.allow_changed_images true."
            )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the images: the fingerprint, where `train_dataloader` has taken it."""
        held = {"held_out": torch.tensor(self.held_out)} if self._fingerprint and self.held_out else {}
        if self._fingerprint and (kept := self.kept_as_test):
            held["kept_as_test"] = torch.tensor(kept)
        return {**self._fingerprint, **held}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Refuse to train on with other images, see `check_images`, or with others held out."""
        held = int(state_dict.get("held_out", 0))
        self.adopt({"held_out": held})
        if state_dict and self.held_out != held:
            raise ValueError(f"data.held_out={self.held_out} but the checkpoint has {held}. Restore the setting.")
        kept = int(state_dict.get("kept_as_test", 0))
        if state_dict and self._with_labels and self.kept_as_test != kept:
            raise ValueError(
                f"{self.kept_as_test} images of {self._where()} are kept as test, the checkpoint kept {kept}: "
                f"data.holdout={self.holdout} and data.test_dir decide on what is trained with labels. Restore them."
            )
        self.check_images(state_dict)

    # Batches

    def _processes(self) -> int:
        """Worker processes or threads for this rank."""
        ranks_here = self.trainer.num_devices if self.trainer is not None else 1
        return self.workers if self.workers is not None else max(1, min(16, cores() // ranks_here))

    @property
    def training_images(self) -> int:
        """How many of the images in `train` are trained on."""
        assert self.train is not None, "setup comes first"
        return len(self.train) - len(self.untrained_numbers)

    @property
    def held_out_numbers(self) -> Tensor:
        """The numbers in `train` of the images that are never trained on, (`held_out`,) int64, ascending."""
        if self._held_out_numbers is None:
            self._held_out_numbers = torch.empty(0, dtype=torch.int64)
            if self.held_out:
                place = self._folder_paths()[0]
                folder = self._folder(*place)
                self._held_out_numbers = held_out_numbers(place[0], folder.paths, folder.labels, self._held_out)
        return self._held_out_numbers

    @property
    def unseen(self) -> tuple[ImageSet, Tensor] | None:
        """Two or more images that are never trained on: those held out, else the test images; None without any.

        Returns:
            An image set, and the images' numbers in it, (n,) int64.
        """
        if self.held_out:
            assert self.train is not None, "setup comes first"
            return self.train, self.held_out_numbers
        return (self.test, torch.arange(len(self.test))) if self.test is not None and len(self.test) > 1 else None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch: whole global batches."""
        return self.training_images // self._training[1]

    @property
    def _training(self) -> tuple[ImageSet, int]:
        """The images in `train` and the global batch, known once `setup` is done."""
        assert self.train is not None, "setup comes first"
        assert self.batch_size is not None
        return self.train, self.batch_size

    def train_dataloader(self) -> TrainLoader:
        """This rank's batches, (images (n, C, S, S), index (n,) int64) with n = batch_size / world size.

        Step k of epoch e trains on the global batch epoch_order(seed, e, training_images)[k * B : (k + 1) * B], counted
        without the images held out; under the Trainer's overfit_batches every epoch has the order of epoch 0, and so
        the same images.
        """
        self.setup()
        images, batch_size = self._training
        trainer = self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        same = trainer is not None and trainer.overfit_batches > 0
        sampler = GlobalBatchSampler(
            self.training_images,
            batch_size,
            self.seed,
            rank,
            world_size,
            reshuffle=not same,
            held_out=self.untrained_numbers,
        )
        if trainer is None or not trainer.training:  # a loop of the caller's own, which no run has begun
            return TrainLoader(images, sampler, self._processes())
        if trainer.is_global_zero:  # which writes the checkpoints
            self.fingerprint()
        if isinstance(images, MemoryImages):
            images.hold_pixels_on(trainer.strategy.root_device)
        # `ready` counts the batches the loop has begun; when the next one is asked for, those are the ones trained on.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return TrainLoader(images, sampler, self._processes(), lambda: progress.current.ready)

    def eval_loader(
        self, split: Literal["train", "test"], batch_size: int = 512, limit: int | None = None
    ) -> EvalLoader:
        """Labelled images for evaluation, (images (n, C, S, S), labels (n,) int64), always in the same order.

        Where there is no labelled test set, `holdout` of each class's images serve as test and the others as train, and
        `evaluation_note` says so.

        Args:
            split: which.
            batch_size: images per batch; the last may be smaller.
            limit: at most this many images, a fixed pseudo-random choice; all if None.
        Raises:
            ValueError: if there are no labels, or nothing can be held out.
        """
        self.setup()
        images, index, _ = self._evaluation()[split]
        if limit is not None and limit < len(index):
            index = index[epoch_order(_SUBSETS, 0, len(index))[:limit].sort().values]
        return EvalLoader(images, index, batch_size, self._processes())

    @property
    def evaluation_note(self) -> str | None:
        """What a reader of the result must know about its test images; None for a test set of its own."""
        self.setup()
        return self._evaluation()["test"][2]

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to evaluate on."""
        self.setup()
        try:
            self._evaluation()
        except ValueError:
            return False
        return True

    def _evaluation(self) -> dict[str, tuple[ImageSet, Tensor, str | None]]:
        assert self.labelled_train is not None  # set up
        sets = (("train", self.labelled_train), ("test", self.test))
        labelled = [(split, s, s.labels) for split, s in sets if s is not None and s.labels is not None]
        if not labelled:
            raise ValueError(_unlabelled(self.labelled_train.name))
        if len(labelled) == 2:
            return {split: (images, torch.arange(len(images)), None) for split, images, _ in labelled}
        [(split, pool, labels)] = labelled
        kept, held = (part.sort().values for part in stratified_split(labels, self.holdout, seed=_HOLDOUT))
        if len(held) == 0:
            raise ValueError(
                f"no class of {pool.name} has two images: none can be held out as test. "
                "Give a labelled test set in data.test_dir."
            )
        note = (
            f"no labelled test set: {len(held)} of the {len(pool)} images of {pool.name}, kept from the probe, "
            "are the test"
        )
        but = f", but for {self.held_out} of the folder that it held out" if self.held_out else ""
        note += f"; pretraining saw them, without labels{but}" if split == "train" and self.in_pretraining else ""
        return {"train": (pool, kept, note), "test": (pool, held, note)}


def _unlabelled(name: str) -> str:
    return (
        f"{name} has no labels: evaluation needs an image set with two or more class folders, in data.train_dir or "
        "data.test_dir."
    )


def default_batch_size(images: int, world_size: int = 1) -> int:
    """The global batch where none is given: the power of two that makes some 30 to 60 steps of an epoch, 32 to 256.

    A thousand images train in batches of 32: fewer and larger steps leave a small set untrained. Where it does not
    divide over the devices, the next multiple below.

    Args:
        images: how many there are for training.
        world_size: devices.
    """
    size = 2 ** max(5, min(8, math.floor(math.log2(max(1, images) / _STEPS_OF_AN_EPOCH))))
    size = min(size, max(2, images))
    return max(size // world_size, 1) * world_size


def images_of_run(settings: Mapping[str, Any], **changed: Any) -> ImageData:
    """The images of a run, by the settings that its checkpoint holds; what `ImageData` no longer has is left out.

    Args:
        settings: `Checkpoint.data`.
        changed: settings to take in place of the run's.
    """
    known = {name: settings[name] for name in inspect.signature(ImageData).parameters if name in settings}
    known.setdefault("held_out", 0)  # a run from before there was the setting
    return ImageData(**{**known, **changed})


@contextmanager
def folders_of_run(data: ImageData, run: Mapping[str, Any]) -> Iterator[None]:
    """Within it a message about a folder that came from a run says so, because its reader did not type it.

    Args:
        data: the images.
        run: the settings that the run's checkpoint holds.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, value in data.given.items():
            if value and value in (run.get(name), folders_shown(run).get(name)):
                message = message.replace(f"data.{name}={value}", f"the run's own data.{name}={value}")
        raise ValueError(message) from error
