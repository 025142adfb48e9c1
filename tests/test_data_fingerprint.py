"""Files are told from others by names, sizes and a sample of contents, wherever they lie."""

import os
import shutil

import pytest
import torch

from simclr.data.fingerprint import compare_files, fingerprint_files

COUNT = 100  # more than are sampled


def taken(root):
    return fingerprint_files(str(root), sorted(str(path) for path in root.rglob("*.png")))


@pytest.fixture
def folder(tmp_path):
    for i in range(COUNT):
        path = tmp_path / "set" / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([i]) * (3000 + i))
    return tmp_path / "set"


def test_a_copy_elsewhere_is_the_same_and_plain_tensors_are_kept(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "far" / "away")
    was, now = taken(folder), taken(tmp_path / "far" / "away")
    assert compare_files(was, now) is None
    assert {name: (tuple(part.shape), part.dtype) for name, part in was.items()} == {
        "files": ((COUNT,), torch.int64),
        "samples": ((64, 2), torch.int64),
    }


def test_what_has_become_of_the_files_is_counted(folder):
    was = taken(folder)
    (folder / "0" / "0.png").unlink()
    os.rename(folder / "1" / "1.png", folder / "1" / "one.png")
    (folder / "2" / "new.png").write_bytes(b"x")
    with (folder / "2" / "2.png").open("ab") as file:
        file.write(b"more")
    assert compare_files(was, taken(folder)) == {"was": 100, "now": 100, "added": 2, "removed": 2, "changed": 1}


@pytest.mark.parametrize("where", [0, -1], ids=["first byte", "last byte"])
def test_contents_of_the_same_size_are_sampled_at_either_end(folder, where):
    was = taken(folder)
    for path in folder.rglob("*.png"):
        content = bytearray(path.read_bytes())
        content[where] ^= 1
        path.write_bytes(content)
    assert compare_files(was, taken(folder)) == {"was": 100, "now": 100, "added": 0, "removed": 0, "changed": 64}


def test_a_file_that_is_gone_is_named(folder):
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    os.unlink(paths[7])
    with pytest.raises(ValueError, match=paths[7]):
        fingerprint_files(str(folder), paths)
