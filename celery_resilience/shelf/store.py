"""Where snoozed messages wait until they are due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Shelved(NamedTuple):
    """
    One message that waits.

    Attributes:
        id: Its name, of at most 32 characters, which no other has.
        text: The message.
    """

    id: str
    text: str


class Claimed(NamedTuple):
    """
    What a process may publish.

    Attributes:
        messages: Those that are due, the longest first.
        next_due_s: Seconds until the next of the others, or until the claim of another
            process lapses; None: no other waits. Not positive: there are more.
        others: How many others wait.
    """

    messages: Sequence[Shelved]
    next_due_s: float | None
    others: int


class ShelfStore(Protocol):
    """
    The messages of one app that wait.

    Raises:
        StoreUnavailable: From each method; nothing is known of what was done.
    """

    def put(self, messages: Sequence[tuple[Shelved, float]]) -> None:
        """
        Keep messages, all or none of them.

        Args:
            messages: With the seconds from now after which each is due.
        """
        ...

    def claim(self, limit: int, lease_s: float) -> Claimed:
        """
        Take messages that are due, which nobody else is given meanwhile.

        Args:
            limit: At most so many.
            lease_s: Seconds after which others are given those that are still there.
        """
        ...

    def remove(self, ids: Sequence[str]) -> None:
        """Forget messages: they are published."""
        ...
