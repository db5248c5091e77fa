"""Where a number comes from: versions, revision, processor, threads, load. Goes into every published result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from steeple.engine import LoadedModel
from steeple.hardware import cpu_name
from steeple.ops.native_attention import NativeAttention

GIT_SECONDS = 10


def environment(target: LoadedModel) -> dict[str, Any]:
    """The surroundings of a run with ``target``, ready for JSON."""
    from steeple import __version__  # the package's own name for itself; it is whole only after import

    device = target.device
    return {
        "steeple": __version__,
        "revision": revision(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "native_attention": isinstance(target.attention, NativeAttention),
        "loadavg": [round(value, 2) for value in os.getloadavg()],
    }


def command_line() -> list[str]:
    """This process's own command, without the folder that the program lies in."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def revision(package: Path) -> str | None:
    """The git commit that ``package`` belongs to, with ``+changes`` if files differ from it; None outside a clone."""
    root = package.parents[1]
    if not (root / ".git").exists():
        return None  # an installed package may lie inside somebody else's repository
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    command = ("git", "-C", str(root), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
