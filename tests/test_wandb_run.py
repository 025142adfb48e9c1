"""A run on Weights & Biases: only when asked, when it can, inside the run folder; and whatever ends it, not the run."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import forked
from simclr.cli.eval import eval_command
from simclr.cli.linear_eval import linear_eval
from simclr.cli.train import train
from simclr.loggers import build_loggers
from simclr.wandb_run import FLUSH, WandbOptions, WandbRun, known_run, rejoined, start_wandb, wandb_mode
from strict.sitecustomize import environment
from tiny import flags

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the right form, of nobody


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """A machine without a W&B key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.fixture
def no_network(monkeypatch):
    """A machine where every connection fails: the attempts. Asks that nobody waits for one without a limit."""
    attempts = []

    def fail(address, timeout=None, *args, **kwargs):
        attempts.append(address)
        assert timeout is not None
        assert timeout <= 5
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", fail)
    return attempts


def test_auto_without_a_key_is_offline_and_says_so_in_one_line(no_key, no_network, capsys):
    assert wandb_mode("auto") == "offline"
    out = capsys.readouterr().out
    assert out.startswith("wandb: no key found, logging offline into the run folder")
    assert out.count("\n") == 1


def test_auto_with_a_key_but_no_network_is_offline_at_once(no_key, no_network, capsys):
    no_key.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == "offline"
    assert no_network == [("api.wandb.ai", 443)], "one attempt, of seconds at most"
    out = capsys.readouterr().out
    assert "api.wandb.ai cannot be reached, logging offline" in out
    assert out.count("\n") == 1


def test_a_key_may_stand_in_netrc(no_key, tmp_path, monkeypatch):
    reached = []

    class Connection:
        def close(self):
            reached.append("closed")

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: reached.append(address) or Connection())
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode("auto") == "online"
    assert reached == [("api.wandb.ai", 443), "closed"]
    (tmp_path / "netrc").write_text(f"machine elsewhere.org login user password {KEY}\n")
    assert wandb_mode("auto") == "offline"


def test_online_without_a_key_is_refused_and_with_one_is_not_second_guessed(no_key, no_network):
    with pytest.raises(ValueError, match="wandb=online needs a key: run `wandb login`"):
        wandb_mode("online")
    no_key.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("online") == "online"


def test_disabled_never_imports_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would fail
    names = [type(logger).__name__ for logger in build_loggers(tmp_path)]
    assert names == ["MetricsCSV", "MachineCSV", "EventFiles"]
    assert wandb_mode("disabled") == "disabled"
    with rejoined(tmp_path, 0, "report") as run:
        assert run is None
    assert not list(tmp_path.iterdir())


# A whole run, read back from everywhere.

PICTURES = {"views", "neighbours", "spectrum", "map"}
HISTOGRAMS = {"cosines/positive", "cosines/negative", "features/spectrum"}


# `wandb leet inspect --json FOLDER` of each folder, in one process that has imported wandb.
INSPECT = """
import sys
from wandb.cli.cli import cli
for folder in sys.argv[1:]:
    try:
        cli(["leet", "inspect", "--json", folder])
    except SystemExit as ended:
        if ended.code:
            raise
"""


def records_of(run_dir: Path) -> list[dict]:
    """What W&B has written, in the order of time."""
    done = forked.run(["-c", INSPECT, *sorted((run_dir / "wandb").glob("offline-run-*"))])
    if "No such command" in done.stderr:
        pytest.skip("this wandb cannot read its own files: leet inspect came later")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def numbers_of(records: list[dict]) -> dict[str, dict[int, float]]:
    """name -> step -> value, of the rows."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        row = record.get("history", {}).get("item", {})
        for name, value in row.items():
            plain = isinstance(value, int | float) and "._" not in name and not name.startswith("_")
            if plain and "trainer/global_step" in row and name != "trainer/global_step":
                found.setdefault(name, {})[int(row["trainer/global_step"])] = value
    of_media = {name.rpartition(".")[0] for name in found if name.endswith((".size", ".height", ".width", ".ncols"))}
    return {name: values for name, values in found.items() if name.rpartition(".")[0] not in of_media}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two epochs with everything on, continued by a third, then measured: its folder and W&B's records."""
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_DATA_DIR", str(root / "staged"))
        patch.setenv("WANDB_RUN_GROUP", "theirs")
        every = {f"{group}.every_n_epochs": 1 for group in ("knn", "quality", "dashboard")}
        told = {"wandb": "offline", "log_artifact": True, "wandb_tags": "[one,two]", "wandb_notes": "a word"}
        train(flags({**every, **told, "run_dir": "run", "dashboard.images": 30, "data.shapes_train": 96}))
        train(["--ckpt_path", "run", "--trainer.max_epochs", "3"])
        linear_eval(["run"])
        eval_command(["run", "--protocols", "knn", "--knn.k", "[3]", "--yardsticks", "random_encoder"])
    return root / "run", records_of(root / "run")


pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("few_lambdas")]  # W&B's own warnings


def test_csv_tensorboard_and_wandb_have_the_same_names_steps_and_values(watched):
    run, records = watched
    in_files: dict[str, dict[int, float]] = {}
    for name in ("metrics.csv", "machine.csv"):
        with (run / name).open(newline="") as file:
            for row in csv.DictReader(file):
                for key in row.keys() - {"step"}:
                    if row[key]:
                        in_files.setdefault(key, {})[int(row["step"])] = float(row[key])
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    in_events = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    in_wandb = numbers_of(records)
    evaluated = {name for name in in_events if name.startswith("linear_eval/")}
    assert len(evaluated) == 5
    by_protocol = {f"eval/knn/k_3/{name}" for name in ("top1", "mean_per_class", "random_encoder_top1")}
    evaluated |= by_protocol
    record = json.loads((run / "eval.json").read_text())
    assert in_events["eval/knn/k_3/top1"] == {17: pytest.approx(record["results"][0]["top1"])}
    assert in_wandb.keys() == in_events.keys() == in_files.keys() | evaluated
    assert len(in_files) >= 25
    for name, values in in_events.items():
        assert in_wandb[name] == pytest.approx(values, rel=1e-6), name
        if name not in evaluated:
            assert in_files[name] == pytest.approx(values, rel=1e-6), name
    steps = sorted(in_files["train_loss"])
    assert steps[0] == 0, "the first step"
    assert steps[-1] == max(in_files["train_loss_epoch"]), "and the last"


def test_tensorboard_and_wandb_have_the_pictures_and_the_evaluation(watched):
    run, records = watched
    kinds: dict[str, set[str]] = {}
    for record in records:
        for name, kind in record.get("history", {}).get("item", {}).items():
            if name.endswith("._type"):
                kinds.setdefault(kind, set()).add(name.removesuffix("._type"))
    matrix = "linear_eval/confusion_matrix"
    assert kinds["image-file"] == PICTURES | {matrix}
    assert kinds["histogram"] == HISTOGRAMS
    assert kinds["table-file"] == {f"{matrix}_chart_table"}
    tags = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload().Tags()
    assert set(tags["images"]) == PICTURES | {matrix}
    assert set(tags["histograms"]) == HISTOGRAMS
    record = json.loads((run / "linear_eval.json").read_text())
    summaries = [r["summary"]["update"] for r in records if r["type"] == "summary" and "update" in r["summary"]]
    assert {s["linear_eval/linear_top1"] for s in summaries if "linear_eval/linear_top1" in s} == {
        record["linear_top1"]
    }
    [told] = [s for s in summaries if "eval/knn/k_3/id" in s]
    assert told["eval/knn/k_3/id"].startswith("knn@last/epoch3/split=test/n=32/res16/")
    assert told["eval/knn/k_3/ci95"] == json.loads((run / "eval.json").read_text())["results"][0]["ci95"]


def test_wandb_has_the_whole_configuration_and_files_the_run_as_it_was_told(watched):
    run, records = watched
    opened = [record["run"] for record in records if record["type"] == "run"]
    first, continued, evaluated, by_protocol = opened
    assert by_protocol["job_type"] == "eval"
    known = known_run(run)
    assert {part["run_id"] for part in opened} == {known["id"]}
    assert (first["display_name"], first["project"], first["run_group"]) == ("run", "simclr", "theirs")
    assert (first["tags"], first["notes"], first["job_type"]) == (["one", "two"], "a word", "pretrain")
    assert evaluated["job_type"] == "linear-eval"
    config = first["config"]["update"]
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: config[name] for name in written} == written
    assert config["model"]["temperature"] == 0.2
    assert config["command"].startswith("simclr train --")
    assert config["versions"]["torch"] == torch.__version__
    assert config["machine"]["cores"] >= 1
    assert "commit" in config
    assert continued["config"]["update"]["trainer"]["max_epochs"] == 3


def test_rows_of_a_run_that_goes_on_have_numbers_that_none_before_had(watched):
    numbers = [record["history"]["step"]["num"] for record in watched[1] if record["type"] == "history"]
    assert numbers == sorted(set(numbers))


def test_the_encoder_is_an_artifact_with_its_epoch_and_its_metrics(watched):
    run, records = watched
    artifacts = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "model"]
    assert [sorted(artifact["aliases"]) for artifact in artifacts] == [["epoch-2", "latest"], ["epoch-3", "latest"]]
    assert {artifact["name"] for artifact in artifacts} == {f"encoder-{known_run(run)['id']}"}
    files = [file["path"] for file in artifacts[1]["manifest"]["contents"]]
    assert sorted(files) == ["config.continued-1.yaml", "encoder.safetensors"]
    about = json.loads(artifacts[1]["metadata"])
    assert about["global_step"] == 18
    assert 0 <= about["knn_top1"] <= 1


def test_a_key_is_written_nowhere_and_nothing_outside_of_the_run(watched):
    run, _ = watched
    assert {path.name for path in run.parent.iterdir()} <= {"run", "staged"}
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """A `WandbRun` whose run answers as it is told to."""

    class Run:
        id, calls = "abc", []

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, row, step=None, commit=None):
            assert commit, "a row of a number that is given would wait for the next, and lose to it"
            self.calls.append((row, step))
            if len(self.calls) > 1:
                raise BrokenPipeError("the service is gone")

        finish = log_artifact = None  # called by nobody once it is broken

    return WandbRun(tmp_path, Run(), first_row=40, log_artifact=True)


def test_a_failure_is_said_once_and_costs_nothing(logged, capsys):
    for step in range(4):
        logged.log_metrics({"train_loss": 1.0}, step)
    logged.log_files("encoder", "model", [], [], {})
    logged.end()
    rows = logged.experiment.calls
    assert rows == [({"train_loss": 1.0, "trainer/global_step": k}, 40 if k == 0 else None) for k in (0, 1)]
    out = capsys.readouterr().out
    assert out == "warning: wandb has failed (the service is gone): the run goes on without it\n"


def test_auto_heeds_the_mode_of_the_environment(no_key, no_network, capsys):
    for told, mode in (("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")):
        no_key.setenv("WANDB_MODE", told)
        assert wandb_mode("auto") == mode
    assert not no_network
    assert capsys.readouterr().out == ""


def test_what_is_not_given_is_left_to_the_environment(no_key, tmp_path, monkeypatch):
    asked = []

    def init(**kwargs):
        asked.append(kwargs)
        raise OSError("nothing is opened here")

    monkeypatch.setattr("wandb.init", init)
    no_key.setenv("WANDB_PROJECT", "theirs")
    no_key.setenv("WANDB_RUN_ID", "id-of-theirs")
    no_key.setenv("WANDB_NAME", "name of theirs")
    assert start_wandb(tmp_path / "run", "offline", WandbOptions(), {"a": {"b": 1}}) is None
    assert start_wandb(tmp_path / "run", "offline", WandbOptions(project="ours", id="x", entity="we"), {}) is None
    first, second = asked
    assert (first["project"], first["id"], first["entity"], first["name"]) == ("theirs", "id-of-theirs", None, None)
    assert first["config"] == {"a": {"b": 1}}
    assert (second["project"], second["id"], second["entity"]) == ("ours", "x", "we")


def test_a_server_that_refuses_is_said_in_one_line_and_the_run_logged_offline(no_key, tmp_path, monkeypatch, capsys):
    asked = []

    class Run:
        id, project, name, entity, url = "abc", "p", "run", None, None

        def define_metric(self, *args, **kwargs):
            pass

    def init(mode, **kwargs):
        asked.append(mode)
        if mode == "online":
            raise ConnectionError("no answer\nfrom the server")
        return Run()

    monkeypatch.setattr("wandb.init", init)
    assert start_wandb(tmp_path, "online", WandbOptions(), {}).experiment.id == "abc"
    assert asked == ["online", "offline"]
    out = capsys.readouterr().out
    assert out.startswith("wandb: no run online (no answer from the server), logging offline into the run folder")
    assert out.count("\n") == 1
    assert known_run(tmp_path)["mode"] == "offline"


def test_an_artifact_without_wandb_is_refused(capsys):
    with pytest.raises(SystemExit):
        train(["--log_artifact", "true"])
    assert "log_artifact uploads to Weights & Biases, which is disabled. Add --wandb auto." in capsys.readouterr().err


def of_its_own() -> dict[str, str]:
    """The environment of a process with a service of its own: wandb's is found by a variable, and inherited."""
    return {name: value for name, value in environment().items() if not name.startswith("WANDB_")}


KILLED = r"""
import os, signal, time
from pathlib import Path
from simclr.wandb_run import FLUSH, WandbOptions, start_wandb
run = start_wandb(Path("run"), "offline", WandbOptions(), {"a": 1})
for step in range(5):
    run.log_metrics({"train_loss": step / 10}, step)
children = []
for path in Path("/proc").iterdir():
    try:
        mine = path.name.isdigit() and f"PPid:\t{os.getpid()}\n" in (path / "status").read_text()
        if mine and b"wandb" in (path / "cmdline").read_bytes():
            os.kill(int(path.name), signal.SIGKILL)
            children.append(path.name)
    except OSError:
        pass
assert children, "W&B's own process is not found"
time.sleep(1)
began = time.monotonic()
for step in range(5, 50):
    run.log_metrics({"train_loss": step / 10}, step)
    time.sleep(0.05)
run.end()
print("seconds", time.monotonic() - began)
os._exit(0)  # without what wandb does as a process ends
"""


@pytest.mark.slow  # processes of W&B's that die
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for a process in /proc")
def test_a_kill_of_its_service_costs_the_run_nothing(tmp_path):
    options = {"cwd": tmp_path, "env": of_its_own(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", KILLED], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb has failed") <= 1
    assert float(done.stdout.split("seconds")[1]) < 60


SHORT = """
import sys, time
from pathlib import Path
from simclr.wandb_run import FLUSH, WandbOptions, start_wandb
run = start_wandb(Path("run"), "offline", WandbOptions(), {"a": 1})
for step in range(7):
    run.log_metrics({"train_loss": step / 10}, step)
print("logged", flush=True)
time.sleep(600)
"""


def wait_until_written(run_dir: Path) -> None:
    """Until W&B's file has grown and grows no more; at most 10 s after it is there, less than wandb's own 15."""
    started = time.monotonic()
    while not (files := list(run_dir.rglob("*.wandb"))):
        assert time.monotonic() < started + 300, "its service does not start"
        time.sleep(0.1)
    sizes, started = [0], time.monotonic()
    while time.monotonic() < started + 10 and not (len(sizes) > 4 and sizes[-1] == sizes[-4] > 100):
        time.sleep(0.3)
        sizes.append(sum(path.stat().st_size for path in files))


@pytest.mark.slow  # some ten seconds of waiting for a file to grow no more
@pytest.mark.skipif(os.name != "posix", reason="kills a group of processes")
def test_rows_are_readable_soon_after_they_were_logged_whatever_is_killed(tmp_path):
    import wandb

    if FLUSH not in wandb.Settings.model_fields:
        pytest.skip("this wandb writes its file when a block is full: a flush every so often came later")
    alone = {"cwd": tmp_path, "env": of_its_own(), "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", SHORT], **alone) as process:
        try:
            assert process.stdout.readline() == "logged\n"
            wait_until_written(tmp_path / "run")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its service too, as a cluster does
    found = numbers_of(records_of(tmp_path / "run"))
    assert found["train_loss"] == {step: pytest.approx(step / 10) for step in range(7)}
