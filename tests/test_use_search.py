"""simclr search and simclr duplicates: what a double loop finds, and a sheet of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr.cli import main
from simclr.cli import search as command
from simclr.cli.messages import BAD_INPUT
from simclr.use import index as indexing
from simclr.use import search as searching
from simclr.use.alike import alike_by_features, groups_of
from simclr.use.embed import embed_folder
from simclr.use.embedded import ABOUT, FEATURES, Embedded
from simclr.use.search import nearest_rows
from simclr.use.source import open_source
from tiny import fit, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(folder, tiny_model(), max_epochs=1).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Smooth pictures: ten of their own, a copy in another format, one a little lighter."""
    monkeypatch.chdir(tmp_path)
    root = Path("photos")
    (root / "a").mkdir(parents=True)
    for seed in range(10):
        coarse = np.random.default_rng(seed).integers(0, 200, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(root / "a" / f"{seed}.png")
        if seed == 3:
            picture.save(root / "copy [3].bmp")
        if seed == 5:
            Image.fromarray((np.asarray(picture) + 3).astype(np.uint8)).save(root / "lighter.png")
    return root


def rows(features: np.ndarray, folder: Path = Path("x")) -> Embedded:
    return Embedded(folder, features, [f"{i}.png" for i in range(len(features))], {"images": "."})


@pytest.mark.parametrize("k", [1, 7, 500])
def test_the_nearest_are_those_of_a_loop_over_all(k, monkeypatch):
    monkeypatch.setattr(searching, "_NUMBERS", 30 * 5)  # chunks of 30 rows
    noise = np.random.default_rng(0)
    features = noise.normal(size=(100, 5)).astype(np.float32)
    features[70] = features[20]  # equal: the earlier comes first
    query = features[20] * 3
    cosines = [
        float(row.astype(float) @ query / np.linalg.norm(row.astype(float)) / np.linalg.norm(query)) for row in features
    ]
    wanted = sorted(range(100), key=lambda i: (-round(cosines[i], 9), i))[:k]
    found = searching.nearest_rows(rows(features), torch.from_numpy(query), k)
    assert [row for row, _ in found] == wanted
    assert np.allclose([cosine for _, cosine in found], [cosines[i] for i in wanted], atol=1e-6)


@pytest.mark.parametrize("size", [1, 50, 130])
def test_alike_by_features_is_a_double_loop(size, monkeypatch):
    monkeypatch.setattr("simclr.use.alike._ROWS", 32)
    features = np.random.default_rng(1).normal(size=(size, 3)).astype(np.float32)
    unit = features.astype(float) / np.linalg.norm(features.astype(float), axis=1, keepdims=True)
    wanted = []
    for i in range(size):
        near = [j for j in range(i) if unit[i] @ unit[j] >= 0.97]
        wanted += [(i, near[0])] if near else []
    found = alike_by_features(features, 0.97)
    assert [(i, j) for i, j, _ in found] == wanted
    assert all(abs(cosine - unit[i] @ unit[j]) < 1e-6 for i, j, cosine in found)


def test_pairs_become_groups():
    assert groups_of([("b", "a"), ("d", "c"), ("e", "b"), ("c", "e"), ("z", "y")]) == [list("abcde"), ["y", "z"]]
    assert groups_of([]) == []


def test_a_search_ends_in_a_table_a_sheet_and_json(run, photos, tmp_path, capsys):
    embed_folder("photos", open_source(run), "features")
    (photos / "a" / "7.png").unlink()  # the sheet says so, and the search goes on
    main(["search", "photos/copy [3].bmp", "--in", "features", "--k", "11", "--json", "found.json"])
    said = capsys.readouterr().out
    found = json.loads(Path("found.json").read_text())
    assert [hit["name"] for hit in found["hits"][:2]] == ["a/3.png", "copy [3].bmp"]
    assert found["hits"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert "copy [3].bmp" in said
    assert len(found["hits"]) == 11
    with Image.open("features/search.png") as sheet:
        assert sheet.size == (5 * 168 + 8, 3 * 208 + 8)
        query, nearest = (np.asarray(sheet.crop((x, 8, x + 160, 168))) for x in (8, 176))
    assert np.abs(query[4:-4, 4:-4].astype(int) - nearest[4:-4, 4:-4]).max() == 0


def test_an_encoder_that_moved_is_named_and_another_refused(run, photos, tmp_path, capsys):
    moved = tmp_path / "moved"
    run_copy = tmp_path / "run"
    (run_copy / "checkpoints").mkdir(parents=True)
    (run_copy / "checkpoints" / "last.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    embed_folder("photos", open_source(run_copy), "features")
    run_copy.rename(moved)
    main(["search", "photos/a/1.png", "--in", "features", "--encoder", "moved"])
    fit(tmp_path / "other", tiny_model(), max_epochs=2).save_checkpoint(tmp_path / "other/checkpoints/last.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["search", "photos/a/1.png", "--in", "features", "--encoder", "other"])
    assert "is not the encoder that these features are of" in capsys.readouterr().err


def test_duplicates_of_three_kinds_are_told_apart(run, photos, capsys):
    Path("photos/void.jpg").touch()
    main(
        [
            "duplicates",
            "photos",
            "--encoder",
            str(run),
            "--min_cosine",
            "0.999999",
            "--copies",
            "copies.txt",
            "--json",
            "f.json",
        ]
    )
    said = capsys.readouterr().out
    found = json.loads(Path("f.json").read_text())
    assert found["groups"]["exact"] == [["photos/a/3.png", "photos/copy [3].bmp"]]
    assert found["groups"]["near"] == [["photos/a/5.png", "photos/lighter.png"]]
    assert Path("copies.txt").read_text().splitlines() == ["copy [3].bmp", "lighter.png"]
    assert "the same pixels: 1 beside the first of its group" in said
    assert "1 image cannot be read" in said
    embed_folder("photos", open_source(run), "features", on_error="skip")
    main(["duplicates", "photos", "--in", "features", "--min_cosine", "0.01"])
    said = capsys.readouterr().out
    assert "are many: of this encoder a cosine of 0.01 tells no copies" in said
    assert "nearly the same features (cosine 0.01 or more): " in said
    assert "the images have changed" not in said


def test_features_made_before_the_folder_changed_are_told_and_of_a_moved_folder_serve(run, photos, capsys):
    embed_folder("photos", open_source(run), "features")
    Path("photos").rename("moved")
    main(["duplicates", "moved", "--in", "features"])
    assert "have changed" not in capsys.readouterr().out
    Path("moved").rename("photos")
    Path("photos/a/0.png").write_bytes(Path("photos/a/1.png").read_bytes())
    main(["duplicates", "photos", "--in", "features"])
    assert "note: the images have changed since features was made: embed them again" in capsys.readouterr().out


def clusters(size: int, folder: Path) -> Embedded:
    """Features in groups, as those of images are, in a folder."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(20, 16))
    features = (centres[draw.integers(0, 20, size)] + 0.5 * draw.normal(size=(size, 16))).astype(np.float32)
    (folder / ABOUT).write_text("{}")
    return rows(features, folder)


def test_an_index_finds_nearly_all_that_a_loop_over_all_finds_and_is_made_once(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="needs the extra simclr[faiss]")
    embedded = clusters(6000, tmp_path)
    queries = torch.from_numpy(embedded.features[::300] + 0.1)
    made = []
    new = indexing._new_index
    monkeypatch.setattr(indexing, "_new_index", lambda *of: made.append(of) or new(*of))
    hits, found = 0, []
    for query in queries:
        exact = dict(nearest_rows(embedded, query, 10))
        found.append(indexing.indexed_rows(embedded, query, 10))
        hits += len(exact.keys() & dict(found[-1]).keys())
        assert [cosine for _, cosine in found[-1]] == sorted((cosine for _, cosine in found[-1]), reverse=True)
        for row, cosine in found[-1]:
            a, b = query.double().numpy(), embedded.features[row].astype(np.float64)
            assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)
    assert hits >= 0.95 * 10 * len(queries)
    assert len(made) == 1
    [file] = tmp_path.glob("*.faiss")
    file.write_bytes(file.read_bytes()[:1000])  # damaged: made anew
    assert indexing.indexed_rows(embedded, queries[0], 10) == found[0]
    (tmp_path / ABOUT).write_text("{ }")  # of other features
    indexing.indexed_rows(embedded, queries[0], 10)
    assert len(made) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".faiss", ".faiss", ".json"]
    with pytest.raises(ValueError, match="the query has 3 numbers"):
        indexing.indexed_rows(embedded, torch.ones(3), 1)


def test_a_large_folder_is_searched_by_an_index_where_there_is_faiss(run, photos, monkeypatch, capsys):
    embed_folder("photos", open_source(run), "features")
    monkeypatch.setattr(command, "LARGE", 5)
    with monkeypatch.context() as without:
        without.setattr(indexing, "has_faiss", lambda: False)
        without.setattr(command, "has_faiss", lambda: False)
        main(["search", "photos/a/0.png", "--in", "features", "--k", "2"])
        assert "note: looked at all 12 rows; pip install 'simclr[faiss]'" in capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            main(["search", "photos/a/0.png", "--in", "features", "--exact", "false"])
        assert stopped.value.code == BAD_INPUT
        assert "exact=false needs faiss: pip install 'simclr[faiss]'" in capsys.readouterr().err
    pytest.importorskip("faiss", reason="needs the extra simclr[faiss]")
    main(["search", "photos/a/0.png", "--in", "features", "--k", "2", "--json", "by_index.json"])
    assert "note: by an index that misses" in capsys.readouterr().out
    main(["search", "photos/a/0.png", "--in", "features", "--k", "2", "--json", "all.json", "--exact", "true"])
    assert "note" not in capsys.readouterr().out
    by_index, all_rows = (json.loads(Path(name).read_text()) for name in ("by_index.json", "all.json"))
    assert by_index["hits"] == all_rows["hits"]  # one list is all there is
    assert (by_index["exact"], all_rows["exact"]) == (False, True)


REFUSED = {
    "search nowhere.png --in features": "image=nowhere.png is no file",
    "search photos --in features": "image=photos is no file",
    "search photos/a/0.png --in photos": "photos holds no features: it has no about.json",
    "search photos/a/0.png --in features --k 0": "k=0 is not 1 or more",
    "search photos/a/0.png --in nan": "the features in nan are NaN or infinite in 1 of 12 rows",
    "search text.png --in features": "cannot read 1 image file",
    "search photos/a/0.png --in features --png no/where.png": "png=no/where.png cannot be written",
    "search photos/a/0.png --in features --device gpu9": "device=gpu9 cannot be used",
    "duplicates nowhere": "folder=nowhere does not exist",
    "duplicates photos --min_cosine 2": "min_cosine=2.0 is not above 0 and at most 1",
    "duplicates photos --in photos": "holds no features",
    "duplicates photos --in features --encoder RUN": "in and encoder: give one of them",
    "duplicates photos --encoder nowhere": "no checkpoint at nowhere",
    "duplicates photos --in nan": "features are NaN or infinite",
    "duplicates namesakes --in features": "whose images have the names of those in namesakes and are others.",
    "duplicates photos --json no/where.json": "json=no/where.json cannot be written",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(typed, run, photos, tmp_path, capsys):
    embed_folder("photos", open_source(run), "features")
    Path("text.png").write_text("no image")
    if "namesakes" in typed:
        shutil.copytree("photos", "namesakes")
        Path("namesakes/a/0.png").write_bytes(Path("photos/a/1.png").read_bytes())
    if "nan" in typed:
        Path("features").rename("nan")
        content = bytearray(Path("nan", FEATURES).read_bytes())
        content[-4:] = np.float32(np.nan).tobytes()
        Path("nan", FEATURES).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(typed.replace("RUN", str(run)).split())
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert REFUSED[typed] in said
    assert said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
