"""Ranks that were launched apart, seconds apart, are of one run, in one folder; or they say what differs, and where."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Callback

import forked
import simclr
from ranks import run_ranks
from simclr.cli.agreement import code_of, refuse_strangers
from simclr.data.loader import GlobalBatchSampler
from strict.sitecustomize import environment
from test_continue import RUN, photos, run_and_code
from test_ranks_fail import TORCHRUN, said
from tiny import BATCH, IMAGES, STEPS, flags, tiny_data

ROOT = Path(__file__).parents[1]


def nodes(where: Path, *changed: dict, path: tuple = (ROOT, ROOT), seconds: float = 0, **settings) -> list:
    """Two machines in one: torchrun on each, with these settings; exit codes and what was said on stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for node, (own, source) in enumerate(zip(changed, path, strict=True)):
        launcher = [*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        options = {"trainer.devices": 1, "trainer.num_nodes": 2, "trainer.strategy": "ddp", **settings, **own}
        options |= {"knn.every_n_epochs": 0, "quality.every_n_epochs": 0, "data.workers": 0}
        command = [*launcher, f"--master_port={port}", str(source / "train.py"), *flags(options)]
        variables = environment(source, ROOT / "tests")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=where, env=variables, **pipes))
        time.sleep(seconds)
    done = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, out, err) for process, (out, err) in zip(started, done, strict=True)]


@pytest.mark.slow
def test_nodes_that_start_seconds_apart_agree_on_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "runs" / "shapes_resnet8").mkdir(parents=True)  # the first name is taken
    first, second = nodes(tmp_path, {}, {}, seconds=4)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["shapes_resnet8", "shapes_resnet8-2"]
    assert (tmp_path / "runs" / "shapes_resnet8-2" / "encoder.pt").exists()
    assert not list((tmp_path / "runs" / "shapes_resnet8").iterdir())
    assert "runs/shapes_resnet8-2" in first[1]


@pytest.mark.slow
def test_the_second_node_may_come_first(tmp_path):
    done = nodes(tmp_path, {"run_dir": "run"}, {"run_dir": "run"}, path=(ROOT, ROOT), seconds=0.5)
    assert [code for code, _, _ in done] == [0, 0], done


def one_run(folder: str, arguments: list[list[str]], package: str | None = None) -> tuple[int, str, str]:
    """On a rank: its command, with the code of a package on the second one; exit code, standard output and error."""
    rank, out, err = dist.get_rank(), io.StringIO(), io.StringIO()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as Lightning tells the ranks that it launches
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if package is not None and rank == 1:
            patch.setattr(simclr, "__file__", package)
        code = run_and_code(arguments[rank])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("launcher", ["none", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_other_code_settings_and_images_on_one_rank_are_found_before_the_first_step(tmp_path, launcher):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "simclr", source / "simclr", ignore=shutil.ignore_patterns("__pycache__"))
    with open(source / "simclr" / "heads.py", "a") as file:
        file.write("# Someone was here.\n")
    shutil.copy(ROOT / "train.py", source / "train.py")
    photos(tmp_path / "a", 40)
    photos(tmp_path / "b", 40, seed=1)
    changed = {"data.train_dir": tmp_path / "a"}, {"data.train_dir": tmp_path / "b", "model.temperature": 0.3}
    if launcher == "torchrun":
        done = nodes(tmp_path, *changed, path=(ROOT, source), run_dir="run", **{"data.batch_size": 8})
    else:
        two = {**RUN, "trainer.devices": 2, "trainer.strategy": "ddp", "data.workers": 0, "run_dir": "run"}
        arguments = [flags({**two, "data.batch_size": 8, **own}) for own in changed]
        done = run_ranks(one_run, 2, str(tmp_path), arguments, str(source / "simclr" / "__init__.py"))
    assert all(code != 0 for code, _, _ in done)
    lines = [line for _, _, err in done for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert re.match(
        r"error: the ranks are not of one run: the code of simclr: [0-9a-f]{12} on rank 0, [0-9a-f]{12} on rank 1; "
        r"model.temperature=0\.\d+ on rank 0, 0\.3 on rank 1; the training images: 40 of \S+a \(hash \w+\) on rank 0, "
        r"40 of \S+b \(hash \w+\) on rank 1\. Give all of them the same\.",
        lines[0],
    )
    assert not (tmp_path / "run").exists()


def test_what_differs_is_named_with_its_ranks():
    same = {"model.views": "2", "the training images": "9 of a"}
    refuse_strangers([same, dict(same)])
    with pytest.raises(ValueError, match=r"one run: model\.views=2 on ranks 0, 2, 3 on rank 1\. Give all"):
        refuse_strangers([same, {**same, "model.views": "3"}, same])
    with pytest.raises(ValueError, match=r"seed_everything=not there on rank 0, 1 on rank 1"):
        refuse_strangers([same, {**same, "seed_everything": "1"}])
    many = {f"model.a{number}": "1" for number in range(7)}
    with pytest.raises(ValueError, match=r"model\.a3=not there on rank 0, 1 on rank 1; and 3 more"):
        refuse_strangers([same, {**same, **many}])


def test_code_is_known_by_its_sources_alone(tmp_path):
    shutil.copytree(ROOT / "simclr", tmp_path / "simclr", ignore=shutil.ignore_patterns("__pycache__"))
    before = code_of(tmp_path / "simclr")
    assert before == code_of(ROOT / "simclr")
    (tmp_path / "simclr" / "notes.txt").write_text("no code")
    assert code_of(tmp_path / "simclr") == before
    os.rename(tmp_path / "simclr" / "heads.py", tmp_path / "simclr" / "head.py")
    assert code_of(tmp_path / "simclr") != before


def test_images_are_known_by_their_names_and_contents_wherever_they_lie(tmp_path):
    photos(tmp_path / "a", 20)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")

    def code(folder, **settings):
        found = tiny_data(train_dir=str(tmp_path / folder), batch_size=4, **settings).digest()
        assert found.startswith("20 of ")
        return found.rpartition("hash ")[2]

    assert code("a") == code("elsewhere") == code("a", memory_limit_gb=0.0)
    os.rename(tmp_path / "elsewhere" / "cat" / "0.png", tmp_path / "elsewhere" / "cat" / "x.png")
    assert code("a") != code("elsewhere")
    photos(tmp_path / "b", 20, seed=1)
    assert code("a") != code("b")
    shapes = [tiny_data(shapes_train=number).digest() for number in (64, 64, 65)]
    assert shapes[0] == shapes[1] != shapes[2]


# Another number of ranks


class Batches(Callback):
    """Writes the images of every batch, a file a rank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"rank{trainer.global_rank}.txt", "a") as file:
            file.write(" ".join(map(str, batch[1].tolist())) + "\n")


WATCHED = {**RUN, "trainer.callbacks": "test_ranks_alike.Batches", "data.workers": 0, "run_dir": "run"}


def trained(where: Path, ranks: int, *arguments: str) -> str:
    """What the first of so many ranks says."""
    arguments = (*arguments, "--trainer.strategy", "ddp", "--trainer.devices", str(ranks))
    if ranks > 1:
        done = run_ranks(one_run, ranks, str(where), [list(arguments)] * ranks)
    else:
        alone = forked.run([forked.TRAIN, *arguments], cwd=where, env=environment(ROOT, ROOT / "tests"))
        done = [(alone.returncode, alone.stdout, alone.stderr)]
    assert [code for code, _, _ in done] == [0] * ranks, done
    assert not [line for _, _, err in done for line in said(err)]
    return done[0][1]


@pytest.mark.parametrize("devices", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_same_global_batches_on_another_number_of_ranks(tmp_path, devices):
    first, then = devices
    trained(tmp_path, first, *flags({**WATCHED, "trainer.max_epochs": 1}))
    out = trained(tmp_path, then, "--ckpt_path", "run", "--trainer.max_epochs", "2")
    views = {1: 2 * BATCH, 2: BATCH}
    assert (
        f"trainer.devices={then}, was {first}: the same batches and views, BatchNorm over {views[then]} views, "
        f"{views[first]} before, but not the same bits"
    ) in out
    [record] = json.loads((tmp_path / "run" / "continuations.json").read_text())
    changed = record["changed"]["trainer.devices"]
    assert {when: int(number) for when, number in changed.items()} == {"was": first, "is": then}
    rows = [(tmp_path / f"rank{rank}.txt").read_text().splitlines() for rank in range(2)]
    rows = [[[int(number) for number in row.split()] for row in rank] for rank in rows]
    alone, shared = (rows[0][STEPS:], slice(0, STEPS)) if then == 1 else (rows[0][:STEPS], slice(STEPS, None))
    together = [a + b for a, b in zip(rows[0][shared], rows[1], strict=True)]
    epochs = [alone, together] if first == 1 else [together, alone]
    sampler = GlobalBatchSampler(IMAGES, BATCH)
    for epoch, batches in enumerate(epochs):
        assert torch.equal(torch.tensor(batches), sampler.global_batches(epoch))
