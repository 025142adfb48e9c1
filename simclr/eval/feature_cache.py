"""Features kept from one evaluation to the next, found by what determines them: the encoder and every pixel.

A file is named after the encoder with its preprocessing and after the images, and holds a hash of its own content. So
an encoder that trained on, an image that changed and a file that was cut short or written over are all noticed, and
the features computed again. What is trusted is never a name or a date: the images are decoded and hashed each time,
which costs little beside the encoder. Files may be deleted between runs.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from simclr.data import EvalLoader
from simclr.distributed import from_rank_0, rank
from simclr.eval.duplicates import HashedImages
from simclr.eval.features import encoder_sha256
from simclr.eval.shares import features_on_ranks, hash_on_ranks
from simclr.files import say_unwritten, write_atomically

_SHA256 = "sha256"


@dataclass
class FeatureCache:
    """Features of labelled images by an encoder, computed once, by all ranks; rank 0 keeps them.

    Args:
        folder: where they are kept; made if it is missing. None: they are computed each time.
        device: where to compute.
        say: is told why features that were there are computed again, a line each.

    Attributes:
        computed: how many passes through an encoder there were.
    """

    folder: Path | None
    device: torch.device | str = "cpu"
    say: Callable[[str], None] = lambda text: None
    computed: int = 0

    def features(self, encoder: nn.Module, images: HashedImages, split: str) -> tuple[Tensor, Tensor]:
        """As `extract_features`; afterwards `images.digests` are those of all images.

        Args:
            encoder: as there.
            images: of which the features are.
            split: train or test: what the file's name begins with.
        """
        loader: EvalLoader = images.loader
        if self.folder is None:
            return self._computed(encoder, images)
        key = f"{split}-{_key(encoder, self.device)}"
        folder = self.folder
        kept = from_rank_0(lambda: sorted(folder.glob(f"{key}-*.safetensors")))
        found: Tensor | None = None
        if kept:  # else one pass does for hashes and features
            if len(images.digests) == 0:
                hash_on_ranks(images)
            file = folder / f"{key}-{images_sha256(images)[:20]}.safetensors"
            if file in kept:
                found = from_rank_0(lambda: self._read(file, len(loader.index)))
            else:
                self.say(f"the features in {folder} are of other {split} images: computed again")
        if found is not None:
            return found, loader.labels
        features, labels = self._computed(encoder, images)
        if rank() == 0:
            self._write(folder / f"{key}-{images_sha256(images)[:20]}.safetensors", features)
        return features, labels

    def _computed(self, encoder: nn.Module, images: HashedImages) -> tuple[Tensor, Tensor]:
        self.computed += 1
        return features_on_ranks(encoder, images, device=self.device)

    def _read(self, file: Path, size: int) -> Tensor | None:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                features, written = opened.get_tensor("features"), (opened.metadata() or {}).get(_SHA256)
            if written != _sha256(features) or len(features) != size:
                raise ValueError("its content is not what was written")
        except (SafetensorError, ValueError, OSError) as error:
            self.say(f"{file} is damaged ({error}): computed again")
            return None
        return features

    def _write(self, file: Path, features: Tensor) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({"features": features.contiguous()}, {_SHA256: _sha256(features)}))
        except OSError as error:
            say_unwritten(file, error, "features are computed again next time")


def images_sha256(images: HashedImages) -> str:
    """A hash of every pixel and label of a data set, in order, after a pass."""
    labels = images.loader.labels.to(torch.int64).cpu().contiguous().numpy()
    return hashlib.sha256(bytes(images.digests) + labels.tobytes()).hexdigest()


def _key(encoder: nn.Module, device: torch.device | str) -> str:
    """Of what turns pixels into features: the weights, what is done to images before, and who computes."""
    prepared = [getattr(encoder, name, None) for name in ("image_size", "mean", "std")]
    text = f"{encoder_sha256(encoder)} {prepared} {torch.__version__} {torch.device(device).type}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _sha256(features: Tensor) -> str:
    text = f"{features.dtype} {tuple(features.shape)}".encode()
    return hashlib.sha256(text + features.contiguous().numpy().tobytes()).hexdigest()
