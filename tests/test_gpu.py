"""What only a CUDA device can show: no step waits for it, and it agrees with the CPU."""

import pytest
import torch
from pytorch_lightning import Callback

from simclr.gradient_cache import backward_in_parts
from simclr.losses import dcl, margin_triplet, nt_logistic, nt_xent
from test_losses import projections, relative
from tiny import STEPS, fit, tiny_data, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class NoWaiting(Callback):
    """From the second epoch on, when all is compiled, a step that waits for the device is an error."""

    def on_train_batch_start(self, trainer, *args):
        # Not only until the step ends: the next one's views are made before it starts.
        torch.cuda.set_sync_debug_mode("error" if trainer.current_epoch and not trainer.is_last_batch else "default")

    def on_exception(self, *args):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}, {"micro_batch_size": 8}, {"loss": "dcl"}], ids=str)
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


@pytest.mark.parametrize("loss", [nt_xent, dcl, nt_logistic, margin_triplet])
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
