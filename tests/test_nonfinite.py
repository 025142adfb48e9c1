"""A step whose loss or gradient is not finite stops the run or is skipped to the bit, on all ranks, and is written
down."""

import contextlib
import io
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pytorch_lightning import Callback
from pytorch_lightning.plugins import MixedPrecision

from poisoned import AlwaysPoisoned, PoisonedGradient, PoisonedLoss
from ranks import run_ranks
from simclr.checkpoint import read_checkpoint
from simclr.cli.messages import FAILED
from simclr.data import draw_shapes
from simclr.nonfinite import FiniteSteps, NonFiniteStep, read_dump, watch
from simclr.nonfinite.dump import dumps_in
from simclr.optim import warmup_cosine
from simclr.seeding import epoch_order
from test_continue import assert_same_run, content, run_and_code
from tiny import BATCH, IMAGES, STEPS, fit, flags, tiny_data, tiny_model
from toy import Toy

TOY = {"encoder": "resnet8", "image_size": 16, "width": 0.25, "warmup_epochs": 0, "batch_size": BATCH}
RUN = {"model.warmup_epochs": 0, "trainer.log_every_n_steps": 1, "knn.every_n_epochs": 0, "quality.every_n_epochs": 0}


def toy(kind=PoisonedLoss, **settings):
    torch.manual_seed(0)
    return kind(**{**TOY, **settings})


def place_of_5(epoch: int) -> int:
    """The batch of the epoch that holds image 5."""
    return (epoch_order(0, epoch, IMAGES) == 5).nonzero().item() // BATCH


class Poison(Callback):
    """Makes the first layer give NaN in some steps, so that all that follows is ruined: statistics, loss, gradient."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_train_start(self, trainer, module):
        module.encoder.conv1.register_forward_hook(
            lambda layer, inputs, output: output * math.nan if trainer.global_step in self.steps else None
        )


class Snapshots(Callback):
    """Weights, statistics and the optimiser's state before each batch and at the end of it, by batch."""

    def __init__(self):
        self.before, self.after, self.rates = [], [], []

    def of(self, trainer, module):
        found = {name: value.clone() for name, value in module.state_dict().items()}
        for number, state in trainer.optimizers[0].state_dict()["state"].items():
            found |= {f"{number}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
        return found

    def on_train_batch_start(self, trainer, module, *args):
        self.before.append(self.of(trainer, module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        self.after.append(self.of(trainer, module))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Skipping


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [
        ({}, {}),
        ({"optimizer": "sgd"}, {}),
        ({"optimizer": "adamw"}, {"gradient_clip_val": 1.0}),
        ({"optimizer": "adamw"}, {}),
        ({"micro_batch_size": 8}, {}),
        ({"loss": "margin_triplet", "views": 2}, {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_a_step_that_is_skipped_leaves_every_bit_as_it_was_and_the_next_is_taken(tmp_path, settings, trainer):
    seen, finite = Snapshots(), FiniteSteps(on_nonfinite="skip", say=lambda *args: None)
    fit(tmp_path, tiny_model(**settings), callbacks=[Poison(2), seen, finite], max_epochs=2, **trainer)
    unchanged = [same(before, after) for before, after in zip(seen.before, seen.after, strict=True)]
    assert unchanged == [step == 2 for step in range(2 * STEPS)]
    shares = [rate / seen.rates[STEPS] for rate in seen.rates]
    assert shares == pytest.approx([warmup_cosine(step, STEPS, 2 * STEPS) for step in range(2 * STEPS)])
    assert all(value.isfinite().all() for value in seen.after[-1].values())
    assert (finite.skipped, finite.in_a_row) == (1, 0)


def test_accumulated_gradients_are_skipped_together(tmp_path):
    class PoisonOne(Poison):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.steps = (1,) if batch_idx == 3 else ()

    seen, finite = Snapshots(), FiniteSteps(tmp_path, "skip", say=lambda *args: None)
    model = tiny_model()
    fit(tmp_path, model, callbacks=[PoisonOne(), seen, finite], max_epochs=2, accumulate_grad_batches=2)
    assert same(seen.before[2], seen.after[3])
    assert not same(seen.before[4], seen.after[5])
    assert finite.skipped == 1
    losses = [batch.loss for batch in read_dump(finite.dump).batches]
    assert math.isfinite(losses[0])
    assert math.isnan(losses[1])


def test_the_mean_loss_of_an_epoch_is_that_of_the_steps_taken(tmp_path):
    seen = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(float(module.step_log.loss))

    model = tiny_model()
    fit(tmp_path, model, callbacks=[Poison(0, 2), Losses(), FiniteSteps(None, "skip", print)], max_epochs=1)
    assert [math.isnan(loss) for loss in seen] == [True, False, True, False]
    assert model.step_log.mean() == pytest.approx((seen[1] + seen[3]) / 2)


def test_looking_changes_no_bit(tmp_path):
    alone, watched = tiny_model(), tiny_model()
    fit(tmp_path, alone)
    fit(tmp_path, watched, callbacks=[FiniteSteps(tmp_path)])
    assert same(alone.state_dict(), watched.state_dict())


def test_too_many_in_a_row_or_in_all_stop_the_run(tmp_path):
    finite = FiniteSteps(None, "skip", print)
    with pytest.raises(
        NonFiniteStep, match=r"step 14, epoch 4.*, as in 11 steps in a row: too many to skip\. Lower base"
    ):
        fit(tmp_path, toy(AlwaysPoisoned), callbacks=[finite], max_epochs=6)
    finite = FiniteSteps(None, "skip", print)
    with pytest.raises(NonFiniteStep, match=r"step 20, epoch 6.*, as in 11 steps: too many to skip"):
        fit(tmp_path, tiny_model(), callbacks=[Poison(*range(0, 40, 2)), finite], max_epochs=8)


def test_a_run_with_skipped_steps_that_is_cut_goes_on_to_the_same_bits_and_counts_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {**RUN, "method": "poisoned.PoisonedLoss", "on_nonfinite": "skip", "trainer.max_epochs": 3}
    assert run_and_code(flags({**settings, "run_dir": "whole"})) == 0
    out = capsys.readouterr().out
    assert re.search(r"warning: the loss is nan at step \d, epoch 2; .*: the step is skipped, later ones", out)
    assert out.count("is skipped") == 1
    assert ", 2 steps skipped; encoder in" in out
    place = place_of_5(1)
    halt = {"trainer.callbacks": "test_continue.Halt", "trainer.callbacks.epoch": 1, "trainer.callbacks.batch": place}
    assert place < STEPS - 1
    assert run_and_code(flags({**settings, **halt, "run_dir": "cut"})) == 0
    callbacks = content(Path("cut"))["callbacks"]
    assert callbacks["FiniteSteps"] == {"skipped": 1, "in_a_row": 1}
    assert run_and_code(["--ckpt_path", "cut", "--trainer.callbacks=null"]) == 0
    assert ", 2 steps skipped; encoder in" in capsys.readouterr().out
    assert_same_run(Path("cut"), Path("whole"))
    rows = [row.split(",") for row in Path("whole/metrics.csv").read_text().splitlines()]
    column = rows[0].index("skipped_steps")
    assert [float(row[column]) for row in rows[1:] if row[column]] == [0, 1, 2]


# Stopping


def photos(root: Path, count: int) -> Path:
    root.mkdir()
    numbers = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(numbers.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / f"{number:02d}.png")
    return root


@pytest.mark.parametrize("kind", ["PoisonedLoss", "PoisonedGradient", "Raises"])
def test_the_run_stops_and_says_where_and_of_which_images(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    photos(Path("photos"), IMAGES)
    settings = {**RUN, "method": f"poisoned.{kind}", "data.train_dir": "photos", "run_dir": "run"}
    settings |= {"data.load_size": 16}
    arguments = [flag for flag in flags(settings) if "shapes" not in flag]
    assert run_and_code(arguments) == FAILED
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    place = place_of_5(1)
    step = STEPS + place
    index = epoch_order(0, 1, IMAGES)[place * BATCH : (place + 1) * BATCH]
    named = ", ".join(f"photos/{number:02d}.png" for number in index[:3].tolist())
    said = {
        "PoisonedLoss": f"error: the loss is nan at step {step}, epoch 2; not finite either is the gradient of all ",
        "PoisonedGradient": f"error: the gradient is not finite at step {step}, epoch 2 (of head.0.weight; the loss ",
        "Raises": "error: the projections are not finite.",
    }[kind]
    assert err.startswith(said), err
    assert kind == "Raises" or f"; the batch: {named} and 13 more. Lower base_lr" in err
    assert f"Look at it: simclr replay run/nonfinite_step_{step}.pt" in err
    assert "run/checkpoints/last.ckpt holds the last good weights" in err
    dump = read_dump("run")
    assert (dump.step, dump.epoch, dump.method) == (step, 1, f"poisoned.{kind}")
    [batch] = dump.batches
    assert batch.index.tolist() == index.tolist()
    assert [Path(name).name for name in batch.names] == [f"{number:02d}.png" for number in index.tolist()]
    assert batch.pixels.shape == (BATCH, 3, 16, 16)
    # The whole of the first epoch is safe, and goes on.
    assert read_checkpoint("run").global_step == STEPS
    assert run_and_code([*arguments, "--resume=auto", "--on_nonfinite=skip"]) == (FAILED if kind == "Raises" else 0)


def test_a_step_at_the_very_beginning_keeps_its_dump_and_the_command_can_be_given_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {**RUN, "trainer.callbacks": "test_nonfinite.PoisonFirst", "run_dir": "run"}
    for _ in range(2):
        assert run_and_code(flags({**settings, "resume": "auto"})) == FAILED
        assert "the loss is nan at step 0, epoch 1: 32 of 32 projections are NaN" in capsys.readouterr().err
        assert [path.name for path in dumps_in(Path("run"))] == ["nonfinite_step_0.pt"]


class PoisonFirst(Poison):
    def __init__(self):
        super().__init__(0)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 8}], ids=str)
@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_the_dump_holds_the_weights_and_statistics_before_the_step(tmp_path, settings):
    seen, finite = Snapshots(), FiniteSteps(tmp_path)
    with pytest.raises(NonFiniteStep):
        fit(tmp_path, tiny_model(**settings), callbacks=[Poison(3), seen, finite])
    dump = read_dump(finite.dump)
    expected = {name: value for name, value in seen.before[3].items() if not name[0].isdigit()}
    assert same(dump.weights, expected)
    assert dump.step == 3
    assert all(math.isnan(norm) for name, norm in dump.found["gradients"].items() if "encoder" in name)


def test_late_numbers_stop_the_run_one_step_later_with_the_weights_before_the_step(tmp_path, monkeypatch):
    """As on a GPU, here with a CPU's numbers: they are looked at when the next step has its gradient."""
    waited = []

    class Copied:
        def synchronize(self):
            waited.append(True)

    class Late(FiniteSteps):
        def on_train_start(self, trainer, module):
            super().on_train_start(trainer, module)
            self._late = True
            self._weights = [torch.empty_like(weight) for weight in self._names]

    monkeypatch.setattr(watch, "send_to_host", lambda numbers: (numbers.clone(), Copied()))
    for step in (1, STEPS - 1):  # the last of an epoch waits for no other
        seen, finite = Snapshots(), Late(tmp_path / str(step))
        (tmp_path / str(step)).mkdir()
        with pytest.raises(NonFiniteStep, match=f"the loss is nan at step {step}, epoch 1"):
            fit(tmp_path, tiny_model(), callbacks=[Poison(step), seen, finite])
        assert len(seen.before) == min(step + 2, STEPS)
        expected = {name: value for name, value in seen.before[step].items() if not name[0].isdigit()}
        dump = read_dump(finite.dump)
        assert same(dump.weights, expected)
        assert dump.batches[0].index.tolist() == epoch_order(0, 0, IMAGES)[step * BATCH : (step + 1) * BATCH].tolist()
    assert waited
    alone, late = tiny_model(), tiny_model()
    fit(tmp_path, alone)
    fit(tmp_path, late, callbacks=[Late(tmp_path)])
    assert same(alone.state_dict(), late.state_dict())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # before any step of the optimiser's
@pytest.mark.parametrize("on", ["stop", "skip"])
def test_the_scaler_of_fp16_looks_for_its_scale_in_peace_but_not_for_ever(tmp_path, on):
    def scaled():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))

    class Overflow(Callback):
        """As fp16 gives it where the scale is too large: the loss is finite, a gradient is not."""

        def __init__(self, steps):
            self.steps = steps

        def on_after_backward(self, trainer, module):
            if trainer.global_step in self.steps:
                module.head.layers[-1].linear.weight.grad.fill_(math.inf)

    seen, finite = Snapshots(), FiniteSteps(None, on, print)
    options = {"max_epochs": 2, "plugins": [scaled()]}
    fit(tmp_path, tiny_model(), callbacks=[Overflow([1, 2]), seen, finite], **options)
    weights = [same({n: v for n, v in a.items() if n.endswith("weight")}, {n: b[n] for n in a if n.endswith("weight")})
               for a, b in zip(seen.before, seen.after, strict=True)]  # fmt: skip
    assert weights == [step in (1, 2) for step in range(2 * STEPS)]
    assert finite.skipped == 0
    with pytest.raises(NonFiniteStep, match="the gradient is not finite at step"):
        fit(tmp_path, tiny_model(), callbacks=[Overflow(range(99)), FiniteSteps(None, on, print)],
            max_epochs=15, plugins=[scaled()])  # fmt: skip
    with pytest.raises(NonFiniteStep, match="the loss is nan at step"):
        fit(tmp_path, tiny_model(), callbacks=[Poison(*range(99)), FiniteSteps(None, on, print)],
            max_epochs=15, plugins=[scaled()])  # fmt: skip


def test_images_that_are_too_many_are_named_and_not_kept(tmp_path, monkeypatch):
    photos(tmp_path / "photos", IMAGES)
    monkeypatch.setattr("simclr.nonfinite.dump.MOST_BYTES", BATCH * 3 * 16**2 - 1)
    data = tiny_data(source="folder", train_dir=str(tmp_path / "photos"), load_size=16)
    finite = FiniteSteps(tmp_path)
    with pytest.raises(NonFiniteStep):
        fit(tmp_path, tiny_model(), data, callbacks=[Poison(1), finite])
    [batch] = read_dump(finite.dump).batches
    assert batch.pixels is None
    assert torch.equal(batch.images(), data.train.images(batch.index))


def test_batches_of_any_loader_are_kept(tmp_path):
    images, index = draw_shapes(IMAGES, 16)[0], torch.arange(IMAGES)
    images = images.float() / 255
    images[20, 0, 3, 3] = math.nan
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, index), batch_size=BATCH)
    finite = FiniteSteps(tmp_path)
    with pytest.raises(
        NonFiniteStep, match=r"at step 1, epoch 1: .*; the batch: image 16, image 17, image 18 and 13 more"
    ):
        fit(tmp_path, tiny_model(), loader, callbacks=[finite])
    [batch] = read_dump(finite.dump).batches
    assert batch.pixels[4].isnan().sum() == 1


def test_a_full_disk_does_not_hide_what_is_wrong(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch, "write_dump", full)
    with pytest.raises(NonFiniteStep, match="the loss is nan at step 0"):
        fit(tmp_path, tiny_model(), callbacks=[Poison(0), FiniteSteps(tmp_path)])
    assert "could not be written (No space left on device): the step cannot be replayed" in capsys.readouterr().err


def test_steps_are_not_skipped_where_devices_share_the_gradient(tmp_path):
    class Sharded:
        strategy, barebones = object(), False

    with pytest.raises(
        ValueError, match=r"on_nonfinite=skip is for one device and for DDP, not for object\. Use --tra"
    ):
        FiniteSteps(on_nonfinite="skip").check(Sharded())
    FiniteSteps().check(Sharded())
    with pytest.raises(ValueError, match="on_nonfinite=wait is none of stop, skip"):
        FiniteSteps(on_nonfinite="wait")


# Ranks


class PoisonSecondRank(Callback):
    """The projections of rank 1 are not finite in step 2."""

    def on_train_start(self, trainer, module):
        if trainer.global_rank == 1:
            Poison(2).on_train_start(trainer, module)


RANKS = {**RUN, "trainer.devices": 2, "trainer.strategy": "ddp", "data.workers": 0}
LOCAL = {**RANKS, "method": "poisoned.PoisonedLoss"}  # whose loss is that of its rank alone
GLOBAL = {**RANKS, "trainer.callbacks": "test_nonfinite.PoisonSecondRank"}


def of_both_ranks(root: str) -> dict[str, tuple]:
    rank, found = dist.get_rank(), {}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as Lightning tells the ranks that it launches
    os.chdir(root)
    for name, settings in (("local", LOCAL), ("global", GLOBAL)):
        for on in ("stop", "skip"):
            said, run = io.StringIO(), Path(f"{name}-{on}")
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run_and_code(flags({**settings, "on_nonfinite": on, "run_dir": run}))
            dist.barrier()
            saved = run / "checkpoints" / "last.ckpt"
            weights = torch.load(saved, weights_only=True)["state_dict"] if saved.exists() else {}
            found[f"{name}-{on}"] = code, said.getvalue(), {n: v.tolist() for n, v in weights.items()}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(the working folder, what `of_both_ranks` gave on each rank)"""
    root = tmp_path_factory.mktemp("ranks")
    return root, run_ranks(of_both_ranks, 2, str(root))


@pytest.mark.parametrize("name", ["local", "global"])
def test_two_ranks_stop_together_with_one_message_that_names_the_rank_and_its_images(ranks, name):
    root, (first, second) = ranks
    assert (first[f"{name}-stop"][0], second[f"{name}-stop"][0]) == (FAILED, FAILED)
    said, other = first[f"{name}-stop"][1], second[f"{name}-stop"][1]
    assert "error" not in other
    step = {"local": STEPS + place_of_5(1), "global": 2}[name]
    epoch, place = divmod(step, STEPS)
    order = epoch_order(0, epoch, IMAGES)[place * BATCH : (place + 1) * BATCH]
    rank = order.tolist().index(5) // (BATCH // 2) if name == "local" else 1
    share = order[rank * BATCH // 2 : (rank + 1) * BATCH // 2].tolist()
    assert f"error: the loss is nan at step {step}, epoch {epoch + 1}, rank {rank}" in said or name == "local"
    assert f"at step {step}, epoch {epoch + 1}, rank {rank}" in said, said
    images = ", ".join(f"image {number}" for number in share[:3])
    assert f"; the batch: {images} and 5 more. Lower base_lr" in said, said
    dump = read_dump(root / f"{name}-stop")
    assert dump.batches[0].index.tolist() == order.tolist()  # that of both ranks
    assert (dump.batches[0].share, dump.rank) == (BATCH // 2, rank)


@pytest.mark.parametrize("name", ["local", "global"])
def test_two_ranks_skip_the_same_step(ranks, name):
    first, second = (found[f"{name}-skip"] for found in ranks[1])
    assert (first[0], second[0]) == (0, 0), first[1]
    assert ", 1 step skipped; encoder in" in first[1]
    assert first[2] == second[2]
    assert all(np.isfinite(value).all() for value in first[2].values())


def test_the_toy_is_well(tmp_path):
    """What the tests above poison trains to the end by itself."""
    finite = FiniteSteps(tmp_path)
    fit(tmp_path, toy(Toy), callbacks=[finite], max_epochs=2)
    assert finite.dump is None
    with pytest.raises(NonFiniteStep, match="the gradient is not finite"):
        fit(tmp_path, toy(PoisonedGradient), callbacks=[finite], max_epochs=2)
