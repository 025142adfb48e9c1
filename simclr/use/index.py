"""An index of a large folder of features, for faiss: made once, kept beside them, and a search reads a part of it.

`simclr.use.search.nearest_rows` looks at every row, which is exact and fast enough to a million. Beyond, the rows are
divided among lists by nearness (an inverted file, Jegou et al. 2011), and a query looks at the nearest lists.
"""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from simclr.eval.features import check_finite
from simclr.files import GrowingFile, say_unwritten
from simclr.use.embedded import ABOUT, Embedded

LARGE = 1_000_000  # rows from which on an index pays
_LISTS = 4.0  # times the square root of the rows, as faiss advises for a million
_OF_A_LIST = 64  # rows that lists are learned from; faiss warns below 39
_LOOKED_AT = 16  # of so many lists one is looked at
_MORE = 4  # times k are found, of which the cosines are computed again
_NUMBERS = 2**25  # of features that are in memory at a time


def has_faiss() -> bool:
    """Whether the extra `simclr[faiss]` is installed."""
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:  # whose own types do not know all of it
    return importlib.import_module("faiss")


def need_faiss() -> None:
    """Refuse to go on without it.

    Raises:
        ModuleNotFoundError: saying how to install it.
    """
    if not has_faiss():
        raise ModuleNotFoundError("exact=false needs faiss: pip install 'simclr[faiss]'.")


def indexed_rows(embedded: Embedded, query: Tensor, k: int) -> list[tuple[int, float]]:
    """Rows of high cosine similarity to a query, the nearest first: nearly always the highest.

    The index is made at the first search, in memory: as much as the features take. It is named after what the features
    are of, so that one of others is never taken.

    Args:
        embedded: N rows.
        query: (F,) float.
        k: how many; all if there are fewer, and fewer where the lists looked at hold fewer.
    Returns:
        (row, cosine), exact for the rows that it has.
    Raises:
        ValueError: if features are not finite, or the query has another width.
    """
    embedded.refuse_query(query)
    index = _index_of(embedded)
    index.nprobe = max(1, index.nlist // _LOOKED_AT, min(index.nlist, 8))
    wanted = min(_MORE * k, len(embedded.features))
    _, near = index.search(normalize(query[None].float(), dim=1).numpy(), wanted)
    rows = sorted(int(row) for row in near[0] if row >= 0)  # -1 where the lists hold fewer
    if not rows:
        return []
    found = torch.from_numpy(np.array(embedded.features[rows]))
    cosines = cosine_similarity(found.double(), query[None].double()).tolist()
    best = sorted(zip((-cosine for cosine in cosines), rows, strict=True))[:k]
    return [(row, -cosine) for cosine, row in best]


def _index_of(embedded: Embedded) -> Any:
    """The index that is kept, or a new one."""
    faiss = _faiss()
    about = hashlib.sha256((embedded.folder / ABOUT).read_bytes()).hexdigest()[:16]
    file = embedded.folder / f"search-{about}.faiss"
    if file.is_file():
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
            if (index.ntotal, index.d) == embedded.features.shape:
                return index
        except RuntimeError:  # faiss's word for a damaged file
            pass
    index = _new_index(embedded.features, f"the features in {embedded.folder}")
    _write(index, file)
    return index


def _new_index(features: np.ndarray, name: str) -> Any:
    faiss = _faiss()
    size, width = features.shape
    lists = max(1, min(int(_LISTS * size**0.5), size // _OF_A_LIST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(_normalized(features[:: max(1, size // (_OF_A_LIST * lists))], name))
    rows = max(1, _NUMBERS // width)
    for start in range(0, size, rows):
        index.add(_normalized(features[start : start + rows], name))
    return index


def _normalized(part: np.ndarray, name: str) -> np.ndarray:
    rows = torch.from_numpy(np.array(part))
    check_finite(name, rows)
    return normalize(rows, dim=1).numpy()


def _write(index: Any, file: Path) -> None:
    """To the disk piece by piece: it is as large as the features."""
    faiss = _faiss()
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        growing = GrowingFile(unfinished)
        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(growing.append))
            growing.finish(file)
        finally:
            growing.close()
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        say_unwritten(file, error, "it is made again next time")
