"""Two ranks from the command line: what is logged exists on both with one value, and what callbacks decide is one."""

import json
from pathlib import Path

import pytest
from pytorch_lightning import Callback

import forked
from simclr.step_figures import MACHINE
from strict.sitecustomize import environment
from tiny import flags

ROOT = Path(__file__).parents[1]
TWO = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.workers": 0}


class Metrics(Callback):
    """Writes what this rank's callbacks and loggers can see at the end of every epoch, a file a rank."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:  # the loggers' row of an epoch is made after the last hook of it
            self.write(trainer)

    def on_train_end(self, trainer, pl_module):
        self.write(trainer)

    def write(self, trainer):
        seen = {"callbacks": trainer.callback_metrics, "loggers": trainer.logged_metrics}
        # But what the machine decides, of each rank, which nothing may watch.
        seen = {
            who: {name: float(value) for name, value in metrics.items() if name not in MACHINE}
            for who, metrics in seen.items()
        }
        with open(f"rank{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(seen, sort_keys=True) + "\n")


def run(where, **settings):
    """A tiny run on two ranks from `where`; one that waits for ever fails here."""
    command = [forked.TRAIN, *flags({**TWO, "run_dir": "run", **settings})]
    return forked.run(command, cwd=where, env=environment(ROOT, ROOT / "tests"))


WATCHERS = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {monitor: knn_top1, mode: max, save_top_k: 5, filename: "knn-{epoch}"}
    - class_path: ModelCheckpoint
      init_args: {monitor: train_loss_epoch, save_top_k: 5, filename: "loss-{epoch}"}
    - class_path: EarlyStopping
      init_args: {monitor: knn_top1, mode: max, patience: 1, min_delta: 1.0}
    - class_path: test_ranks_agree.Metrics
"""


@pytest.mark.filterwarnings("ignore:BatchNorm's statistics are those of a micro-batch")
def test_two_ranks_see_the_same_metrics_and_end_where_callbacks_watch_the_online_knn(tmp_path):
    """kNN is measured in every second epoch; no gain is 1.0, so a patience of one measurement ends in the fourth."""
    (tmp_path / "watch.yaml").write_text(WATCHERS)
    settings = {
        "trainer.max_epochs": 5,
        "knn.every_n_epochs": 2,
        "probe.every_n_epochs": 2,
        "quality.every_n_epochs": 2,
        "trainer.log_every_n_steps": 2,
    }
    settings |= {"model.micro_batch_size": 4}  # logs what whole batches do not
    done = run(tmp_path, config="watch.yaml", **settings)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{rank}.jsonl").read_text().splitlines() for rank in range(2))
    assert first == second
    assert len(first) == 4
    seen = json.loads(first[1])
    for names in seen.values():
        assert {
            "knn_top1",
            "probe_top1",
            "retrieval_top1",
            "train_loss_epoch",
            "train_loss",
            "lr",
            "contrast_top1",
            "gradient_cache_error",
        } <= names.keys()
    assert "knn_top1" not in json.loads(first[0])["callbacks"]
    kept = sorted(path.name for path in (tmp_path / "run").rglob("*-epoch=*.ckpt"))
    assert kept == ["knn-epoch=1.ckpt", "knn-epoch=3.ckpt", *(f"loss-epoch={epoch}.ckpt" for epoch in range(4))]
    assert "could not find the monitored key" not in done.stderr
