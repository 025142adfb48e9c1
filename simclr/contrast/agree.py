"""All ranks check the input together, so that either all of them go on or all of them raise."""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from simclr import distributed
from simclr.precision import Operands

# Below it e^(1 / temperature) leaves the range where float32 sums of it are safe, and rounding costs 1e-5 of a logit.
SMALLEST_IN_FLOAT32 = 1 / 64
SMALLEST_TEMPERATURE = 0.0015  # e^(1 / temperature) is near the end of float64's range
_LETTERS = 6  # of a name in one number: 48 bits, which a float64 holds


class Settings(NamedTuple):
    """How a loss is asked for; see `simclr.losses.nt_xent` for the first four.

    Attributes:
        name: of the loss.
        margin: of a margin loss, in cosines.
        semi_hard: one negative an anchor.
    """

    gather: bool
    uneven: bool
    operands: Operands
    return_stats: bool
    name: str
    margin: float | None = None
    semi_hard: bool = False


class GlobalBatch(NamedTuple):
    """The global batch, as this rank sees it.

    Attributes:
        views: V, of each image.
        n: images of this rank.
        counts: anchors of each rank, this one alone without gathering.
        rank: this rank's place in `counts`.
        temperature: tau.
    """

    views: int
    n: int
    counts: list[int]
    rank: int
    temperature: float

    @property
    def start(self) -> int:
        """Where this rank's anchors begin among the candidates."""
        return sum(self.counts[: self.rank])

    @property
    def scale(self) -> float:
        """What an anchor's loss counts in this rank's value, so that the mean over ranks is that over all anchors."""
        return len(self.counts) / sum(self.counts)

    @property
    def same_image(self) -> tuple[int, ...]:
        """0 and the distances, among this rank's anchors, from one view of an image to the others."""
        return tuple(range(0, self.views * self.n, self.n))

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's rows: (m, ...) -> (M, ...)."""
        return distributed.gather(x, self.counts) if len(self.counts) > 1 else x


# What one rank alone may find wrong: the error, and how the other ranks put it.
_WRONG = {
    1: (ValueError, "projections or labels that do not fit"),
    2: (ValueError, "a setting out of its range"),
    3: (FloatingPointError, "projections that are not finite"),
}


def agree(views: Sequence[Tensor], temperature: float, settings: Settings, labels: Tensor | None) -> GlobalBatch:
    """Checks the input, on all ranks together, so that either all of them go on or all of them raise."""
    wrong, message = _first_problem(views, temperature, settings, labels)
    n, width = views[0].shape if wrong != 1 else (0, 0)
    if not (settings.gather and distributed.world_size() > 1):
        if wrong:
            raise _WRONG[wrong][0](message)
        counts, rank = [len(views) * n], 0
    else:
        told = {
            "number of images": n,
            "width of a projection": width,
            "number of views": len(views),
            "temperature": temperature if wrong != 2 else 0,
            "margin": (settings.margin or 0) if wrong != 2 else 0,
            "bytes of a number": views[0].element_size() if wrong != 1 else 0,
            "operands": get_args(Operands).index(settings.operands) if wrong != 2 else 0,
            "semi_hard": settings.semi_hard,
            "uneven": settings.uneven,
            "labels": labels is not None,
        }
        name = _as_numbers(settings.name)
        # On the host: a look at numbers on a device would wait for all that is queued there.
        everyone = distributed.exchange([wrong, *told.values(), *name])
        if wrong:
            raise _WRONG[wrong][0](message)
        for other, row in enumerate(everyone):
            if row[0]:
                error, what = _WRONG[int(row[0])]
                raise error(f"rank {other} got {what}; its own error says which.")
        names = [_as_text(row[-len(name) :]) for row in everyone]
        if len(set(names)) > 1:
            shown = ", ".join(names)
            raise ValueError(f"the ranks disagree about the loss: {shown} on ranks 0 to {len(names) - 1}.")
        for column, setting in enumerate(told, start=1):
            values = [row[column] for row in everyone]
            if len(set(values)) > 1 and not (column == 1 and settings.uneven):
                hint = ". Give all of them the same number, or pass uneven=True" if column == 1 else ""
                shown = ", ".join(f"{value:g}" for value in values)
                raise ValueError(
                    f"the ranks disagree about the {setting}: {shown} on ranks 0 to {len(values) - 1}{hint}."
                )
        counts, rank = [len(views) * int(row[1]) for row in everyone], distributed.rank()
    if sum(counts) == len(views) and settings.name != "nt_xent":
        raise ValueError(f"{settings.name} got a batch of one image, which has no negatives. It needs 2 at least.")
    return GlobalBatch(len(views), n, counts, rank, temperature)


def _first_problem(
    views: Sequence[Tensor], temperature: float, settings: Settings, labels: Tensor | None
) -> tuple[int, str]:
    """Its key in _WRONG and the message of this rank; 0 if nothing is wrong here."""
    if not all(isinstance(view, Tensor) and view.is_floating_point() for view in views):
        return 1, "projections must be tensors of floating point."
    shapes = [tuple(view.shape) for view in views]
    if len(shapes) < 2 or len(shapes[0]) != 2 or len(set(shapes)) > 1 or shapes[0][0] < 1:
        listed = " and ".join(map(str, shapes)) or "()"
        return 1, f"projections of shapes {listed} do not fit. Two views or more, all of one shape (N, D), are needed."
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != shapes[0][:1]):
        got = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"of type {type(labels).__name__}"
        return 1, f"labels {got} do not fit projections of shape {shapes[0]}: a tensor of one an image is needed."
    if not isinstance(temperature, Real):
        return 2, f"temperature is a {type(temperature).__name__}. Pass a plain number: its gradient is not given."
    if not temperature >= SMALLEST_TEMPERATURE or temperature == float("inf"):
        return 2, f"temperature={temperature} is not {SMALLEST_TEMPERATURE} or more. Values from 0.05 to 1 are usual."
    if settings.margin is not None and not 0 < settings.margin < float("inf"):
        return 2, f"margin={settings.margin} is not positive. Cosines lie between -1 and 1."
    if settings.operands not in get_args(Operands):
        return 2, f"operands={settings.operands!r} is none of {', '.join(get_args(Operands))}."
    if views[0].device.type == "mps" and (temperature < SMALLEST_IN_FLOAT32):
        return 2, f"temperature={temperature} needs float64, which this device lacks. Use {SMALLEST_IN_FLOAT32}."
    if bad := count_not_finite(views):
        return 3, f"{bad} of {len(views) * len(views[0])} projections are NaN or infinite."
    return 0, ""


def count_not_finite(views: Sequence[Tensor]) -> int:
    """How many projections are not finite, on a CPU: a look at another device's would wait for it."""
    if views[0].device.type != "cpu":
        return 0
    # Their sum costs a tenth of a look at each, and is finite only if all of them are.
    if all(view.detach().sum(dtype=torch.float64).isfinite() for view in views):
        return 0
    return sum(int((~view.detach().isfinite()).any(1).sum()) for view in views)


def _as_numbers(name: str, count: int = 3) -> list[float]:
    """A name as numbers that ranks can exchange; of one that is longer its beginning."""
    padded = name.encode()[: _LETTERS * count].ljust(_LETTERS * count)
    return [float(int.from_bytes(padded[i : i + _LETTERS])) for i in range(0, len(padded), _LETTERS)]


def _as_text(numbers: Sequence[float]) -> str:
    return b"".join(int(number).to_bytes(_LETTERS) for number in numbers).decode().rstrip()
