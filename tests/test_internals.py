"""No private name of Lightning, torch or Kornia but in the files that exist for them, each there and meaning what we
think."""

import argparse
import ast
import copy
import inspect
import math
import multiprocessing
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies.launchers import subprocess_script
from torch import nn

from simclr import torch_internals
from simclr.cli.internals import destinations
from simclr.training import hooks, internals
from simclr.views import internals as views
from tiny import STEPS, fit, tiny_model

PACKAGE = Path(__file__).parents[1] / "simclr"
ROOMS = {"internals.py", "torch_internals.py"}  # the names of files that may borrow
# Documented by torch under their private names: https://docs.pytorch.org/docs/stable/torch.html#foreach-functions
DOCUMENTED = ("_foreach_",)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ROOMS)


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and not name.startswith(DOCUMENTED)


def defined_here() -> set[str]:
    """Private names that the package itself defines: attributes set on self, functions, classes, fields, globals."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                found |= {node.attr} if own else set()
    return found


OWN = defined_here()
# Of NamedTuple, and of os: public by their documentation.
OWN |= {"_asdict", "_replace", "_fields", "_exit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_of_others_are_borrowed_in_one_place(path):
    borrowed = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in OWN:
            borrowed.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("simclr"):
            borrowed |= {f"{node.module}.{alias.name}" for alias in node.names if private(alias.name)}
            borrowed |= {node.module for part in node.module.split(".") if private(part)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            borrowed |= {name} if private(str(name)) and name not in OWN else set()
    assert not borrowed, f"{path.name} reaches for {sorted(borrowed)}: give each a function in internals.py"


class Steps(Callback):
    def __init__(self):
        self.counted = []

    def on_train_batch_start(self, trainer, *args):
        self.counted.append(internals.optimizer_batches(trainer))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_optimizer_batches_are_those_that_stepped_before(tmp_path, accumulate):
    seen = Steps()
    fit(tmp_path, callbacks=[seen], max_epochs=2, accumulate_grad_batches=accumulate)
    assert seen.counted == [batch // accumulate for batch in range(2 * STEPS)]


class Heard(PassThroughProfiler):
    """What Lightning calls, by the names under which it would be timed."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def start(self, action_name):
        self.calls.append(action_name)

    def of(self, callback: Callback) -> Counter:
        mine = f"[Callback]{callback.state_key}."
        return Counter(call.removeprefix(mine) for call in self.calls if call.startswith(mine))


def test_a_step_calls_no_hook_that_a_callback_lacks(tmp_path):
    class Deaf(Callback):
        pass

    heard, callbacks = Heard(), [Steps(), Deaf()]
    fit(tmp_path, callbacks=callbacks, max_steps=3, profiler=heard)
    once, in_steps = (heard.of(callback) for callback in callbacks)
    assert in_steps["on_train_epoch_start"] == 1
    assert not set(in_steps) & set(internals.STEP_HOOKS)
    assert {hook: n for hook, n in once.items() if hook in internals.STEP_HOOKS} == {"on_train_batch_start": 3}
    assert callbacks[0].counted == [0, 1, 2]


def test_the_hooks_of_a_step_are_all_that_lightning_calls_in_each(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "call_only_own_hooks", lambda callbacks: None)
    heard, deaf = Heard(), Callback()
    fit(tmp_path, callbacks=[deaf], max_steps=3, profiler=heard)
    assert {hook for hook, calls in heard.of(deaf).items() if calls == 3} == set(internals.STEP_HOOKS)


def test_a_hook_given_to_one_callback_alone_is_called(tmp_path):
    seen = []

    class Sub(Steps):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)  # Lightning's own, empty

    callback = Sub()
    callback.on_after_backward = lambda trainer, *args: seen.append(trainer.global_step)
    fit(tmp_path, callbacks=[callback], max_steps=2)
    assert seen == [0, 1]
    assert callback.counted == [0, 1]


class Rows(Logger):
    name = version = ""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((dict(metrics), step))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epochs_row_is_known_before_lightning_logs_it(tmp_path, accumulate):
    expected, logger = [], Rows()

    class Ask(ModelCheckpoint):  # called last
        def on_train_epoch_end(self, trainer, *args):
            metrics, step = internals.epoch_row(trainer)
            expected.append(({name: float(value) for name, value in metrics.items()}, step))

    options = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 100}
    fit(tmp_path, callbacks=[Ask(tmp_path)], max_epochs=2, accumulate_grad_batches=accumulate, **options)
    assert [step for _, step in expected] == [-(-STEPS // accumulate) * epoch - 1 for epoch in (1, 2)]
    assert logger.rows == expected


@pytest.mark.parametrize("wanted", [False, True])
def test_batch_norm_is_told_to_be_synchronised(wanted):
    options = {"logger": False, "enable_checkpointing": False, "sync_batchnorm": wanted}
    trainer = Trainer(accelerator="cpu", devices=1, strategy="ddp", **options)
    assert internals.synchronises_batch_norm(trainer) is wanted


def test_a_module_has_the_trainer_that_trains_it_or_none(tmp_path):
    assert internals.trainer_of(tiny_model()) is None
    told = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            told.append(internals.trainer_of(pl_module) is trainer)

    fit(tmp_path, callbacks=[Ask()], max_steps=1)
    assert told == [True]


def test_a_run_may_stop_early_once_its_least_length_is_behind(tmp_path):
    told = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer, *args):
            told.append(internals.may_stop_early(trainer))

    fit(tmp_path, callbacks=[Ask()], max_epochs=2, min_epochs=1, min_steps=STEPS + 2)
    assert told == [False] * (STEPS + 1) + [True] * (STEPS - 1)


def test_lightning_asks_all_ranks_for_a_signal_by_the_name_that_is_replaced():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop)), pytorch_lightning.__version__
    internals.leave_signals_to_us(trainer)
    assert loop._broadcast_sigterm_tensor() is None


def test_lightning_gives_the_processes_that_it_launches_to_the_observer_that_is_replaced():
    source = inspect.getsource(subprocess_script._SubprocessScriptLauncher.launch)
    assert "_launch_process_observer(self.procs)" in source, pytorch_lightning.__version__
    before, seen = subprocess_script._launch_process_observer, []
    with internals.children_watched_by(seen.append):
        subprocess_script._launch_process_observer([])
    assert seen == [[]]
    assert subprocess_script._launch_process_observer is before


def test_a_strategy_of_several_ranks_has_a_limit_of_waiting_that_can_be_set():
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(**options, strategy="ddp")
    assert internals.patience_of(trainer) == timedelta(minutes=30)  # as docs/training.md says
    assert internals.wait_for_ranks(trainer, timedelta(minutes=2))
    assert internals.patience_of(trainer) == timedelta(minutes=2)
    assert "self._timeout" in inspect.getsource(type(trainer.strategy).setup_distributed)
    alone = Trainer(**options)
    assert not internals.wait_for_ranks(alone, timedelta(minutes=2))
    assert internals.patience_of(alone) is None


def test_a_checkpoint_saved_within_a_batch_lacks_that_batch(tmp_path):
    saved = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                saved.update(trainer.fit_loop.state_dict())

    fit(tmp_path, callbacks=[Save()], max_epochs=1)
    loop = {"epoch_loop.state_dict": dict(saved["epoch_loop.state_dict"])}
    before = loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    internals.count_last_batch(loop)
    assert (before, loop["epoch_loop.state_dict"]["_batches_that_stepped"]) == (1, 2)


def test_a_checkpoint_saved_before_a_batch_is_told_as_one_saved_within_the_last(tmp_path):
    within, before = [], []

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            within.append(copy.deepcopy(trainer.fit_loop.state_dict()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.append(copy.deepcopy(trainer.fit_loop.state_dict()))

    fit(tmp_path, callbacks=[Save()], max_epochs=1)
    for earlier, later in zip(within, before[1:], strict=False):
        assert later != earlier
        internals.as_saved_within_last_batch(later)
        assert later == earlier


def test_compiling_is_known_to_fail_and_to_end_at_its_limit():
    def unknown(x):
        return x if x.sum() > 0 else -x  # a branch by value, which fullgraph cannot follow

    with pytest.raises(views.CompilingFailed):
        torch.compile(unknown, fullgraph=True, backend="eager")(torch.ones(2))
    with views.shapes_compiled(2):
        doubled = torch.compile(lambda x: 2 * x, fullgraph=True, dynamic=False, backend="eager")
        doubled(torch.ones(2)), doubled(torch.ones(3))
        with pytest.raises(views.TooManyShapes):
            doubled(torch.ones(4))


def test_a_parser_tells_its_settings():
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", dest="model.width")
    assert destinations(parser) == ["help", "model.width"]


def test_every_batch_normalisation_has_the_base():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(kind, torch_internals.BatchNorm) for kind in kinds)
    assert not isinstance(nn.GroupNorm(1, 2), torch_internals.BatchNorm)


def test_storages_are_told_apart_also_without_memory():
    a, b = (torch.empty(4, device="meta") for _ in range(2))
    assert torch_internals.storage_id(a) == torch_internals.storage_id(a.view(2, 2))
    assert torch_internals.storage_id(a) != torch_internals.storage_id(b)


def fill(tensor):
    tensor.fill_(7)


def test_a_shared_storage_is_written_by_another_process():
    tensor = torch.empty(0, dtype=torch.uint8).set_(torch_internals.shared_storage(8))
    assert tensor.is_shared()
    child = multiprocessing.get_context("forkserver").Process(target=fill, args=(tensor,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert tensor.tolist() == [7] * 8


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_value_that_is_not_finite_is_found_in_any_of_several_tensors_and_nothing_finite_is_changed(bad, at):
    torch.manual_seed(0)
    tiny, large = torch.finfo(torch.float32).tiny / 4, torch.finfo(torch.float32).max
    tensors = [torch.randn(5, 3), torch.randn(7).double(), torch.tensor([0.0, -0.0, tiny, large, -large])]
    tensors += [torch.randn(4).bfloat16(), torch.randn(2, 2, 2, 2).to(memory_format=torch.channels_last)]
    if bad is not None:
        tensors[at].view(-1)[-1] = bad
    before = [tensor.clone() for tensor in tensors]
    assert torch_internals.non_finite(tensors).item() == (1 if bad is None else math.inf)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.isfinite(), old.isfinite())
        assert torch.equal(tensor[tensor.isfinite()], old[old.isfinite()])
        assert torch.equal(tensor.signbit(), old.signbit())


def test_the_processor_says_whether_it_multiplies_bfloat16():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags:
        pytest.skip("no list of the processor's features here")
    assert torch_internals.cpu_has_fast_bf16() == bool({"amx_bf16", "avx512_bf16"} & set(flags.split()))


def test_the_decoders_are_found_where_torchvision_has_them():
    assert torch_internals.has_image_decoders() == hasattr(torch.ops.image, "decode_image")
