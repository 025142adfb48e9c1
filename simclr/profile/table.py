"""A profile as a table, with a line of advice or two below it."""

import torch
from pytorch_lightning import Trainer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from simclr.profile.advice import advice
from simclr.profile.limit import dtype_of
from simclr.profile.measured import Profile
from simclr.profile.words import ms, percent, rate
from simclr.training.method import Method

_NAMES = {
    "data": "data",
    "augmentation": "augmentation",
    "encoder": "encoder and head, forward",
    "loss": "loss",
    "backward": "backward",
    "optimiser": "optimiser",
    "rest": "rest: Lightning, logging",
}


def draw(profile: Profile, model: Method, trainer: Trainer, images: int) -> Group:
    """The profile as a table with a line of advice or two below it, for people."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("a training step")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("of the limit", justify="right")
    longest = max(profile.parts.values())
    for part, seconds in profile.parts.items():
        bar = Text("█" * round(20 * max(0.0, seconds) / longest), style="cyan")
        table.add_row(
            _NAMES[part], ms(seconds), f"{100 * profile.share(part):.0f} %", bar, percent(profile.of_limit(part))
        )
    table.add_section()
    table.add_row("sum of the parts", ms(profile.timed), "100 %", "", "")
    compared = f"{100 * (profile.timed / profile.untouched - 1):+.0f} % by timing parts"
    reached = percent(profile.of_limit("untouched"))
    table.add_row("the step untouched", ms(profile.untouched), "", Text(compared, style="dim"), reached, style="bold")
    device, hparams = trainer.strategy.root_device, model.hparams
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count != 1 else ''}" if device.type == "cpu" else ""
    several = f" on each of {trainer.world_size} devices" if trainer.world_size > 1 else ""
    at_a_time = f", {hparams.micro_batch_size} at a time" if hparams.micro_batch_size else ""
    images_per_second = images * trainer.world_size / profile.untouched
    views = " and ".join(f"{views} views of {side} px" for views, side in model.views.groups(0))
    head = Text.assemble(
        (f"{images_per_second:,.0f} images/s", "bold"),
        f": {hparams.encoder}, {images} images{several}{at_a_time}, "
        f"{views},\n{trainer.precision} on {device.type}{threads}\n",
    )
    notes = Table.grid(padding=(0, 1))
    dtype = str(dtype_of(str(trainer.precision))).removeprefix("torch.")
    notes.add_row("limit", f"{rate(profile.limit.rate)}, {profile.limit.what} in {dtype}, measured here", style="dim")
    if profile.operations:
        work = f"{sum(profile.operations) / 1e9:,.3g} GFLOP a step, encoder and head forward and backward"
        notes.add_row("work", work, style="dim")
    busy = ": a busy machine or short steps, try more --steps" if profile.spread > 0.25 else ""
    times = f"{profile.steps} steps in parts, as many untouched, whose blocks differ by {percent(profile.spread)}{busy}"
    notes.add_row("times", times, style="dim")
    for line in advice(profile, model, trainer, images):
        notes.add_row(Text("advice", style="bold yellow"), line)
    return Group(head, table, Text(), notes)
