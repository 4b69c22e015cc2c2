"""What is done with what a body leaves behind: no library, no I/O, no clock."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Seconds without use after which a connection is asked whether it lives.
IDLE_S = 30.0


class DriverState(enum.Enum):
    """What a driver knows of its connection, without asking the server."""

    IDLE = "idle"
    IN_TRANSACTION = "in a transaction"
    FAILED = "in a failed transaction"
    BUSY = "in a statement"
    DEAD = "closed"
    UNSAID = "unsaid"


class Action(enum.Enum):
    """What is done with a connection that a body has not returned."""

    NOTHING = "nothing"
    ROLL_BACK = "roll back"
    CANCEL = "cancel on the server, and throw away"
    THROW_AWAY = "throw away"


_ACTIONS = {
    DriverState.IDLE: Action.NOTHING,
    DriverState.IN_TRANSACTION: Action.ROLL_BACK,
    DriverState.FAILED: Action.ROLL_BACK,
    DriverState.BUSY: Action.CANCEL,
    DriverState.DEAD: Action.THROW_AWAY,
    # A rollback of nothing is harmless.
    DriverState.UNSAID: Action.ROLL_BACK,
}


def action_for(state: DriverState) -> Action:
    """What is done with a connection in *state* once its body has ended."""
    return _ACTIONS[state]


def should_ask(*, idle_s: float | None, is_readable: bool) -> bool:
    """
    Whether a connection is asked, in a round trip, whether it lives.

    Args:
        idle_s: Seconds since its last use; None: not known.
        is_readable: The server has sent something that nobody has asked for, which
            may be its good-bye.
    """
    return is_readable or (idle_s is not None and idle_s > IDLE_S)


@dataclass(frozen=True, slots=True)
class Leak:
    """
    One thing that a body has left behind.

    Attributes:
        kind: What it is, in words.
        open_s: Seconds since it was taken; None: not known.
        where: `file:line` that took it; "" where that is not known.
    """

    kind: str
    open_s: float | None = None
    where: str = ""

    def __str__(self) -> str:
        since = "" if self.open_s is None else f", open for {self.open_s:.3f} s"
        where = f", taken at {self.where}" if self.where else ""
        return f"{self.kind}{since}{where}"


#: Kinds of leaks.
OPEN_TRANSACTION = "open transaction"
NOT_RETURNED = "connection not returned"
ATOMIC_LEFT = "atomic left"
AUTOCOMMIT_OFF = "autocommit left off"

# --- state of a server's session -----------------------------------------------------

SET = "SET"
LOCK = "advisory lock"
TEMPORARY = "temporary table"
LISTEN = "LISTEN"

#: What begins a statement, behind comments.
_START = r"\A\s*(?:/\*.*?\*/\s*|--[^\n]*\n\s*)*"

_LEAVES = (
    (
        SET,
        re.compile(
            _START + r"set\s+(?!local\b|transaction\b|constraints\b|role\s+none\b)",
            re.IGNORECASE,
        ),
    ),
    (SET, re.compile(r"\bset_config\s*\([^)]*,\s*false\s*\)", re.IGNORECASE)),
    (LISTEN, re.compile(_START + r"listen\s", re.IGNORECASE)),
    (
        TEMPORARY,
        re.compile(
            _START + r"create\s+(?:(?:local|global)\s+)?temp(?:orary)?\s", re.IGNORECASE
        ),
    ),
    (
        LOCK,
        re.compile(
            r"\b(?:pg_(?:try_)?advisory_lock(?:_shared)?|get_lock)\s*\(", re.IGNORECASE
        ),
    ),
)

_ENDS = (
    (SET, re.compile(_START + r"(?:reset|discard)\s+all\b", re.IGNORECASE)),
    (LISTEN, re.compile(_START + r"(?:unlisten\s+\*|discard\s+all\b)", re.IGNORECASE)),
    (TEMPORARY, re.compile(_START + r"(?:drop\s+table|discard\s)", re.IGNORECASE)),
    (LOCK, re.compile(r"\b(?:pg_advisory_unlock|release_lock)", re.IGNORECASE)),
)

#: One of these words is in each statement that any pattern above finds.
_ANY = re.compile(
    r"\b(?:set|set_config|reset|discard|listen|unlisten|temp|temporary|drop|"
    r"pg_(?:try_)?advisory_\w+|get_lock|release_\w*lock\w*)\b",
    re.IGNORECASE | re.DOTALL,
)

#: What a statement does to the state of its session: (left behind, undone).
Effect = tuple[tuple[str, ...], tuple[str, ...]]
NO_EFFECT: Effect = ((), ())


def effect_of(statement: str) -> Effect:
    """
    What of its session a statement leaves changed beyond its transaction.

    A guess from its words: what a function or procedure does inside the server is
    not seen.
    """
    if _ANY.search(statement) is None:
        return NO_EFFECT
    leaves = tuple(kind for kind, pattern in _LEAVES if pattern.search(statement))
    ends = tuple(kind for kind, pattern in _ENDS if pattern.search(statement))
    return (leaves, ends) if leaves or ends else NO_EFFECT


def left_by(effects: Iterable[Effect]) -> set[str]:
    """The kinds of state that are left after statements with these *effects*."""
    counts: dict[str, int] = {}
    for leaves, ends in effects:
        for kind in leaves:
            counts[kind] = counts.get(kind, 0) + 1
        for kind in ends:
            # One of several locks or tables may be all that is undone.
            whole = kind in (SET, LISTEN)
            counts[kind] = 0 if whole else max(0, counts.get(kind, 0) - 1)
    return {kind for kind, count in counts.items() if count > 0}
