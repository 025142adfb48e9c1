"""simclr embed: the encoder's own features, row by row; killed and gone on with to the bit; nothing half-written."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import forked
from simclr import load_encoder
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.use import embed as embedding
from simclr.use.embed import embed_folder
from simclr.use.embedded import ABOUT, FEATURES, PATHS, STATE, names_as_lines, names_of, read_embedded
from simclr.use.source import open_source
from tiny import fit, tiny_model

SIZES = [(16, 16), (40, 17), (9, 30), (64, 64), (1, 1), (3, 200)]


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZES[seed % len(SIZES)], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(folder, tiny_model(), max_epochs=1).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty-three, nested and flat, of any sizes, with names that are hard on lists of names."""
    root = tmp_path_factory.mktemp("images") / "photos"
    for seed in range(19):
        picture(root / ("a" if seed % 2 else "b/deep") / f"{seed:02}.png", seed)
    for seed, name in enumerate(["line\nbreak.png", "back\\slash\\n.png", 'comma,"quote".jpg', "-ü [red].png"], 19):
        picture(root / name, seed)
    return root


def test_a_row_is_what_the_encoder_gives_for_the_file(run, photos, tmp_path):
    found = embed_folder(str(photos), open_source(run), tmp_path / "out", batch_size=5)
    encoder = load_encoder(run)
    assert sorted(found.names) == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))
    assert found.features.dtype == np.float32
    for row, name in enumerate(found.names):
        with torch.no_grad():
            wanted = encoder(encoder.transform(photos / name))[0].numpy()
        np.testing.assert_allclose(found.features[row], wanted, rtol=1e-4, atol=1e-5)
    assert np.array_equal(np.load(tmp_path / "out" / FEATURES), found.features)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [ABOUT, FEATURES, PATHS]


def test_processes_that_decode_change_no_bit(run, photos, tmp_path):
    here, there = (
        embed_folder(str(photos), open_source(run), tmp_path / str(n), batch_size=5, workers=n) for n in (0, 2)
    )
    assert (here.folder / FEATURES).read_bytes() == (there.folder / FEATURES).read_bytes()


DIES = """
import os, signal, sys
from simclr.use import embed
embed.SAVE_SECONDS = 0.0
seen = []
def advance(done, files):
    seen.append(done)
    if len(seen) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
embed.embed_folder(sys.argv[1], embed.open_source(sys.argv[2]), sys.argv[3], batch_size=5, on_error="skip",
                   advance=advance)
"""


def test_killed_and_begun_again_it_ends_in_the_same_bits(run, photos, tmp_path, monkeypatch):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "a" / "07.png").write_bytes(b"no image")
    source = open_source(run)
    whole = embed_folder(str(root), source, tmp_path / "whole", batch_size=5, on_error="skip")
    program = DIES.replace("embed.open_source", "__import__('simclr.use.source', fromlist=['x']).open_source")
    done = forked.run(["-c", program, root, run, tmp_path / "out", "4"])
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert 10 <= state["files"] < 23
    with open(tmp_path / "out" / "features.npy.unfinished", "ab") as file:
        file.write(b"rows of which the state knows nothing")
    seen = []
    again = embed_folder(str(root), source, tmp_path / "out", on_error="skip", advance=lambda n, of: seen.append(n))
    assert seen[0] == state["files"]  # not from the beginning
    assert sorted(path.name for path in again.folder.iterdir()) == [ABOUT, FEATURES, PATHS]
    for name in (FEATURES, PATHS, ABOUT):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert whole.about["unreadable"] == [["a/07.png", "not an image in a known format"]]


@pytest.mark.parametrize("operation", range(1, 12))
def test_an_error_between_any_two_of_the_last_files_is_gone_on_from(operation, run, photos, tmp_path, monkeypatch):
    """The names of the whole files are given one after the other; whatever stops that, the rest follows."""
    source = open_source(run)
    whole = embed_folder(str(photos), source, tmp_path / "whole", batch_size=8)
    seen = [0]

    class Stopped(BaseException):
        pass

    def counted(real):
        def work(*args, **kwargs):
            seen[0] += 1
            if seen[0] == operation:
                raise Stopped
            return real(*args, **kwargs)

        return work

    with monkeypatch.context() as patch:
        patch.setattr(embedding.GrowingFile, "finish", counted(embedding.GrowingFile.finish))
        patch.setattr(embedding.GrowingFile, "to_disk", counted(embedding.GrowingFile.to_disk))
        patch.setattr(embedding, "write_atomically", counted(embedding.write_atomically))
        patch.setattr(embedding, "_tidy", counted(embedding._tidy))
        try:
            embed_folder(str(photos), source, tmp_path / "out", batch_size=8)
        except Stopped:
            pass
        else:
            assert operation > 6
    again = embed_folder(str(photos), source, tmp_path / "out", batch_size=8)
    assert (again.folder / FEATURES).read_bytes() == (whole.folder / FEATURES).read_bytes()
    assert sorted(path.name for path in again.folder.iterdir()) == [ABOUT, FEATURES, PATHS]


def test_names_survive_lists_of_names(photos):
    names = ["a/b.png", "line\nbreak", "ret\rurn", "back\\slash", "\\n", os.fsdecode(b"\xff.png"), "ü"]
    assert names_of(names_as_lines(names)) == names
    assert names_as_lines(names).count(b"\n") == len(names)


@pytest.mark.parametrize("format", ["csv", "npz", "parquet"])
def test_other_programs_read_the_same_numbers(format, run, photos, tmp_path, capsys):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    main(["embed", str(photos), "--encoder", str(run), "--out", str(tmp_path / "out"), "--format", format])
    found, file = read_embedded(tmp_path / "out"), tmp_path / "out" / f"features.{format}"
    if format == "npz":
        with np.load(file) as content:
            names, features = content["paths"].tolist(), content["features"]
    elif format == "csv":
        with open(file, newline="", encoding="utf-8") as text:
            head, *rows = csv.reader(text)
        assert head[:2] == ["path", "f0"]
        names, features = [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=np.float32)
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(file)
        names, features = table["path"].to_pylist(), np.array(table["features"].to_pylist(), dtype=np.float32)
    assert names == found.names
    assert np.array_equal(features, found.features)
    assert "features of 23 images" in capsys.readouterr().out
    # Given again nothing is computed, also for another form.
    main(["embed", str(photos), "--encoder", str(run), "--out", str(tmp_path / "out"), "--format", "csv"])
    assert "was whole already" in capsys.readouterr().out


def test_a_stock_network_gives_what_torchvision_gives(tmp_path, photos):
    torch.manual_seed(1)
    network = torchvision.models.resnet18().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "weights.pth")
    source = open_source("torchvision:resnet18", weights=tmp_path / "weights.pth", prefix="module.", image_size=64)
    assert source.dropped == ["fc.weight", "fc.bias"]
    network.fc = nn.Identity()
    squares = torch.randint(0, 256, (3, 3, source.side, source.side), dtype=torch.uint8)
    with torch.no_grad():
        wanted = network(source.transform(squares))
    torch.testing.assert_close(source.features(squares), wanted, rtol=1e-4, atol=1e-5)
    assert (source.transform.mean, source.transform.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert open_source("torchvision:resnet18", random_weights=True).transform.image_size == 224
    same = [open_source("torchvision:resnet18", random_weights=True).identity for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "convnext_tiny", "googlenet"])
def test_of_stock_networks_the_classifier_is_left_out_and_nothing_else(name, tmp_path):
    options = {"init_weights": False} if name == "googlenet" else {}
    torch.save(torchvision.models.get_model(name, weights=None, **options).state_dict(), tmp_path / "w.pth")
    source = open_source(f"torchvision:{name}", weights=tmp_path / "w.pth")
    assert source.dropped
    assert all(key.startswith(("classifier", "fc", "aux")) for key in source.dropped)


def test_an_exported_graph_embeds(run, photos, tmp_path):
    from simclr.export.formats import export_encoder

    export_encoder(run, "torch-export", tmp_path / "graph", preprocessing="inside")
    graph = embed_folder(str(photos), open_source(tmp_path / "graph"), tmp_path / "a", batch_size=5)
    plain = embed_folder(str(photos), open_source(run), tmp_path / "b", batch_size=5)
    assert np.abs(graph.features - plain.features).max() <= 1e-3


REFUSED = {
    "embed photos --encoder nowhere --out out": "no checkpoint at nowhere",
    "embed nowhere --encoder RUN --out out": "images=nowhere does not exist",
    "embed empty --encoder RUN --out out": "images=empty holds no images",
    "embed broken --encoder RUN --out out": "cannot read",
    "embed broken --encoder RUN --out out --on_error skip": "none of the 2 images in broken can be read",
    "embed photos --encoder RUN --out taken": "out=taken holds other files, mine.txt for one",
    "embed photos --encoder RUN --out taken/mine.txt": "out=taken/mine.txt is a file",
    "embed photos --encoder torchvision:resnet18 --out done --random_weights true": "holds features of another encoder",
    "embed broken --encoder RUN --out done": "holds features of other images",
    "embed photos --encoder torchvision:resnet18 --out out": "needs weights, and none are downloaded",
    "embed photos --encoder torchvision:resnet81 --out out --random_weights true": "Did you mean resnet18",
    "embed photos --encoder torchvision:resnet18 --weights w.pth --out out": "w.pth does not fit torchvision:resnet18",
    "embed photos --encoder torchvision:resnet18 --weights no.pth --out out": "no.pth is no file",
    "embed photos --encoder torchvision:resnet18 --weights photos/0.png --out out": "cannot be read as weights",
    "embed photos --encoder RUN --weights w.pth --out out": "has its own",
    "embed photos --encoder NAN --out out": "are NaN or infinite",
    "embed photos --encoder RUN --out out --batch_size 0": "batch_size=0 is not 1 or more",
    "embed photos --encoder RUN --out out --workers -1": "workers=-1 is negative",
    "embed photos --encoder RUN --out out --format xlsx": "format=xlsx is not one of",
    "embed photos --encoder RUN --out out --device gpu9": "device=gpu9 cannot be used",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(typed, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        picture(Path("photos") / f"{seed}.png", seed)
    for name in ("empty", "taken", "broken"):
        Path(name).mkdir()
    Path("taken/mine.txt").touch()
    Path("broken/a.png").write_bytes(b"no image")
    Path("broken/b.jpg").touch()
    torch.save({"one": torch.zeros(1)}, "w.pth")
    if "done" in typed:
        embed_folder("photos", open_source(run), "done")
    if "NAN" in typed:
        torch.manual_seed(0)
        network = torchvision.models.resnet18()
        network.fc = nn.Identity()
        with torch.no_grad():  # finite weights, infinite features
            network.bn1.weight.fill_(3e38)
        torch.save(network.state_dict(), "nan.pth")
        typed_now = typed.replace("NAN", "torchvision:resnet18 --weights nan.pth")
    else:
        typed_now = typed
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(typed_now.replace("RUN", str(run)).split())
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert REFUSED[typed] in said
    assert said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not Path("out").exists()


def test_an_error_late_keeps_what_was_done(run, photos, tmp_path, capsys):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "b" / "deep" / "18.png").write_bytes(b"no image")
    arguments = ["embed", str(root), "--encoder", str(run), "--out", str(tmp_path / "out"), "--batch_size", "4"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert "18.png (not an image in a known format)" in said
    assert "--on_error skip. The 16 files before are kept to go on from." in said
    with pytest.raises(FileNotFoundError, match="is not finished"):
        read_embedded(tmp_path / "out")
    main([*arguments, "--on_error", "skip"])
    assert "1 could not be read and have no row" in capsys.readouterr().out
    assert len(read_embedded(tmp_path / "out").names) == 22


def test_a_folder_of_features_has_one_writer(run, photos, tmp_path):
    from simclr.files import hold

    (tmp_path / "out").mkdir()
    let_go = hold(tmp_path / "out")
    with pytest.raises(ValueError, match="is being written by another process"):
        embed_folder(str(photos), open_source(run), tmp_path / "out")
    let_go()


def test_a_damaged_folder_is_refused_by_name(run, photos, tmp_path):
    found = embed_folder(str(photos), open_source(run), tmp_path / "out")
    content = (found.folder / FEATURES).read_bytes()
    (found.folder / FEATURES).write_bytes(content[:-4])
    with pytest.raises(ValueError, match="cannot be read"):
        read_embedded(tmp_path / "out")
