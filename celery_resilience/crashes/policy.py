"""How many crashes are enough. No Celery, no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

#: Seconds before the run after the first crash; doubled for each further one.
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0

#: Without a store nobody knows whether a redelivered message had started, so
#: that many redeliveries are needed before it is failed.
MAX_REDELIVERIES_UNSTORED = 20


@dataclass(frozen=True, slots=True)
class AfterCrash:
    """
    What becomes of a run that ended with its process.

    Attributes:
        runs: How many runs have ended so, this one included.
        delay_s: Seconds until the next run; None: there is none.
        marks: Written on the message that is sent again.
    """

    runs: int
    delay_s: float | None
    marks: Mapping[str, Any] = field(default_factory=dict)


def after_crash(
    marks: Mapping[str, Any],
    *,
    max_crashes: int,
    window_s: float,
    now: float,
    runs_before: int = 0,
) -> AfterCrash:
    """
    Judge a run whose child died, as the main process saw it.

    Args:
        marks: Ours on the message that was running.
        max_crashes: Runs that may end with their process.
        window_s: Crashes before an earlier start than this are forgotten.
        now: Wall time, in seconds.
        runs_before: Runs that had ended with their process when this one started,
            by the store; 0 where nobody asked it.
    """
    first_at = float(marks.get("crashed_at", now))
    counted = int(marks.get("crashes", 0))
    forgotten = 0
    if now - first_at > window_s:
        first_at, forgotten = now, counted
    runs = max(counted, runs_before) - forgotten + 1
    if runs >= max_crashes:
        return AfterCrash(runs, None)
    return AfterCrash(
        runs,
        min(FIRST_DELAY_S * 2 ** (runs - 1), MAX_DELAY_S),
        {
            "crashes": runs,
            "crashed_at": first_at,
            # The last run that is allowed decides, so it must decide fairly.
            "alone": True if runs + 1 >= max_crashes else None,
            "unrecorded": None,
        },
    )


class Step(Enum):
    """What to do with a start that may follow the death of a whole worker."""

    RUN = auto()
    RUN_ALONE_FIRST = auto()
    FAIL = auto()


def before_start(
    *,
    crashes: int,
    unrecorded: int,
    earlier: Sequence[bool],
    is_alone: bool,
    max_crashes: int,
) -> tuple[Step, int]:
    """
    Judge a start from the starts of the same message that never ended.

    Args:
        crashes: Runs that ended with their child, from the message's mark.
        unrecorded: 1 when the message's first delivery was not recorded.
        earlier: Recorded starts that never ended, oldest first; True for one
            that ran alone in its worker.
        is_alone: Whether this start runs alone in its worker.
        max_crashes: Runs that may end with their process.

    Returns:
        What to do, and how many runs have ended with their process.
    """
    runs = crashes + unrecorded + len(earlier)
    if earlier and earlier[-1] and runs >= max_crashes:
        return Step.FAIL, runs
    if (earlier or runs + 1 >= max_crashes) and not is_alone:
        return Step.RUN_ALONE_FIRST, runs
    return Step.RUN, runs
