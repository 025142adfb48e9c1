"""A run on Weights & Biases: only when asked, when it can, inside the run folder; and whatever ends it, not the run."""

import os
import socket
import sys

import pytest

from simclr.cli.train import train
from simclr.loggers import build_loggers
from simclr.wandb_run import rejoined, wandb_mode
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


@pytest.mark.slow  # starts W&B's own process
@pytest.mark.filterwarnings("default")  # W&B's own
def test_an_offline_run_writes_below_its_folder_only_and_no_key(no_key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    before = {p.name for p in tmp_path.iterdir()}
    train([*flags({"wandb": "offline", "run_dir": "run", "trainer.max_epochs": 1})])
    assert {p.name for p in tmp_path.iterdir()} - before - {"home"} == {"run"}
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
