"""`simclr ablate`: the findings of papers, run again."""

import shutil
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import torch
import yaml

from simclr.ablate.cells import Place, run_cells
from simclr.ablate.experiment import Experiment, find, read_experiment, rule_in_words
from simclr.ablate.page import write_experiment, write_index, write_page
from simclr.ablate.probes import ProbeSettings
from simclr.ablate.supervised import Settings
from simclr.ablate.verdict import ONE_SEED, judge
from simclr.checks import listed
from simclr.cli.messages import FAILED, INTERRUPTED, fail, guarded, in_a_line, quiet
from simclr.cli.parsing import Parser, device_named
from simclr.cli.recipes import recipes
from simclr.container import cores, processor
from simclr.data.sources import list_folder
from simclr.eval.protocol import OF_EVAL, settings_of
from simclr.paths import expanded

KIND = "ablations"  # the folder of `configs` that holds the experiments


@in_a_line
def ablate(argv: list[str] | None = None) -> None:
    """Run a paper's finding again and say whether it held. See `simclr ablate --help`."""
    quiet()
    args = sys.argv[1:] if argv is None else argv
    config = guarded(lambda: ablate_parser().parse_args(args))
    known = recipes(KIND)
    if config.list:
        print(guarded(lambda: listing([read_experiment(path) for path in known.values()])))
        return
    if config.page is not None:
        print(f"written to {guarded(lambda: write_page(expanded(config.out), expanded(config.page), list(known)))}")
        return
    if config.name is None:
        fail("which experiment? Use simclr ablate NAME; simclr ablate --list shows all.")
    experiment = guarded(lambda: read_experiment(find(config.name, known), config.full))
    guarded(lambda: refuse_unknown_settings(experiment))
    seeds = experiment.seeds if config.seeds is None else config.seeds
    if seeds < 1:
        fail(f"seeds={seeds} is not 1 or more.")
    if config.jobs is not None and config.jobs < 1:
        fail(f"jobs={config.jobs} is not 1 or more.")
    trains = any(cell.work in ("pretrain", "supervised") for cell in experiment.cells)
    if config.full and trains and config.images is None:
        fail("full needs real images. Add --images FOLDER, which holds train and test with a folder for each class.")
    if config.device not in ("auto", "cpu", "cuda"):
        fail(f"device={config.device} is not auto, cpu or cuda. CUDA_VISIBLE_DEVICES says which GPUs.")
    device = guarded(lambda: device_named(config.device)) if trains else "cpu"
    out = expanded(config.out)
    name = f"{experiment.name}-full" if config.full else experiment.name
    place = guarded(lambda: place_of(out / name, device, config.images, config.jobs))
    print(f"{experiment.name}: {experiment.question}")
    runs = f"{len(experiment.cells)} cells, {seeds} seed{'s' if seeds > 1 else ''} each, {place.jobs} at a time"
    print(f"{runs}, {about(place, experiment)}", flush=True)
    try:
        results = guarded(lambda: run_cells(experiment, seeds, place, _say))
    except KeyboardInterrupt:
        fail("stopped. Give the same command again to go on.", INTERRUPTED)
    verdict = judge(experiment, results)
    write_experiment(experiment, results, verdict, place.out, about(place, experiment))
    print((place.out / "table.md").read_text())
    print(f"rule: {rule_in_words(experiment.rule)}")
    print(f"{verdict.word}: {verdict.sentence}")
    index = write_index(out)
    print(f"written to {place.out} (table.md, table.csv, figure.png, verdict.json) and {index}")
    failed = [f"{result.cell}, seed {result.seed}" for result in results.values() if result.status == "failed"]
    if failed:
        fail(f"{len(failed)} of {len(results)} cells failed: {'; '.join(failed)}. The table says why.", FAILED)


def _say(text: str) -> None:
    """A line, written whole: cells that end at the same time say so from threads of their own."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def refuse_unknown_settings(experiment: Experiment) -> None:
    """Before anything is trained: the settings of the programs that measure.

    Raises:
        ValueError: for one that a program does not have, or a protocol that there is none of.
    """
    of_probes, of_training = ({f.name for f in fields(of)} for of in (ProbeSettings, Settings))
    for cell in experiment.cells:
        probe = {key.removeprefix("probe."): v for key, v in cell.settings.items() if key.startswith("probe.")}
        unknown = [f"probe.{name}" for name in probe if name not in of_probes]
        if cell.work == "supervised":
            unknown += [name for name in cell.settings if name not in of_training]
        if unknown:
            known = [f"probe.{name}" for name in of_probes] if cell.work == "pretrain" else of_training
            raise ValueError(
                f"cell {cell.name}: {', '.join(unknown)} is no setting. There are {listed(sorted(known))}."
            )
        if protocol := probe.get("protocol"):
            settings_of(protocol, probe.get("options", {}), OF_EVAL)


def ablate_parser() -> Parser:
    """The settings of an experiment."""
    parser = Parser(command="ablate", description="Run a paper's finding again: table, figure, and whether it held.")
    parser.add_argument(
        "--name", type=str | None, default=None, help="An experiment, or a file of one's own; NAME, by itself."
    )
    parser.add_argument("--list", action="store_true", help="Show all experiments: question, paper, rule, cost.")
    parser.add_argument("--full", action="store_true", help="The form for GPUs: all cells, real sizes. Needs --images.")
    parser.add_argument(
        "--seeds", type=int | None, default=None, help="Runs of each cell. By default the experiment's."
    )
    parser.add_argument("--device", type=str, default="auto", help="Where to train: auto, cpu, cuda.")
    parser.add_argument(
        "--images",
        type=str | None,
        default=None,
        help="A folder with train and test, a folder for each class in both. By default the built-in shapes.",
    )
    parser.add_argument("--out", type=str, default="ablations", help="Folder of all experiments and their page.")
    parser.add_argument(
        "--page",
        type=str | None,
        default=None,
        help="Run nothing: write what --out holds as this Markdown file, its figures into a folder beside it.",
    )
    parser.add_argument("--jobs", type=int | None, default=None, help="Cells at a time. By default one a GPU or core.")
    return parser


def place_of(out: Path, device: str, images: str | None, jobs: int | None) -> Place:
    """Where an experiment runs.

    Raises:
        ValueError: if there are no images where they were said to be.
    """
    gpus = torch.accelerator.device_count() if device != "cpu" else 0
    jobs = jobs or (max(1, gpus) if device != "cpu" else min(cores(), 4))
    contents = {name: yaml.safe_load(path.read_text()) for name, path in recipes("pretrain").items()}
    if images is None:
        return Place(out, device, jobs=jobs, gpus=gpus, recipes=contents)
    folder = expanded(images).absolute()
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise ValueError(f"images={images} has no folder {part}. It needs train and test, with a folder a class.")
    count = len(list_folder(str(folder / "train"), "images").paths)
    return Place(out, device, folder, count, jobs, gpus, contents)


def about(place: Place, experiment: Experiment) -> str:
    """Images and device, for people."""
    works = {cell.work for cell in experiment.cells}
    if not works & {"pretrain", "supervised"}:
        return "no training: computed here, the same everywhere"
    images = (
        "the built-in shapes" if place.images is None else f"{place.training_images:,} images of {place.images.name}"
    )
    for work, setting, limit, what in (
        ("pretrain", "probe.train", ProbeSettings.train, "probes learn from"),
        ("supervised", "train", Settings.train, "classifiers from"),
    ):
        of_cells = {
            min(c.settings.get(setting, limit), place.training_images) for c in experiment.cells if c.work == work
        }
        if of_cells and max(of_cells) < place.training_images:
            images += f", {what} {max(of_cells):,} of them"
    return f"{images}, {processor_in_words(place.jobs) if place.device == 'cpu' else torch.cuda.get_device_name()}"


def processor_in_words(jobs: int) -> str:
    """The CPU, its vector instructions, and how much of it is used by so many cells at a time."""
    bf16 = "with" if "amx_bf16" in _cpuinfo() or "avx512_bf16" in _cpuinfo() else "without"
    threads = 1 if jobs > 1 else torch.get_num_threads()
    each = f"{threads} thread{'s' if threads > 1 else ''} a cell"
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}, {bf16} bf16), {cores()} cores, {each}"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def listing(experiments: list[Experiment]) -> str:
    """Every experiment, for a terminal."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    blocks = []
    for experiment in experiments:
        papers = dict.fromkeys(table.source for table in experiment.paper)
        measured = f"measured: {experiment.measured}" if experiment.measured else "expected, not yet measured"
        cost = f"{experiment.minutes:g} min on two cores ({measured}); {len(experiment.cells)} cells"
        cost += f", {experiment.seeds} seed{'s' if experiment.seeds > 1 else ''}"
        said = {"question": experiment.question, "paper": "; ".join(papers)}
        said |= {"rule": f"held if {rule_in_words(experiment.rule)}", "cost": cost}
        lines = [experiment.name]
        for name, text in said.items():
            lines += textwrap.wrap(f"{name}: {text}", width, initial_indent="  ", subsequent_indent="    ")
        blocks.append("\n".join(lines))
    one_seed = f"With one seed nothing below {ONE_SEED:g} points is held or reversed."
    return "\n".join([*blocks, f"{one_seed} {len(blocks)} experiments. Run one: simclr ablate NAME."])
