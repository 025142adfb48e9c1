"""simclr.export: what leaves opens in the other library with the same features; where it does not, nothing is left."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from simclr import load_encoder
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.encoders import build_encoder
from simclr.export.card import CARD, card_text, read_card
from simclr.export.counterparts import timm_counterpart, torchvision_counterpart
from simclr.export.formats import FILES, export_encoder
from simclr.export.graph import WithPreprocessing, cubic, resampling, triangle
from simclr.inputs import InputTransform
from simclr.module import SimCLR
from tiny import fit, flags, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a network that only we have."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    fit(folder, tiny_model(), max_epochs=1).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A run of a network that everyone has, behind the small stem."""
    folder = tmp_path_factory.mktemp("runs") / "resnet18"
    torch.manual_seed(0)
    model = SimCLR("resnet18", image_size=16, batch_size=16, warmup_epochs=0)
    fit(folder, model, max_epochs=1).save_checkpoint(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_the_other_library_computes_the_same_features(format, resnet18, tmp_path, images):
    done = export_encoder(resnet18, format, tmp_path / "out")
    assert done.difference == 0
    head = read_card(done.card)
    lines = (tmp_path / "out" / CARD).read_text().split("## Use\n")[1].split("In: ")[0]
    names: dict = {}
    exec(lines.replace("\n    ", "\n").replace(head["file"], str(done.file)).strip(), names)  # as the card says it
    with torch.no_grad():
        assert torch.equal(names["network"].eval()(images), load_encoder(resnet18)(images))
        assert torch.equal(load_encoder(done.file.parent)(images), load_encoder(resnet18)(images))


@pytest.mark.parametrize("name", ["resnet50", "shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
@pytest.mark.parametrize("stem", ["imagenet", "small_stride2"])
def test_torchvision_has_a_counterpart_of_its_own_networks(name, stem):
    if stem != "imagenet" and name != "resnet50":
        pytest.skip("these have one stem")
    options = {"stem": stem} if name == "resnet50" else {}
    encoder = build_encoder(name, image_size=64, **options).eval()
    found = torchvision_counterpart({"encoder": name, "image_size": 64, "stem": stem})
    found.network.load_state_dict(encoder.state_dict())
    made: dict = {}
    exec("\n".join(found.lines), made)
    made["network"].load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.network(x), encoder(x))
        assert torch.equal(made["network"].eval()(x), encoder(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"phi": 1, "stem": "auto"},
        {"width": 0.25, "depth": 1.5, "stem": "imagenet"},
        {"width": 0.25, "stem": "small", "channels": 2},
        {"encoder": "efficientnet_b0", "stem": "small"},
    ],
)
def test_torchvision_builds_every_scaled_efficientnet(settings):
    settings = {"encoder": "efficientnet", "image_size": 32, **settings}
    options = {name: value for name, value in settings.items() if name != "encoder"}
    encoder = build_encoder(settings["encoder"], **options).eval()
    found = torchvision_counterpart(settings)
    made: dict = {}
    exec("\n".join(found.lines), made)
    x = torch.randn(2, settings.get("channels", 3), 32, 32)
    for network in (found.network, made["network"].eval()):
        network.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            assert torch.equal(network(x), encoder(x))


def test_timm_has_a_counterpart_of_its_own_networks():
    encoder = build_encoder("mobilenetv3_small_050", image_size=64).eval()
    found = timm_counterpart({"encoder": "mobilenetv3_small_050", "image_size": 64})
    found.network.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.network(x), encoder(x))


@pytest.mark.parametrize(
    ("library", "settings", "why"),
    [
        (torchvision_counterpart, {"encoder": "resnet20"}, "it is a CIFAR network. Use --format safetensors, onnx"),
        (torchvision_counterpart, {"encoder": "resnet18", "width": 2.0}, "it has width 2"),
        (torchvision_counterpart, {"encoder": "resnet18", "depth": 1.5}, "it has depth 1.5"),
        (timm_counterpart, {"encoder": "efficientnet", "phi": 0}, "Use --format torchvision"),
        (timm_counterpart, {"encoder": "resnet18", "shortcut": "C", "norm": "none"}, "shortcut C and has no normalis"),
        (torchvision_counterpart, {"encoder": "mobilenetv3_small_050"}, "It is one of timm's: use --format timm"),
        (timm_counterpart, {"encoder": "mobilenet_v2"}, "Use --format torchvision"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_to_do(library, settings, why):
    with pytest.raises(ValueError, match=why):
        library({"image_size": 32, "stem": "small", **settings})


@pytest.mark.parametrize(
    ("preprocessing", "format"),
    [
        pytest.param("outside", "onnx", marks=pytest.mark.slow),
        ("outside", "torch-export"),
        ("inside", "onnx"),
        ("inside", "torch-export"),
    ],
)
def test_a_graph_gives_the_encoders_features(format, preprocessing, run, tmp_path, images):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    done = export_encoder(run, format, tmp_path / "out", preprocessing=preprocessing)
    encoder, graph = load_encoder(run), load_encoder(tmp_path / "out")
    photo = tmp_path / "photo.png"
    pixels = np.asarray(Image.radial_gradient("L").resize((53, 38)))
    Image.fromarray(np.stack([pixels, pixels.T.copy().reshape(pixels.shape), 255 - pixels], -1)).save(photo)
    allowed = 1e-3 if preprocessing == "inside" else 1e-4 if format == "onnx" else 1e-6
    with torch.no_grad():
        wanted = encoder(encoder.transform(photo))
        if preprocessing == "outside":
            assert (graph(images) - encoder(images)).abs().max() <= allowed
        else:
            raw = torch.from_numpy(np.array(Image.open(photo))).movedim(-1, 0)[None]
            assert (graph(raw) - wanted).abs().max() <= allowed
    assert (graph(graph.transform(photo)) - wanted).abs().max() <= allowed
    assert graph.feature_dim == encoder.feature_dim
    assert done.difference <= allowed


@pytest.mark.parametrize("load_size", [32, 40])
@pytest.mark.parametrize("size", [(1, 1), (2, 90), (32, 32), (40, 40), (41, 40), (97, 64), (64, 97), (300, 131)])
def test_preprocessing_inside_is_that_of_the_transform(load_size, size):
    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)

    transform = InputTransform(32, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), load_size)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    apart = (WithPreprocessing(Pixels(), transform)(images) - transform(images).flatten(1)).abs()
    # The same bytes, but for the last bit of a weight now and then; a level of 255 would be 0.02.
    assert (apart > 1e-5).float().mean() <= 0.005
    assert apart.mean() <= 1e-4


@pytest.mark.parametrize(("kernel", "mode"), [(triangle, "bilinear"), (cubic, "bicubic")])
@pytest.mark.parametrize(("size", "out"), [(7, 5), (5, 7), (64, 9), (3, 40), (12, 12)])
def test_a_resampling_matrix_resizes_as_torch_does(kernel, mode, size, out):
    x = torch.rand(1, 2, size, size, generator=torch.Generator().manual_seed(0))
    matrix = resampling(size, out, torch.scalar_tensor(size), torch.scalar_tensor(0), kernel)
    wanted = torch.nn.functional.interpolate(x, (out, out), mode=mode, antialias=True, align_corners=False)
    assert torch.allclose(matrix @ x @ matrix.T, wanted, atol=2e-6)


def test_an_export_of_safetensors_opens_anywhere_by_itself(run, tmp_path, images):
    done = export_encoder(run, "safetensors", tmp_path / "out", license="CC0-1.0")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(done.file, alone)
    assert torch.equal(load_encoder(alone)(images), load_encoder(run)(images))
    assert "CC0-1.0" in done.card.read_text()


@pytest.mark.usefixtures("few_lambdas")
def test_a_card_tells_data_recipe_and_results(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["train", *flags({"run_dir": folder, "trainer.max_epochs": 1})])
    main(["linear-eval", str(folder)])
    main(["export", str(folder)])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"written to {folder}/export/safetensors/encoder.safetensors (")
    assert said.endswith(": the same features")
    card = folder / "export" / "safetensors" / CARD
    head, record = read_card(card), json.loads((folder / "linear_eval.json").read_text())
    assert head["results"][0]["top1"] == record["linear_top1"]
    assert head["results"][0]["encoder_sha256"] == record["encoder_sha256"]
    assert head["data"] == {"images": "built-in shapes"}
    assert (head["recipe"]["epochs"], head["recipe"]["objective"]) == (1, "NT-Xent, temperature 0.2")
    assert f"{record['linear_top1']:.1%}" in card.read_text()
    assert str(tmp_path) not in card.read_text()


REFUSED = {
    "export RUN --format torchvision": "torchvision has no counterpart of this resnet8",
    "export RUN --preprocessing inside": "format=safetensors holds weights, in which no preprocessing fits",
    "export RUN --out RUN": "is there already. Name another folder.",
    "export nowhere": "no checkpoint at nowhere",
    "export RUN --format onxx": "Did you mean onnx?",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(typed, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(typed.replace("RUN", str(run)).split())
    said = capsys.readouterr().err
    assert stopped.value.code == BAD_INPUT
    assert REFUSED[typed] in said
    assert said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_other_features_are_an_error_and_the_file_goes(run, tmp_path, monkeypatch):
    monkeypatch.setattr("simclr.export.formats.same_features", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match="gives other features than the encoder"):
        export_encoder(run, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def evil_file() -> bytes:
    """What torch.load runs if it may."""
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    return buffer.getvalue()


def test_an_archive_that_could_run_code_is_refused_before_it_does(run, tmp_path, capsys):
    export_encoder(run, "torch-export", tmp_path / "out")
    source, evil = tmp_path / "out" / FILES["torch-export"], tmp_path / "evil.pt2"
    for what in ("sample", "weights", "cut"):
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(evil, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                content = old.read(name)
                if what == "sample" and "sample_inputs" in name:
                    content = evil_file()
                if what == "weights" and "weights_config" in name:
                    content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
                elif what == "weights" and "weights/" in name:
                    content = evil_file()
                new.writestr(name, content)
        if what == "cut":
            evil.write_bytes(source.read_bytes()[:-2000])
        with pytest.raises(ValueError, match=r"no archive of torch\.export, or holds more than a network"):
            load_encoder(evil)
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert "ran" not in capsys.readouterr().out


def test_files_of_other_programs_are_refused_by_name(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="cannot be read as ONNX"):
        load_encoder(tmp_path / "x.onnx")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "x.pt2")
    with pytest.raises(ValueError, match="was not exported by simclr: it lacks encoder"):
        load_encoder(tmp_path / "x.pt2")
    with pytest.raises(FileNotFoundError, match="no exported encoder"):
        load_encoder(tmp_path / "y.onnx")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hello", "is not the card of an exported encoder"),
        ("---\n[\n---\n", "cannot be read"),
        ("---\n!!python/object/apply:print ['ran']\n---\n", "cannot be read"),
        ("---\nsimclr_export: 99\nfile: x\nencoder: {}\n---\n", "is of version 99 of the card"),
    ],
)
def test_a_foreign_card_is_refused(text, why, tmp_path):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(ValueError, match=why):
        load_encoder(tmp_path)


def test_a_card_without_results_says_how_to_get_them():
    head = {"simclr_export": 1, "format": "onnx", "file": "x", "encoder": {"encoder": "resnet18"}, "data": {}}
    head |= {"recipe": {}, "results": [], "license": None, "output": {"shape": "(N, 4)"}}
    fed = {"image_size": 32, "load_size": 40, "mean": [0.5] * 3, "std": [0.1] * 3, "preprocessing": "outside"}
    text = card_text({**head, "input": {"shape": "(N, 3, 32, 32)", "values": "float32", **fed}}, "h = network(x)")
    assert "simclr linear-eval RUN" in text
    assert "of it the evaluation crop of 32 px" in text
    assert "Not recorded." in text
