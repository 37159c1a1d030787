"""What a measurement is worth nothing without: the machine, the commit, the versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "graphlathe",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "numpy",
)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def load_average() -> float | None:
    """Runnable processes over the last minute, or None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load, system and Python."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "load_average": load_average(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }


def commit() -> str:
    """The repository's commit, with ``-dirty`` when tracked files differ from it; ``unknown`` outside a repository."""
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return "unknown"
        return git("rev-parse", "HEAD")[:12] + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def library_version(name: str) -> str | None:
    """The installed version of a package, or None; of torch with its build, which its metadata may leave out."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return None
    if name != "torch":
        return found
    import torch

    return str(torch.__version__)


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of the installed ones among the named packages."""
    found = {name: library_version(name) for name in names}
    return {name: text for name, text in found.items() if text is not None}
