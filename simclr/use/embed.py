"""A folder of images -> a folder of features, as large as the disk, killed and gone on with at any time."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from simclr import __version__
from simclr.container import cores
from simclr.data.ahead import in_processes
from simclr.data.decode import ReadingRules, UnreadableError, decoder, read_images
from simclr.data.fingerprint import digest_files
from simclr.data.sources import Folder, PackedPaths, list_folder
from simclr.distributed import from_rank_0, rank, to_rank_0, world_size
from simclr.eval.features import frozen
from simclr.files import GrowingFile, hold, remove_abandoned, write_atomically
from simclr.paths import expanded, stored
from simclr.use.embedded import (
    ABOUT,
    FEATURES,
    PATHS,
    STATE,
    UNFINISHED,
    VERSION,
    Embedded,
    names_as_lines,
    read_embedded,
)
from simclr.use.source import Source

OnError = Literal["raise", "skip"]
SAVE_SECONDS = 5.0  # of work that a kill may cost
_PIXELS = 2**22  # of a batch, where its size is not given: what a CPU's caches and a small GPU can bear
_LARGEST_BATCH = 512


def default_batch_size(image_size: int) -> int:
    """Images that are encoded at a time: 512, and fewer above 90 pixels."""
    return max(16, min(_LARGEST_BATCH, _PIXELS // image_size**2))


def squares_of(
    paths: list[str], side: int, rules: ReadingRules, threads: int = 1
) -> tuple[np.ndarray, dict[int, tuple[str, bool]]]:
    """The images of some files that can be read, (n, C, side, side), and a line for each other by its place.

    With each line stands whether the file may be sound.
    """
    out = torch.empty(len(paths), rules.channels, side, side, dtype=rules.dtype)
    try:
        return read_images(paths, side, out, threads, rules).numpy(), {}
    except UnreadableError as error:
        good = [place for place in range(len(paths)) if place not in error.lines]
        return out[good].numpy(), {place: (str(line), line.sound) for place, line in error.lines.items()}


def feature_batches(
    paths: PackedPaths | list[str],
    source: Source,
    *,
    batch_size: int,
    first: int = 0,
    every: int = 1,
    workers: int = 0,
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """Features of files, batch by batch: what a batch gives depends on its files alone.

    Args:
        paths: N files.
        source: the encoder, on its device.
        batch_size: files of a batch.
        first: batches that are left out.
        every: of 3, say, the first batch, the fourth and so on.
        workers: processes that decode ahead; 0 decodes between the batches, by all cores.
    Yields:
        (n, F) float32, the rows of the files that can be read, in their order; and why others cannot, by their places
        in the batch.
    Raises:
        ValueError: if a feature is NaN or infinite, naming the image.
    """
    starts = range(first * batch_size, len(paths), every * batch_size)
    parts = (paths[start : start + batch_size] for start in starts)
    tasks = (list(part) for part in parts)
    work = partial(squares_of, side=source.side, rules=source.rules, threads=1 if workers else cores())
    decoded = in_processes(work, tasks, workers) if workers else map(work, tasks)
    for start, (squares, bad) in zip(starts, decoded, strict=True):
        lines = {place: line for place, (line, _) in bad.items()}
        if len(squares):
            rows = source.features(torch.from_numpy(squares)).numpy()
        else:
            rows = np.empty((0, source.about["feature_dim"]), np.float32)
        if not (finite := np.isfinite(rows).all(1)).all():
            good = [start + place for place in range(batch_size) if place not in lines]
            raise ValueError(
                f"the features of {paths[good[int((~finite).argmax())]]} are NaN or infinite: "
                "the encoder cannot be used."
            )
        yield rows, lines


def feature_batches_on_ranks(
    paths: PackedPaths | list[str], source: Source, *, batch_size: int, first: int = 0, workers: int = 0
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """As `feature_batches`, whose batches the ranks take in turn; each goes through it, and rank 0 gets them all.

    A batch is of the same files however many ranks there are.

    Raises:
        ValueError: on rank 0, for what a rank has met, once the batches before it are handed over.
    """
    ranks = world_size()
    if ranks == 1:
        yield from feature_batches(paths, source, batch_size=batch_size, first=first, workers=workers)
        return
    own = feature_batches(paths, source, batch_size=batch_size, first=first + rank(), every=ranks, workers=workers)
    for _ in range(first, -(-len(paths) // batch_size), ranks):
        batch: tuple[np.ndarray, dict[int, str]] | None = None
        problem: str | None = None
        try:
            batch = next(own, None)
        except ValueError as error:
            problem = str(error)
        for done, said in to_rank_0((batch, problem)):
            if said is not None:
                raise ValueError(said)
            if done is not None:
                yield done


def refuse_unlike_rank_0(mine: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse to share work with a rank 0 that has other things by the same names."""
    if differ := [name for name, value in mine.items() if first[name] != value]:
        raise ValueError(f"rank {rank()} has other {' and '.join(differ)} than rank 0. Give all of them the same.")


def embed_folder(
    images: str,
    source: Source,
    out: str | os.PathLike,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    on_error: OnError = "raise",
    advance: Callable[[int, int], None] = lambda done, files: None,
) -> Embedded:
    """Write the features of all images of a folder: `features.npy`, `paths.txt` and `about.json`.

    They are written as they come. A process that was killed, stopped or had no more room on the disk goes on from the
    last few seconds when it is begun again, and ends in the same bits: batches are always of the same files. Several
    ranks share the batches, each calling this; rank 0 writes, and more or fewer may go on.

    Args:
        images: a folder of images, nested or flat.
        source: the encoder, on its device.
        out: a folder that is not there, is empty, or holds these features or a part of them.
        batch_size: files of a batch; `default_batch_size` if not given, or the one that it was begun with.
        workers: as for `feature_batches`.
        on_error: of an image that cannot be read. raise: an error names it, and what was done until there stays to go
            on from. skip: it has no row, and `about.json` lists it.
        advance: told how many files are done, of how many.
    Returns:
        What was written. If it was whole before, nothing is computed.
    Raises:
        ValueError: if `out` holds something else: features of another encoder, of other images; if no image can be
            read; if features are not finite.
        BlockingIOError: if another process is at work there.
    """
    listed, folder = list_folder(images, "images"), expanded(out)
    if rank() > 0:
        help_to_embed(listed, source, workers)
        return read_embedded(folder)
    _refuse_strange(folder, out)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        let_go = hold(folder)
    except BlockingIOError as error:
        raise ValueError(f"out={out} is being written by another process.") from error
    try:
        return _embed(listed, source, folder, batch_size, workers, on_error, advance)
    finally:
        let_go()
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _embed(
    listed: Folder,
    source: Source,
    folder: Path,
    batch_size: int | None,
    workers: int,
    on_error: OnError,
    advance: Callable[[int, int], None],
) -> Embedded:
    what = {"encoder": source.identity, "images": images_digest(listed), "decoder": decoder(source.rules)}
    if (folder / ABOUT).is_file():
        found = read_embedded(folder)
        _refuse_other({**found.about, "encoder": _identity(found.about)}, what, folder, source)
        _tidy(folder)
        _tell_ranks(None)
        return found
    size = source.transform.image_size
    state: dict[str, Any] = {"simclr_embed": VERSION, **what}
    state |= {"batch_size": batch_size or default_batch_size(size)}
    state |= {"files": 0, "rows": 0, "unreadable": []}
    if (folder / STATE).is_file():
        state = _state_of(folder)
        _refuse_other(state, what, folder, source)
        if not (folder / UNFINISHED).exists() and (folder / FEATURES).exists():  # killed between the last two names
            GrowingFile(folder / FEATURES, (folder / FEATURES).stat().st_size).finish(folder / UNFINISHED)
    width, files, begun = source.about["feature_dim"], len(listed.paths), state["files"]
    head = _head(len(listed.paths), width)
    growing = GrowingFile(folder / UNFINISHED, len(head) + state["rows"] * width * 4 if state["files"] else 0)
    if not state["files"]:
        growing.append(head)
    top = len(os.path.join(stored(listed.root), ""))
    try:
        saved = time.monotonic()
        advance(state["files"], files)
        plan = {"batch_size": state["batch_size"], "first": -(-state["files"] // state["batch_size"])}
        _tell_ranks({"images": listed.fingerprint, "weights": source.identity, **plan})
        with frozen(source.encoder):
            batches = feature_batches_on_ranks(listed.paths, source, workers=workers, **plan)
            for rows, bad in batches:
                first = state["files"]
                if bad and on_error == "raise":
                    raise ValueError(_refusal(list(bad.values()), first))
                growing.append(np.ascontiguousarray(rows).data)
                for place, line in bad.items():
                    name = listed.paths[first + place]
                    reason = line.removeprefix(f"{name} (").removesuffix(")")
                    state["unreadable"].append([name[top:].replace(os.sep, "/"), reason])
                state["rows"] += len(rows)
                state["files"] = min(files, first + state["batch_size"])
                if time.monotonic() - saved >= SAVE_SECONDS:
                    _save(growing, state, folder)
                    saved = time.monotonic()
                advance(state["files"], files)
        if not state["rows"]:
            raise ValueError(f"none of the {files:,} images in {listed.root} can be read: {state['unreadable'][0][1]}.")
        _save(growing, state, folder)
        _finish(growing, state, listed, source, folder, top)
        _tell_ranks(None)
    except BaseException as error:
        if (
            state["rows"]
            and not growing.whole
            and not (isinstance(error, RuntimeError) and "encoder changed" in str(error))
        ):
            with suppress(OSError):  # of which the first error tells
                _save(growing, state, folder)
        if not state["rows"] and not begun:
            for name in (UNFINISHED, STATE):
                (folder / name).unlink(missing_ok=True)
        raise
    finally:
        growing.close()
    return read_embedded(folder)


def _tell_ranks(plan: dict[str, Any] | None) -> None:
    """What the other ranks wait for: what is to be computed, or None, that all is written."""
    from_rank_0(lambda: plan)


def help_to_embed(listed: Folder, source: Source, workers: int) -> None:
    """What ranks other than the first do while it is in `embed_folder`, until all is written.

    Args:
        listed: the folder of images.
        source, workers: as there.
    """
    plan = from_rank_0(lambda: None)
    if plan is None:
        return
    mine = {"images": listed.fingerprint, "weights": source.identity}
    refuse_unlike_rank_0(mine, {name: plan.pop(name) for name in mine})
    with frozen(source.encoder):
        for _ in feature_batches_on_ranks(listed.paths, source, workers=workers, **plan):
            pass
    from_rank_0(lambda: None)


def _finish(
    growing: GrowingFile, state: dict[str, Any], listed: Folder, source: Source, folder: Path, top: int
) -> None:
    """All is computed: the files take their names, `about.json` last."""
    bad = {name for name, _ in state["unreadable"]}
    names = (path[top:].replace(os.sep, "/") for path in listed.paths)
    growing.finish(folder / FEATURES, _head(state["rows"], source.about["feature_dim"]))
    write_atomically(folder / PATHS, names_as_lines(name for name in names if name not in bad))
    about = {
        "simclr_embed": VERSION,
        "rows": state["rows"],
        "files": {FEATURES: "(rows, feature_dim) float32", PATHS: "a row each, below images; \\ escapes \\, n and r"},
        "encoder": source.about,
        "images": stored(listed.root),
        "images_digest": state["images"],
        "unreadable": state["unreadable"],
        "not_taken": listed.left_out_text,
        "batch_size": state["batch_size"],
        "decoder": state["decoder"],
        "versions": {"simclr": __version__, **{name: version(name) for name in ("torch", "torchvision", "pillow")}},
    }
    write_atomically(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
    _tidy(folder)


def _tidy(folder: Path) -> None:
    (folder / STATE).unlink(missing_ok=True)
    remove_abandoned(folder)


def _save(growing: GrowingFile, state: dict[str, Any], folder: Path) -> None:
    """The rows to the disk, then how many they are: never the other way round."""
    growing.to_disk()
    write_atomically(folder / STATE, json.dumps(state).encode())


def _head(rows: int, width: int) -> bytes:
    """The header of a `.npy` file of float32, (rows, width); of the same length for any number of rows."""
    buffer = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(buffer, described)  # leaves room for the first dimension to grow
    return buffer.getvalue()


def _state_of(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_bytes())
        if state["simclr_embed"] != VERSION:
            raise ValueError(f"it is of version {state['simclr_embed']}")
        return {name: state[name] for name in ("encoder", "images", "decoder", "batch_size", "files", "rows")} | {
            "simclr_embed": VERSION,
            "unreadable": state["unreadable"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE} cannot be gone on from ({error}). Remove {folder}.") from error


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    return {name: about["encoder"][name] for name in ("sha256", "preprocessing")}


def _refuse_other(was: dict[str, Any], what: dict[str, Any], folder: Path, source: Source) -> None:
    """Refuse to go on with features of another encoder or of other images."""
    if was["encoder"] != what["encoder"]:
        same = was["encoder"]["sha256"] == what["encoder"]["sha256"]
        other = "this encoder with other preprocessing" if same else "another encoder"
        raise ValueError(f"{folder} holds features of {other}, not of {source.name}. Name another folder.")
    if was.get("images_digest", was["images"]) != what["images"]:
        raise ValueError(
            f"{folder} holds features of other images: files were added, removed or changed. Name another folder."
        )
    if was["decoder"] != what["decoder"]:
        raise ValueError(
            f"{folder} was made with other versions of the libraries that decode ({was['decoder']}; here "
            f"{what['decoder']}). Name another folder."
        )


def _refuse_strange(folder: Path, out: str | os.PathLike) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out} is a file. Name a folder.")
    if folder.is_dir() and not (folder / ABOUT).is_file() and not (folder / STATE).is_file():
        strange = [entry.name for entry in folder.iterdir() if not entry.name.startswith((UNFINISHED, f".{STATE}"))]
        if strange:
            raise ValueError(f"out={out} holds other files, {sorted(strange)[0]} for one. Name a folder of its own.")


def images_digest(listed: Folder) -> str:
    """What tells these images from others, wherever they lie: names, sizes, and a sample of the contents.

    `Embedded.about` has it as `images_digest`.
    """
    whole = hashlib.sha256(listed.fingerprint.encode())
    for path in listed.paths:
        try:
            whole.update(f"{os.stat(path).st_size}\n".encode())
        except OSError:  # a link that leads nowhere, for example: reading it says so
            whole.update(b"none\n")
    with suppress(OSError):
        whole.update(digest_files(stored(listed.root), listed.paths).encode())
    return whole.hexdigest()


def _refusal(lines: list[str], done: int) -> str:
    others = f", and {len(lines) - 3} others" if len(lines) > 3 else ""
    kept = f" The {done:,} files before are kept to go on from." if done else ""
    return f"cannot read {'; '.join(lines[:3])}{others}. To leave such files out: --on_error skip.{kept}"
