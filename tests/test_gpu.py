"""What only a CUDA device can show: no step waits for it, and it agrees with the CPU."""

import pytest
import torch
from pytorch_lightning import Callback
from torch._dynamo.utils import counters

from simclr.losses import dcl, margin_triplet, nt_logistic, nt_xent, nt_xent_unnormalized
from simclr.training.gradient_cache import backward_in_parts
from test_losses import projections, relative
from tiny import STEPS, Record, fit, tiny_data, tiny_model

pytestmark = [
    pytest.mark.gpu,
    # What torch and Lightning have to say about a GPU is not ours to mend, but that nothing compiles is an error.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:Kornia's operations make the views"),
]


class NoWaiting(Callback):
    """From the second epoch on, when all is compiled, a step that waits for the device is an error."""

    def on_train_batch_start(self, trainer, *args):
        # Not only until the step ends: the next one's views are made before it starts.
        torch.cuda.set_sync_debug_mode("error" if trainer.current_epoch and not trainer.is_last_batch else "default")

    def on_exception(self, *args):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adamw"},
        {"micro_batch_size": 8},
        {"loss": "dcl"},
        {"compile_encoder": "reduce-overhead"},
        {"compile_encoder": "reduce-overhead", "micro_batch_size": 8},
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_nowhere(tmp_path, settings):
    model = tiny_model(norm="none", head_batch_norm=False, **settings)
    data = tiny_data()
    trainer = fit(
        tmp_path,
        model,
        data,
        [NoWaiting()],
        max_epochs=2,
        accelerator="gpu",
        precision="bf16-mixed",
        log_every_n_steps=50,
    )
    assert trainer.global_step == 2 * STEPS


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2}, {"micro_batch_size": 8}, {"start_size": 8, "grow_epochs": 2}],
    ids=str,
)
def test_cuda_graphs_take_the_steps_of_the_plain_encoder(tmp_path, settings):
    from torch._inductor import cudagraph_trees  # not above: torch 2.11 warns of itself when it is imported

    of_model = {name: value for name, value in settings.items() if name != "accumulate_grad_batches"}
    of_model |= {"norm": "none", "head_batch_norm": False, "optimizer": "sgd", "base_lr": 0.2, "warmup_epochs": 0}
    accumulate = settings.get("accumulate_grad_batches", 1)
    losses = []
    torch._dynamo.reset()
    counters["inductor"].clear()
    for how in (False, "reduce-overhead"):
        record, model = Record(), tiny_model(**of_model, compile_encoder=how)
        fit(tmp_path, model, None, [record], accelerator="gpu", accumulate_grad_batches=accumulate)
        losses.append([step["train_loss"] for step in record.steps])
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager is not None  # graphs there were
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)  # convolutions round to TF32


def test_cuda_graphs_move_the_statistics_of_batch_normalisation(tmp_path):
    buffers = []
    for how in (False, "reduce-overhead"):
        model = tiny_model(compile_encoder=how, optimizer="sgd", base_lr=0.01)
        model = fit(tmp_path, model, accelerator="gpu", max_epochs=2).lightning_module
        buffers.append({name: value.float() for name, value in model.named_buffers() if "running" in name})
        assert {int(value) for name, value in model.named_buffers() if "tracked" in name} == {2 * STEPS}
    for name, value in buffers[1].items():
        torch.testing.assert_close(value, buffers[0][name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("loss", [nt_xent, dcl, nt_logistic, margin_triplet, nt_xent_unnormalized])
@pytest.mark.parametrize("n", [7, 3000])
def test_value_and_gradient_are_the_cpus_in_float64(loss, n):
    exact = projections(n, 32)
    expected = loss(*exact, 0.2)
    views = [view.detach().float().cuda().requires_grad_() for view in exact]
    found = loss(*views, 0.2)
    assert relative(found.cpu(), expected) < 1e-6
    for grad, other in zip(torch.autograd.grad(found, views), torch.autograd.grad(expected, exact), strict=True):
        assert relative(grad.cpu(), other) < 2e-6


@pytest.mark.parametrize(("operands", "error"), [("tf32", 2e-3), ("bfloat16", 1e-2)])
def test_rounded_operands_stay_within_their_error(operands, error):
    exact = projections(3000, 128)
    expected = torch.autograd.grad(nt_xent(*exact, 0.1), exact)
    views = [view.detach().float().cuda().requires_grad_() for view in exact]
    for grad, other in zip(torch.autograd.grad(nt_xent(*views, 0.1, operands=operands), views), expected, strict=True):
        assert relative(grad.cpu(), other) < error


def test_memory_of_the_loss_grows_with_the_batch_not_with_its_square():
    views = [torch.randn(16_384, 128, device="cuda", requires_grad=True) for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt_xent(*views, 0.1).backward()
    assert torch.cuda.max_memory_allocated() - before < 300e6  # the matrix of all pairs alone has 4.3 GB


def test_dropout_is_replayed_on_the_device():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 8)).cuda()
    parts = [torch.randn(4, 8, device="cuda") for _ in range(3)]
    cached = backward_in_parts(
        [lambda x=x: model(x) for x in parts],
        lambda z: nt_xent(*torch.cat(z).chunk(2), 0.2),
        torch.Tensor.backward,
        [model],
    )
    assert cached.error.item() == 0
