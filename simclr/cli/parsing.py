"""The parser of every command, and what arguments mean."""

import difflib
import itertools
import re
import sys
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from simclr.cli.messages import fail
from simclr.cli.recipes import with_config_files


class Parser(LightningArgumentParser):
    """Lightning's parser, which answers a mistake with one line, the nearest right key and exit code 2.

    Args:
        recipes: the kind of recipes that `--config` finds by name; see `simclr.cli.recipes`.
        *args, **kwargs: of jsonargparse's ArgumentParser.
    """

    def __init__(self, *args: Any, recipes: str = "pretrain", **kwargs: Any):
        self.recipes = recipes
        # Without allow_abbrev=False, --trainer.max_epoch is silently taken for --trainer.max_epochs.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was probably meant, and exit."""
        fail(self.explain(message))

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:
        """As in jsonargparse; remembers the names of config files, which its messages do not give."""
        args = sys.argv[1:] if args is None else args
        self.config_files = " or ".join(values_of(args, "--config", "-c"))
        args = with_config_files(args, self.recipes)
        return super().parse_args(args, *rest, **kwargs)

    def explain(self, message: str) -> str:
        """jsonargparse's message as one clear line."""
        unknown = (
            re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message)
            or re.search(r"Option '([^']+)' is not accepted", message)
            or re.search(r"Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'", message)
        )
        if unknown:
            key = ".".join(unknown.groups())
            where = "" if message.startswith("unrecognized") else f" in {self.config_files}"
            return f"unknown key {key}{where}. {self.suggest(key)}"
        if message.startswith("Problems parsing config"):
            detail = " ".join(re.sub(r'in "<unicode string>",', "in", message.partition(":")[2]).split())
            return f"{self.config_files} is not valid YAML: {detail}."
        message = re.sub(r'^(?:Parser key|argument) "?(?:--)?([^":]+)"?:\s*', r"\1: ", message)
        value = re.search(r"(?:Got|Given) value: ?(.*)", message)
        if not value:
            return " ".join(message.split())
        key = message.split(":", 1)[0]
        wanted = dict.fromkeys(
            re.findall(r"Expected an? (?:typing\.)?(?:Literal)?(.+?)(?:\. Got|$)", message, re.MULTILINE)
        )
        names = [re.sub(r"<class '(.+?)'>", r"\1", kind).replace("NoneType", "null") for kind in wanted]
        choices = re.findall(r"'([^']*)'", " ".join(names))
        if choices and len(names) == 1:
            nearest = difflib.get_close_matches(value.group(1), choices, n=1, cutoff=0.6)
            meant = f" Did you mean {nearest[0]}?" if nearest else ""
            return f"{key}={value.group(1)} is not one of {', '.join(choices)}.{meant}"
        return f"{key}={value.group(1)} is not {' or '.join(names) or 'valid'}."

    def suggest(self, key: str) -> str:
        """The nearest key that exists, or where to look."""
        keys = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
        same_end = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        if nearest or same_end:
            return f"Did you mean {(same_end or nearest)[0]}?"
        return "See --help for the keys there are."


def values_of(args: list[str], *names: str) -> list[str]:
    """The values given to any of some options, as in `--name value` or `--name=value`."""
    found = [value for name, value in itertools.pairwise(args) if name in names]
    return found + [arg.partition("=")[2] for arg in args if arg.partition("=")[0] in names and "=" in arg]


def device_named(wanted: str) -> str:
    """The device meant by `--device`, tried; `auto` is CUDA where there is one.

    Raises:
        ValueError: for a device that is not here.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not here
        raise ValueError(f"device={wanted} cannot be used: {str(error).splitlines()[0]}") from error
    return wanted
