"""The container's memory, from folders as each version of cgroups has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_resilience.memory.container import (
    Container,
    find_container,
    whole_kib,
)

MIB = 1 << 20


def write(root: Path, files: dict[str, object]) -> Path:
    """A tree of files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def found(tmp_path: Path, own: str, files: dict[str, object]) -> Container | None:
    """What is found in a tree, by a process in the cgroups *own*."""
    write(tmp_path, {"own": own})
    return find_container(write(tmp_path / "fs", files), tmp_path / "own")


V2 = {
    "memory.max": 512 * MIB,
    "memory.current": 400 * MIB,
    "memory.stat": f"anon {300 * MIB}\ninactive_file {100 * MIB}\nactive_file 7",
}
V1 = {
    "memory/memory.limit_in_bytes": 512 * MIB,
    "memory/memory.usage_in_bytes": 400 * MIB,
    "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {100 * MIB}",
}


@pytest.mark.parametrize(
    ("own", "files"),
    [("0::/", V2), ("9:cpu:/a\n4:memory:/a\n0::/", V1), ("", V2), ("", V1)],
    ids=["v2", "v1", "v2 unsaid", "v1 unsaid"],
)
def test_a_container_is_found(
    tmp_path: Path, own: str, files: dict[str, object]
) -> None:
    """With its limit and its working set, which is without the files that would go."""
    container = found(tmp_path, own, files)

    assert container is not None
    assert container.limit_kib == 512 * 1024
    assert container.used_kib() == 300 * 1024
    assert whole_kib(container) == 512 * 1024


def test_a_process_in_a_cgroup_of_its_own(tmp_path: Path) -> None:
    """Outside of a container, as under systemd; the lowest limit above it counts."""
    slice_ = "system.slice/shop.service"
    files = {
        f"{slice_}/memory.max": "max",
        f"{slice_}/memory.current": 1,
        "system.slice/memory.max": 256 * MIB,
        "system.slice/memory.current": 200 * MIB,
        "system.slice/memory.stat": "inactive_file 0",
    }
    container = found(tmp_path, f"0::/{slice_}", files)

    assert container is not None
    assert container.limit_kib == 256 * 1024
    assert container.used_kib() == 200 * 1024


def test_a_limit_may_be_changed_while_it_runs(tmp_path: Path) -> None:
    """As Kubernetes does."""
    container = found(tmp_path, "0::/", V2)
    assert container is not None
    write(tmp_path / "fs", {"memory.max": 1_024 * MIB})

    assert container.limit_now_kib() == 1_024 * 1_024
    (tmp_path / "fs" / "memory.max").unlink()
    assert container.limit_now_kib() == 512 * 1_024


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max"},
        {"memory.max": ""},
        {"memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000},
        {"memory/memory.limit_in_bytes": -1},
    ],
)
def test_there_may_be_no_limit(tmp_path: Path, files: dict[str, object]) -> None:
    """Shares are then shares of the host's memory."""
    meminfo = write(tmp_path, {"meminfo": "MemFree: 5 kB\nMemTotal:   16000 kB"})

    assert found(tmp_path, "0::/", files) is None
    assert whole_kib(None, meminfo / "meminfo") == 16_000
    assert whole_kib(None, meminfo / "none") is None


@pytest.mark.parametrize("text", ["", "nonsense", "inactive_file x"])
def test_what_cannot_be_read_is_not_guessed(tmp_path: Path, text: str) -> None:
    """A container without a figure is left alone."""
    container = found(tmp_path, "0::/", {**V2, "memory.current": text})

    assert container is not None
    assert container.used_kib() is None


def test_odd_lines_are_passed_over(tmp_path: Path) -> None:
    """The file is another program's."""
    assert found(tmp_path, "\n:\n4:memory\n0::/../..\n", V1) is not None
