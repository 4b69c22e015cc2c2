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

#: Lines whose child is killed when it first comes to this step: the beginning of a task;
#: or within `charge` when the bank has taken the money, and nothing tells of it here
#: ("taken"), and when the payment is in the shop's tables too ("booked").
KILLED_ONCE: Mapping[str, frozenset[int]] = {
    "charge": frozenset({97, 240, 388, 515}),
    "taken": frozenset({133, 288, 431, 1034}),
    "booked": frozenset({175, 356, 566, 1075}),
    "ship": frozenset({61, 199, 342, 478}),
    "enrich": frozenset({703, 741, 777, 802}),
}

#: Lines whose customer clicks twice: the messages of the order are sent twice.
CLICKED_TWICE = frozenset({29, 83, 148, 226, 311, 407, 452, 539, 718, 855, 968, 1101})

#: Lines of whose labels the printer writes two.
LABELLED_TWICE = frozenset({120, 260, 405, 550, 720, 930})

#: The line at which its import meets a deploy: the process group has a TERM.
DEPLOYED_AT = 451

#: The line that kills every child that looks at it.
POISON = 690

#: Lines for which the address service, while it is ill, does not answer in time.
HANGING = frozenset({695, 762, 831, 900})

#: Every so many lines the address service needs a second asking.
BLINKS_EVERY = 17

#: Lines that meet a misfortune; the file has no fault there.
STRUCK = (
    frozenset({POISON, DEPLOYED_AT}) | HANGING | CLICKED_TWICE | LABELLED_TWICE
).union(*KILLED_ONCE.values())


def blinks(line_no: int) -> bool:
    """Whether the service answers the first question about this line with a 503."""
    return line_no % BLINKS_EVERY == 0


class Misfortunes:
    """
    Has customers click and children die as the day has it, and remembers the dead.

    Args:
        folder: Holds one file for each child that was killed; None: a lucky day.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def clicks(self, line_no: int) -> int:
        """How often the customer of a line sends the order."""
        return 2 if self._folder is not None and line_no in CLICKED_TWICE else 1

    def labels(self, line_no: int) -> int:
        """How many labels the printer writes for a line."""
        return 2 if self._folder is not None and line_no in LABELLED_TWICE else 1

    def deploy(self, line_no: int) -> None:
        """Stop the worker as a supervisor does that stops its whole group, once."""
        if self._folder is None or line_no != DEPLOYED_AT:
            return
        deployed = self._folder.parent / "deployed"
        if not deployed.exists():
            deployed.touch()
            os.killpg(os.getpgrp(), signal.SIGTERM)

    def strike(self, step: str, line_no: int) -> None:
        """
        End this process without warning, if it is to.

        Args:
            step: One of those in `KILLED_ONCE`, at which a task has arrived.
        """
        if self._folder is None:
            return
        is_poison = step == "enrich" and line_no == POISON
        is_first = self._is_first(step, line_no)
        if is_poison or (is_first and line_no in KILLED_ONCE[step]):
            run = 1 + sum(1 for _ in self._folder.glob(f"{step}-{line_no}-*"))
            (self._folder / f"{step}-{line_no}-{run}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_first(self, step: str, line_no: int) -> bool:
        assert self._folder is not None
        return not (self._folder / f"{step}-{line_no}-1").exists()


def deaths(folder: Path) -> list[tuple[str, int]]:
    """Step and line of each child that was killed, counted from *folder*."""
    names = sorted(path.name.split("-") for path in folder.iterdir())
    return [(step, int(line_no)) for step, line_no, _ in names]
