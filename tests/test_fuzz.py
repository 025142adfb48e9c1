"""Configs and command lines changed at random: each is accepted up to training, or refused in a line; no traceback."""

import random
import shlex
from pathlib import Path

import pytest

from simclr.cli import main
from simclr.cli import train as command
from simclr.cli.messages import BAD_INPUT
from tiny import flags

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
ODD = [
    "",
    "nan",
    "-1",
    "0",
    "1e99",
    "null",
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "true",
    "x\ty",
    "é",
    "!!python/name:os",
    "*a",
]
WORDS = ["model", "data.batch_size", "model.encoder", "trainer.max_epochs", "trainer", "knn.k", "--", "a.b.c", "config"]
QUICK = 40


class Accepted(BaseException):
    """Settings with which a run would be built."""


def config(numbers: random.Random) -> tuple[str, bytes]:
    """A command, and a shipped recipe of it with some bytes, keys, values or levels that are others."""
    recipe = numbers.choice(RECIPES)
    lines = recipe.read_text().splitlines()
    for _ in range(numbers.randint(1, 3)):
        at = numbers.choice([i for i, line in enumerate(lines) if line and line[0] != "#"] or [0])
        key, _, value = lines[at].partition(":")
        lines[at] = numbers.choice(
            [
                f"{key}: {numbers.choice(ODD)}",
                f"{key[:-1]}:{value}",
                f"  {lines[at]}",
                lines[at].strip(),
                f"{numbers.choice(WORDS)}:{value}",
                f"{lines[at]}\n{lines[at]}",
                f"{key}: [{value}]",
                f"{key}: {{a: {value}}}",
            ]
        )
    content = bytearray("\n".join(lines).encode())
    if numbers.random() < 0.3:
        for _ in range(numbers.randint(1, 4)):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
    return ("linear-eval run" if recipe.parent.name == "linear_eval" else "train"), bytes(content)


def command_line(numbers: random.Random) -> list[str]:
    """The flags of a tiny run with one to four that are others, lacking or strange."""
    words = flags({})
    for _ in range(numbers.randint(1, 4)):
        at = numbers.randrange(len(words))
        key, _, value = words[at].partition("=")
        words[at : at + 1] = numbers.choice(
            [
                [f"{key}={numbers.choice(ODD)}"],
                [key, numbers.choice(ODD)],
                [f"{key[:-1]}={value}"],
                [f"--{numbers.choice(WORDS)}={value}"],
                [f"-{numbers.choice(WORDS)}"],
                [numbers.choice(ODD)],
                [key],
                [words[at], words[at]],
            ]
        )
    return [numbers.choice(["train", "train", "train", "profile", "linear-eval", "report"]), *words]


@pytest.fixture
def ends(tmp_path, monkeypatch, capsys):
    """Run a command line: it is accepted, as far as building, or refused in one line that leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIMCLR_TRACEBACK", raising=False)

    def stop(cli, *args):
        raise Accepted

    monkeypatch.setattr(command.TrainCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr("simclr.cli.profile.ProfileCLI.before_instantiate_classes", stop)

    def run(args: list[str]) -> bool:
        before = sorted(tmp_path.iterdir())
        try:
            main(args)
        except Accepted:
            return True
        except SystemExit as stopped:
            said = capsys.readouterr()
            code = stopped.code
            assert code == BAD_INPUT, said.err
            assert said.err.startswith("error: "), said.err
            assert said.err.count("\n") == 1, said.err
            assert len(said.err) < 1000, said.err
            assert sorted(tmp_path.iterdir()) == before
            return False
        pytest.fail(f"{args} was carried out")

    return run


SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed >= QUICK else ()) for seed in range(150)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_config_changed_at_random(seed, ends):
    name, content = config(random.Random(seed))
    Path("changed.yaml").write_bytes(content)
    ends([*shlex.split(name), "--config", "changed.yaml"])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_command_line_changed_at_random(seed, ends):
    ends(command_line(random.Random(1000 + seed)))


def test_shipped_recipes_and_the_tiny_run_are_accepted(ends):
    assert all(ends(["train", "--config", str(path)]) for path in RECIPES if path.parent.name == "pretrain")
    assert ends(["train", *flags({})])
