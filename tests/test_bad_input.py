"""What is wrong in a command line, a config or a file: the one line that each gets, its exit code, nothing left."""

import os
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from pytorch_lightning import Callback

from simclr.cli import main
from simclr.cli import train as command
from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.refusals import check_devices
from simclr.data.kinds import extensions
from simclr.module import SimCLR
from tiny import flags

CONFIGS = {
    "empty": b"",
    "comment": b"# nothing\n",
    "list": b"- a\n- b\n",
    "word": b"hello\n",
    "binary": bytes(range(256)),
    "latin": "model: {encoder: r\u00e9seau}\n".encode("latin-1"),
    "utf16": "model: {width: 1}\n".encode("utf-16"),
    "twice": b"model:\n  width: 0.5\n  width: 0.25\n",
    "groups_twice": b"model: {width: 0.5}\ndata: {batch_size: 8}\nmodel: {width: 0.25}\n",
    "anchor": b"model: *b\n",
    "python": b"model: !!python/object/apply:os.mkdir [pwned]\n",
    "tag": b"model: {encoder: !foo bar}\n",
    "tabs": b"model:\n\twidth: 1\n",
    "brackets": b"model: [\n",
    "group_list": b"model: [1, 2]\n",
    "group_null": b"data: null\n",
    "group_word": b"data: photos\n",
    "two": b"model: {width: 1}\n---\nmodel: {width: 2}\n",
    "number_key": b"1: 2\n",
    "number_below": b"model: {1: 2}\n",
    "list_key": b"? [a, b]\n: 1\n",
    "deep": b"model: " + b"{a: " * 1000 + b"1" + b"}" * 1000,
    "bomb": b"a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(7)),
    "itself": b"model: &x {width: *x}\n",
    "misspelt": b"model: {temprature: 1}\n",
    "elsewhere": b"temperature: 1\n",
    "word_for_number": b"model: {width: wide}\n",
    "yes": b"model: {encoder: yes}\n",
    "nan": b"model: {temperature: .nan}\n",
    "dashes": b"--model.width: 0.5\n",
    "equals": b"model.width=0.5\n",
    "resume": b"model: {batch_size: 8}\n",
}


class Bomb:
    """A pickle that would make a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def write_checkpoints(folder: Path) -> None:
    folder.mkdir()
    (folder / "text.ckpt").write_text("hello world")
    (folder / "empty.ckpt").touch()
    (folder / "plain.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"a": Bomb()}, folder / "code.ckpt")
    torch.save({"state_dict": {"w": torch.ones(3)}}, folder / "other.ckpt")
    torch.save(torch.ones(3), folder / "tensor.ckpt")
    (folder / "half.ckpt").write_bytes((folder / "other.ckpt").read_bytes()[:300])
    torch.save({"w": torch.ones(3)}, folder / "weights.pt")
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / "other.safetensors")
    (folder / "run" / "checkpoints" / "last.ckpt").mkdir(parents=True)


def write_images(folder: Path, *classes: str, count: int = 20) -> None:
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything that is given wrongly; no row may change it."""
    root = tmp_path_factory.mktemp("place")
    for name, content in CONFIGS.items():
        (root / f"{name}.yaml").write_bytes(content)
    (root / "f.txt").write_text("hello")
    write_checkpoints(root / "ck")
    write_images(root / "photos", "")
    write_images(root / "one", "a")
    write_images(root / "classes", "a", "b")
    write_images(root / "new\nline", "", count=1)
    for name in ("empty", "empties/a", "empties/b", "raws", "fakes", "run"):
        (root / name).mkdir(parents=True)
    for number in range(20):
        (root / "raws" / f"{number}.nef").write_bytes(b"x")
        (root / "fakes" / f"{number}.png").write_bytes(b"not an image")
    (root / "run" / "config.yaml").write_text("model: {}\n")
    return root


EXAMPLE = "Write settings as `key: value`, for example `model: {encoder: resnet18}`."
UNREADABLE = "cannot be read as a checkpoint: it is damaged, of another program, or holds more than weights."
KINDS = f"Looked at every depth for {', '.join(sorted(kind[1:] for kind in extensions()))}."
NO_RUN = "Give a run folder that training has filled."
ALONE = "holds an encoder alone. Give the run's folder, or its checkpoints/last.ckpt."

# What is typed: the whole line that answers it, or its beginning, before an ellipsis.
ROWS = {
    # Configs
    "train --config empty.yaml": f"empty.yaml holds nothing, not settings. {EXAMPLE}",
    "train --config comment.yaml": f"comment.yaml holds nothing, not settings. {EXAMPLE}",
    "train --config list.yaml": f"list.yaml holds a list, not settings. {EXAMPLE}",
    "profile --config list.yaml": f"list.yaml holds a list, not settings. {EXAMPLE}",
    "linear-eval run --config list.yaml": f"list.yaml holds a list, not settings. {EXAMPLE}",
    "train --config word.yaml": f"word.yaml holds a single value, not settings. {EXAMPLE}",
    "train --config equals.yaml": f"equals.yaml holds a single value, not settings. {EXAMPLE}",
    "train --config binary.yaml": "binary.yaml is not text in UTF-8. Give a YAML file of settings.",
    "linear-eval run --config binary.yaml": "binary.yaml is not text in UTF-8. Give a YAML file of settings.",
    "train --config latin.yaml": "latin.yaml is not text in UTF-8. Give a YAML file of settings.",
    "train --config utf16.yaml": "utf16.yaml is not text in UTF-8. Give a YAML file of settings.",
    "train --config photos/0.png": "photos/0.png is not text in UTF-8. Give a YAML file of settings.",
    "train --config twice.yaml": "model.width stands twice in twice.yaml, in lines 2 and 3. Keep one of them.",
    "train --config groups_twice.yaml": "model stands twice in groups_twice.yaml, in lines 1 and 3. Keep one of them.",
    "linear-eval run --config twice.yaml": "model.width stands twice in twice.yaml, in lines 2 and 3. Keep one ...",
    "train --config anchor.yaml": "anchor.yaml is not valid YAML: found undefined alias 'b' in line 1, column 8.",
    "train --config python.yaml": "python.yaml is not valid YAML: could not determine a constructor for the tag "
    "'tag:yaml.org,2002:python/object/apply:os.mkdir' in line 1, column 8.",
    "train --config tag.yaml": "tag.yaml is not valid YAML: could not determine a constructor for the tag '!foo' "
    "in line 1, column 18.",
    "train --config tabs.yaml": "tabs.yaml is not valid YAML: found character '\\t' that cannot start any token in "
    "line 2, column 1.",
    "train --config brackets.yaml": "brackets.yaml is not valid YAML: expected the node content, but found "
    "'<stream end>' in line 2, column 1.",
    "train --config two.yaml": "two.yaml is not valid YAML: but found another document in line 2, column 1.",
    "train --config list_key.yaml": "list_key.yaml is not valid YAML: found unhashable key in line 1, column 3.",
    "train --config group_list.yaml": "model is a group of settings. Use model.encoder: resnet18.",
    "train --config group_null.yaml": "data is a group of settings. Use data.train_dir: photos.",
    "linear-eval run --config group_null.yaml": "data is a group of settings. Use data.train_dir: photos.",
    "train --config group_word.yaml": "data is a group of settings. Use --data.train_dir photos.",
    "train --config number_key.yaml": f"key 1 in number_key.yaml, line 1, is not a word. {EXAMPLE}",
    "train --config number_below.yaml": f"key model.1 in number_below.yaml, line 1, is not a word. {EXAMPLE}",
    "train --config deep.yaml": f"deep.yaml is nested too deep. {EXAMPLE}",
    "train --config bomb.yaml": "bomb.yaml holds more than 10,000 values, its anchors resolved. Leave the anchors out.",
    "train --config itself.yaml": "itself.yaml holds more than 10,000 values, its anchors resolved. Leave the anchors "
    "out.",
    "train --config misspelt.yaml": "unknown key model.temprature in misspelt.yaml. Did you mean model.temperature?",
    "train --config elsewhere.yaml": "unknown key temperature in elsewhere.yaml. Did you mean model.temperature?",
    "train --config dashes.yaml": "unknown key --model.width in dashes.yaml. Did you mean model.width?",
    "train --config word_for_number.yaml": "model.width=wide is not float. For example --model.width 1.0.",
    "train --config yes.yaml": "model.encoder=True is not str. For example --model.encoder auto.",
    "train --config nan.yaml": "temperature=nan is not positive.",
    "linear-eval run --config misspelt.yaml": "unknown key model.temprature in misspelt.yaml. Did you mean "
    "knn_temperature?",
    "train --config photos": "config=photos is a folder. Give a file in it, or the images as --data.train_dir photos.",
    "train --config ''": "config is empty. Give it a value, or leave it out.",
    # Checkpoints and runs
    "linear-eval ck/text.ckpt": f"ck/text.ckpt {UNREADABLE}",
    "linear-eval ck/empty.ckpt": f"ck/empty.ckpt {UNREADABLE}",
    "linear-eval ck/code.ckpt": f"ck/code.ckpt {UNREADABLE}",
    "linear-eval ck/plain.ckpt": f"ck/plain.ckpt {UNREADABLE}",
    "linear-eval ck/half.ckpt": "ck/half.ckpt cannot be read as a checkpoint: it is damaged ...",
    "linear-eval ck/run": f"ck/run/checkpoints/last.ckpt {UNREADABLE}",
    "linear-eval ck/other.ckpt": "ck/other.ckpt is not a checkpoint of simclr: it has no state_dict and "
    "hyper_parameters.",
    "linear-eval ck/tensor.ckpt": "ck/tensor.ckpt is not a checkpoint of simclr: it has no state_dict and "
    "hyper_parameters.",
    "linear-eval ck/weights.pt": f"ck/weights.pt {ALONE}",
    "linear-eval ck/other.safetensors": f"ck/other.safetensors {ALONE}",
    "linear-eval run": f"no checkpoints/last.ckpt in run. {NO_RUN}",
    "linear-eval ''": "the first word is empty. Give it a value, or leave it out.",
    "train --ckpt_path ck/text.ckpt": f"ck/text.ckpt {UNREADABLE}",
    "train --ckpt_path ck/code.ckpt": f"ck/code.ckpt {UNREADABLE}",
    "train --ckpt_path ck/other.safetensors": f"ck/other.safetensors {ALONE}",
    "train --ckpt_path run": f"no checkpoints/last.ckpt in run. {NO_RUN}",
    "train --ckpt_path photos": f"no checkpoints/last.ckpt in photos. {NO_RUN}",
    "train --ckpt_path=": "ckpt_path is empty. Give it a value, or leave it out.",
    "report run": f"no checkpoints/last.ckpt in run. {NO_RUN}",
    "report empty": f"no checkpoints/last.ckpt in empty. {NO_RUN}",
    "report f.txt": f"f.txt {UNREADABLE}",
    "report ck/code.ckpt": f"ck/code.ckpt {UNREADABLE}",
    "report run --device quantum": "device=quantum cannot be used: there is none of this name. Use auto, cpu or cuda.",
    # Run folders
    "train --run_dir f.txt": "run_dir=f.txt is a file. Choose a new folder.",
    "train --run_dir f.txt/x": "run_dir=f.txt/x cannot be made: ...",
    "train --run_dir photos": "run_dir=photos is taken. Choose another.",
    "train --run_dir /proc/x": "run_dir=/proc/x cannot be made: No such file or directory. Choose another.",
    "train --run_dir ''": "run_dir is empty. Give it a value, or leave it out.",
    "train --resume auto": "resume=auto needs --run_dir, the folder in which the same command finds its run again.",
    # Images
    "train empty": f"data.train_dir=empty holds no images. {KINDS}",
    "train empties": f"data.train_dir=empties holds no images. {KINDS}",
    "train raws": f"data.train_dir=raws holds no images. {KINDS} There are 20 .nef.",
    "train fakes": "cannot read 20 image files: ...",
    "train f.txt": "data.train_dir=f.txt is a file. Give the folder that holds the images.",
    "train 'new\nline'": "data.batch_size=16 is more than the 1 training images in new line. Use at most 1.",
    "train classes --data.test_dir empty": f"data.test_dir=empty holds no images. {KINDS}",
    "train classes --data.cache_dir f.txt": "data.cache_dir=f.txt is a file. Give a folder with room for the images.",
    # Sizes and other numbers
    "train --data.batch_size -8": "batch_size=-8 is not positive.",
    "train --data.batch_size 1": "data.batch_size=1 leaves no image to tell another from. Use 2 at least.",
    "train --data.batch_size 100000": "data.batch_size=100000 is more than the 64 training images ...",
    "train --data.workers -1": "data.workers=-1 is negative. Use 0 to decode in the training process.",
    "train --data.workers 100000": "data.workers=100000 is more than 1,024. Leave it out for one a core.",
    "train --trainer.devices 0": "trainer.devices=0 is not 1 or more. Leave it out for the default.",
    "train --trainer.devices -3": "trainer.devices=-3 is not 1 or more. Leave it out for the default.",
    "train --trainer.num_nodes 0": "trainer.num_nodes=0 is not 1 or more. Leave it out for the default.",
    "train --trainer.max_steps 99999999999999999999": "trainer.max_steps=99999999999999999999 is more than a run ...",
    "train --trainer.max_epochs 99999999999999999999": "trainer.max_epochs=99999999999999999999 is more than a run ...",
    "train --data.shapes_train 1000000000000": "these settings need 768,000 GB in one piece, more than there is. Use "
    "smaller sizes.",
    "train --model.projection_dim 1000000000000": "these settings need 64,000 GB in one piece, more than there is. "
    "Use smaller sizes.",
    "train --model.projection_dim 0": "projection_dim=0 must be at least 1.",
    "train --model.temperature nan": "model.temperature=nan is not float. For example --model.temperature 0.2.",
    "train --model.temperature inf": "model.temperature=inf is not float. For example --model.temperature 0.2.",
    "train --model.base_lr -1": "base_lr=-1.0 is not positive.",
    "train --model.momentum 2": "momentum=2.0 is not in [0, 1).",
    "train --model.views 1": "views=1 leaves an image without a positive: use 2 or more.",
    "train --model.std [0,0,0]": "SimCLRAugmentation: std=(0.0, 0.0, 0.0) does not have one positive number for each "
    "of 3 channels.",
    "train --model.semi_hard true": "semi_hard=True is for loss=nt_logistic and margin_triplet, not for nt_xent.",
    "train --seed_everything -1": "seed_everything=-1 is no whole number from 0 to 2^32 - 1. Use --seed_everything 0.",
    "train --seed_everything x": "seed_everything=x is no whole number from 0 to 2^32 - 1. Use --seed_everything 0.",
    "train --seed_everything 99999999999": "seed_everything=99999999999 is no whole number from 0 to 2^32 - 1. Use "
    "--seed_everything 0.",
    "train --minutes 0": "minutes=0 is not positive.",
    "train --checkpoint.keep -1": "checkpoint.keep=-1 is less than 0.",
    "train --trainer.max_time never": "trainer.max_time=never is no time. Write 30m, 1h30m, 2d or DD:HH:MM:SS.",
    "train --trainer.max_time 99999999999h": "trainer.max_time=99999999999h is longer than 30 years. Leave it out for "
    "a run without a limit.",
    "train --trainer.gradient_clip_val -1": "trainer.gradient_clip_val=-1 is negative. Leave it out not to clip.",
    "train --trainer.log_every_n_steps -1": "trainer.log_every_n_steps=-1 is negative. Use 1 or more.",
    "train --trainer.callbacks os.system": "trainer.callbacks=os.system is not a class that can be used here. Give "
    "its path, package.module.Class.",
    "train --method no.such.Class": "method=no.such.Class is none of simclr, byol, supervised, nor the path of a "
    "class: No module named 'no'.",
    "check-data nowhere": "train_dir=nowhere does not exist. ...",
    "check-data empty": "train_dir=empty holds no images. Looked at every depth for ...",
    "check-data f.txt": "train_dir=f.txt is a file. Give the folder that holds the images.",
    "profile --steps 0": "steps=0 is not a positive number.",
    "profile --ckpt_path ck/text.ckpt": f"ck/text.ckpt {UNREADABLE}",
}


@pytest.mark.parametrize("typed", ROWS)
def test_a_wrong_row_gets_its_line_and_leaves_nothing(typed, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("SIMCLR_TRACEBACK", raising=False)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    name, *args = shlex.split(typed)
    if name in ("train", "profile"):
        given = {arg.partition("=")[0] for arg in args}
        args += [flag for flag in flags({}) if "--config" not in args and flag.partition("=")[0] not in given]
    with pytest.raises(SystemExit) as stopped:
        main([name, *args])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out, said.err.count("\n")) == (BAD_INPUT, "", 1), said.err
    message, expected = said.err.removeprefix("error: ").rstrip("\n"), ROWS[typed]
    if expected.endswith("..."):
        message, expected = message[: len(expected) - 3], expected[:-3]
    assert message == expected
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_there_are_enough_and_of_every_command():
    assert len(ROWS) >= 60
    assert {typed.split()[0] for typed in ROWS} == {"train", "linear-eval", "report", "profile", "check-data"}


class Broken(Callback):
    """A callback of somebody's own, which fails."""

    def on_train_start(self, *args) -> None:
        raise KeyError("no such thing")


def test_what_nobody_has_foreseen_is_a_line_too_and_a_traceback_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *flags({"run_dir": "run", "knn.every_n_epochs": 0})]
    monkeypatch.setattr(command, "EpochLines", Broken)
    monkeypatch.delenv("SIMCLR_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == FAILED
    line = Broken.on_train_start.__code__.co_firstlineno + 1
    place = f"{__file__}, line {line}"
    assert said == f"error: KeyError: 'no such thing' (in {place}; SIMCLR_TRACEBACK=1 shows the traceback)\n"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("SIMCLR_TRACEBACK", "1")
    with pytest.raises(KeyError, match="no such thing"):
        main(arguments)


def test_an_encoder_that_breaks_is_a_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def step(*args):
        raise RuntimeError("shapes cannot be multiplied\nand many lines more")

    monkeypatch.setattr(SimCLR, "training_step", step)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *flags({"run_dir": "run", "knn.every_n_epochs": 0})])
    said = capsys.readouterr().err
    assert stopped.value.code == FAILED
    assert said.startswith(f"error: RuntimeError: shapes cannot be multiplied (in {__file__}, line ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_told_in_words_of_the_options(accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_devices("auto", "auto")
    with pytest.raises(ValueError, match=f"^trainer.accelerator={accelerator}: torch .* finds no GPU on this machine"):
        check_devices(accelerator, "auto")


def test_devices_that_may_be_meant_pass(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for devices in ("auto", 2, "2", -1, "-1", [0, 1], "0,1"):
        check_devices("gpu", devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^trainer\.devices=-1 is not 1 or more"):
        check_devices("auto", -1)  # of which there are none
