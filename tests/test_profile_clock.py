"""The clock of a step: parts that add up, time found where it is spent, and nothing else changed."""

import pytest
import torch
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

from simclr.profile import PARTS, StepClock, StepParts
from tiny import fit, tiny_model

TAKES = {"make_views": 0.02, "project": 0.03, "training_step": 0.004}  # seconds, by a clock that nothing else moves


class Slow(StepClock):
    """Times a model whose methods take as long as they are said to, on whatever machine."""

    def on_train_start(self, trainer, pl_module):
        now = [0.0]
        self.profiler.now = lambda: now[0]

        def slow(name, method):
            def call(*args, **kwargs):
                now[0] += TAKES[name]
                return method(*args, **kwargs)

            return call

        pl_module.training_step = slow("training_step", pl_module.training_step)
        pl_module.views.make = slow("make_views", pl_module.views.make)  # what these do, within their ranges
        pl_module.network = slow("project", pl_module.network)
        super().on_train_start(trainer, pl_module)


def clocked(root, kind=StepClock, **settings):
    clock, model = kind(5, "cpu"), tiny_model(**settings)
    fit(root, model, callbacks=[clock], max_epochs=-1, max_steps=clock.steps)
    return clock, model


def test_parts_of_a_step_add_up_and_time_is_found_where_it_is_spent(tmp_path):
    clock, _ = clocked(tmp_path, Slow)
    assert len(clock.timed) == len(clock.untouched) == 1  # epochs of 4 steps, blocks of 5
    took = {part: seconds for part, seconds in clock.profiler.seconds.items() if seconds}
    assert took == pytest.approx({"augmentation": 5 * 0.02, "encoder": 5 * 0.03, "rest": 5 * 0.004})
    assert clock.timed == clock.untouched == pytest.approx([5 * sum(TAKES.values())])
    assert all(clock.profiler.calls[part] >= 5 for part in PARTS)


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_micro_batches_run_the_encoder_once_more_for_all_but_one(tmp_path):
    clock, _ = clocked(tmp_path, micro_batch_size=4)  # 4 of them a step
    assert clock.profiler.calls["encoder"] == clock.profiler.calls["augmentation"] == 5 * 7
    assert clock.profiler.calls["backward"] == 5 * 4
    assert clock.profiler.calls["loss"] == 5 * 2  # with its gradient, and within that by itself


def test_the_clock_changes_no_weight(tmp_path):
    _, model = clocked(tmp_path)
    other = tiny_model()
    fit(tmp_path, other, max_epochs=-1, max_steps=StepClock(5, "cpu").steps)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_part_within_another_interrupts_it_and_what_has_no_name_belongs_to_none():
    parts, now = StepParts("cpu"), [0.0]
    parts.now = lambda: now[0]

    def takes(seconds):
        now[0] += seconds

    for parts.on in (False, True):
        with parts.profile("[LightningModule]SimCLR.optimizer_step"):
            takes(1)
            with parts.profile("[Strategy]DDPStrategy.training_step"):
                takes(2)
                with parts.profile("loss"), parts.profile("[Callback]on_backward.on_before_backward"):
                    takes(4)
            with parts.profile("[Strategy]DDPStrategy.backward"):
                takes(8)
            takes(16)
        parts.start("[_TrainingEpochLoop].train_dataloader_next")
        takes(32)
        parts.stop("[_TrainingEpochLoop].train_dataloader_next")
    assert parts.seconds == {"optimiser": 17, "rest": 2, "loss": 4, "backward": 8, "data": 32}
    assert set(parts.calls.values()) == {1}


def test_the_trainer_gets_its_own_profiler_back(tmp_path):
    own, clock = PassThroughProfiler(), StepClock(5, "cpu")
    trainer = fit(tmp_path, tiny_model(), callbacks=[clock], profiler=own, max_epochs=-1, max_steps=clock.steps)
    assert trainer.profiler is own
    assert not clock.profiler.on


def test_a_profiler_of_lightning_shows_the_parts_of_a_step(tmp_path):
    profiler = SimpleProfiler()
    fit(tmp_path, tiny_model(), profiler=profiler, max_epochs=1)
    steps = len(profiler.recorded_durations["[Strategy]SingleDeviceStrategy.training_step"])
    for part in ("augmentation", "encoder", "loss"):
        assert len(profiler.recorded_durations[part]) == steps
