"""Why a child has ended."""

from __future__ import annotations

import signal

import pytest
from unit.specimens import a_settlement

from celery_resilience.events import emit
from celery_resilience.outcome import EVENTS, Outcome, Reason
from celery_resilience.telemetry.exits import MAX_REMEMBERED, WhyEnded, exit_reason


@pytest.mark.parametrize(
    ("code", "is_recycled", "is_meant", "because", "reason"),
    [
        (155, True, False, None, ("recycled", "")),
        (-signal.SIGKILL, False, False, None, ("signal", "SIGKILL")),
        (-signal.SIGKILL, False, True, "memory", ("memory", "SIGKILL")),
        (-signal.SIGTERM, False, True, "time_limit", ("time_limit", "SIGTERM")),
        (-signal.SIGTERM, False, True, None, ("stopped", "SIGTERM")),
        (0, False, True, None, ("stopped", "")),
        (1, False, False, None, ("exit", "")),
        (-200, False, False, None, ("signal", "SIG200")),
    ],
)
def test_each_end_has_one_reason(
    code: int,
    is_recycled: bool,
    is_meant: bool,
    because: str | None,
    reason: tuple[str, str],
) -> None:
    """What the main process knows beats what the system says."""
    found = exit_reason(
        code, is_recycled=is_recycled, is_meant=is_meant, because=because
    )

    assert found == reason


def test_what_a_child_is_ended_for_is_remembered_once() -> None:
    """By the settlement of its run; of a run that has failed otherwise nothing is."""
    why = WhyEnded()
    stops = why.attach()
    for pid, reason in ((1, Reason.HARD_TIME_LIMIT), (2, Reason.EXCEPTION)):
        settlement = a_settlement(reason=reason, pid=pid)
        emit(EVENTS[Outcome.FAILED], settlement=settlement)
    emit("memory.ended", task="t", pid=3, used_mib=1.0, limit_mib=1.0)
    for stop in stops:
        stop()

    assert [why.pop(pid) for pid in (1, 2, 3, 1)] == [
        "time_limit",
        None,
        "memory",
        None,
    ]


def test_what_nobody_asks_for_is_forgotten() -> None:
    """A pool that never tells of its children fills no memory."""
    why = WhyEnded()
    for pid in range(MAX_REMEMBERED + 5):
        why._memory(pid)

    assert why.pop(0) is None
    assert why.pop(MAX_REMEMBERED) == "memory"
