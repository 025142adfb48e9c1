"""An encoder that runs as CUDA graphs: what they overwrite is used before, and what they refuse is refused."""

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from simclr.cli import main
from simclr.cli.messages import BAD_INPUT
from simclr.training.network import CUDA_GRAPHS
from tiny import BATCH, STEPS, StopAt, fit, flags, tiny_model

FEW = "ignore:BatchNorm's statistics are those of a micro-batch"


class Run(torch.autograd.Function):
    """One run of a graph, forward and backward: its results lie in `memory`."""

    @staticmethod
    def forward(ctx, function, memory, x, *weights):
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            ctx.result = function(x)
        ctx.memory, ctx.weights = memory, weights
        memory.append(ctx.result.detach().clone())
        return memory[-1].detach()

    @staticmethod
    def backward(ctx, grad):
        grads = torch.autograd.grad(ctx.result, ctx.weights, grad)
        ctx.memory.extend(grads)
        return None, None, None, *(g.detach() for g in grads)  # that autograd may keep as it is


class Graph:
    """What CUDA graphs mean to who calls them, without CUDA: a run overwrites all that the last one returned."""

    def __init__(self, function, mode):
        self.function, self.mode = function, mode
        self.memory, self.marked, self.runs = [], False, 0

    def __call__(self, x):
        if self.mode is None:
            return self.function(x)
        assert self.marked
        for tensor in self.memory:
            tensor.fill_(torch.nan)
        self.memory, self.marked, self.runs = [], False, self.runs + 1
        return Run.apply(self.function, self.memory, x, *self.function.__self__.parameters())

    def mark(self):
        self.marked = True


@pytest.fixture
def graphs(monkeypatch):
    """The functions compiled, as such graphs."""
    made = []

    def compiled(function, mode=None):
        made.append(Graph(function, mode))
        return made[-1]

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: made[-1].mark())
    return made


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"micro_batch_size": 4},
        {"micro_batch_size": 8, "accumulate_grad_batches": 2, "optimizer": "sgd"},
        pytest.param({"micro_batch_size": 4, "precision": "bf16-mixed"}, marks=pytest.mark.slow),
        {"start_size": 8, "grow_epochs": 1},
    ],
    ids=str,
)
def test_graphs_that_overwrite_their_results_train_the_same_bits(tmp_path, graphs, settings):
    names = {"gradient_clip_val", "accumulate_grad_batches", "precision"} & settings.keys()
    of_trainer = {name: settings[name] for name in names} | {"max_epochs": 2}
    of_model = {name: value for name, value in settings.items() if name not in names}
    plain = fit(tmp_path, tiny_model(**of_model), **of_trainer).lightning_module.state_dict()
    model = fit(tmp_path, tiny_model(**of_model, compile_encoder="reduce-overhead"), **of_trainer).lightning_module
    parts = BATCH // settings.get("micro_batch_size", BATCH)
    assert [graph.mode for graph in graphs] == ["reduce-overhead"]
    assert graphs[0].runs == 2 * STEPS * (2 * parts - 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.filterwarnings("ignore:When using .Trainer.accumulate_grad_batches")
def test_batches_that_are_accumulated_from_the_second_epoch_on_train_the_same_bits(tmp_path, graphs):
    def train(**settings):
        scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
        return fit(tmp_path, tiny_model(**settings), callbacks=[scheduler], max_epochs=2).lightning_module.state_dict()

    plain = train()
    for name, value in train(compile_encoder="reduce-overhead").items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(("setting", "mode"), [(True, None), ("max-autotune-no-cudagraphs",) * 2])
def test_the_setting_is_the_mode_of_torch_compile(tmp_path, monkeypatch, setting, mode):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: modes.append(mode) or function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: pytest.fail("there are no graphs"))
    fit(tmp_path, tiny_model(compile_encoder=setting), max_steps=2)
    assert modes == [mode]


@pytest.mark.parametrize(("given", "kept"), [("reduce-overhead", "reduce-overhead"), ("true", True), ("false", False)])
def test_it_is_a_plain_setting_from_the_command_line_to_the_checkpoint(tmp_path, monkeypatch, graphs, given, kept):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.compile_encoder": given,
        "trainer.max_epochs": 1,
        "knn.every_n_epochs": 0,
        "quality.every_n_epochs": 0,
    }
    main(["train", *flags(settings), "--run_dir", "run"])
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["compile_encoder"] == kept
    assert f"compile_encoder: {given}\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert len(graphs) == (given != "false")


def test_what_is_no_mode_is_refused(capsys):
    with pytest.raises(ValueError, match="compile_encoder=fast is none of true, false, reduce-overhead, max-autotune"):
        tiny_model(compile_encoder="fast")
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags({"model.compile_encoder": "fast"})])
    assert stop.value.code == BAD_INPUT
    assert "model.compile_encoder" in capsys.readouterr().err


@pytest.mark.parametrize("mode", CUDA_GRAPHS)
def test_graphs_over_several_devices_are_refused(mode):
    trainer = Trainer(accelerator="cpu", devices=1, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=f"model.compile_encoder={mode} is for one device, not for DDPStrategy: CUDA"):
        tiny_model(compile_encoder=mode).run.check(trainer)
    tiny_model(compile_encoder=True).run.check(trainer)


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW)
def test_a_compiled_run_is_continued_to_the_same_bits(tmp_path):
    """On a CPU there are no graphs in the mode that has them, but the same compiled functions."""

    def model():
        return tiny_model(compile_encoder="reduce-overhead", micro_batch_size=8)

    whole = fit(tmp_path, model(), max_epochs=2).lightning_module.state_dict()
    stop = StopAt(tmp_path, 5)
    with pytest.raises(SystemExit):
        fit(tmp_path, model(), callbacks=[stop], max_epochs=2)
    found = fit(tmp_path, model(), max_epochs=2, ckpt_path=stop.path).lightning_module.state_dict()
    for name, value in found.items():
        assert torch.equal(value, whole[name]), name
