"""How much memory there still is."""

from pathlib import Path

import psutil

CGROUPS, OURS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available(cgroups: Path = CGROUPS, ours: Path = OURS) -> int:
    """Bytes that this process can take before the kernel kills somebody for them: what the machine has left, or a container's
    limit, if that is less (kernel.org, "Control Group v2": ``memory.max``; the limits of v1 aren't looked at)."""
    return min([psutil.virtual_memory().available, *_within_limits(cgroups, ours)])


def _within_limits(cgroups: Path, ours: Path) -> list[int]:
    """What each of the groups that this process is in has left."""
    lines = ours.read_text().splitlines() if ours.is_file() else []
    names = next((line[3:].strip("/").split("/") for line in lines if line.startswith("0::")), [])
    folders = [cgroups.joinpath(*names[:depth]) for depth in range(len(names) + 1)]
    return [left for folder in folders if (left := _left(folder)) is not None]


def _left(folder: Path) -> int | None:
    limit = folder / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    # Files that are cached count as used, and give way.
    files = int(used["active_file"]) + int(used["inactive_file"])
    return int(limit.read_text()) - int((folder / "memory.current").read_text()) + files
