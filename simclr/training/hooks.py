"""What Lightning asks of a method while it trains, passed on to the parts of this folder."""

from typing import Any

import torch
from pytorch_lightning import LightningModule

from simclr.training.internals import call_only_own_hooks
from simclr.training.parts import clears_gradients
from simclr.training.run import PretrainingRun, to_device
from simclr.training.step_log import StepLog


class Pretraining(LightningModule):
    """A LightningModule whose `run` and `step_log` answer Lightning; a method adds its networks and its step.

    Attributes:
        run: settles what was left out, and knows how long the run is and where it stands.
        step_log: the loss so far.
    """

    run: PretrainingRun
    step_log: StepLog

    def setup(self, stage: str) -> None:
        """Settle what was left out, by the data and the length of the run."""
        self.run.setup(self)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, its warm-up and its cosine."""
        return self.run.configure_optimizers(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Images go to the device, their numbers stay on the CPU; batches of an evaluation as Lightning does it."""
        if not self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return to_device(batch, device)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear gradients, unless the step does it as it begins."""
        if not clears_gradients(self.hparams):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_start(self) -> None:
        """Know from where on the run goes, and whom to ask in its steps."""
        self.run.start(self)
        call_only_own_hooks(self.trainer.callbacks)

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch."""
        self.step_log.log_epoch(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the run stands."""
        self.run.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse settings with which the run would not go on."""
        self.run.load(self, checkpoint)
