"""Methods that give numbers which are not finite, at a known place: wherever image 5 is, from the second epoch on."""

import torch

from toy import Toy


class PoisonedLoss(Toy):
    """The loss is NaN, what the network gives is finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= 1 and (batch[1] == 5).any():
            loss = loss * torch.nan
            self.step_log.loss = loss.detach()
            self.step_log.epoch_loss += loss.detach()
        return loss


class PoisonedGradient(Toy):
    """The loss is finite, its gradient is not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= 1 and (batch[1] == 5).any():
            loss = loss + (self.head[0].weight * 0).sum().sqrt()  # of zero, where the slope is infinite
        return loss


class AlwaysPoisoned(Toy):
    """Every step from the second epoch on, whatever its images."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.current_epoch else loss


class Raises(Toy):
    """Says by itself that something is not finite."""

    def training_step(self, batch, batch_idx):
        if self.current_epoch >= 1 and (batch[1] == 5).any():
            raise FloatingPointError("the projections are not finite.")
        return super().training_step(batch, batch_idx)
