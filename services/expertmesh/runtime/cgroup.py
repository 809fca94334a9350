"""Memory limits that control groups put on this process (Linux cgroup v2 and v1).

Files and their meaning: kernel documentation admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class CgroupMemory:
    """One limit on the way from the process's own group to the root."""

    limit_bytes: int
    working_bytes: int
    """What cannot be taken back without hurting: usage less page cache not used lately."""

    @property
    def free_bytes(self) -> int:
        """What the group can still give."""
        return max(self.limit_bytes - self.working_bytes, 0)


@dataclass(frozen=True)
class _Files:
    """Where a version of cgroups keeps a group's memory numbers."""

    limit: str
    usage: str
    inactive_key: str


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def read_cgroup_memory(root: Path, membership: str) -> list[CgroupMemory]:
    """Every memory limit on this process; none outside of limited groups.

    Args:
        root: where cgroups are mounted, usually /sys/fs/cgroup.
        membership: the text of /proc/self/cgroup.
    """
    return [
        limit
        for mount, group, files in _memory_groups(root, membership)
        for directory in _up_to_root(mount, group)
        if (limit := _read_group(directory, files)) is not None
    ]


def _memory_groups(root: Path, membership: str) -> Iterator[tuple[Path, str, _Files]]:
    """(mount point, group of this process, file names) of each hierarchy that can limit memory."""
    for line in membership.splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            yield root, group, _V2
        elif "memory" in controllers.split(","):
            yield root / "memory", group, _V1


def _up_to_root(mount: Path, group: str) -> Iterator[Path]:
    """The group's directory and its ancestors.

    In a container the group may be named as the host sees it and not exist here; the container's
    own is the mount itself.
    """
    relative = PurePosixPath(group.lstrip("/"))
    for part in (relative, *relative.parents):
        if ".." not in part.parts:
            yield mount / part


def _read_group(directory: Path, files: _Files) -> CgroupMemory | None:
    try:
        limit = (directory / files.limit).read_text().strip()
        if limit == "max":
            return None
        usage_bytes = int((directory / files.usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return None
    # Page cache of mapped checkpoints is given back before anyone runs out of memory.
    return CgroupMemory(int(limit), max(usage_bytes - int(stat.get(files.inactive_key, 0)), 0))
