"""What a worker's end means: its exit code, and when it has done enough."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What a supervisor is told of a worker's end."""

    DRAINED = 0
    RECYCLED = 12
    PUT_BACK = 75
    LOST = 76
    STUCK = 77


#: What each means, for the last line of the log.
MEANINGS = {
    ExitCode.DRAINED: "drained",
    ExitCode.RECYCLED: "recycled",
    ExitCode.PUT_BACK: "work was put back",
    ExitCode.LOST: "work was cut off",
    ExitCode.STUCK: "the worker was stuck",
}


def exit_code(
    *, celery: int | None, was_asked: bool, wanted: int, put_back: int, lost: int
) -> int:
    """
    The exit code of a worker whose deliveries are all settled.

    Args:
        celery: Celery's own.
        was_asked: A signal, a command or a stop condition has ended the worker, and
            not an error of its own.
        wanted: The code of the reason for which it drains.
        put_back: Runs that were cut off and are delivered again.
        lost: Runs that were cut off for good; their failures are kept.
    """
    if celery and not was_asked:
        return celery
    if lost:
        return ExitCode.LOST
    if put_back:
        return ExitCode.PUT_BACK
    return wanted


def meaning(code: int) -> str:
    """The code in words."""
    try:
        return MEANINGS[ExitCode(code)]
    except ValueError:
        return "an error"


@dataclass(frozen=True, slots=True)
class StopConditions:
    """
    When a worker drains by itself.

    Attributes:
        after_s: Seconds after its start; None: never.
        after_tasks: Tasks that have ended; None: any number.
        when_empty: Once its queues are empty and it holds nothing.
    """

    after_s: float | None = None
    after_tasks: int | None = None
    when_empty: bool = False

    def words(self) -> str:
        """For the start line; "" where there are none."""
        found = []
        if self.after_s is not None:
            found.append(f"after {self.after_s:g} s")
        if self.after_tasks is not None:
            found.append(f"after {self.after_tasks} tasks")
        if self.when_empty:
            found.append("when its queues are empty")
        return f"stops {' or '.join(found)}" if found else ""


def is_idle_long_enough(*, idle_for_s: float, was_ever_busy: bool) -> bool:
    """
    Whether a worker that holds nothing asks the broker if its queues are empty.

    A worker that has just started may have asked for messages that are on their way.
    """
    return idle_for_s >= (IDLE_S if was_ever_busy else FIRST_IDLE_S)


#: Seconds without a message before the broker is asked; the longer one at the start.
IDLE_S = 1.0
FIRST_IDLE_S = 3.0
