"""The misfortunes of the day: who meets which, and how a task meets its own.

Everything is fixed by the line of the order in the file, so that both runs of
the shop have the same day.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

#: Lines that arrive in three batches; during the second the address service is down.
MORNING = range(2, 602)
OUTAGE = range(602, 682)
AFTERNOON = range(682, 1152)

#: Lines whose child is killed when it first runs this task.
KILLED_ONCE: Mapping[str, frozenset[int]] = {
    "charge": frozenset({97, 240, 388, 515}),
    "ship": frozenset({61, 199, 342, 478}),
    "enrich": frozenset({703, 741, 777, 802}),
}

#: The line that kills every child that looks at it.
POISON = 690

#: Lines for which the address service, while it is ill, does not answer in time.
HANGING = frozenset({695, 762, 831, 900})

#: Every so many lines the address service needs a second asking.
BLINKS_EVERY = 17

#: Lines that meet a misfortune; the file has no fault there.
STRUCK = frozenset({POISON}) | HANGING | frozenset().union(*KILLED_ONCE.values())


def blinks(line_no: int) -> bool:
    """Whether the service answers the first question about this line with a 503."""
    return line_no % BLINKS_EVERY == 0


class Misfortunes:
    """
    Kills children as the day has it, and remembers whom over their death.

    Args:
        folder: Holds one file for each child that was killed; None: a lucky day.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def strike(self, task: str, line_no: int) -> None:
        """
        End this process without warning, if it is to.

        Called before a task has any effect.
        """
        if self._folder is None:
            return
        is_poison = task == "enrich" and line_no == POISON
        is_first = self._is_first(task, line_no)
        if is_poison or (is_first and line_no in KILLED_ONCE.get(task, ())):
            run = 1 + sum(1 for _ in self._folder.glob(f"{task}-{line_no}-*"))
            (self._folder / f"{task}-{line_no}-{run}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_first(self, task: str, line_no: int) -> bool:
        assert self._folder is not None
        return not (self._folder / f"{task}-{line_no}-1").exists()


def deaths(folder: Path) -> list[tuple[str, int]]:
    """Task and line of each child that was killed, counted from *folder*."""
    names = sorted(path.name.split("-") for path in folder.iterdir())
    return [(task, int(line_no)) for task, line_no, _ in names]
