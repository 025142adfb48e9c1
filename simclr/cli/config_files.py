"""What a file given by `--config` may hold, read once and refused in words before jsonargparse sees it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_MOST = 10_000  # values, anchors resolved: a file of a few lines can hold billions
_EXAMPLE = "Write settings as `key: value`, for example `model: {encoder: resnet18}`"


def read_settings(file: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, no YAML, no settings, or says two things about one key.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        tree = yaml.compose(text, yaml.SafeLoader)
        if tree is not None and sum(1 for _ in zip(_values(tree), range(_MOST + 1), strict=False)) > _MOST:
            raise ValueError(f"{file} holds more than {_MOST:,} values, its anchors resolved. Leave the anchors out.")
        content = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8. Give a YAML file of settings.") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deep. {_EXAMPLE}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {_detail(error)}.") from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else "a list" if isinstance(content, list) else "a single value"
        raise ValueError(f"{file} holds {held}, not settings. {_EXAMPLE}.")
    assert tree is not None  # of settings
    _check_keys(tree, file)
    return content


def _detail(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _values(node: yaml.Node) -> Iterator[yaml.Node]:
    """Every node below one, as often as anchors repeat it; in turn, so that none is without end."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        for part in node.value if isinstance(node, yaml.CollectionNode) else ():
            waiting.extend(part if isinstance(part, tuple) else (part,))


def _check_keys(node: yaml.Node, file: str | Path, above: str = "") -> None:
    """Refuse keys that are no words, and those that stand twice: YAML would take the last without a word."""
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = f"{above}{key.value}", key.start_mark.line + 1
        if above.count(".") < 2 and key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ValueError(f"key {name} in {file}, line {line}, is not a word. {_EXAMPLE}.")
        if name in lines:
            raise ValueError(f"{name} stands twice in {file}, in lines {lines[name]} and {line}. Keep one of them.")
        lines[name] = line
        _check_keys(value, file, f"{name}.")
