"""What the main process says of a child that died."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from celery_resilience.crashes.judge import CrashJudge, oom_kills


def a_judge(now: float = 1_000.0) -> CrashJudge:
    """A judge with a limit of three."""
    return CrashJudge(max_crashes=3, window_s=100.0, clock=lambda: now)


def test_the_apps_limit_holds_where_a_task_has_none() -> None:
    """And the task's own one where it has."""
    marks = {"crashes": 1, "crashed_at": 990.0}

    assert a_judge().judge(marks, None).delay_s is not None
    assert a_judge().judge(marks, 2).delay_s is None
    assert a_judge().judge({"crashes": 2, "crashed_at": 990.0}, None).delay_s is None
    assert a_judge().judge({"crashes": 2, "crashed_at": 990.0}, 9).delay_s is not None


def test_the_window_is_the_apps() -> None:
    """By the clock that it was given."""
    marks = {"crashes": 2, "crashed_at": 1_000.0}

    assert a_judge(now=1_100.0).judge(marks, None).runs == 3
    assert a_judge(now=1_101.0).judge(marks, None).runs == 1


def test_host_and_memory_are_told() -> None:
    """An operator looks for the OOM killer first."""
    said = a_judge().describe()

    assert f"host {socket.gethostname()}" in said
    assert "MiB" in said
    assert said.startswith("(")
    assert said.endswith(")")


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("low 0\nhigh 2\noom 5\noom_kill 3\n", 3),
        ("oom_kill 0\n", 0),
        ("low 0\n", 0),
        ("", 0),
        ("garbage\n\n", 0),
    ],
)
def test_the_kernels_kills_are_counted(tmp_path: Path, text: str, kills: int) -> None:
    """In this container, by its own counter."""
    events = tmp_path / "memory.events"
    events.write_text(text)

    assert oom_kills(events) == kills


def test_without_a_container_nothing_is_known(tmp_path: Path) -> None:
    """No file, no kills."""
    assert oom_kills(tmp_path / "none") == 0
