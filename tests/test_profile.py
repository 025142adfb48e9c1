"""The profile of a step: parts that add up, a limit that is one, a command that writes nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simclr import profile
from simclr.cli import main
from simclr.cli.messages import BAD_INPUT, INTERRUPTED
from simclr.profile import PARTS, Limit, Profile, StepClock, advice, count_operations, dtype_of, throughput
from tiny import fit, flags, tiny_model

TAKES = {"_loss": 0.02, "_project": 0.03, "training_step": 0.004}  # seconds, by a clock that nothing else moves


class Slow(StepClock):
    """Times a model whose methods take as long as they are said to, on whatever machine."""

    def on_train_start(self, trainer, pl_module):
        now = [0.0]
        self._now = lambda: now[0]

        def slow(name, method):
            def call(*args, **kwargs):
                now[0] += TAKES[name]
                return method(*args, **kwargs)

            return call

        for name in TAKES:
            setattr(pl_module, name, slow(name, getattr(pl_module, name)))
        super().on_train_start(trainer, pl_module)


def clocked(root, kind=StepClock, **settings):
    clock, model = kind(5, "cpu"), tiny_model(**settings)
    fit(root, model, callbacks=[clock], max_epochs=-1, max_steps=clock.steps)
    return clock, model


def test_parts_of_a_step_add_up_and_time_is_found_where_it_is_spent(tmp_path):
    clock, model = clocked(tmp_path, Slow)
    assert len(clock.timed) == len(clock.untouched) == 1  # epochs of 4 steps, blocks of 5
    took = {part: seconds for part, seconds in clock.parts.items() if seconds}
    assert took == pytest.approx({"loss": 5 * 0.02, "encoder": 5 * 0.03, "rest": 5 * 0.004})
    assert clock.timed == clock.untouched == pytest.approx([5 * sum(TAKES.values())])
    assert all(clock.calls[part] >= 5 for part in ("data", "augmentation", "encoder", "loss", "backward", "optimiser"))
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert "_views" not in vars(model)


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_micro_batches_run_the_encoder_once_more_for_all_but_one(tmp_path):
    clock, _ = clocked(tmp_path, micro_batch_size=4)  # 4 of them a step
    assert clock.calls["encoder"] == clock.calls["augmentation"] == 5 * 7
    assert clock.calls["backward"] == 5 * 4
    assert clock.calls["loss"] == 5 * 2  # and its gradient


def test_the_clock_changes_no_weight(tmp_path):
    _, model = clocked(tmp_path)
    other = tiny_model()
    fit(tmp_path, other, max_epochs=-1, max_steps=StepClock(5, "cpu").steps)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_operations_are_those_counted_by_hand():
    model = tiny_model(encoder="resnet8", width=1, stem="small", head="linear", projection_dim=8)
    convolutions = 16 * 16 * (3 * 16 + 2 * 16 * 16) * 9  # stem and first stage, 16 pixels
    convolutions += 8 * 8 * (16 * 32 + 32 * 32) * 9 + 8 * 8 * 16 * 32  # second stage and its shortcut
    convolutions += 4 * 4 * (32 * 64 + 64 * 64) * 9 + 4 * 4 * 32 * 64
    forward, backward = count_operations(model, 2)
    assert forward == 2 * 2 * (convolutions + 64 * 8)
    assert backward == 2 * forward - 2 * 2 * 16 * 16 * 3 * 16 * 9  # no gradient of the images


def test_the_limit_is_the_rate_of_a_product(monkeypatch):
    counted = []

    def in_two_seconds(job, device, seconds):
        with FlopCounterMode(display=False) as counter:
            job()
        counted.append(counter.get_total_flops())
        return 2.0

    monkeypatch.setattr(profile, "_fastest", in_two_seconds)
    rates = throughput(torch.device("cpu"), torch.float32, 0.05)
    assert rates == {"matrix products": counted[0] / 2, "convolutions": counted[1] / 2}
    assert counted[0] == 2 * 1024**3
    assert [dtype_of(name) for name in ("bf16-mixed", "16-true", "32-true")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


def test_the_seconds_of_a_call_are_those_of_the_best_calls_in_a_row(monkeypatch):
    takes = iter([9, 9, 9, 9, 3, 4, 3, 2, 5, 5, 5, 5])
    now, waits = [0.0], []
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(now[0]))

    def job():
        now[0] += next(takes)

    assert profile._fastest(job, torch.device("cuda"), seconds=50, calls=4) == 3
    assert next(takes, None) is None, "it stops at the first end of a row after the time"
    assert waits == [0, 36, 36, 48, 48, 68], "before a row and after it"


GRAPHS, COMPILE = "--model.compile_encoder reduce-overhead", "--model.compile_encoder true"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, GRAPHS),
        ({"setting": True}, GRAPHS),
        ({"setting": "max-autotune-no-cudagraphs"}, GRAPHS),
        ({"setting": "reduce-overhead"}, "nothing stands out"),
        ({"setting": "max-autotune"}, "nothing stands out"),
        ({"seconds": 0.016}, COMPILE),
        ({"seconds": 0.016, "setting": True}, "nothing stands out"),
        ({"devices": 8}, COMPILE),
        ({"rate": 1.5e11}, "nothing stands out"),
        ({"device": "cpu"}, "nothing stands out"),
    ],
    ids=str,
)
def test_short_steps_on_one_gpu_are_advised_cuda_graphs(changed, expected):
    values = {"seconds": 0.014, "setting": False, "devices": 1, "rate": 1e12, "device": "cuda"} | changed
    parts = dict.fromkeys(PARTS, 0.0) | {"encoder": 0.3, "backward": 0.6, "rest": 0.05, "loss": 0.05}
    limit = Limit(values["rate"], "matrix products")
    seconds = values["seconds"]
    measured = Profile(
        {name: share * seconds for name, share in parts.items()}, seconds, seconds, 0, 0, (5e8, 1e9), limit, None, 20
    )
    strategy = SimpleNamespace(root_device=torch.device(values["device"]))
    trainer = SimpleNamespace(strategy=strategy, world_size=values["devices"], datamodule=None, log_every_n_steps=25)
    (line,) = advice(measured, tiny_model(compile_encoder=values["setting"]), trainer, 16)
    assert expected in line
    assert "14.0 ms are short" in line or expected is not GRAPHS


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_the_command_prints_a_table_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["profile", *flags({"model.micro_batch_size": 8}), "--steps=5"])
    printed = capsys.readouterr().out
    for row in ("augmentation", "backward", "the step untouched", "images/s", "advice", "8 at a time"):
        assert row in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("--steps=0", "steps=0 is not a positive number"),
        ("--stepz=3", "unknown key stepz. Did you mean steps?"),
        ("--model.micro_batch_size=5", "micro_batch_size=5 does not divide"),
        ("--ckpt_path=x.ckpt", "a profile begins anew"),
    ],
)
def test_a_mistake_gets_one_line(wrong, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["profile", *flags({}), wrong])
    error = capsys.readouterr().err
    assert stop.value.code == BAD_INPUT
    assert answer in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_with_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StepClock, "on_train_batch_end", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["profile", *flags({})])
    assert stop.value.code == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: no profile"
    assert not list(tmp_path.iterdir())
