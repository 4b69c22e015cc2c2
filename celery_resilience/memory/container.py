"""The memory that this container may have, from cgroup v1 or v2. Sizes are in KiB.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

#: Version 1 says "no limit" by the largest number of whole pages.
NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class _Files:
    """The names of one version of cgroups."""

    limit: str
    used: str
    inactive: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class Container:
    """
    The cgroup whose memory is the scarcest.

    Attributes:
        folder: Of the cgroup, where the kernel shows it.
        limit_kib: At the time it was looked for.
    """

    folder: Path
    limit_kib: int
    files: _Files

    def used_kib(self) -> int | None:
        """
        The working set: what it has, less the files that the kernel would drop first.

        As Kubernetes counts it. None where it cannot be read.
        """
        try:
            used = int((self.folder / self.files.used).read_text())
            for line in (self.folder / "memory.stat").read_text().splitlines():
                name, _, number = line.partition(" ")
                if name == self.files.inactive:
                    return max(0, used - int(number)) // 1024
        except (OSError, ValueError):
            return None
        return used // 1024

    def limit_now_kib(self) -> int:
        """The limit, which may be changed while the container runs."""
        return _limit(self.folder / self.files.limit) or self.limit_kib


def find_container(
    cgroups: Path | None = None, own_cgroups: Path | None = None
) -> Container | None:
    """
    The cgroup of this process, or above it, with the lowest limit; None: there is none.

    Args:
        cgroups: Where the kernel shows its cgroups.
        own_cgroups: The file that says in which this process is.
    """
    root = CGROUPS if cgroups is None else cgroups
    found = [
        Container(folder, limit, files)
        for folder, files in _candidates(root, own_cgroups or OWN_CGROUPS)
        if (limit := _limit(folder / files.limit)) is not None
    ]
    return min(found, key=lambda container: container.limit_kib, default=None)


def _candidates(root: Path, own: Path) -> Iterator[tuple[Path, _Files]]:
    """Each folder that may limit this process, from its own to the root."""
    v1, v2 = root / "memory", root
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            yield from ((folder, _V1) for folder in _upwards(v1, path))
        elif not controllers:
            yield from ((folder, _V2) for folder in _upwards(v2, path))
    yield from ((v1, _V1), (v2, _V2))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), 0, -1):
        yield root.joinpath(*parts[:count])


def _limit(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):  # "max"
        return None
    return limit // 1024 if 0 < limit < NO_LIMIT else None


def whole_kib(container: Container | None, meminfo: Path = MEMINFO) -> int | None:
    """What shares are shares of: the container's limit, or else the host's memory."""
    if container is not None:
        return container.limit_kib
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
