"""simclr ablate: the files of experiments, verdicts against cases by hand, cells that are killed, skipped and fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
import yaml
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from simclr.ablate import cells as engine
from simclr.ablate import figure, probes, supervised
from simclr.ablate.cells import Place, as_flag, folder_of, run_cells, settings_of, train_command
from simclr.ablate.counts import count
from simclr.ablate.experiment import Cell, Experiment, PaperTable, find, read_experiment, rule_in_words
from simclr.ablate.figure import figure_of
from simclr.ablate.page import write_experiment, write_index, write_page
from simclr.ablate.probes import ProbeSettings, by_protocol, last_figures, measure
from simclr.ablate.program import labels_sha256
from simclr.ablate.responses import responses_at_start
from simclr.ablate.results import RESULT, Result
from simclr.ablate.supervised import Settings, rate, train_classifier
from simclr.ablate.table import as_csv, as_markdown
from simclr.ablate.verdict import Effect, agrees, effect_of, judge, paired_t, word_of
from simclr.cli import main
from simclr.cli.ablate import about
from simclr.cli.messages import BAD_INPUT
from simclr.cli.recipes import recipes
from simclr.cli.train import TrainCLI, parse_and_build
from simclr.efficientnet import PHI, scaled_efficientnet
from simclr.encoders import build_encoder
from simclr.eval.features import extract_features
from simclr.eval.few_labels import labelled_part
from simclr.eval.predictions import packed
from simclr.eval.protocol import Outcome
from simclr.files import hold
from simclr.run_folder import RunFolder
from simclr.training.method import DEFAULT_METHOD, find_method
from strict.sitecustomize import environment
from tiny import tiny_data, tiny_model

FILES = recipes("ablations")
TINY = {"model.image_size": 16, "model.width": 0.25, "model.projection_dim": 16, "data.shapes_train": 64}
TINY |= {"data.shapes_test": 32, "data.batch_size": 16, "trainer.max_epochs": 2, "knn.every_n_epochs": 0}
TINY |= {"quality.every_n_epochs": 0, "dashboard.every_n_epochs": 0}


def experiment(rule: dict, cells: tuple[str, ...] = ("a", "b"), **more) -> Experiment:
    paper = (PaperTable("Table 1", "Someone 2020", {"a": 2.0}, printed={"a": "2.0"}),)
    made = tuple(Cell(name, "pretrain", "shapes_resnet8", {}) for name in cells)
    named = {"name": "made", "title": "Made", "question": "Is it?", "paper": paper, "minutes": 1.0, "measured": ""}
    return Experiment(**{**named, "seeds": 1, "cells": made, "metrics": {"m": "%"}, "rule": rule, **more})


def numbers(**values: list[float]) -> dict[tuple[str, int], Result]:
    """Results by cell, one number a seed."""
    return {
        (cell, seed): Result(cell, seed, "done", {"m": value})
        for cell, given in values.items()
        for seed, value in enumerate(given)
    }


def images(cell: str, hits: list[int]) -> Result:
    shared = {"metrics": {"m": 100 * sum(hits) / len(hits)}, "images": {"m": "same"}}
    return Result(cell, 0, "done", per_image={"m": packed(torch.tensor(hits))}, **shared)


# The files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("full", [False, True])
def test_an_experiment_is_read_and_every_paper_value_has_a_source(name, full):
    read = read_experiment(FILES[name], full)
    assert read.name == name
    assert all(table.source for table in read.paper)
    assert all(table.values or table.says for table in read.paper)
    # Processors without bf16 take about twice as long; head takes more: no shorter form of it told its cells apart.
    older = 30 if read.name == "head" else 20
    assert read.minutes <= (older if "without bf16" in read.measured else 10)
    assert rule_in_words(read.rule)
    for series in read.figure.get("series", {}).values():
        known = {cell.name for cell in read.cells} | {name for table in read.paper for name in table.values}
        assert {str(cell) for cell in series.values()} <= known


def test_there_are_eighteen_or_more():
    assert len(FILES) >= 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": [{"name": "T", "values": {"a": 1}}]}, r"paper table 1 \(T\) has no source"),
        ({"paper": [{"name": "T", "source": "x", "mark": "S", "values": {"a": 1}}]}, "unknown key mark"),
        ({"paper": [{"name": "T", "source": "x"}]}, "has neither values nor says"),
        ({"paper": [{"name": "T", "source": "x", "values": {"a": "much"}}]}, "a is no number"),
        ({"rule": {"kind": "difference", "a": "a", "b": "c", "margin": 1}}, "names the cell c, which is not there"),
        ({"rule": {"kind": "difference", "a": "a", "b": "b"}}, "rule difference has no margin"),
        ({"rule": {"kind": "guess"}}, "rule.kind is not one of"),
        ({"figure": {"kind": "pie"}}, "figure.kind=pie is not one of"),
        ({"figure": {"kind": "bars", "beside": "n"}}, "figure.beside=n is no metric"),
        ({"colour": 1}, "unknown key colour"),
        ({"rule": {"kind": "difference", "a": "a", "b": "a", "margin": 1}}, "rule difference compares a with itself"),
        ({"cells": {"a": {}, "b": {"start": "c"}}}, "cell b starts from c, which is no cell"),
        ({"cells": {"a": {}, "b": {"start": "a", "work": "supervised"}}}, "which work=supervised does not"),
        ({"question": None}, "question is missing"),
    ],
)
def test_a_file_with_a_mistake_is_refused(change, message, tmp_path):
    content = {"title": "T", "question": "Q?", "work": "pretrain", "cost": {"minutes": 1}, "cells": {"a": {}, "b": {}}}
    content |= {"paper": [{"name": "T", "source": "x", "values": {"a": 1}}], "metrics": {"m": "%"}}
    content |= {"rule": {"kind": "difference", "a": "a", "b": "b", "margin": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    assert read_experiment(tmp_path / "own.yaml").cells[1].name == "b"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(ValueError, match=message):
        read_experiment(tmp_path / "own.yaml")


def test_the_full_form_may_have_other_cells_and_another_rule_and_figure(tmp_path):
    content = {"title": "T", "question": "Q?", "work": "pretrain", "cost": {"minutes": 1}, "cells": {"a": {}, "b": {}}}
    content |= {"paper": [{"name": "T", "source": "x", "values": {"a": 1}}], "metrics": {"m": "%"}}
    content |= {"rule": {"kind": "difference", "a": "a", "b": "b", "margin": 1}}
    content["full"] = {"cells": {"b": None, "c": {"model.width": 2}}, "figure": {"kind": "heatmap", "names": ["a"]}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="names the cell b, which is not there"):
        read_experiment(path, full=True)
    content["full"]["rule"] = {"kind": "difference", "a": "a", "b": "c", "margin": 2}
    path.write_text(yaml.safe_dump(content))
    read = read_experiment(path, full=True)
    assert [(cell.name, cell.settings) for cell in read.cells] == [("a", {}), ("c", {"model.width": 2})]
    assert (read.rule["b"], read.rule["margin"], read.figure["kind"]) == ("c", 2, "heatmap")
    default = read_experiment(path)
    assert ([cell.name for cell in default.cells], default.rule["b"], default.figure["kind"]) == (
        ["a", "b"],
        "b",
        "bars",
    )


@pytest.fixture(scope="module")
def parse():
    """What `simclr train` makes of arguments, without building anything."""

    class Parsed(Exception):
        pass

    parsers = {}

    def stop(cli):
        parsers[cli.config.method] = cli.parser
        raise Parsed

    def parse(arguments, method):
        if method not in parsers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TrainCLI, "before_instantiate_classes", stop)
                with pytest.raises(Parsed):
                    parse_and_build(arguments, RunFolder())
        return parsers[method].parse_args(arguments)

    return parse


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if "work: pretrain" in path.read_text()])
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_line_takes_every_cell_and_its_model_can_be_built(name, full, parse, tmp_path):
    read = read_experiment(FILES[name], full)
    for cell in read.cells:
        settings = settings_of(read, cell, 0, Place(tmp_path))
        if cell.work == "supervised":
            Settings(**cell.settings)
            continue
        ProbeSettings(**{key[6:]: v for key, v in cell.settings.items() if key.startswith("probe.")})
        recipe = yaml.safe_load(recipes("pretrain")[cell.recipe].read_text()) if cell.recipe else {}
        method = settings.get("method", recipe.get("method", DEFAULT_METHOD))
        found = parse(train_command(cell, 0, tmp_path / "run", settings, Place(tmp_path))[4:], method)
        assert found["method"] == method
        given = {key: v for key, v in cell.settings.items() if key.startswith(("model.", "data."))}
        for key, value in given.items():
            group, _, option = key.partition(".")
            read_value = found[group][option]
            assert (list(read_value) if isinstance(value, list) else read_value) == value
        with torch.device("meta"):
            find_method(method)(**found["model"].as_dict())


def test_the_whole_map_has_every_pair_and_one_value_of_the_paper_for_each_order():
    names = read_experiment(FILES["augmentation-pairs"], full=True)
    order = names.figure["names"]
    pairs = {f"{a}+{b}" for a in order for b in order if a != b}
    [table] = names.paper
    assert set(table.values) == pairs | set(order)
    one_order = {frozenset(cell.name.split("+")) for cell in names.cells}
    assert one_order == {frozenset((a, b)) for a in order for b in order}
    # The row means are printed in the paper: to a tenth.
    means = [sum(table.values[a if a == b else f"{a}+{b}"] for b in order) / 7 for a in order]
    assert [round(mean, 1) for mean in means] == pytest.approx([39.2, 29.4, 25.7, 18.8, 15.5, 14.5, 13.8], abs=0.1001)


def test_an_unknown_name_is_answered_with_the_nearest_and_a_file_is_taken(tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean temperature\? simclr ablate --list shows all"):
        find("temprature", FILES)
    with pytest.raises(ValueError, match="Did you mean what-the-head-forgets"):
        find("what_the_head_forgets_", FILES)
    (tmp_path / "own.yaml").touch()
    assert find(str(tmp_path / "own.yaml"), FILES) == tmp_path / "own.yaml"


def test_the_list_has_question_paper_rule_and_cost_of_all(capsys):
    main(["ablate", "--list"])
    said = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{said}" for name in FILES)
    for word in ("question: ", "paper: ", "rule: held if ", "cost: "):
        assert said.count(word) >= len(FILES)


# Counts


def test_counts_are_the_papers_to_the_last_digit_that_they_print():
    """Table 1 and 6 of He et al., Table 2 of Tan & Le: rounded, and where it says so cut."""
    for name, printed in {"resnet18": "1.8", "resnet34": "3.6"}.items():
        assert f"{count(name, shortcut='A')['multiply_adds']:.1f}" == printed
    for name, printed in {"resnet101": "7.6", "resnet152": "11.3"}.items():
        assert f"{count(name, stride_first=True)['multiply_adds']:.1f}" == printed
    fifty = count("resnet50", stride_first=True)["multiply_adds"]
    assert f"{fifty:.2f}" == "3.86"  # the paper prints 3.8
    assert agrees(fifty, 3.8, 1)
    cifar = {20: "0.27", 32: "0.46", 44: "0.66", 56: "0.85"}
    for depth, printed in cifar.items():
        counted = count(f"resnet{depth}", shortcut="A", stem="small", image_size=32, classes=10)
        assert f"{counted['parameters']:.2f}" == printed
    base, compound = count("efficientnet"), count("efficientnet", width=1.2, depth=1.4, image_size=291)
    assert (f"{base['multiply_adds']:.2f}", f"{base['parameters']:.1f}") == ("0.39", "5.3")
    assert (f"{compound['multiply_adds']:.2f}", f"{compound['parameters']:.1f}") == ("1.80", "12.2")


PARAMETERS = {0: "5.3", 1: "7.8", 3: "12", 4: "19", 5: "30", 6: "43", 7: "66"}  # 2: 9.1, where 9.2 is printed


@pytest.mark.parametrize(
    "phi", [phi if phi in (0, 3) else pytest.param(phi, marks=pytest.mark.slow) for phi in PARAMETERS]
)
def test_the_parameters_of_efficientnets_are_the_papers(phi):
    with torch.device("meta"):
        counted = sum(p.numel() for p in scaled_efficientnet(phi=phi).parameters()) / 1e6
    printed = PARAMETERS[phi]
    assert f"{counted:.{len(printed.partition('.')[2])}f}" == printed


@pytest.mark.parametrize("phi", [pytest.param(phi, marks=[pytest.mark.slow] * (phi not in (0, 3, 5))) for phi in PHI])
def test_multipliers_give_torchvisions_networks_name_by_name(phi):
    width, depth, size, _ = PHI[phi]
    with torch.device("meta"):
        ours = scaled_efficientnet(phi=phi)
        multiplied = scaled_efficientnet(width=width, depth=depth)
        theirs = torchvision.models.get_model(f"efficientnet_b{phi}")
        shapes = [{name: t.shape for name, t in network.state_dict().items()} for network in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert shapes[0] == {name: t.shape for name, t in multiplied.state_dict().items()}
        norms = [[(m.eps, m.momentum) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
                 for network in (ours, theirs)]  # fmt: skip
        assert norms[0] == norms[1]
        assert [m.p for m in ours.classifier if isinstance(m, torch.nn.Dropout)] == [theirs.classifier[0].p]
        counts = []
        for network in (ours, theirs):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network.eval()(torch.empty(1, 3, size, size))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_the_small_stem_leaves_a_map_and_changes_no_weight():
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small, usual = scaled_efficientnet(stem="small"), scaled_efficientnet()
    assert usual.eval().features(x).shape[-1] == 1
    assert small.eval().features(x).shape[-1] == 4
    small.load_state_dict(usual.state_dict())
    encoder = build_encoder("efficientnet_b0", image_size=32, stem="small").eval()
    assert encoder.features(x).shape[-1] == 4
    encoder.load_state_dict({k: v for k, v in usual.state_dict().items() if not k.startswith("classifier")})
    usual.classifier = torch.nn.Identity()
    assert not torch.equal(encoder(x), usual(x))
    with pytest.raises(ValueError, match="efficientnet_b0 has no stem='small_stride2'"):
        build_encoder("efficientnet_b0", stem="small_stride2")
    for bad in ({"width": 0}, {"depth": -1}, {"stem": "tiny"}, {"phi": 8}, {"phi": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            scaled_efficientnet(**bad)
    with pytest.raises(ValueError, match="counts are for"):
        count("vit_b_16")


def test_a_printed_number_is_met_rounded_or_cut():
    assert agrees(3.858, 3.8, 1)
    assert agrees(7.57, 7.6, 1)
    assert agrees(7.57, 7.5, 1)
    assert not agrees(4.394, 4.2, 1)
    assert not agrees(0.687, 0.70, 2)
    assert agrees(37.75, 37, 0)


def test_a_multiply_add_is_one_product_and_sum():
    """A ResNet-8 by hand, over its convolutions and classifier."""
    by_hand = 32 * 32 * 27 * 16  # the stem
    for side, channels, first in ((32, 16, 16), (16, 32, 16), (8, 64, 32)):
        by_hand += side * side * 9 * channels * (first + channels)
    counted = count("resnet8", shortcut="A", stem="small", image_size=32, classes=10)
    assert counted["multiply_adds"] * 1e9 == by_hand + 64 * 10


@pytest.mark.slow  # the networks of the experiment
def test_responses_of_plain_networks_forget_their_input():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plain, curves = responses_at_start("resnet20", shortcut="none", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    residual, _ = responses_at_start("resnet20", shortcut="A", seed=0)
    assert responses_at_start("resnet8", shortcut="A", seed=1) == responses_at_start("resnet8", shortcut="A", seed=1)
    assert plain["block_change"] > 1.2 > 0.9 > residual["block_change"]
    assert plain["response_std"] == pytest.approx(1, abs=0.01)
    assert len(curves["gradient"]) == len(curves["response_std"]) == 18


# Verdicts


def test_a_paired_t_is_that_of_a_table():
    """Differences 1, 2, 3: mean 2, sd 1, se .577; t(.975, 2) = 4.303, so 2 +- 2.484; t = 3.464, p = .0742."""
    effect = paired_t([1.0, 2.0, 3.0])
    assert effect.value == 2
    assert effect.interval == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-3)
    assert effect.p == pytest.approx(0.0742, abs=1e-4)
    assert paired_t([2.0, 2.0]).interval == (2, 2)
    assert paired_t([0.0, 0.0]).p == 1


def test_one_seed_is_compared_image_by_image():
    """Ten images: six that only a has right, one that only b has: McNemar's exact p = 2 (1 + 7) / 2^7 = .125."""
    a, b = [1] * 6 + [0] + [1, 1, 0], [0] * 6 + [1] + [1, 1, 0]
    effect = effect_of({("a", "m"): 1.0, ("b", "m"): -1.0}, {("a", 0): images("a", a), ("b", 0): images("b", b)})
    assert (effect.value, effect.n, effect.images, effect.test) == (pytest.approx(50), 1, 10, "McNemar")
    assert effect.p == pytest.approx(0.125)
    half = 1.96 * (7 - 25 / 10) ** 0.5 / 10 * 100  # Wald, of paired proportions
    assert effect.interval == pytest.approx((50 - half, 50 + half))


def test_other_images_or_none_give_no_interval():
    found = {("a", 0): images("a", [1, 0]), ("b", 0): images("b", [1, 1])}
    found["b", 0].images["m"] = "other"
    effect = effect_of({("a", "m"): 1.0, ("b", "m"): -1.0}, found)
    assert (effect.value, effect.interval, effect.p) == (-50, None, None)
    assert effect_of({("a", "m"): 1.0, ("c", "m"): -1.0}, found) is None


def test_seeds_that_one_cell_lacks_are_left_out():
    effect = effect_of({("a", "m"): 1.0, ("b", "m"): -1.0}, numbers(a=[1, 2, 9], b=[0, 1]))
    assert (effect.value, effect.n) == (1, 2)


@pytest.mark.parametrize(
    ("kind", "value", "interval", "word"),
    [
        ("difference", 5, (1, 9), "held"),
        ("difference", 2, (1, 3), "not resolved"),  # below the margin of 3
        ("difference", 5, (-1, 11), "not resolved"),
        ("difference", 0, (-2, 2), "not resolved"),
        ("difference", -5, (-9, -1), "reversed"),
        ("difference", 5, None, "not resolved"),
        ("below", 1, (-2, 2.9), "held"),
        ("below", 1, (-2, 4), "not resolved"),
        ("below", 6, (4, 8), "reversed"),
        ("below", 4, (2, 6), "not resolved"),
        ("equal", 1, (-1, 2.9), "held"),
        ("equal", 1, (-1, 3.1), "not resolved"),
        ("equal", 9, (4, 14), "reversed"),
        ("equal", -9, (-14, -4), "reversed"),
    ],
)
def test_the_word_follows_from_effect_interval_and_margin(kind, value, interval, word):
    p = 0.01 if interval is None or interval[0] * interval[1] > 0 else 0.5
    assert word_of(kind, Effect(value, interval, p, 3), 3) == word
    if kind == "difference":  # an exact test that does not agree with the interval decides
        assert word_of(kind, Effect(value, interval, 0.06, 3), 3) == "not resolved"


def test_of_one_seed_nothing_is_claimed_that_another_could_undo():
    for value, word in ((2.9, "not resolved"), (3.1, "held"), (-2.9, "not resolved"), (-3.1, "reversed")):
        effect = Effect(value, (value - 1, value + 1), 0.001, 1, images=10_000)
        assert word_of("difference", effect, 1) == word
        assert word_of("interaction", effect, 1) == word
    assert word_of("difference", Effect(1.5, (1, 2), 0.001, 3), 1) == "held"  # of three


def test_a_cell_may_stand_on_both_sides_of_an_interaction():
    """(a - b) - (c - b) is a - c."""
    found = numbers(a=[10, 11, 12.5], b=[5, 6.1, 7], c=[8, 9, 10.2])
    rule = {"kind": "interaction", "a": "a", "b": "b", "c": "c", "d": "b", "margin": 1}
    verdict = judge(experiment(rule, ("a", "b", "c")), found)
    plain = judge(experiment({"kind": "difference", "a": "a", "b": "c", "margin": 1}, ("a", "b", "c")), found)
    assert verdict.effect.value == pytest.approx(plain.effect.value) == pytest.approx(2.1)
    assert verdict.effect.interval == pytest.approx(plain.effect.interval)


def test_the_effect_shown_is_that_of_the_part_that_decides():
    up = {"kind": "difference", "a": "a", "b": "b", "margin": 1}
    down = {"kind": "difference", "a": "b", "b": "a", "margin": 1}
    verdict = judge(experiment({"kind": "all", "of": [up, down]}), numbers(a=[10, 11, 12], b=[5, 6.1, 7]))
    assert (verdict.word, verdict.effect) == ("reversed", verdict.parts[1].effect)


def test_a_metric_may_have_to_equal_another_of_its_cell():
    rule = {"kind": "equal", "a": "a", "b": "a", "metric": "m", "metric_b": "k", "margin": 3}
    found = {("a", seed): Result("a", seed, "done", {"m": 30.0 + seed / 10, "k": 30.5}) for seed in range(3)}
    made = Experiment(**{**vars(experiment(rule)), "metrics": {"m": "%", "k": "%"}})
    assert judge(made, found).word == "held"
    assert rule_in_words(rule) == "of a, the interval of m - k lies within 3 of 0"
    far = {key: Result("a", key[1], "done", {"m": 40.0 + key[1] / 10, "k": 30.5}) for key in found}
    assert judge(made, far).word == "reversed"


def test_rules_of_several_parts_and_of_several_cells():
    both = {"kind": "all", "of": []}
    up = {"kind": "difference", "a": "a", "b": "b", "margin": 1}
    down = {"kind": "difference", "a": "b", "b": "a", "margin": 1}
    found = numbers(a=[10, 11, 12], b=[5, 6.1, 7])
    assert judge(experiment(up), found).word == "held"
    assert judge(experiment({**both, "of": [up, up]}), found).word == "held"
    assert judge(experiment({**both, "of": [up, down]}), found).word == "reversed"
    missing = judge(experiment({**both, "of": [up, {**up, "b": "c"}]}, ("a", "b", "c")), found)
    assert missing.word == "not run"
    assert "(c missing)" in missing.sentence
    rule = {"kind": "interaction", "a": "a", "b": "b", "c": "c", "d": "d", "margin": 1}
    found = numbers(a=[10, 11, 12], b=[5, 6, 7], c=[8, 9, 10], d=[6, 7.1, 8])
    verdict = judge(experiment(rule, tuple("abcd")), found)
    assert (verdict.word, round(verdict.effect.value, 2)) == ("held", 3.03)
    rule = {"kind": "monotone", "cells": ["a", "b", "c"], "direction": "lower"}
    assert judge(experiment(rule, tuple("abc")), numbers(a=[9], b=[8], c=[7])).word == "held"
    assert judge(experiment(rule, tuple("abc")), numbers(a=[9], b=[6], c=[7])).word == "not resolved"
    assert judge(experiment(rule, tuple("abc")), numbers(a=[1], b=[2], c=[3])).word == "reversed"
    assert judge(experiment(rule, tuple("abc")), numbers(a=[1], b=[2])).word == "not run"


def test_two_metrics_of_one_cell_are_compared():
    rule = {"kind": "difference", "a": "a", "b": "a", "metric": "h", "metric_b": "z", "margin": 1}
    found = {("a", seed): Result("a", seed, "done", {"h": 9.0 + seed, "z": 3.0 + 1.1 * seed}) for seed in (0, 1, 2)}
    verdict = judge(experiment(rule, ("a",), metrics={"h": "%", "z": "%"}), found)
    assert verdict.word == "held"
    assert "h - z" in verdict.sentence


def test_counts_are_judged_one_by_one():
    table = PaperTable("T", "x", {"a": 1.8, "b": 0.7}, metric="m", printed={"a": "1.8", "b": "0.70"})
    made = experiment({"kind": "counts"}, paper=(table,))
    assert judge(made, numbers(a=[1.82], b=[0.701])).word == "held"
    verdict = judge(made, numbers(a=[1.82], b=[0.687]))
    assert (verdict.word, "b 0.687 against 0.7" in verdict.sentence) == ("not resolved", True)
    assert judge(made, numbers(a=[2.82], b=[0.2])).word == "reversed"
    assert judge(made, numbers(a=[1.82])).word == "not run"


# The engine


@pytest.fixture
def commands(monkeypatch):
    """Cells are small programs in place of runs; what they are is set by name."""
    programs: dict[str, str] = {}
    monkeypatch.setattr(engine._Runner, "commands", lambda self, cell, seed, settings, folder: [
        [sys.executable, "-S", "-c", programs[cell.name], str(folder / engine.OUTCOME)]
    ])  # fmt: skip
    return programs


WRITES = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"metrics": {"m": 5.0}}\')'
UP = {"kind": "difference", "a": "a", "b": "b", "margin": 1}


def test_what_is_done_is_skipped_and_what_is_of_another_version_or_damaged_is_computed_again(tmp_path, commands):
    commands |= {"a": WRITES, "b": WRITES}
    said: list[str] = []
    made, place = experiment(UP), Place(tmp_path)
    first = run_cells(made, 1, place, said.append)
    without_seconds = sorted(text.partition(" (")[0] for text in said)
    assert without_seconds == ["done: a, seed 0: m 5.00", "done: b, seed 0: m 5.00"]
    said.clear()
    assert run_cells(made, 1, place, said.append) == first
    assert sorted(said) == ["skipped: a, seed 0: done", "skipped: b, seed 0: done"]
    files = {path.parent.parent.name: path for path in tmp_path.rglob(RESULT)}
    files["a"].write_text(json.dumps({**json.loads(files["a"].read_text()), "version": 0}))
    files["b"].write_text("{")
    said.clear()
    run_cells(made, 1, place, said.append)
    assert "again: a, seed 0: its result is of version 0, this one writes 2" in said
    assert "again: b, seed 0: its result cannot be read (JSONDecodeError)" in said


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, commands):
    commands |= {"a": "import sys; sys.exit('error: no images in photos.')", "b": WRITES}
    said: list[str] = []
    made = experiment(UP)
    found = run_cells(made, 1, Place(tmp_path), said.append)
    assert "failed: a, seed 0: no images in photos." in said
    assert (found["a", 0].status, found["b", 0].status) == ("failed", "done")
    verdict = judge(made, found)
    assert (verdict.word, "(a missing)" in verdict.sentence) == ("not run", True)
    assert "| a |  | 2.0 | 0 | seed 0 failed: no images in photos. |" in as_markdown(made, found)
    commands["a"] = WRITES
    assert run_cells(made, 1, Place(tmp_path), said.append)["a", 0].status == "done"
    assert "again: a, seed 0: it failed before: no images in photos." in said


def test_a_cell_that_measures_another_follows_it_and_falls_with_it(tmp_path, commands):
    commands |= {"a": "import sys; sys.exit('error: broken.')", "b": WRITES}
    made = experiment(UP)
    later = Cell("b", "pretrain", None, {}, start="a")
    made = Experiment(**{**vars(made), "cells": (later, made.cells[0])})
    found = run_cells(made, 1, Place(tmp_path), lambda text: None)
    assert found["b", 0].why == "it measures a, which failed"


def test_a_run_that_is_gone_is_told_with_what_to_do(tmp_path, commands, monkeypatch):
    """Its result is there, and skipped; a cell that is added later would measure the run once more."""
    commands |= {"a": WRITES, "b": WRITES}
    made = experiment(UP)
    run_cells(made, 1, Place(tmp_path), lambda text: None)
    later = Cell("later", "pretrain", None, {}, start="a")
    monkeypatch.undo()  # the engine's own commands
    found = run_cells(
        Experiment(**{**vars(made), "cells": (*made.cells, later)}), 1, Place(tmp_path), lambda text: None
    )
    assert (found["a", 0].status, found["later", 0].status) == ("done", "failed")
    [folder] = tmp_path.glob("cells/a/*")
    assert found["later", 0].why == f"the run of a is gone. Delete {folder}, and it is trained again."


def test_other_settings_have_another_folder_and_fewer_epochs_of_more_images(tmp_path, monkeypatch):
    made = experiment(UP)
    cell = Cell("a/b c", "pretrain", None, {"trainer.max_epochs": 20})
    shapes, photos = Place(tmp_path), Place(tmp_path, images=Path("/photos"), training_images=50_000)
    # 10 epochs of 8 192 are 1.6 of 50 000: steps of the recipe's batch, or the cell's, tell as many views exactly.
    content = {"r": {"data": {"batch_size": 128}}}
    photos_with = Place(tmp_path, images=Path("/photos"), training_images=50_000, recipes=content)
    for more, steps in (({}, 640), ({"data.batch_size": 64, "trainer.accumulate_grad_batches": 8}, 160)):
        short = settings_of(made, Cell("s", "pretrain", "r", {"trainer.max_epochs": 10, **more}), 0, photos_with)
        assert (short["trainer.max_epochs"], short["trainer.max_steps"]) == (-1, steps)
        assert short["of_recipe"] == content["r"]  # another content is another cell
    settings = [settings_of(made, cell, 0, place) for place in (shapes, photos)]
    assert [found["trainer.max_epochs"] for found in settings] == [20, 3]
    # The rate warms up over as many views, of the recipes' one epoch of built-in images.
    assert [found.get("model.warmup_epochs") for found in settings] == [None, 0.1638]
    for name in ("shapes_resnet8", "shapes_byol"):
        assert yaml.safe_load(recipes("pretrain")[name].read_text())["model"]["warmup_epochs"] == engine._WARM_UP
    # The epochs of a protocol go over the images, too; those over labelled ones, and of the full form, stay.
    taught = Cell("d", "pretrain", None, {"probe.options": {"epochs": 30, "teacher_epochs": 60}})
    options = settings_of(made, taught, 0, photos)["probe.options"]
    assert (options, taught.settings["probe.options"]["epochs"]) == ({"epochs": 5, "teacher_epochs": 60}, 30)
    whole = Experiment(**{**vars(made), "full": True})
    assert settings_of(whole, taught, 0, photos)["probe.options"]["epochs"] == 30
    folders = {folder_of(cell, 0, found, shapes) for found in settings}
    assert len(folders) == 2
    monkeypatch.setattr(engine, "RESULT_VERSION", engine.RESULT_VERSION + 1)  # whose runs are not those of the other
    assert folder_of(cell, 0, settings[0], shapes) not in folders
    assert all(folder.parent.name == "a-b-c" for folder in folders)
    command = train_command(cell, 3, tmp_path, settings[1], photos)
    assert {"--seed_everything=3", "--data.train_dir=/photos/train", "--resume=auto"} <= set(command)
    assert [as_flag(v) for v in (True, [0.2, 1.0], None, "none", 0.5)] == ["true", "[0.2, 1.0]", "null", "none", "0.5"]


def test_a_cell_that_cannot_be_made_is_named_and_the_others_go_on(tmp_path):
    cells = (
        Cell("wrong", "counts", None, {"encoder": "resnet18", "widht": 2}),
        Cell("a", "counts", None, {"encoder": "resnet18"}),
    )
    made = Experiment(**{**vars(experiment(UP)), "cells": cells})
    found = run_cells(made, 1, Place(tmp_path), lambda text: None)
    assert found["wrong", 0].why.startswith("TypeError: ")
    assert "widht" in found["wrong", 0].why
    assert found["a", 0].status == "done"


def test_ctrl_c_reaches_the_programs_of_cells_once(tmp_path, commands):
    """By the engine, which asks them to save and end: not by the terminal, too, which a second time means at once."""
    commands["a"] = f"import os; print(os.getsid(0) != {os.getsid(0)}); {WRITES}"
    run_cells(experiment(UP, ("a",)), 1, Place(tmp_path), lambda text: None)
    [log] = tmp_path.glob("cells/a/*/log.txt")
    assert log.read_text().startswith("True")


WAITING = """
import sys
from pathlib import Path
from simclr.ablate import cells
from simclr.ablate.experiment import read_experiment
child = "import os, time; open('pid', 'w').write(f'{os.getpid()}.'); time.sleep(100)"
cells._Runner.commands = lambda *given: [[sys.executable, "-c", child]]
cells.run_cells(read_experiment(Path(sys.argv[1])), 1, cells.Place(Path("out")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_programs_of_cells_end_with_an_engine_that_is_killed(tmp_path):
    """Else they would hold their runs when the same command is given again."""
    command = [sys.executable, "-c", WAITING, str(FILES["blur"])]
    engine_process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text().endswith(".")):
        assert time.monotonic() < deadline
        assert engine_process.poll() is None
        time.sleep(0.05)
    child = Path("/proc", pid.read_text()[:-1])
    assert child.is_dir()
    engine_process.kill()
    engine_process.wait()
    while child.is_dir() and "(zombie)" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_closed_terminal_ends_an_experiment_but_not_one_of_nohup(tmp_path, commands):
    commands["a"] = WRITES
    seen = []
    for before in (signal.SIG_DFL, signal.SIG_IGN):
        previous = signal.signal(signal.SIGHUP, before)
        try:
            run_cells(
                experiment(UP, ("a",)),
                1,
                Place(tmp_path / before.name),
                lambda text: seen.append(signal.getsignal(signal.SIGHUP)),
            )
            assert signal.getsignal(signal.SIGHUP) is before
        finally:
            signal.signal(signal.SIGHUP, previous)
    assert seen == [engine._interrupt, signal.SIG_IGN]


@pytest.mark.parametrize("content", ["{}", "[]", '{"verdict": {"effect": null}}', "null", "{"])
def test_a_verdict_of_another_program_is_left_out(tmp_path, content):
    made = experiment(UP)
    results = numbers(a=[1, 2, 3], b=[5, 6, 7.1])
    write_experiment(made, results, judge(made, results), tmp_path / "own", "shapes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "verdict.json").write_text(content)
    page = write_index(tmp_path).read_text()
    assert "| [own](" in page
    assert "[other]" not in page


@pytest.mark.parametrize("device", ["cpu:0", "cuda:1", "meta", "gpu"])
def test_a_device_that_experiments_cannot_have_is_refused_in_a_line(tmp_path, capsys, device):
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "blur", "--device", device, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (BAD_INPUT, 1)
    assert f"device={device} is not auto, cpu or cuda" in said


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"probe.trian": 64}, "cell b: probe.trian is no setting. There are probe.labels, "),
        ({"probe.protocol": "semi_finetune", "probe.options": {"epoch": 3}}, "epoch: no setting of semi_finetune"),
        ({"probe.protocol": "semi_tune"}, "semi_tune"),
        ({"work": "supervised", "stepz": 3}, "cell b: stepz is no setting. There are augment, batch_size, "),
    ],
)
def test_a_setting_that_no_program_has_is_refused_before_anything_trains(tmp_path, capsys, cell, message):
    file = tiny_file(tmp_path / "own.yaml")
    content = yaml.safe_load(file.read_text())
    content["cells"]["b"] = cell
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", str(file), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n"), message in said) == (BAD_INPUT, 1, True), said
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_cells_learned_from_and_how_many_threads_each_had(tmp_path):
    cells = (Cell("a", "pretrain", None, {}), Cell("b", "supervised", None, {"train": 4096}))
    made = Experiment(**{**vars(experiment(UP)), "cells": cells})
    said = about(Place(tmp_path, images=Path("/photos"), training_images=50_000, jobs=2), made)
    assert said.startswith("50,000 images of photos, probes learn from 8,192 of them, classifiers from 4,096 of them, ")
    assert said.endswith("1 thread a cell")
    assert about(Place(tmp_path), made).startswith("the built-in shapes, classifiers from 4,096 of them, ")


def test_a_page_joins_what_was_run(tmp_path):
    made = experiment(UP)
    for name, results in (("first", numbers(a=[1, 2, 3], b=[5, 6, 7.1])), ("second", {})):
        one = Experiment(**{**vars(made), "name": name, "title": f"The {name}"})
        write_experiment(one, results, judge(one, results), tmp_path / name, "shapes")
        assert (tmp_path / name / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = write_index(tmp_path).read_text()
    assert "| [first](#the-first) | reversed | -4.033 (-4.177 to -3.890) | 3 seeds |" in page
    assert "| [second](#the-second) | not run |  |  |" in page
    assert page.count("Rule, published beforehand: held if a is at least 1 above b") == 2
    assert "- Table 1: a 2.0. Someone 2020." in page
    assert "(first/figure.png)" in page
    assert "a,2.000 ± 1.000,2.0,3,0," in as_csv(made, numbers(a=[1, 2, 3]))
    docs = tmp_path / "docs" / "findings.md"
    docs.parent.mkdir()
    text = write_page(tmp_path, docs, ["first", "second", "third"]).read_text()
    assert "Not run yet in its present form: third." in text
    drawn = re.findall(r"\]\((.*?png)\)", text)
    assert drawn == ["findings/first.png", "findings/second.png"]
    assert all((docs.parent / path).read_bytes().startswith(b"\x89PNG") for path in drawn)
    with pytest.raises(ValueError, match=r"holds no experiment\. Run one there: simclr ablate NAME --out"):
        write_page(docs.parent, docs, [])
    with pytest.raises(ValueError, match=r"findings\.html is no Markdown file"):
        write_page(tmp_path, docs.with_suffix(".html"), [])


def test_the_page_of_the_documentation_states_each_rule_as_it_stands_and_no_verdict_without_result():
    page = Path(__file__).parents[1] / "docs" / "experiments.md"
    top, *sections = page.read_text().split("\n## ")
    rows = [re.split(r" *\| *", line)[1:-1] for line in top.splitlines() if line.startswith("| [")]
    listed = {row[0].partition("]")[0][1:]: row for row in rows}
    told = {re.search(r"`simclr ablate ([\w-]+)`", text)[1]: text for text in sections}
    assert list(told) == list(listed)
    [absent] = re.findall(r"(?m)^Not run yet in its present form: (.*)\.$", top) or [""]
    assert {*listed, *absent.split(", ")} - {""} == set(FILES)
    for name, text in told.items():
        read = read_experiment(FILES[name])
        assert f"held if {rule_in_words(read.rule)}.\n" in text
        assert text.startswith(f"{read.title}\n")
        word, effect, n, date = listed[name][1:]
        assert f"**{word.capitalize()}.** " in text
        assert word in ("held", "not resolved", "reversed")
        assert date in text
        table = [line for line in text.splitlines() if line.startswith("|")]
        place = re.split(r" *\| *", table[0]).index("n")
        counts = [int(re.split(r" *(?<!\\)\| *", line)[place]) for line in table[2:]]
        assert len(counts) == len(read.cells)
        assert max(counts) > 0
        if read.rule["kind"] != "counts":
            assert re.match(r"-?\d+\.\d+( \(|$)", effect)  # one run by itself has no interval
            assert n.startswith(f"{max(counts)} seed")
        assert (page.with_suffix("") / f"{name}.png").stat().st_size < 150_000


@pytest.mark.parametrize("name", FILES)
def test_every_figure_can_be_drawn(name):
    read = read_experiment(FILES[name])
    curve = {read.figure["curve"]: [[1.0, 2.0], [2.0, 1.0]]} if "curve" in read.figure else {}
    found = {
        (cell.name, 0): Result(cell.name, 0, "done", dict.fromkeys(read.metrics, 1.0 + i), curves=curve)
        for i, cell in enumerate(read.cells)
    }
    assert figure_of(read, found).startswith(b"\x89PNG")


def test_bars_of_a_second_metric_stand_beside_and_numbers_clear_of_the_seeds():
    axes = Figure().subplots()
    figure._bars(axes, {"h": {"a": [2.0, 4.0], "b": [5.0], "c": []}, "z": {"a": [1.0, 2.0], "b": []}}, ["blue", "red"])
    bars = [(round(bar.get_y() + bar.get_height() / 2, 4), bar.get_width()) for bar in axes.patches]
    assert bars == [(-0.1625, 3.0), (0.8375, 5.0), (0.1625, 1.5)]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("3", 4.0), ("5", 5.0), ("1.5", 2.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_a_logarithmic_axis_names_the_places_that_were_measured():
    axes = Figure().subplots()
    arrangement = {"series": {"a": {"4": "x", "12": "y", "100": "not run"}}, "log": True}
    figure._lines(axes, {"x": [1.0], "y": [2.0]}, arrangement)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "12"]


def test_a_protocol_of_eval_measures_a_run_as_it_is_asked_to(monkeypatch):
    data, model, seen = tiny_data(), tiny_model(head="deep", seed=3).eval(), []
    train, test = data.eval_loader("train"), data.eval_loader("test", limit=20)

    def find_protocol(name, known):
        def watched(frozen, **options):
            seen.append((name, frozen, options))
            return known_protocol(name, known)(frozen, **options)

        return watched

    known_protocol = probes.find_protocol
    monkeypatch.setattr(probes, "find_protocol", find_protocol)
    options = {"fractions": [0.5], "draws": 1, "epochs": 1, "from_layer": 1}
    hits = by_protocol("semi_finetune", ProbeSettings(options=options), model, train, test, "cpu")
    assert (hits.shape, hits.dtype) == ((20,), torch.bool)
    [(name, frozen, given)] = seen
    assert (name, given) == ("semi_finetune", {**options, "seed": 3})
    assert frozen.head is model.head
    assert frozen.encoder is model.encoder
    assert (len(frozen.train[0]), len(frozen.train_images)) == (64, 64)

    right, wrong = Outcome(test.labels), Outcome((test.labels + 1) % 10)
    known_protocol = lambda name, known: lambda *args, **more: {"teacher": wrong, "student=resnet8": right}  # noqa: E731
    of_student = ProbeSettings(options=options, result="student")
    assert by_protocol("distill", of_student, model, train, test, "cpu").all()
    assert not by_protocol("distill", ProbeSettings(result="teacher"), model, train, test, "cpu").any()


def test_labels_alone_are_those_that_the_protocols_draw_first(monkeypatch):
    """A class-balanced draw that the seed decides; so differences between cells are not of the labels."""
    asked = []
    monkeypatch.setattr(
        supervised, "labelled_part", lambda *args, **more: asked.append(more) or labelled_part(*args, **more)
    )
    monkeypatch.setattr(
        supervised, "_fit", lambda network, pixels, labels, *rest: asked.append(labels) or [[1.0, 50.0]]
    )
    settings = Settings(encoder="resnet8", width=0.25, train=200, test=64, labels=0.1, seed=5)
    train_classifier(settings, Path("unused"))
    assert asked[0] == {"seed": 5, "draw": 0}
    assert asked[1].bincount().tolist() == [2] * 10


def test_probes_and_protocols_are_of_the_same_labels_and_the_same_test_images(monkeypatch, tmp_path):
    data, model, seen = tiny_data(), tiny_model(head="deep", seed=5).eval(), []
    of_run = SimpleNamespace(model={"seed": 5}, data={})
    monkeypatch.setattr(probes, "read_checkpoint", lambda run: of_run)
    monkeypatch.setattr(probes, "network_of", lambda checkpoint: model)
    monkeypatch.setattr(probes, "images_of_run", lambda settings: data)

    def linear_probe(features, labels, tested, wanted, **more):
        seen.append((features, labels))
        return SimpleNamespace(predictions=wanted)

    monkeypatch.setattr(probes, "linear_probe", linear_probe)
    few = {"labels": 0.5}
    probed = measure(tmp_path, ProbeSettings(**few))
    labels = data.eval_loader("train").labels
    part = labelled_part(labels, 3, seed=5, draw=0)  # half of the 6.4 images of a class
    assert torch.equal(seen[0][1], labels[part])
    assert torch.equal(seen[0][0], extract_features(model.encoder, data.eval_loader("train"))[0][part])
    options = {"fractions": [0.5], "draws": 1, "epochs": 1}
    tuned = measure(tmp_path, ProbeSettings(protocol="semi_finetune", options=options))
    assert (list(probed.metrics), probed.metrics["linear_top1"]) == (["linear_top1", "spread_h"], 100)
    assert list(tuned.metrics) == ["test_top1"]
    assert tuned.images["test_top1"] == probed.images["linear_top1"]
    test = data.eval_loader("test")
    assert probed.images["linear_top1"] == labels_sha256(test.labels, test.source.name)
    assert len({labels_sha256(test.labels, "a"), labels_sha256(test.labels, "b"), labels_sha256(labels, "a")}) == 3


def test_the_last_figures_of_a_run_are_means_of_ten(tmp_path):
    rows = [f"{step},{step / 100 if step % 2 else ''}" for step in range(40)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,contrast_top1", *rows]))
    assert last_figures(tmp_path / "metrics.csv") == {"contrast_top1": pytest.approx(30)}
    assert last_figures(tmp_path / "none.csv") == {}


def test_a_classifier_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    given = {"encoder": "resnet8", "width": 0.25, "train": 128, "test": 64, "batch_size": 32, "steps": 12}
    settings = Settings(**given)
    whole = train_classifier(settings, tmp_path)
    (tmp_path / "again").mkdir()
    saved, epochs = torch.save, []

    def save_and_die(content, file):
        saved(content, file)
        epochs.append(content["step"])
        if len(epochs) == 2:
            file.flush()
            raise KeyboardInterrupt

    assert whole.metrics.keys() >= {"train_error", "test_top1", "response_std"}
    monkeypatch.setattr(torch, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(settings, tmp_path / "again")
    monkeypatch.setattr(torch, "save", saved)
    assert vars(train_classifier(settings, tmp_path / "again")) == vars(whole)
    assert [rate(step, Settings(steps=100, lr=1.0, warmup_steps=2)) for step in (0, 2, 50, 75)] == [0.1, 1, 0.1, 0.01]


def tiny_file(path: Path) -> Path:
    content = {"title": "Tiny", "question": "Does it run?", "work": "pretrain", "recipe": "shapes_resnet8"}
    content |= {"cost": {"minutes": 1}, "base": {**TINY, "probe.train": 64, "probe.z": True}}
    tuned = {"probe.protocol": "semi_finetune", "probe.options": {"fractions": [0.5], "draws": 1, "epochs": 1}}
    content |= {"cells": {"a": {}, "b": {"model.temperature": 0.5}, "tuned": {"start": "a", **tuned}}}
    content |= {"metrics": {"linear_top1": "%", "test_top1": "%"}}
    content |= {"paper": [{"name": "T", "source": "x", "values": {"a": 50.0}}]}
    content |= {"rule": {"kind": "difference", "a": "a", "b": "b", "margin": 1}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_experiment_that_another_process_computes_is_refused_in_a_line(tmp_path, capsys):
    folder = tmp_path / "bottleneck"
    folder.mkdir()
    let_go = hold(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "bottleneck", "--out", str(tmp_path)])
    let_go()
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (BAD_INPUT, 1)
    assert f"{folder} is being computed by another process. Wait for it" in said
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_two_cells_are_killed_go_on_and_are_skipped_when_done(tmp_path):
    file = tiny_file(tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "simclr", "ablate", str(file), "--jobs", "1", "--device", "cpu"]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("ablations/tiny/cells/b/*/run/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped: a, seed 0: done" in done.stdout
    assert "done: b, seed 0: " in done.stdout
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.stdout.count("skipped: ") == 3
    assert re.search(r"done: tuned, seed 0: test_top1 \d", done.stdout)
    assert (tmp_path / "ablations" / "index.md").is_file()
