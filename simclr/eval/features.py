"""Images -> features: one pass through a frozen encoder, proven frozen. Every protocol of this folder starts here."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from simclr.checks import listed, refuse
from simclr.inputs import fit_to_size, normalize, to_unit_range

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def encoder_sha256(encoder: nn.Module) -> str:
    """Fingerprint of an encoder: SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers.

    Independent of device and memory format. Buffers that a checkpoint leaves out (non-persistent) count too, because
    they can change what the encoder computes.

    Args:
        encoder: any module.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    state = [*encoder.named_parameters(remove_duplicate=False), *encoder.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(state, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)  # bytes, because numpy has no bfloat16
    return digest.hexdigest()


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Hold an encoder in eval mode without gradients, and prove that nothing in it changed.

    The training flag of every submodule is put back at the end, also after an error. A copy of its weights and buffers
    is held meanwhile where they are: a hash of an encoder on a GPU would bring all of it to the CPU, twice.

    Raises:
        RuntimeError: on leaving, if a parameter or buffer differs from what it was on entering, in any bit.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    before = {name: tensor.detach().clone() for name, tensor in _state(encoder)}
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
    after = dict(_state(encoder))
    if changed := [name for name in {**before, **after} if not _same(before.get(name), after.get(name))]:
        raise RuntimeError(
            f"the encoder changed while it was evaluated: {listed(changed, 3)}; "
            "a forward pass in eval mode must write no parameter or buffer (a BatchNorm that ignores eval()?)."
        )


def _state(encoder: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers by name, those that a checkpoint leaves out too."""
    return [*encoder.named_parameters(), *encoder.named_buffers()]


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether two tensors are there and equal in every bit: NaN equals itself, and 0 does not equal -0."""
    if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
        return False
    return torch.equal(_bits(before), _bits(after))


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().view(_INTEGERS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features of one batch, in full precision, as every protocol takes them; the caller holds the encoder `frozen`.

    Args:
        encoder: (n, C, S, S) -> (n, F).
        images: (n, C, S, S) float, normalised, on the encoder's device.
    Returns:
        (n, F) float32 on the same device.
    Raises:
        ValueError: if the encoder returns another shape.
    """
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    with torch.autocast(images.device.type, enabled=False):  # a number to report is not taken in 16 bit
        features = encoder(images.to(dtype).contiguous(memory_format=torch.channels_last))
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"the encoder returned {got} for {len(images)} images: needed a tensor (n, F).")
    return features.float()


def extract_features(
    encoder: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    image_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, from an encoder in eval mode that is proven unchanged.

    Images are brought to the encoder's size by the evaluation crop and normalised with its `.mean` and `.std`, where it
    has them (simclr.inputs, which also states how `ImageData` and `encoder.transform` come to the square before it).
    Float32 throughout, never autocast.

    Args:
        encoder: (n, C, S, S) -> (n, F); its training mode is put back afterwards, submodule by submodule.
        loader: iterable of (images, labels, ...): images (n, C, H, W) uint8, uint16 or float in [0, 1], not normalised,
            of as many channels as `.mean` has, 3 where there is none;
            labels (n,) integer >= 0.
        device: where to compute; by default where the encoder is. The encoder goes back to where it was.
        image_size: side in pixels; by default `encoder.image_size`, and without that images stay as they come.
    Returns:
        features (N, F) float32 and labels (N,) int64, both on the CPU, in the loader's order.
    Raises:
        ValueError: if the loader is empty, labels are missing, or a feature is NaN or infinite.
        RuntimeError: if a parameter or buffer of the encoder changed.
    """
    image_size = image_size or getattr(encoder, "image_size", None)
    mean, std = getattr(encoder, "mean", None), getattr(encoder, "std", None)
    channels = 3 if mean is None else len(mean)
    home = next((t.device for t in (*encoder.parameters(), *encoder.buffers())), torch.device("cpu"))
    device = torch.device(device) if device is not None else home
    parts: list[Tensor] = []
    label_parts: list[Tensor] = []
    with frozen(encoder):
        try:
            encoder.to(device)
            for images, batch_labels in labelled_batches(loader):
                images = to_unit_range(images.to(device, non_blocking=True), channels)
                if image_size is not None:
                    images = fit_to_size(images, image_size)
                if mean is not None and std is not None:
                    images = normalize(images, mean, std)
                parts.append(encode(encoder, images).cpu())
                label_parts.append(batch_labels)
        finally:
            encoder.to(home)
    features, labels = torch.cat(parts), torch.cat(label_parts)
    check_finite("features", features)
    return features, labels


def raw_pixels(loader: Iterable, *, max_size: int = 32) -> tuple[Tensor, Tensor]:
    """The yardstick without any encoder: pixel values as features.

    Images with a side above `max_size` are brought to (max_size, max_size) by the evaluation crop, because a linear
    classifier on 224 px would have 150 528 inputs; smaller ones are taken as they are.

    Args:
        loader: as for `extract_features`; all images must come out at one size.
        max_size: the largest side kept, in pixels.
    Returns:
        features (N, C * H * W) float32 in [0, 1] and labels (N,) int64, both on the CPU.
    Raises:
        ValueError: if the loader is empty, labels are missing, or image sizes differ.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for images, batch_labels in labelled_batches(loader):
        images = to_unit_range(images, channels=None)
        if max(images.shape[-2:]) > max_size:
            images = fit_to_size(images, max_size)
        if features and features[0].shape[1:] != images.shape[1:]:
            raise ValueError(
                f"images of {tuple(features[0].shape[1:])} and {tuple(images.shape[1:])}: needed one size."
            )
        features.append(images.cpu())
        labels.append(batch_labels)
    return torch.cat(features).flatten(1), torch.cat(labels)


def labelled_batches(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) from a loader, labels checked, int64 and on the CPU; further items of a batch are left out."""
    count = 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2 or batch[1] is None:
            raise ValueError("a batch has no labels: evaluation needs a loader of (images, labels).")
        images, labels = batch[0], torch.as_tensor(batch[1])
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (len(images),):
            raise ValueError(
                f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images: needed one integer each."
            )
        if len(labels) and labels.min() < 0:
            raise ValueError(f"image {count + int(labels.argmin())} has label {int(labels.min())}: it is unlabeled.")
        count += len(labels)
        yield images, labels.to("cpu", torch.int64)
    if count == 0:
        raise ValueError("the loader gave no images.")


def check_finite(name: str, features: Tensor) -> None:
    """Refuse NaN and infinities, naming the first row that holds one."""
    rows = (~features.isfinite()).any(1)
    if rows.any():
        raise ValueError(
            f"{name} are NaN or infinite in {int(rows.sum())} of {len(features)} rows, "
            f"first in row {int(rows.int().argmax())}."
        )


def check_split(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int | None = None,
) -> int:
    """Refuse features and labels that do not belong together, listing every problem; the number of classes C.

    A class of the test set that training never saw is refused: no protocol can name it, and the usual cause is two
    folders whose classes differ. A class that only training has is allowed.

    Args:
        train_features, test_features: (N, F) and (M, F) float.
        train_labels, test_labels: (N,) and (M,) integer.
        num_classes: C; by default one more than the largest training label.
    Returns:
        C >= 2.
    Raises:
        ValueError: with all that is wrong.
    """
    problems = []
    for part, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        shapes = f"{part}_features {tuple(features.shape)} and {part}_labels {tuple(labels.shape)}"
        if features.ndim != 2 or labels.ndim != 1 or 0 in features.shape:
            problems.append(f"{shapes}: needed (N, F) and (N,), not empty")
        elif len(features) != len(labels):
            problems.append(f"{shapes}: the lengths differ")
        if not features.is_floating_point():
            problems.append(f"{part}_features are {features.dtype}: needed float")
        elif features.ndim == 2:
            try:
                check_finite(f"{part}_features", features)
            except ValueError as error:
                problems.append(str(error).rstrip("."))
        if labels.is_floating_point() or labels.dtype == torch.bool:
            problems.append(f"{part}_labels are {labels.dtype}: needed integer class numbers")
    if train_features.shape[1:] != test_features.shape[1:]:
        problems.append(
            f"train_features are {tuple(train_features.shape)}, test_features {tuple(test_features.shape)}: "
            "the widths differ"
        )
    refuse(problems)  # what follows reads the labels
    classes = num_classes if num_classes is not None else int(train_labels.max()) + 1
    for part, labels in (("train", train_labels), ("test", test_labels)):
        if labels.min() < 0 or (num_classes is not None and labels.max() >= classes):
            problems.append(f"{part}_labels reach from {labels.min()} to {labels.max()}: needed 0 to {classes - 1}")
    seen = train_labels.unique()
    if len(seen) < 2:
        problems.append(f"train_labels hold {len(seen)} class: needed at least 2")
    unseen = sorted(set(test_labels.unique().tolist()) - set(seen.tolist()))
    if unseen:
        problems.append(f"test_labels hold classes {unseen[:10]} that train_labels lack")
    refuse(problems)
    return classes
