"""What a run was made by: versions, commit, command and machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simclr import __version__
from simclr.container import cores

_PACKAGES = ("torchvision", "kornia", "pytorch-lightning")


def provenance(command: str) -> dict[str, Any]:
    """What is to be known of a run beside its settings, in plain types.

    Args:
        command: as it was given.
    Returns:
        `versions` by package, `commit` of the checkout (with `+` if files differ from it, None in an installed
        package), `command`, and `machine`: host, system, cores that may be used, GPUs by name.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"simclr": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "versions": versions | {package: version(package) for package in _PACKAGES},
        "commit": commit(),
        "command": command,
        "machine": {"host": platform.node(), "system": platform.platform(), "cores": cores(), "gpus": gpus},
    }


def commit() -> str | None:
    """The commit of the checkout that this package is imported from, with a `+` if files differ; None if it is none."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] + ("+" if found[1] else "")
