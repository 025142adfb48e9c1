"""The card of an exported encoder: what it is, how to feed it, what it was trained on and what it reached.

Markdown with a head of YAML, as model hubs have it: people read the one, machines the other.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from simclr.efficientnet import encoder_in_words

CARD = "card.md"  # beside the exported file
VERSION = 1  # of the card's head


def read_card(path: Path) -> dict[str, Any]:
    """The head of a card.

    Raises:
        ValueError: if it is none, or of a later version.
    """
    found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(head, dict) or not {"simclr_export", "file", "encoder"} <= head.keys():
        raise ValueError(f"{path} is not the card of an exported encoder: it has no simclr_export, file and encoder.")
    if head["simclr_export"] != VERSION:
        raise ValueError(
            f"{path} is of version {head['simclr_export']} of the card; this simclr reads version {VERSION}. "
            "Export the run again."
        )
    return head


def card_text(head: dict[str, Any], use: str) -> str:
    """A card.

    Args:
        head: what a machine reads: `simclr_export`, `format`, `file`, `sha256`, `encoder` (settings), `input`,
            `output`, `data`, `recipe`, `results`, `license`.
        use: lines of Python that open the file.
    """
    encoder, given = head["encoder"], head["input"]
    stem = f", {encoder['stem']} stem" if encoder.get("stem") not in (None, "auto") else ""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120).rstrip(),
            "---",
            "",
            f"# {encoder_in_words(encoder)}{stem}",
            "",
            f"An image encoder, `{head['file']}` ({head['format']}), pretrained without labels"
            f"{': ' + head['recipe']['objective'] if 'objective' in head['recipe'] else ''}.",
            "",
            "## Use",
            "",
            *(f"    {line}" if line else "" for line in use.splitlines()),
            "",
            f"In: {given['shape']}, {given['values']}. Out: {head['output']['shape']}.",
            "",
            *_preprocessing(given),
            "## Trained on",
            "",
            *(_lines(head["data"]) or ["Not recorded."]),
            "",
            "## Recipe",
            "",
            *_lines(head["recipe"]),
            "",
            "## Results",
            "",
            *_results(head["results"]),
            "",
            "## License",
            "",
            head["license"] or "Not stated. Whoever hands this file on says under which license.",
            "",
        ]
    )


def _preprocessing(given: dict[str, Any]) -> list[str]:
    text = f"central square of the upright image at {given['load_size']} px (bilinear, antialiased)"
    if given["load_size"] != given["image_size"]:
        text += f", of it the evaluation crop of {given['image_size']} px"
    numbers = (", ".join(f"{number:.4g}" for number in given[name]) for name in ("mean", "std"))
    mean, std = numbers
    inside = "Inside the file: " if given["preprocessing"] == "inside" else "Before the file: "
    if given.get("bits", 8) == 16:
        text += f", held in 16 bits (of 16-bit images {given['sixteen_bit_max']} is white)"
    return [f"{inside}{text}; values in [0, 1], minus mean ({mean}), divided by std ({std}).", ""]


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]


def _results(results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return ["Not measured: `simclr linear-eval RUN` does, and a new export has the numbers."]
    yardsticks = {"random encoder": "random_encoder_top1", "raw pixels": "raw_pixels_top1"}
    if any("starting_weights_top1" in result for result in results):
        yardsticks["starting weights"] = "starting_weights_top1"
    if any(result.get("supervised_top1") is not None for result in results):
        yardsticks["supervised"] = "supervised_top1"
    rows = [f"| protocol | top-1 | 95 % interval | {' | '.join(yardsticks)} |", "|---" * (3 + len(yardsticks)) + "|"]
    for result in results:
        values = (result.get(name) for name in yardsticks.values())
        reached = " | ".join("-" if value is None else f"{value:.1%}" for value in values)
        interval = " to ".join(f"{bound:.1%}" for bound in result["ci95"]) if result.get("ci95") else "-"
        rows.append(f"| {result['protocol']} | {result['top1']:.1%} | {interval} | {reached} |")
    return rows
