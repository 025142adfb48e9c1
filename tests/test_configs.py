"""Every shipped configuration is read by the real parser, states only what differs, and says what it is for."""

import inspect
import shlex
from pathlib import Path

import pytest
import yaml

from simclr.cli.refusals import LOGGED
from simclr.cli.train import TrainCLI, parse_and_build
from simclr.data import ImageData
from simclr.eval.protocol import find_protocol, settings_in
from simclr.module import SimCLR
from simclr.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMANDS = {"pretrain": "python train.py", "linear_eval": "python linear_eval.py", "sweeps": "wandb sweep"}
COMMANDS["ablations"] = "simclr ablate"


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"model": {"width": 2}} -> {"model.width": 2}"""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.fixture
def parse(monkeypatch):
    """The command line's own parser on some arguments, without building anything: the settings, flat."""

    class Parsed(Exception):
        pass

    def parse(arguments: list[str]) -> dict[str, object]:
        settings = {}

        def stop(self):
            settings.update(flat(self.config.as_dict()))
            raise Parsed

        monkeypatch.setattr(TrainCLI, "before_instantiate_classes", stop)
        with pytest.raises(Parsed):
            parse_and_build(arguments, RunFolder())
        return settings

    return parse


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "pretrain"], ids=named)
def test_a_pretraining_config_is_read_and_states_only_what_differs(path, parse):
    defaults, read, stated = parse([]), parse(["--config", str(path)]), flat(yaml.safe_load(path.read_text()))
    assert stated.keys() <= read.keys()
    assert [key for key in stated if read[key] == defaults[key]] == []


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "linear_eval"], ids=named)
def test_a_linear_evaluation_config_is_read(path):
    known = {"protocol", "device", *settings_in(find_protocol("linear"))}
    known |= {f"knn_{name}" for name in settings_in(find_protocol("knn"))}
    known |= {f"data.{name}" for name in inspect.signature(ImageData).parameters}
    assert set(flat(yaml.safe_load(path.read_text()))) <= known


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_the_header_has_a_command_that_names_the_file_and_real_settings(path):
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    command = next(line for line in header if named(path) in line)
    assert command.startswith(f"{COMMANDS[path.parent.name]} ")
    flags = [word[2:].split("=")[0] for word in shlex.split(command) if word.startswith("--")]
    known = {"config", "checkpoint", "run_dir", "seed_everything", "wandb"}
    known |= {f"model.{name}" for name in inspect.signature(SimCLR).parameters}
    known |= {f"data.{name}" for name in inspect.signature(ImageData).parameters}
    assert {flag for flag in flags if not flag.startswith("trainer.")} <= known


SWEEPS = [p for p in CONFIGS if p.parent.name == "sweeps"]


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_a_sweep_gives_the_command_line_what_it_takes(path, parse):
    """As W&B's agent does: `${args}` becomes a flag for each parameter, at every value, or at both ends of a range."""
    sweep = yaml.safe_load(path.read_text())
    program, command, *given = sweep["command"]
    assert (program, command, given[-1]) == ("simclr", "train", "${args}")
    assert sweep["metric"]["name"] in LOGGED
    assert sweep["metric"]["goal"] == "maximize"
    ends = {name: space.get("values") or [space["min"], space["max"]] for name, space in sweep["parameters"].items()}
    for end in (0, -1):
        chosen = {name: values[end] for name, values in ends.items()}
        read = parse([*given[:-1], *(f"--{name}={value}" for name, value in chosen.items())])
        assert {name: read[name] for name in chosen} == chosen
    for name, values in ends.items():
        for value in values if name.startswith("model.") else ():
            SimCLR("resnet8", **{name.removeprefix("model."): value})


def test_there_are_configs():
    assert len(CONFIGS) >= 2
