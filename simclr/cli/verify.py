"""`simclr verify`: whether the numbers that a run carries are those that its encoder gives."""

import sys
from functools import partial
from typing import Any

from simclr.cli.messages import FAILED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.eval.verify import Compared, differing, records_of, verify_record

_LONG = 60  # characters of a value that are shown


@in_a_line
def verify(argv: list[str] | None = None) -> None:
    """Compute a run's numbers again and say whether they are equal. See `simclr verify --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config = guarded(lambda: verify_parser().parse_args(args))
    device = guarded(lambda: device_named(config.device))
    folders = {name: config[name] for name in ("train_dir", "test_dir", "data_dir")}
    records = guarded(lambda: records_of(config.run))
    wrong = 0
    for name, record in records.items():
        try:
            beside = {"folders": folders, "supervised": config.supervised, "device": device}
            compared = guarded(partial(verify_record, name, record, config.run, **beside))
        except RuntimeError as error:
            fail(f"{name} cannot be computed again: {error}", FAILED)
        found = differing(compared)
        wrong += len(found)
        print(f"{name}: {len(compared) - len(found)} of {len(compared)} equal")
        for each in found:
            print(f"  {each.what}: {_said(each)}")
        if found:
            _explain(record, device)
    print("equal" if not wrong else "NOT EQUAL", flush=True)
    if wrong:
        sys.exit(FAILED)


def _explain(record: dict[str, Any], device: str) -> None:
    """What may be behind a difference besides an edited file or other weights."""
    import torch

    then = record.get("versions", {}).get("torch")
    if then != torch.__version__ or record.get("device", device) != device:
        print(
            f"  measured with torch {then} on {record.get('device', 'an unknown device')}, computed again with torch "
            f"{torch.__version__} on {device}: a few images may be classified otherwise"
        )


def _said(each: Compared) -> str:
    return f"recorded {_short(each.recorded)}, found {_short(each.found)}"


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def verify_parser() -> Parser:
    """The settings of a verification."""
    parser = Parser(
        command="verify", description="Computes the numbers of eval.json and linear_eval.json again, from the images."
    )
    parser.add_argument("--run", type=str, required=True, help="A run folder; RUN, by itself.")
    for name in ("train_dir", "test_dir", "data_dir"):
        parser.add_argument(
            f"--{name}", type=str | None, default=None, help=f"In place of the recorded data.{name}, if it has moved."
        )
    parser.add_argument(
        "--supervised", type=str | None, default=None, help="The supervised run of the records, if it has moved."
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to compute: auto, cpu, cuda, cuda:1 ...")
    return parser
