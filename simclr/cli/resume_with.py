"""`--resume_with KEY=VALUE`: what a continued run is meant to change, though it decides what is learned."""

import json

from simclr.cli.parsing import values_of
from simclr.continuation import refuse_purpose

OPTION = "--resume_with"


def purposes(args: list[str]) -> dict[str, str]:
    """The settings that the arguments mean to change, and their values as given.

    Raises:
        ValueError: for what is no KEY=VALUE, and for a setting that cannot be changed so.
    """
    found: dict[str, str] = {}
    for given in values_of(args, OPTION):
        for part in _parts(given):
            key, equals, value = part.partition("=")
            key = key.strip().lstrip("-")
            if not (equals and key and value):
                raise ValueError(f"resume_with={part} is no KEY=VALUE. Use {OPTION} model.temperature=0.2.")
            found[key] = value.strip()
    refuse_purpose(found)
    return found


def _parts(given: str) -> list[str]:
    if given == "null":
        return []
    if not given.startswith("["):
        return [given]
    try:
        return [str(part) for part in json.loads(given)]
    except ValueError:
        return [part.strip(" '\"") for part in given[1:-1].split(",")]


def with_purposes(args: list[str]) -> list[str]:
    """The arguments with the settings of `--resume_with` given last, and itself once, as a list."""
    meant = purposes(args)
    if not meant:
        return args
    kept, skip = [], False
    for arg in args:
        if not skip and arg.partition("=")[0] != OPTION:
            kept.append(arg)
        skip = arg == OPTION and not skip
    listed = json.dumps([f"{key}={value}" for key, value in meant.items()])
    return [*kept, f"{OPTION}={listed}", *(f"--{key}={value}" for key, value in meant.items())]
