"""The folder that may stand by itself on a command line: `simclr train FOLDER`, `simclr report RUN`."""

import json
import re
from pathlib import Path

from simclr.checkpoint import LAST
from simclr.cli.recipes import recipes
from simclr.paths import expanded

OPTION = {"train": "data.train_dir", "profile": "data.train_dir", "linear-eval": "checkpoint", "report": "run_dir"}
OPTION |= {"compare": "runs", "check-data": "train_dir", "export": "encoder", "replay": "dump", "ablate": "name"}
OPTION |= {"eval": "checkpoint", "verify": "run", "supervised": "data.train_dir"}
PLACE = {"train": "FOLDER", "profile": "FOLDER", "linear-eval": "RUN", "report": "RUN"}  # what help calls it
PLACE |= {
    "compare": "RUN RUN ...",
    "check-data": "FOLDER",
    "export": "RUN",
    "replay": "DUMP",
    "ablate": "NAME",
    "eval": "RUN",
    "verify": "RUN",
    "supervised": "RUN or FOLDER",
}
OPTION |= {"embed": "images", "search": "image", "duplicates": "folder"}
OPTION |= {"fit": "encoder", "predict": "images"}
PLACE |= {"embed": "FOLDER", "search": "IMAGE", "duplicates": "FOLDER"}
PLACE |= {"fit": "RUN", "predict": "IMAGE IMAGE ..."}
_SEVERAL = ("compare", "predict")  # take more than one
_ALONE = ("-h", "--help", "--print_config", "--text", "--list", "--full")  # options that take no value of their own
_SETS = ("cifar10", "cifar100", "stl10", "imagenet")


def with_folder(args: list[str], command: str) -> list[str]:
    """The arguments with a folder that stands by itself given to the option it is for.

    Raises:
        ValueError: for what is no folder, for a second one, or beside the option, with what to type.
    """
    option = OPTION[command]
    alone = [i for i, arg in enumerate(args) if not arg.startswith("-") and not _is_value(args, i)]
    if not alone:
        return args
    first, *more = (args[i] for i in alone)
    for i in alone:
        _refuse_other(args, i, command)
    if more and command not in _SEVERAL:
        takes_test = option.endswith("train_dir")
        test = f" For test images: --{option.replace('train', 'test')} {more[0]}." if takes_test else ""
        if command == "ablate":
            raise ValueError(f"ablate runs one experiment at a time, not {', '.join((first, *more))}.")
        raise ValueError(f"{command} takes one folder, not {', '.join((first, *more))}.{test}")
    if any(arg.partition("=")[0] == f"--{option}" for arg in args):
        raise ValueError(f"{first} is given beside --{option}, which means the same. Give one of them.")
    given = json.dumps([first, *more]) if command in _SEVERAL else first
    kept = [(i, arg) for i, arg in enumerate(args) if i not in alone[1:]]
    return [f"--{option}={given}" if i == alone[0] else arg for i, arg in kept]


def _is_value(args: list[str], i: int) -> bool:
    before = args[i - 1] if i else ""
    return before.startswith("-") and "=" not in before and before not in _ALONE


def _refuse_other(args: list[str], i: int, command: str) -> None:
    """Refuse what stands by itself and is no folder, if it can be told what it was meant for."""
    word = args[i]
    path = expanded(word)
    if path.suffix in (".yaml", ".yml") and command != "ablate":
        raise ValueError(f"{word} is a file of settings. Use --config {word}.")
    if command in ("train", "profile", "supervised"):
        if path.suffix == ".ckpt" or (path / LAST).is_file():
            raise ValueError(
                f"{word} is a run. To continue it: --ckpt_path {word}; to measure it: simclr linear-eval {word}."
            )
        if not path.exists() and word in _SETS:
            raise ValueError(f"{word} is a set with a name. Use --data.source {word} --data.data_dir datasets.")
        if not path.exists() and word == "shapes":
            raise ValueError("shapes are built in. Use --data.source shapes.")
        if not path.exists() and word in recipes("pretrain"):
            raise ValueError(f"{word} is a recipe. Use --config {word}.")
    if path.exists():
        return
    if word == "help":
        raise ValueError("help is no folder. Use --help.")
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) and i:
        start = next((j for j in range(i - 1, -1, -1) if args[j].startswith("-")), i)
        name, _, value = args[start].partition("=")
        values = [*filter(None, [value]), *args[start + 1 : i + 1]]
        raise ValueError(f"{word} stands alone: {name} takes one word. Use {name} [{','.join(values)}] for a list.")


def assignment(args: list[str]) -> tuple[str, str] | None:
    """The first `key=value` that stands by itself, as Hydra writes settings."""
    for i, arg in enumerate(args):
        key, equals, value = arg.partition("=")
        bare = equals and re.fullmatch(r"\+*[A-Za-z_][\w.]*", key) and not Path(arg).exists()
        if bare and not _is_value(args, i):
            return key.lstrip("+"), value
    return None
