"""Features as other programs read them: Parquet, CSV, npz, beside the `.npy` that they are made of."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from simclr.files import written_whole
from simclr.use.embedded import Embedded

Table = Literal["npy", "parquet", "csv", "npz"]
_ROWS = 8192  # written at a time


def need_packages(format: str) -> None:
    """Refuse a format whose library is not here.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError("Parquet needs pyarrow: pip install 'simclr[parquet]'.") from error


def write_table(embedded: Embedded, format: Table) -> Path:
    """Write features in another form beside `features.npy`.

    Args:
        embedded: the features.
        format: parquet: columns `path` and `features`, a list of floats. csv: columns `path`, `f0`, `f1` ..., each
            number with as many digits as give its bits back. npz: arrays `paths` and `features`. npy: nothing to do.
            Names that are not UTF-8 have their bytes written as backslash escapes in Parquet.
    Returns:
        The file.
    """
    if format not in get_args(Table):
        raise ValueError(f"format={format} is none of {', '.join(get_args(Table))}.")
    path = embedded.folder / f"features.{format}"
    if format != "npy":
        need_packages(format)
        with written_whole(path) as file:
            _WRITERS[format](embedded, file)
    return path


def _parquet(embedded: Embedded, file: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    width = embedded.features.shape[1]
    schema = pyarrow.schema([("path", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), width))])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(embedded.features), _ROWS):
            rows = np.ascontiguousarray(embedded.features[start : start + _ROWS])
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), width)
            names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in embedded.names[start:][:_ROWS]]
            writer.write_table(pyarrow.table([pyarrow.array(names, pyarrow.string()), values], schema=schema))


def _csv(embedded: Embedded, file: Any) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    writer = csv.writer(text)
    writer.writerow(["path", *(f"f{column}" for column in range(embedded.features.shape[1]))])
    for name, row in zip(embedded.names, embedded.features, strict=True):
        writer.writerow([name, *map(str, row)])  # of a float32 the shortest digits that give it back
    text.flush()
    text.detach()


def _npz(embedded: Embedded, file: Any) -> None:
    np.savez(file, paths=np.array(embedded.names), features=embedded.features)


_WRITERS: dict[str, Callable[[Embedded, Any], None]] = {"parquet": _parquet, "csv": _csv, "npz": _npz}
