"""Order, ranks, workers and resuming: the indices that a run trains on are the ones the pure function names."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

import forked
from simclr.data import FileImages, GlobalBatchSampler, ImageData, MemoryImages, TrainLoader
from simclr.data.decode import read_images
from simclr.data.loader import Batches
from simclr.seeding import epoch_order

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",  # Lightning 2.6 on torch 2.15: its own tree code uses a deprecated class
    "ignore:.*callbacks used to create the checkpoint",  # the resumed runs here write no checkpoints, on purpose
)

SIZE, BATCH, EPOCHS = 22, 4, 3  # 5 steps an epoch and two images over


def numbered(size: int = SIZE) -> MemoryImages:
    """Images that show their own number, so that a wrong image is seen."""
    return MemoryImages("numbered", torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4))


def expected(seed: int, first_epoch: int, epochs: int, size: int = SIZE, batch: int = BATCH) -> list[list[int]]:
    steps = []
    for epoch in range(first_epoch, first_epoch + epochs):
        order = epoch_order(seed, epoch, size).tolist()
        steps += [order[k * batch : (k + 1) * batch] for k in range(size // batch)]
    return steps


def test_a_step_trains_on_its_slice_of_the_order_and_the_images_are_the_numbered_ones():
    loader = TrainLoader(numbered(), GlobalBatchSampler(SIZE, BATCH, seed=3))
    loader.sampler.set_epoch(2)
    batches = list(loader)
    assert [index.tolist() for _, index in batches] == expected(3, 2, 1)
    for images, index in batches:
        assert images.dtype == torch.uint8
        assert images.shape == (BATCH, 3, 4, 4)
        assert torch.equal(images[:, 0, 0, 0].long(), index)
    assert len(loader) == len(batches) == 5


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches_in_order(world_size):
    parts = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(SIZE, BATCH, 0, rank, world_size)
        sampler.set_epoch(1)
        parts.append(torch.cat(list(sampler.from_step(0))))
    assert torch.cat(parts, dim=1).tolist() == expected(0, 1, 1)


def test_a_batch_that_does_not_divide_names_the_multiples_beside_it():
    with pytest.raises(ValueError, match=r"batch_size=500 does not divide over 3 devices\. .* 3, .* 498 or 501\."):
        GlobalBatchSampler(1000, 500, world_size=3)


def test_a_loop_begins_after_the_batches_that_were_trained_on():
    loader = TrainLoader(numbered(), GlobalBatchSampler(SIZE, BATCH), trained_batches=lambda: 2)
    loader.sampler.set_epoch(1)
    assert [index.tolist() for _, index in loader] == expected(0, 1, 1)[2:]
    assert len(loader) == 5, "the length is that of a whole epoch"


class Killed(Exception):
    """Stands for whatever ends a run early."""


class Recorder(LightningModule):
    """Writes down the images of every optimiser step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, _):
        images, index = batch
        assert torch.equal(images[:, 0, 0, 0].long(), index)
        self.seen.append(index.tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KillAt(Callback):
    def __init__(self, step: int, hook: str):
        self.step, self.hook = step, hook

    def _maybe(self, trainer: Trainer, hook: str):
        if hook == self.hook and trainer.global_step == self.step:
            raise Killed

    def on_train_batch_start(self, trainer, *_):
        self._maybe(trainer, "on_train_batch_start")

    def on_before_optimizer_step(self, trainer, *_):
        self._maybe(trainer, "on_before_optimizer_step")

    def on_train_batch_end(self, trainer, *_):
        self._maybe(trainer, "on_train_batch_end")


class NumberedData(ImageData):
    """ImageData on the numbered images."""

    def setup(self, stage=None):
        self.train = self.labelled_train = numbered()


def fit(folder: Path, callbacks=(), ckpt_path=None, **options) -> Recorder:
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    data = NumberedData(batch_size=BATCH, workers=0, seed=5)
    try:
        trainer.fit(model, data, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    except Killed:
        trainer.save_checkpoint(folder / "killed.ckpt")
    return model


def test_a_run_resumed_from_the_checkpoint_of_any_step_sees_exactly_the_rest(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    assert fit(tmp_path, [every]).seen == expected(5, 0, EPOCHS)
    for step in range(1, EPOCHS * 5 + 1):
        resumed = fit(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == expected(5, 0, EPOCHS)[step:], step


@pytest.mark.parametrize("step", [1, 4, 5, 7])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_a_run_killed_inside_a_step_resumes_with_the_steps_that_were_not_taken(tmp_path, hook, step):
    fit(tmp_path, [KillAt(step, hook)])
    resumed = fit(tmp_path, ckpt_path=tmp_path / "killed.ckpt")
    assert resumed.seen == expected(5, 0, EPOCHS)[step:]


def test_a_run_resumed_from_an_epoch_end_checkpoint_goes_on_with_the_next_epoch(tmp_path):
    fit(tmp_path, [ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)])
    for epoch in range(EPOCHS):
        resumed = fit(tmp_path, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.seen == expected(5, epoch + 1, EPOCHS - epoch - 1)


def test_accumulation_sees_the_same_batches(tmp_path):
    assert fit(tmp_path, accumulate_grad_batches=2).seen == expected(5, 0, EPOCHS)


def test_files_and_memory_and_worker_processes_give_the_same_batches(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    memory = MemoryImages("memory", read_images(paths, 6))
    batches = {}
    for name, source, workers in (
        ("memory", memory, 0),
        ("files", FileImages("files", paths, 6), 0),
        ("workers", FileImages("files", paths, 6), 1),
    ):
        loader = TrainLoader(source, GlobalBatchSampler(10, 3), workers)
        batches[name] = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches[name] += [(images, index) for images, index in loader]
        # An epoch that is left early must not leak into the next one.
        loader.sampler.set_epoch(2)
        next(iter(loader))
        loader.sampler.set_epoch(3)
        batches[name] += list(loader)
    for name in ("files", "workers"):
        assert len(batches[name]) == len(batches["memory"]) == 9
        for got, want in zip(batches[name], batches["memory"], strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


READER = """
import sys, time
from simclr.data import FileImages
from simclr.data.loader import Batches
import torch
if __name__ == "__main__":
    read = Batches(FileImages("files", sys.argv[2:], 6), workers=1)
    for images, index in read([torch.arange(8).view(4, 2)] * int(sys.argv[1])):
        print(len(images), flush=True)
        time.sleep(0.01)
"""


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            found += [int(path.parent.name)] if int(of) == leader and state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_process_outlives_the_one_that_reads(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    script = tmp_path / "read.py"
    script.write_text(READER)
    with forked.Forked([script, "100000", *paths], session=True) as process:
        assert process.stdout.readline() == "2\n"
        assert len(session(process.pid)) >= 4  # itself, worker, fork server, what clears up
        process.kill()
        process.wait()
        until = time.monotonic() + 60  # on however busy a machine; what stays longer is a failure
        while session(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
        left = session(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []


def test_the_numbers_stay_on_the_cpu_wherever_the_images_are():
    source = MemoryImages("elsewhere", torch.empty(8, 3, 4, 4, dtype=torch.uint8, device="meta"))
    order = torch.arange(8).view(2, 4)
    for parts in ([order], iter(order.split(1))):
        for images, index in Batches(source)(parts):
            assert (images.shape, images.device.type, index.device.type) == ((4, 3, 4, 4), "meta", "cpu")


class Deadly:
    """A set that is not in files, and whose workers die."""

    name, side, labels, classes, paths = "deadly", 4, None, None, None

    def __len__(self):
        return 4

    def images(self, index, threads=1):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_of_dead_workers_that_read_no_files_the_memory_is_suspected():
    with pytest.raises(ValueError, match=r"died: .*signal: Killed\. Is there too little memory\?"):
        list(Batches(Deadly())([torch.arange(4)[None]]))
