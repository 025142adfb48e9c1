"""A step that was written down is computed again as in the run, and what is wrong is found where it was put."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from poisoned import PoisonedGradient, PoisonedLoss
from simclr.cli.messages import BAD_INPUT, FAILED
from simclr.cli.replay import replay
from simclr.nonfinite import FiniteSteps, NonFiniteStep, read_dump, replay_step
from simclr.nonfinite.dump import write_dump
from simclr.nonfinite.replay import Computed, compute, verdict
from test_nonfinite import Poison, toy
from tiny import BATCH, fit, tiny_data, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")


def dumped(root: Path, model=None, callbacks=None, **trainer):
    """What a run leaves that meets a step which is not finite."""
    root.mkdir(exist_ok=True)
    finite = FiniteSteps(root)
    with pytest.raises(NonFiniteStep):
        fit(root, model, callbacks=[*([Poison(2)] if callbacks is None else callbacks), finite], **trainer)
    return read_dump(finite.dump)


@pytest.fixture(scope="module")
def well(tmp_path_factory):
    """A step of SimCLR, the third, whose poison does not come with the dump."""
    return dumped(tmp_path_factory.mktemp("well"), tiny_model())


class Write(FiniteSteps):
    """Writes every step down, as if it were not finite, and tells its numbers."""

    def __init__(self, root, at):
        super().__init__(root)
        self.at, self.losses, self.norms = at, [], {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        super().on_before_optimizer_step(trainer, module, optimizer)
        if trainer.global_step == self.at:
            self._write(trainer, module, self._now, None, {})
            self.losses = [float(loss) for loss in self._now.losses]
            self.norms = {name: float(p.grad.double().norm()) for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [
        ({}, {}),
        ({"optimizer": "adamw", "views": 3, "start_size": 8, "grow_epochs": 3}, {"accumulate_grad_batches": 2}),
        ({"micro_batch_size": 8}, {"precision": "bf16-mixed"}),
        ({"loss": "margin_triplet", "semi_hard": True}, {"precision": "64-true"}),
    ],
    ids=str,
)
def test_a_step_is_computed_as_the_run_did_to_the_bit(tmp_path, settings, trainer):
    step = Write(tmp_path, 3)
    fit(tmp_path, tiny_model(**settings), callbacks=[step], max_epochs=2, **trainer)
    dump = read_dump(step.dump)
    found = compute(dump, dump.trainer["precision"])
    assert found.losses == step.losses
    assert found.gradients == step.norms
    assert found.finite
    assert found.first is None
    assert len(found.largest) > 10


def test_the_share_of_a_rank_has_its_own_batch_norm(tmp_path):
    """As two ranks without synchronised BatchNorm train: by micro-batches of a rank's images."""
    step = Write(tmp_path, 2)
    fit(tmp_path, tiny_model(micro_batch_size=8), callbacks=[step], max_epochs=1)
    dump = read_dump(step.dump)
    [batch] = dump.batches
    ranks = replace(dump, settings={**dump.settings, "micro_batch_size": None}, batches=[replace(batch, share=8)])
    assert dump.trainer["batch_norm_group"] == 16
    assert compute(ranks, "32-true").losses == step.losses


def said(arguments: list[str], capsys) -> tuple[int, str]:
    try:
        replay(arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, " ".join((err if code == BAD_INPUT else out).split())


def test_an_image_that_alone_makes_the_loss_nan_is_named(tmp_path, capsys):
    dump = dumped(tmp_path, toy(PoisonedLoss), [])
    command = [str(dump.path), "--device=cpu"]
    code, text = said(command, capsys)
    assert code == BAD_INPUT
    assert (
        "is of method=poisoned.PoisonedLoss, a class that is not of simclr. If its code may run, add --method po"
        in text
    )
    assert "method=toy.Toy, but" in said([*command, "--method=toy.Toy"], capsys)[1]
    file = tmp_path / "found.json"
    code, text = said([*command, "--method=poisoned.PoisonedLoss", f"--json={file}"], capsys)
    assert code == FAILED
    assert (
        "Every layer's output is finite, the loss of them is not: look at the loss. Image 5 alone makes it so." in text
    )
    record = json.loads(file.read_text())
    assert record["images"] == ["image 5"]
    assert record["precisions"]["32-true"]["loss"] == ["nan"]
    assert record["weights"] == []
    assert record["finite"] is False


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(tmp_path):
    dump = dumped(tmp_path, toy(PoisonedGradient), [], accumulate_grad_batches=2)
    assert len(dump.batches) == 2
    record = replay_step(dump, method="poisoned.PoisonedGradient")
    assert record["verdict"] == [
        "the loss is finite, its gradient is not: of head.0.weight",
        "image 5 alone makes it so",
    ]


def test_numbers_that_fit_a_finer_type_are_told_with_the_layer(well, capsys, tmp_path):
    weights = dict(well.weights)
    weights["encoder.layer2.0.conv1.weight"] = weights["encoder.layer2.0.conv1.weight"] * 1e38  # float32 ends at 3e38
    path = tmp_path / "nonfinite_step_9.pt"
    write_dump(path, replace(well, weights=weights))
    code, text = said([str(tmp_path), "--device=cpu"], capsys)
    assert code == FAILED
    assert "Finite in float64: float32 overflows, first in encoder.layer2.0.conv1, where float64 has up to" in text
    assert "largest outputs layer 32-true 64-true" in text
    assert "It is not up to a few images" in text


def test_weights_that_were_ruined_before_are_told_first(well):
    weights = {**well.weights, "encoder.conv1.weight": well.weights["encoder.conv1.weight"] * math.nan}
    record = replay_step(replace(well, weights=weights))
    assert record["verdict"] == ["the weights were not finite before this step: encoder.conv1.weight"]
    assert record["weights"] == ["encoder.conv1.weight"]
    assert record["precisions"]["32-true"]["first_layer"] == "encoder.conv1"


def test_pixels_that_are_not_finite_are_told_by_their_image(well):
    [batch] = well.batches
    pixels = batch.pixels.float() / 255
    pixels[3] = math.inf
    record = replay_step(replace(well, batches=[replace(batch, pixels=pixels)]))
    assert record["verdict"] == [f"pixels are not finite: image {int(batch.index[3])}"]


def test_a_layer_that_fails_for_one_image_is_told_with_it(well, monkeypatch):
    """By a layer that gives infinity for a bright image, in every precision."""
    [batch] = well.batches
    pixels = batch.pixels.clone()
    pixels[6] = 255
    original = torch.nn.Conv2d.forward

    def forward(layer, x):
        white = (x.flatten(1).amin(1) > 1.9) & (x.shape[1] == 3)
        return original(layer, x) + torch.where(white, math.inf, 0).to(x.dtype)[:, None, None, None]

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    settings = {**well.settings, "jitter_prob": 0.0, "gray_prob": 0.0}
    record = replay_step(replace(well, settings=settings, batches=[replace(batch, pixels=pixels)]))
    name = f"image {int(batch.index[6])}"
    assert record["verdict"] == [
        f"not finite in float32 and all finer: first the output of encoder.conv1, of {name}",
        f"{name} alone makes it so",
    ]


def test_what_is_finite_here_is_said_to_be(well, capsys):
    code, text = said([str(well.path), "--device=cpu"], capsys)
    assert code == 0
    assert "step 2, epoch 1, 16 images" in text
    assert "the run (32-true, cpu) nan" in text
    assert "All numbers are finite here, in 32-true too: kernels and versions round in other ways." in text


def test_the_verdict_of_fp16_names_the_layer_and_its_size_in_float32(well):
    half = Computed("16-mixed", [math.nan], {"w": math.nan}, {"encoder.conv1": math.inf}, "encoder.conv1")
    full = Computed("32-true", [5.0], {"w": 1.0}, {"encoder.conv1": 7e4})
    double = Computed("64-true", [5.0], {"w": 1.0}, {"encoder.conv1": 7e4})
    assert verdict(well, [half, full, double], [], [], None) == [
        "finite in float32: float16 overflows, first in encoder.conv1, where float32 has up to 7e+04",
        "it is not up to a few images: most parts of the batch give the same",
    ]
    assert compute(replace(well, trainer={**well.trainer, "precision": "16-mixed"}), "16-mixed").refused


# Files


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, dump: None, "no dump of a step at"),
        (lambda path, dump: path.mkdir(), "A run that met numbers not finite has RUN/nonfinite_step_N.pt."),
        (lambda path, dump: path.write_text("x"), "cannot be read: it is damaged"),
        (lambda path, dump: torch.save({"a": torch.ones(1)}, path), "is no dump of a step. A run writes them as"),
        (lambda path, dump: torch.save({"nonfinite": 2}, path), "is of another version of simclr: format 2, not 1."),
        (lambda path, dump: torch.save({"nonfinite": 1}, path), "is damaged: method, settings, weights, step, epoch,"),
        (lambda path, dump: write_dump(path, replace(dump, batches=[])), "is damaged: batches is missing"),
        (
            lambda path, dump: write_dump(path, replace(dump, batches=[replace(dump.batches[0], index=torch.ones(3))])),
            "is damaged: a batch is missing or of another type.",
        ),
        (lambda path, dump: write_dump(path, replace(dump, weights={})), "does not fit method=simclr of this version"),
        (lambda path, dump: flip(path, dump), "has other bytes than were written"),
    ],
)
def test_what_is_no_dump_is_refused_in_one_line(tmp_path, well, capsys, make, message):
    make(tmp_path / "file.pt", well)
    code, text = said([str(tmp_path / "file.pt"), "--device=cpu"], capsys)
    assert code == BAD_INPUT
    assert message in text


def flip(path: Path, dump) -> None:
    content = bytearray(dump.path.read_bytes())
    at = content.find(dump.batches[0].pixels.numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_of_several_dumps_one_must_be_chosen_and_the_name_may_be_short(tmp_path, well, capsys):
    for step in (2, 10):
        shutil.copy(well.path, tmp_path / f"nonfinite_step_{step}.pt")
    code, text = said([str(tmp_path)], capsys)
    assert code == BAD_INPUT
    assert f"holds 2 dumps. Give one of them: {tmp_path}/nonfinite_step_2.pt, {tmp_path}/nonfinite_step_10.pt." in text
    assert read_dump(tmp_path / "nonfinite_step_10").step == 2
    code, text = said([str(tmp_path / "nonfinite_step_2.pt"), f"--json={tmp_path}"], capsys)
    assert code == BAD_INPUT
    assert "cannot be written. Name a file in a folder that exists." in text


def test_a_dump_needs_no_training_data(tmp_path, well):
    assert well.batches[0].pixels.shape == (BATCH, 3, 16, 16)
    data = tiny_data()
    data.setup()
    assert torch.equal(well.batches[0].pixels, data.train.images(well.batches[0].index))
