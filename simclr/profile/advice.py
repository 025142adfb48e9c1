"""What would make a step faster, from the numbers of its profile alone."""

from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.strategies import ParallelStrategy

from simclr.data.sources import MemoryImages
from simclr.memory import available, estimate
from simclr.profile.measured import Profile
from simclr.profile.words import gigabytes, ms, percent
from simclr.training.method import Method
from simclr.training.network import CUDA_GRAPHS

_SHORT_STEP = 0.015  # seconds, in which launching a step's kernels takes a good part of it


def advice(profile: Profile, model: Method, trainer: Trainer, images: int) -> list[str]:
    """What would make steps faster, largest first, at most two lines: only what the numbers say."""
    found: list[tuple[float, str]] = []
    hparams, data, device = model.hparams, trainer.datamodule, trainer.strategy.root_device
    share = {part: profile.share(part) for part in profile.parts}
    if share["data"] > 0.1:
        found.append((share["data"], f"data take {percent(share['data'])}: {_data_advice(data)}"))
    if share["augmentation"] > 0.25:
        line = f"augmentation takes {percent(share['augmentation'])}: "
        if not hparams.compile_views and device.type == "cpu":
            line += "--model.compile_views true makes views faster, after a minute (needs a C++ compiler)"
        elif hparams.blur_prob and hparams.image_size <= 32:
            line += "at 32 px the paper leaves blur out, --model.blur_prob 0"
        else:
            line += "a larger encoder costs less than it seems"
        found.append((share["augmentation"] / 2, line))
    twice = profile.repeated * (share["encoder"] + share["augmentation"])
    if twice > 0.05:
        found.append(
            (twice, f"the second pass of micro-batches takes {percent(twice)}: {_larger(model, trainer, images)}")
        )
    network = share["encoder"] + share["backward"]
    if profile.bf16 is not None and profile.bf16 > 1.1:
        line = (
            f"encoder and backward take {percent(network)}: in bf16-mixed they ran {profile.bf16:.1f} times as fast, "
        )
        found.append((network * (1 - 1 / profile.bf16), f"{line}--trainer.precision bf16-mixed"))
    if share["rest"] > 0.1:
        line = f"Lightning and logging take {percent(share['rest'])} of a short step: a larger --data.batch_size, or "
        found.append((share["rest"], f"{line}--trainer.log_every_n_steps {5 * (trainer.log_every_n_steps or 10)}"))
    reached = profile.of_limit("untouched")
    alone = trainer.world_size == 1 and not isinstance(trainer.strategy, ParallelStrategy)  # others refuse CUDA graphs
    short = alone and profile.untouched < _SHORT_STEP and (reached or 0) < 0.6
    if device.type == "cuda" and short and hparams.compile_encoder not in CUDA_GRAPHS:
        line = f"{ms(profile.untouched)} ms are short beside the launching of kernels, which CUDA graphs spare: "
        found.append((0.3 * network, f"{line}--model.compile_encoder reduce-overhead"))
    elif device.type == "cuda" and not hparams.compile_encoder and network > 0.4 and (reached or 1) < 0.35:
        found.append((0.2 * network, "the encoder is far from the limit: --model.compile_encoder true"))
    if not found:
        reach = f", at {percent(profile.of_limit('backward'))} of the limit backward" if profile.operations else ""
        found.append((0, f"nothing stands out: encoder and backward take {percent(network)}{reach}"))
    return [line for _, line in sorted(found, reverse=True)[:2]]


def _data_advice(data: Any) -> str:
    if isinstance(data.train, MemoryImages):
        return "they are in memory already, so the memory or the bus is slow, or Lightning in steps as short as these"
    gigabytes = data.train.nbytes / 1e9
    if data.cache_dir:
        return f"--data.memory_limit_gb {gigabytes + 0.1:.1f} and no cache_dir would hold them in memory"
    return (
        f"--data.cache_dir DIR keeps them decoded ({gigabytes:.1f} GB), --data.memory_limit_gb {gigabytes + 0.1:.1f} "
        f"holds them in memory, and more --data.workers (now {data._processes()}) decode faster if there are cores"
    )


def _larger(model: Method, trainer: Trainer, images: int) -> str:
    have = available(trainer.strategy.root_device)
    sizes = [n for n in range(model.hparams.micro_batch_size + 1, images + 1) if images % n == 0]
    needs = {n: estimate(model, images, n, trainer.world_size, trainer.precision).total for n in sizes}
    fits = [n for n in sizes if have and needs[n] < 0.5 * have]
    if not fits:
        return "it is the price of their memory"
    if fits[-1] == images:
        return f"the whole batch takes about {gigabytes(needs[images])}, leave --model.micro_batch_size out"
    return f"--model.micro_batch_size {fits[-1]} takes about {gigabytes(needs[fits[-1]])}"
