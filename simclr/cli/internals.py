"""What is borrowed from argparse and jsonargparse though it is not public; tests/test_internals.py says whether it is
still there and still means this."""

from argparse import ArgumentParser


def destinations(parser: ArgumentParser) -> list[str]:
    """The settings of a parser by their full names, `help` and `config` among them. Its defaults lack those without."""
    return [action.dest for action in parser._actions]
