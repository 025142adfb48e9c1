"""The parser of every command, and what arguments mean."""

import difflib
import itertools
import os
import re
import sys
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from simclr.cli import hints
from simclr.cli.config_files import read_settings
from simclr.cli.folders import PLACE, assignment, with_folder
from simclr.cli.internals import destinations
from simclr.cli.messages import fail
from simclr.cli.recipes import recipes, with_config_files
from simclr.distributed import world_size
from simclr.training.method import METHODS, find_method, takes


class Parser(LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line that says what to type, and exit code 2.

    Args:
        command: of `simclr`: which folder may stand by itself, which recipes `--config` knows, which hints there are.
        *args, **kwargs: of jsonargparse's ArgumentParser.
    """

    def __init__(self, *args: Any, command: str = "train", **kwargs: Any):
        self.command = command
        self.linked: dict[str, str] = {}  # settings that follow others
        # Without allow_abbrev=False, --trainer.max_epoch is silently taken for --trainer.max_epochs.
        words = {"usage": f"simclr {command} [{PLACE[command]}] [options]", "epilog": _epilog(command)}
        super().__init__(*args, **{**words, **kwargs, "allow_abbrev": False})

    def link_arguments(self, source: str, target: str, *args: Any, **kwargs: Any) -> None:
        """As in jsonargparse; remembers what follows what."""
        self.linked[target] = source
        super().link_arguments(source, target, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was probably meant, and exit."""
        fail(self.explain(message))

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:
        """As in jsonargparse, with a folder that stands by itself, recipes by name and `~` understood.

        Raises:
            ValueError: for what stands by itself and is no folder, and a config that is neither file nor recipe.
        """
        self.args = list(sys.argv[1:] if args is None else args)
        refuse_empty(self.args)
        self.config_files = " or ".join(values_of(self.args, "--config", "-c"))
        if written := assignment(self.args):
            key, value = written
            if key in self.keys():
                raise ValueError(f"{key}={value} stands without dashes. Use --{key} {value}.")
            raise ValueError(f"unknown key {key}. {self.suggest(key, value)}")
        args = with_config_files(with_folder(self.args, self.command), recipes_of(self.command))
        for file in values_of(args, "--config", "-c"):
            self._check_file(file)
        return super().parse_args(args, *rest, **kwargs)

    def _check_file(self, file: str) -> None:
        """Refuse in a file what is no settings, and those that follow others: jsonargparse would pass over them."""
        try:
            content = read_settings(file)
        except OSError:  # the parser says what is wrong with it
            return
        if not isinstance(content.get("config"), str | None):
            raise ValueError(f"config in {file} is not the name of a file. Give --config more than once instead.")
        for group in {key.partition(".")[0] for key in self.keys() if "." in key}:
            if not isinstance(content.get(group, {}), dict | str):
                raise ValueError(hints.as_yaml(hints.group_value(group, content[group])))
        for key in self.linked:
            group, _, name = key.rpartition(".")
            inside = content.get(group)
            if isinstance(inside, dict) and name in inside:
                raise ValueError(
                    f"{key} in {file} cannot be given. {hints.as_yaml(self.suggest(key, str(inside[name])))}"
                )

    def keys(self) -> list[str]:
        """The settings that can be given."""
        given_otherwise = {"help", "config", "print_config", *self.linked}
        return [name for name in destinations(self) if name not in given_otherwise]

    def suggest(self, key: str, value: str | None = None) -> str:
        """What to type in place of a key that does not exist; of another method's setting, whose it is."""
        group, _, own = key.lstrip("-").replace("-", "_").partition(".")
        known = self.keys()
        elsewhere = group == "model" and "model.encoder" in known and f"model.{own}" not in (*known, *self.linked)
        if methods := [name for name in METHODS if elsewhere and takes(find_method(name), own)]:
            return f"It is a setting of --method {' and of '.join(methods)}."
        return hints.unknown_option(self.command, key, value, known, self.linked)

    def explain(self, message: str) -> str:
        """jsonargparse's message as one clear line."""
        if message.startswith("unrecognized arguments: "):
            return self._explain_unrecognised(message.partition(": ")[2].split())
        in_file = re.search(r"Option '([^']+)' is not accepted", message) or re.search(
            r"Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'", message
        )
        if in_file:
            key = ".".join(in_file.groups())
            return f"unknown key {key} in {self.config_files}. {hints.as_yaml(self.suggest(key))}"
        # The second for a setting that may be null: jsonargparse takes its type for a function.
        linked = re.search(r'Linked "([^"]+)" must be given via', message) or re.search(r" --> ([\w.]+)\"?: ", message)
        if linked:
            key = linked[1]
            return f"{key} cannot be given. {self.suggest(key, *values_of(self.args, f'--{key}')[-1:])}"
        if message.startswith("Problems parsing config"):
            detail = " ".join(re.sub(r'in "<unicode string>",', "in", message.partition(":")[2]).split())
            return f"{self.config_files} is not valid YAML: {detail}."
        if group := re.match(
            r"(?:Parser key|argument) \"?(?:--)?(\w+)\"?:\s+Unable to load config ['\"]([^'\"]*)", message
        ):
            return hints.group_value(group[1], group[2])
        message = re.sub(r'^(?:Parser key|argument) "?(?:-c/)?(?:--)?([^":]+)"?:\s*', r"\1: ", message)
        if lacking := re.match(r"(\S+): expected (?:one|at least one) argument", message):
            return f"{lacking[1]} needs a value. Use --{lacking[1]} {self._example(lacking[1])}."
        if required := re.match(r"the following arguments are required: ([\w.]+)", message):
            of_all = hints.REQUIRED.get(required[1], f"--{required[1]} VALUE")
            return f"{required[1]} is missing. Use {hints.REQUIRED.get(f'{self.command} {required[1]}', of_all)}."
        if bounded := re.match(r"(\S+): Not of type", message):
            value = (values_of(self.args, f"--{bounded[1]}") or ["this"])[-1]
            return f"{bounded[1]}={value} is no whole number from 0 to 2^32 - 1. Use --{bounded[1]} 0."
        if message.startswith("-h/--help"):
            return "--help takes no value. Use --help."
        return self._explain_value(message)

    def _explain_unrecognised(self, words: list[str]) -> str:
        """Every option that does not exist, each with what to type."""
        said = []
        for word in words:
            if not word.startswith("-") or re.fullmatch(r"-[\d.]+", word):
                continue
            key, equals, value = word.partition("=")
            at = self.args.index(word) if word in self.args else len(self.args)
            after = self.args[at + 1] if at + 1 < len(self.args) else "-"
            given = value if equals else None if re.match(r"-\D", after) or after == "-" else after
            key = key[2:] if key.startswith("--") else key
            said.append(f"unknown key {key}. {self.suggest(key, given)}")
        return " ".join(said) or f"unrecognized: {' '.join(words)}. See --help."

    def _explain_value(self, message: str) -> str:
        found = re.search(r"(?:Got|Given) value: ?(.*)", message)
        if not found:
            return " ".join(message.split())
        key, value = message.split(":", 1)[0], found[1]
        if part := re.match(r"NestedArg\(key='(\w+)', val='(.*)'\)", value):  # jsonargparse's own word
            key, value = f"{key}.{part[1]}", part[2]
        wanted = dict.fromkeys(
            re.findall(r"Expected an? (?:typing\.)?(?:Literal)?(.+?)(?:\. Got|$)", message, re.MULTILINE)
        )
        names = [re.sub(r"<class '(.+?)'>", r"\1", kind).replace("NoneType", "null") for kind in wanted]
        if any("not accessible" in name or name.startswith("dot import path") for name in names):
            return f"{key}={value} is not a class that can be used here. Give its path, package.module.Class."
        choices = list(dict.fromkeys(re.findall(r"'([^']*)'", " ".join(names))))
        if choices:
            others = [name for name in names if "'" not in name and "[" not in name and name not in ("int", "null")]
            nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.6)
            known = hints.other_value(key, value)
            meant = known or (f" Did you mean {nearest[0]}?" if nearest else "")
            return f"{key}={value} is not {' or '.join([*others, 'one of ' + ', '.join(choices)])}.{meant}"
        if names and names[0] in ("tuple", "list"):
            return f"{key}={value} is not a list. Use --{key} {self._example(key, value)}."
        example = self._example(key)
        meant = f" For example --{key} {example}." if example != "VALUE" else ""
        return f"{key}={value} is not {' or '.join(names) or 'valid'}.{meant}"

    def _example(self, key: str, value: str = "") -> str:
        """A value that a setting takes: its default, if it has one; `value` in it, if it is a number for a list."""
        if key in hints.EXAMPLES:
            return hints.EXAMPLES[key]
        default = self.get_defaults().get(key) if key in self.keys() else None
        default = hints.LISTS.get(key, default)
        if isinstance(default, tuple | list):
            number = bool(re.fullmatch(r"\d*\.?\d+", value))
            same = len(set(default)) == 1
            return f"[{','.join(value if number and (same or not i) else str(v) for i, v in enumerate(default))}]"
        return "VALUE" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _epilog(command: str) -> str | None:
    if command not in ("train", "profile", "supervised", "linear-eval"):
        return None
    return f"Recipes for --config: {', '.join(recipes(recipes_of(command)))}."


def recipes_of(command: str) -> str:
    """The kind of recipes of a command."""
    return "linear_eval" if command == "linear-eval" else "pretrain"


def refuse_empty(args: list[str]) -> None:
    """Refuse a value that is empty, mostly a variable of a shell that is not set: as a path it would be this folder.

    Raises:
        ValueError: with the option before it.
    """
    for i, arg in enumerate(args):
        if not arg or (arg.startswith("--") and arg.endswith("=")):
            name = arg[2:-1] or (args[i - 1].lstrip("-") if i else "the first word")
            raise ValueError(f"{name} is empty. Give it a value, or leave it out.")


def values_of(args: list[str], *names: str) -> list[str]:
    """The values given to any of some options, as in `--name value` or `--name=value`."""
    found = [value for name, value in itertools.pairwise(args) if name in names]
    return found + [arg.partition("=")[2] for arg in args if arg.partition("=")[0] in names and "=" in arg]


def device_named(wanted: str) -> str:
    """The device meant by `--device`, tried; `auto` is the accelerator where there is one that does what is asked.

    Raises:
        ValueError: for a device that is not here.
    """
    if wanted == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        # A Mac's GPU has no float64, in which logistic regression is fitted.
        if found is None or found.type == "mps":
            return "cpu"
        place = os.environ.get("LOCAL_RANK", "") if world_size() > 1 else ""  # ranks of a machine take one each
        return f"{found.type}:{int(place) % torch.accelerator.device_count()}" if place.isdigit() else found.type
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not here
        reason = re.sub(r"^Expected one of .*", "there is none of this name", str(error).splitlines()[0])
        raise ValueError(f"device={wanted} cannot be used: {reason}. Use auto, cpu or cuda.") from error
    return wanted
