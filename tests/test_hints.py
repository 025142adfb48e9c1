"""What people type who come from other programs: one line each that says what to type, exit code 2, nothing left."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from simclr.checkpoint import read_checkpoint
from simclr.cli import COMMANDS, hints, main
from simclr.cli.ablate import ablate_parser
from simclr.cli.check_data import check_data_parser
from simclr.cli.compare import compare_parser
from simclr.cli.duplicates import duplicates_parser
from simclr.cli.embed import embed_parser
from simclr.cli.eval import eval_parser
from simclr.cli.export import export_parser
from simclr.cli.fit import fit_parser
from simclr.cli.linear_eval import evaluation_parser
from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.parsing import Parser
from simclr.cli.predict import predict_parser
from simclr.cli.recipes import recipes
from simclr.cli.refusals import LOGGED
from simclr.cli.replay import replay_parser
from simclr.cli.report import report_parser
from simclr.cli.search import search_parser
from simclr.cli.train import TrainCLI, parse_and_build
from simclr.cli.verify import verify_parser
from simclr.module import SimCLR
from simclr.run_folder import RunFolder
from simclr.step_figures import MACHINE
from tiny import flags


def photos(root: Path, count: int = 20) -> None:
    root.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """The parsers that the commands use."""

    class Parsed(Exception):
        pass

    built = {"linear-eval": evaluation_parser(), "report": report_parser(), "compare": compare_parser()}
    built |= {"check-data": check_data_parser(), "export": export_parser(), "replay": replay_parser()}
    built |= {"eval": eval_parser(), "verify": verify_parser()}
    built |= {"embed": embed_parser(), "search": search_parser(), "duplicates": duplicates_parser()}
    built |= {"fit": fit_parser(), "predict": predict_parser()}
    built["ablate"] = ablate_parser()

    def stop(cli: TrainCLI) -> None:
        built["train"] = built["profile"] = built["supervised"] = cli.parser
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainCLI, "before_instantiate_classes", stop)
        with pytest.raises(Parsed):
            parse_and_build([], RunFolder())
    return built


def options(text: str) -> list[str]:
    """The options that a hint names, with the value it gives each."""
    found = re.findall(r"--([a-z_]\w*(?:\.\w+)*)(?: (\[[^\]]*\]|[^\s,;:]+?))?(?=[.,;:]*(?:\s|$))", text)
    return [f"--{key}={value}" for key, value in found if key not in ("version", "help", "list")]


TYPED = {
    # Options of other programs
    "train --batch_size 32": "Use --data.batch_size 32.",
    "train --batch-size 32": "Use --data.batch_size 32.",
    "train --model.batch_size 32": "Use --data.batch_size 32.",
    "train --epochs 10": "Use --trainer.max_epochs 10.",
    "train -e 10": "Use --trainer.max_epochs 10.",
    "train --max_epochs 10": "Did you mean trainer.max_epochs?",
    "train --max_epochs=10": "Did you mean trainer.max_epochs?",
    "train --lr 0.1": "Use --model.base_lr 0.1.",
    "train --lr 0.1 --epochs 5": "Use --model.base_lr 0.1. unknown key epochs. Use --trainer.max_epochs 5.",
    "train --model.lr 0.1": "Use --model.base_lr 0.1.",
    "train --wd 0.01": "Use --model.weight_decay 0.01.",
    "train --optim sgd": "Use --model.optimizer sgd.",
    "train --optim adam": "Use --model.optimizer adamw.",
    "train --tau 0.1": "Use --model.temperature 0.1.",
    "train --method byol --model.small_crops 4": "unknown key model.small_crops. It is a setting of --method simclr.",
    "train --model.target_decay 0.9": "unknown key model.target_decay. It is a setting of --method byol.",
    "train --n_local_crops 6": "Use --model.small_crops 6.",
    "train --local_crops_scale 0.1": "Use --model.small_crop_scale [0.1,0.2].",
    "train --compound_coef 3": "Use --model.encoder efficientnet --model.phi 3.",
    "train --proj_dim 64": "Use --model.projection_dim 64.",
    "train --img_size 64": "Use --model.image_size 64.",
    "train --data.image_size 64": "Use --model.image_size 64.",
    "train --resume": "resume needs a value. Use --resume auto.",
    "train --resume runs/a/checkpoints/last.ckpt": "To continue a run: --ckpt_path runs/a/checkpoints/last.ckpt.",
    "train --seed 7": "Use --seed_everything 7.",
    "train --data.seed 7": "Use --seed_everything 7.",
    "train --data photos": "Use --data.train_dir photos.",
    "train --root photos": "Use --data.train_dir photos.",
    "train --data-dir photos": "Use --data.train_dir photos for a folder of images",
    "train --data_path=photos": "Use --data.train_dir photos.",
    "train --data.train-dir photos": "Did you mean data.train_dir?",
    "train --dataset cifar10": "Use --data.source cifar10 --data.data_dir datasets.",
    "train --dataset photos": "Use --data.train_dir photos.",
    "train --dataset shapes": "Use --data.source shapes.",
    "train --val_dir photos": "Use --data.test_dir photos.",
    "train --model resnet18": "Use --model.encoder resnet18.",
    "train --arch resnet50": "Use --model.encoder resnet50.",
    "train -a resnet50": "Use --model.encoder resnet50.",
    "train --gpus 2": "Use --trainer.devices 2.",
    "train --trainer.gpus 2": "Use --trainer.devices 2.",
    "train --devices 2": "Did you mean trainer.devices?",
    "train --strategy ddp": "Did you mean trainer.strategy?",
    "train --num_workers 4": "Use --data.workers 4.",
    "train --data.num_workers 4": "Use --data.workers 4.",
    "train --amp": "Use --trainer.precision bf16-mixed.",
    "train --fp16": "Use --trainer.precision 16-mixed.",
    "train --precision 16": "Use --trainer.precision 16-mixed.",
    "train --no-cuda": "Use --trainer.accelerator cpu.",
    "train --device cuda:0": "Use --trainer.accelerator gpu.",
    "train --out results": "Use --run_dir results.",
    "train --output_dir results": "Use --run_dir results.",
    "train --trainer.default_root_dir results": "Use --run_dir results.",
    "train --exp_name first": "Use --run_dir runs/first.",
    "train --linear-eval": "simclr linear-eval runs/NAME measures a run",
    "train --version": "Use simclr --version.",
    "train --min_scale 0.2": "Use --model.crop_scale [0.2,1.0].",
    "train --cfg my.yaml": "Use --config my.yaml.",
    "profile --lr 0.1": "Use --model.base_lr 0.1.",
    "train --trainer 3": "Use --trainer.max_epochs 3.",
    # Values
    "train --model.crop_scale 0.2": "Use --model.crop_scale [0.2,1.0].",
    "train --model.crop_scale 0.2 1.0": "Use --model.crop_scale [0.2,1.0] for a list.",
    "train --model.mean 0.4": "Use --model.mean [0.4,0.4,0.4].",
    "train --model.encoder vit_small": "Did you mean vit_small_",
    "train --model.encoder runs/X/encoder.pt": "To continue a run: --ckpt_path runs/NAME. To measure it:",
    "train --trainer.precision fp16": "Use --trainer.precision 16-mixed.",
    "train --trainer.max_epochs ten": "For example --trainer.max_epochs 100.",
    "train --trainer.max_epochs": "trainer.max_epochs needs a value. Use --trainer.max_epochs 100.",
    "train --data.train_dir": "data.train_dir needs a value. Use --data.train_dir photos.",
    "train --config": "config needs a value. Use --config shapes_resnet8.",
    "train --model.optimizer Adam": "Use --model.optimizer adamw.",
    "train --trainer.callbacks EarlyStopping": "Use --trainer.callbacks.monitor train_loss_epoch.",
    # Words by themselves
    "train photos empty": "train takes one folder, not photos, empty. For test images: --data.test_dir empty.",
    "train photos --data.train_dir photos": "photos is given beside --data.train_dir, which means the same.",
    "train photo": "Did you mean",
    "train cifar10": "Use --data.source cifar10 --data.data_dir datasets.",
    "train shapes": "Use --data.source shapes.",
    "train shapes_resnet8": "Use --config shapes_resnet8.",
    "train my.yaml": "Use --config my.yaml.",
    "train last.ckpt": "To continue it: --ckpt_path last.ckpt; to measure it: simclr linear-eval last.ckpt.",
    "train help": "Use --help.",
    "train model.temperature=0.5": "Use --model.temperature 0.5.",
    "train epochs=10": "Use --trainer.max_epochs 10.",
    # Recipes and files
    "train --config shape_resnet8": "Did you mean --config shapes_resnet8?",
    "train --config configs/pretrain/shapes_resnet8.yaml": "Did you mean --config shapes_resnet8?",
    "train --config epochs.yaml": "unknown key epochs in epochs.yaml. Use trainer.max_epochs: 100.",
    "train --config linked.yaml": "Use data.batch_size: 10.",
    # Commands
    "evaluate runs/a": "Did you mean eval?",
    "linear_eval": "Did you mean linear-eval?",
    "pretrain photos": "Did you mean train?",
    "pretrain": "Did you mean train?",
    "--linear-eval": "Did you mean linear-eval?",
    "--epochs 10": "Begin with simclr train, supervised, linear-eval, eval, verify, report, profile, compare, "
    "ablate, export, embed, search, duplicates, fit, predict, check-data, replay.",
    "photos": "Use simclr train photos.",
    "my.yaml": "Use simclr train --config my.yaml.",
    "help": "Use simclr --help",
    "version": "Use simclr --version.",
    # The other commands
    "linear-eval": "Use simclr linear-eval runs/NAME.",
    "linear-eval --run_dir runs/x": "Use --checkpoint runs/x.",
    "linear-eval --lr 0.3": "Use --base_lr 0.3.",
    "linear-eval --k 20": "Use --knn_k 20.",
    "linear-eval --gpus 1": "Use --device cuda.",
    "linear-eval --data photos": "Use --data.train_dir photos.",
    "linear-eval --data.image_size 64": "images have the size that the encoder was trained on",
    "linear-eval --model.encoder resnet18": "Use --checkpoint runs/NAME.",
    "linear-eval runs/a runs/b": "linear-eval takes one folder",
    "eval": "Use simclr eval runs/NAME.",
    "eval --run_dir runs/x": "Use --checkpoint runs/x.",
    "eval --k 20": "Use --knn.k 20.",
    "eval --lr 0.3": "Use --linear.base_lr 0.1, or --heads.lrs [0.01,0.1] for a choice.",
    "eval --task knn": "Use --protocols knn,logreg.",
    "eval --knn.kk 5": "Did you mean knn.k?",
    "eval runs/a runs/b": "eval takes one folder",
    "eval --out x": "eval.json and eval.md are written into the run's folder.",
    "verify": "Use simclr verify runs/NAME.",
    "verify --checkpoint runs/x": "Use --run runs/x.",
    "verify empty": "no eval.json and no linear_eval.json in empty. Measure the run first: simclr eval empty",
    "recompute runs/x": "Did you mean verify?",
    "report": "Use simclr report runs/NAME.",
    "report --checkpoint runs/x": "Use --run_dir runs/x.",
    "report --out page.html": "report.html is written into the run's folder",
    "compare": "Use simclr compare runs/NAME runs/OTHER.",
    "export": "Use simclr export runs/NAME.",
    "export runs/x --out_dir y": "Use --out y.",
    "export runs/x --onnx": "Use --format onnx, torchvision, timm, safetensors or torch-export.",
    "export runs/x --torchscript": "Use --format torch-export.",
    "export runs/x --format onxx": "Did you mean onnx?",
    "export runs/x --checkpoint runs/y": "Use --encoder runs/y.",
    "export photos": "no checkpoints/last.ckpt in photos.",
    "compare --out x.html": "Use --html x.html.",
    "embed": "Use simclr embed photos --encoder runs/NAME --out features.",
    "embed photos --encoder runs/x": "out is missing. Use --out features.",
    "embed photos --checkpoint runs/x": "Use --encoder runs/x.",
    "embed photos --data other": "Use --images other.",
    "embed photos --resume": "the same command given again goes on.",
    "embed photos --out x": "encoder is missing. Use --encoder runs/NAME.",
    "search": "image is missing. Use simclr search photo.jpg --in features.",
    "search photos/0.png": "in is missing. Use --in features.",
    "search photos/0.png --index x": "Use --in x.",
    "duplicates": "folder is missing. Use simclr duplicates photos.",
    "duplicates photos --threshold 0.9": "Use --min_cosine 0.9.",
    "dedup photos": "Did you mean duplicates?",
    "fit runs/x": "data.train_dir is missing. Use --data.train_dir labelled.",
    "fit --data.train_dir photos": "encoder is missing. Use simclr fit runs/NAME --data.train_dir labelled.",
    "predict photos": "classifier is missing. Use --classifier runs/NAME.",
    "predict photos --checkpoint runs/x": "Use --classifier runs/x.",
    "extract photos": "Did you mean embed?",
    "replay": "Use simclr replay runs/NAME/nonfinite_step_N.pt.",
    "replay --run_dir runs/x": "Use simclr replay runs/NAME/nonfinite_step_N.pt.",
    "replay --precision bf16": "the run's precision and finer ones are computed.",
    "replay empty": "no dump of a step at empty. A run that met numbers not finite has RUN/nonfinite_step_N.pt.",
    "replay my.yaml": "my.yaml is a file of settings.",
    "train --skip_nan": "Use --on_nonfinite skip.",
    "train --terminate_on_nan true": "a loss or gradient that is not finite stops the run.",
    "train --on_nonfinite ignore": "on_nonfinite=ignore is not one of stop, skip.",
    "reproduce empty": "Did you mean replay?",
    "ablate": "which experiment? Use simclr ablate NAME; simclr ablate --list shows all.",
    "ablate temprature": "unknown experiment temprature. Did you mean temperature?",
    "ablate colour-strength": "Did you mean color-strength?",
    "ablate head losses": "ablate runs one experiment at a time, not head, losses.",
    "ablate head --seed 3": "Use --seeds 3.",
    "ablate head --num_workers 2": "Use --jobs 2.",
    "ablate head --data photos": "Use --images photos.",
    "ablate head --seeds 0": "seeds=0 is not 1 or more.",
    "ablate head --jobs 0": "jobs=0 is not 1 or more.",
    "ablate head --full": "full needs real images. Add --images FOLDER",
    "ablate head --images photos": "images=photos has no folder train.",
    "ablate head --resume": "the same command given again goes on",
    "ablate my.yaml": "my.yaml is no experiment",
    "ablate --page docs/found.html": "found.html is no Markdown file. Give it a name that ends in .md.",
    "ablate --page found.md": "ablations holds no experiment. Run one there: simclr ablate NAME --out",
    "ablation": "Did you mean ablate?",
    "compare photos empty": "photos: is not a run, and holds none; empty: is not a run",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_wrongly_gets_the_line_that_says_what_to_type(typed, tmp_path, monkeypatch, capsys, parsers):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "my.yaml").touch()
    (tmp_path / "epochs.yaml").write_text("epochs: 10\n")
    (tmp_path / "linked.yaml").write_text("model: {batch_size: 10}\n")
    before = sorted(tmp_path.rglob("*"))
    command, *rest = shlex.split(typed)
    with pytest.raises(SystemExit) as stopped:
        main([command, *rest])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    assert TYPED[typed] in said.err
    assert sorted(tmp_path.rglob("*")) == before  # not even an empty folder
    named = {option[2:].partition("=")[0] for option in options(TYPED[typed])} - {"config", "trainer.callbacks.monitor"}
    assert named <= set(parsers[command].keys() if command in parsers else [])


def test_there_are_enough():
    assert len(TYPED) >= 45


ALL_HINTS = [(command, name, text) for command, table in hints.HINTS.items() for name, text in table.items()]
ALL_HINTS += [("train", name, text) for name, text in hints.GROUPS.items()]
ALL_HINTS += [("train", key, f"--{key} {value}") for key, value in hints.EXAMPLES.items() if key != "checkpoint"]
ALL_HINTS += [
    ("linear-eval" if key == "protocol" else "train", key, f"--{key} {value}")
    for key, values in hints.VALUES.items()
    for value in values.values()
]


def test_no_hint_names_what_would_be_refused(parsers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    needed = {"linear-eval": "--checkpoint=x", "report": "--run_dir=x", "compare": "--runs=[x]"}
    needed |= {"check-data": "--train_dir=x", "export": "--encoder=x", "replay": "--dump=x"}
    needed |= {"eval": "--checkpoint=x", "verify": "--run=x"}
    more = {"embed": ["--images=x", "--encoder=x", "--out=x"]}
    more |= {"search": ["--image=x", "--in=x"], "duplicates": ["--folder=x"]}
    more |= {"fit": ["--encoder=x", "--data.train_dir=x"], "predict": ["--images=[x]", "--classifier=x"]}

    def given(command: str) -> list[str]:
        return [needed[command]] if command in needed else more.get(command, [])

    together: dict[str, set[str]] = {command: set() for command in parsers}
    for command, name, text in {(c, n if t.startswith("Leave") else "", t) for c, n, t in ALL_HINTS}:
        said = hints._use(text, None)
        assert "{" not in said, said
        named = [f"{option}30m" if option.endswith("=") else option for option in options(said)]  # of a time alone
        assert named or text.startswith(("Leave it out: ", "Use simclr")), (name, text)
        for other in re.findall(r"simclr ([a-z-]+)", said):
            assert other in (*COMMANDS, "--version"), said
        # What belongs to an object that another option names needs this one beside it: by itself.
        if any(option.count(".") > 1 for option in named):
            parsers[command].parse_args([*given(command), *named])
        together[command] |= set(named)
    for command, named in together.items():
        while named:  # an option a time: all that it was given
            once = {option.partition("=")[0]: option for option in sorted(named)}
            parsers[command].parse_args([*given(command), *once.values()])
            named -= set(once.values())


def test_no_hint_is_for_an_option_that_exists(parsers):
    """It would never be said: nobody keeps such a line right."""
    for command, table in hints.HINTS.items():
        assert not table.keys() & (set(parsers[command].keys()) - hints.GROUPS.keys()), command


def test_every_command_that_is_meant_exists():
    assert hints.COMMANDS.keys() <= COMMANDS.keys()


def test_a_key_that_follows_another_is_never_suggested(parsers):
    assert parsers["train"].linked == {
        "model.seed": "seed_everything",
        "data.seed": "seed_everything",
        "model.batch_size": "data.batch_size",
        "data.image_size": "model.image_size",
        "model.channels": "data.channels",
    }
    assert not parsers["train"].linked.keys() & set(parsers["train"].keys())


def test_a_folder_by_itself_is_the_one_a_command_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    small = flags({"trainer.max_epochs": 1, "knn.every_n_epochs": 0, "quality.every_n_epochs": 0})
    main(["train", "photos", *small])
    assert read_checkpoint("runs/photos_resnet8").data["train_dir"] == str(tmp_path / "photos")
    main(["train", *small, "--run_dir", "last", "photos"])  # after the options too
    assert read_checkpoint("last").data["train_dir"] == str(tmp_path / "photos")
    capsys.readouterr()
    main(["report", "last"])
    assert (tmp_path / "last" / "report.html").exists()
    with pytest.raises(SystemExit):
        main(["linear-eval", "last"])
    assert "photos has no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["train", "supervised", "linear-eval", "report", "profile", "check-data", "replay", "eval", "verify", "ablate"],
)
def test_help_says_what_stands_by_itself_and_names_the_recipes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    place = {
        "linear-eval": "RUN",
        "report": "RUN",
        "replay": "DUMP",
        "eval": "RUN",
        "verify": "RUN",
        "ablate": "NAME",
        "supervised": "RUN or FOLDER",
    }.get(command, "FOLDER")
    assert said.startswith(f"usage: simclr {command} [{place}] [options]\n")
    kind = "linear_eval" if command == "linear-eval" else "pretrain"
    assert command in ("report", "check-data", "replay", "eval", "verify", "ablate") or all(
        name in said for name in recipes(kind)
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.val_check_interval=5", "a pretraining run has no validation loop. Leave it out"),
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches=0 leaves no step"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 is not 1 or more"),
        ("--trainer.max_epochs=0", "trainer.max_epochs=0 trains nothing"),
        ("--trainer.devices=-1", "is not 1 or more"),
        ("--trainer.callbacks=BatchSizeFinder", "Set --data.batch_size"),
        ("--trainer.callbacks=LearningRateFinder", "Set --model.base_lr"),
        (
            "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val_loss",
            "EarlyStopping watches val_loss, which is not logged. Watch one of train_loss_epoch, knn_top1",
        ),
        ("--trainer.strategy=quantum", "invalid strategy name"),
        ("--trainer.plugins=quantum", "trainer.plugins=quantum is not"),
        ("--trainer.profiler=quantum", "'simple', 'advanced', 'pytorch', 'xla'"),
        ("--trainer.limit_val_batches=-1", "limit_val_batches"),
        ("--trainer.reload_dataloaders_every_n_epochs=-1", "reload_dataloaders_every_n_epochs"),
        ("--trainer.deterministic=maybe", "trainer.deterministic=maybe is not bool or one of warn"),
        ("--trainer.overfit_batches=1.5", "overfit_batches"),
        ("--trainer.num_nodes=0", "num_nodes"),
        ("--trainer.logger=CSVLogger", "save_dir is missing"),
        ("--trainer.callbacks=Timer", "a setting cannot be written to config.yaml"),
        (
            "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.save_top_k=3",
            "not a valid configuration. No quantity for top_k to track.\n",
        ),
    ],
)
def test_what_lightning_cannot_do_is_refused_before_a_folder_is_made(option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = {part.partition("=")[0] for part in option.split()}
    with pytest.raises(SystemExit) as stopped:
        main(["train", *(flag for flag in flags({}) if flag.partition("=")[0] not in taken), *option.split()])
    said = capsys.readouterr()
    assert stopped.value.code == BAD_INPUT
    assert said.out == ""  # not even the summary
    assert said.err.count("\n") == 1, said.err
    assert message in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MisconfigurationException, ValueError, RuntimeError])
@pytest.mark.parametrize("folder", ["runs/a", "there"])
def test_what_fails_before_the_first_step_leaves_nothing(error, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()

    def step(*args):
        raise error("this cannot be done")

    monkeypatch.setattr(SimCLR, "training_step", step)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *flags({"run_dir": folder})])
    assert stopped.value.code == (FAILED if error is RuntimeError else BAD_INPUT)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    if error is not RuntimeError:  # which is nobody's bad input
        assert capsys.readouterr().err.startswith("error: this cannot be done (SIMCLR_TRACEBACK=1 shows where)\n")


def test_what_fails_later_leaves_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = SimCLR.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 1:
            raise ValueError("an image cannot be read")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SimCLR, "training_step", step)
    with pytest.raises(SystemExit):
        main(["train", *flags({"run_dir": "run"})])
    assert (tmp_path / "run" / "config.yaml").exists()


def test_callbacks_may_watch_what_is_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "train",
            *flags(
                {"run_dir": "run", "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 1, "probe.every_n_epochs": 1}
            ),
        ]
    )
    names = {"device_memory_gib"}  # of a GPU
    for file in ("metrics.csv", "machine.csv"):
        names |= set((tmp_path / "run" / file).read_text().splitlines()[0].split(","))
    assert names - {"epoch", "step"} == set(LOGGED) | set(MACHINE)
