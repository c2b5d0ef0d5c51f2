"""What made a number: the code, the libraries, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "numpy", "zarr", "h5py", "av", "pillow")


def code_version() -> str:
    """The package's version, with the commit (and ``.changed``) when it runs from a git checkout."""
    root = Path(__file__).resolve().parents[1]
    number = version("mastaf") if _is_installed("mastaf") else "unknown"
    if not (root / ".git").exists():
        return number
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return number
    return f"{number}+{commit}" + (".changed" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that touch the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES if _is_installed(name)}


def hardware() -> dict[str, str | int | list[str]]:
    """Processor, cores, and the GPUs if there are any."""
    import torch

    found: dict[str, str | int | list[str]] = {
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def processor_name() -> str:
    """What the processor calls itself; Linux tells, other systems name its family at least."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            # `status` would lock the index for a moment, and a commit that somebody makes meanwhile would fail.
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        # No git, or not our repository: the package version alone has to do.
        return ""
