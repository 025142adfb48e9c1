"""The recipes that come with simclr: configuration files found by name, from any folder."""

import difflib
from pathlib import Path

import simclr
from simclr.paths import expanded

_PACKAGE = Path(simclr.__file__).parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in an installed wheel; in a checkout, their source
_OPTIONS = ("-c", "--config")


def recipes(kind: str) -> dict[str, Path]:
    """The recipes of a kind, `pretrain` or `linear_eval`: name -> file."""
    place = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return {path.stem: path for path in sorted((place / kind).glob("*.yaml"))}


def config_file(given: str, kind: str) -> Path:
    """The file meant by `--config`: one at this path, else the recipe of this name.

    Raises:
        ValueError: if there is neither, with the recipes there are.
    """
    path, known = expanded(given), recipes(kind)
    if path.exists() and not path.is_dir():
        return path
    if given in known:
        return known[given]
    if path.is_dir():
        raise ValueError(f"config={given} is a folder. Give a file in it, or the images as --data.train_dir {given}.")
    nearest = [path.stem] if path.stem in known else difflib.get_close_matches(path.stem, known, n=1)
    meant = f"Did you mean --config {nearest[0]}? " if nearest else ""
    raise ValueError(f"config={given} is neither a file nor a recipe. {meant}Recipes: {', '.join(known) or 'none'}.")


def with_config_files(args: list[str], kind: str) -> list[str]:
    """The arguments with every `--config` as a path of a file."""
    found = list(args)
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in _OPTIONS and equals:
            found[i] = f"{name}={config_file(value, kind)}"
        elif i and args[i - 1] in _OPTIONS:
            found[i] = str(config_file(arg, kind))
    return found
