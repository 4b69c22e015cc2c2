"""What a store of circuits promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

#: Characters of a circuit's name.
MAX_NAME = 64


class Stored(NamedTuple):
    """
    One circuit as it is stored.

    Attributes:
        version: Of the text; "" where there is none.
        text: The state.
    """

    version: str = ""
    text: str = ""


class Answer(NamedTuple):
    """
    What a store says.

    Attributes:
        now: Its wall time in seconds.
        found: The circuits as they are now; what is missing has never been written, or
            is forgotten.
    """

    now: float
    found: Mapping[str, Stored]


class CircuitStore(Protocol):
    """
    One text for each circuit, changed by who has seen the last one.

    Raises:
        StoreUnavailable: From each method; nothing is known of what was done.
    """

    def read(self, names: Sequence[str]) -> Answer:
        """The circuits of these names, in one round trip."""
        ...

    def swap(self, name: str, seen: str, new: Stored, *, keep_s: float) -> Answer:
        """
        Replace a circuit if it still is of the version *seen*.

        Args:
            name: At most `MAX_NAME` characters.
            seen: "" where there was none.
            new: With a version that nobody has used.
            keep_s: Seconds after which it is forgotten if nobody writes.

        Returns:
            What is stored now: *new*, or what somebody else has written.
        """
        ...

    def tickets(self, name: str, generation: int, count: int, *, keep_s: float) -> int:
        """
        Take *count* tickets, each of which is given once in a generation.

        Args:
            keep_s: Seconds after which they may be forgotten if nobody takes one.

        Returns:
            The first of them; the first of a generation is 0.
        """
        ...

    def take_slot(self, name: str, token: str, *, limit: int, lease_s: float) -> bool:
        """
        Take one of *limit* slots for a task that runs.

        Args:
            token: That nobody has used.
            lease_s: Seconds after which it is another's, if it is not given back.

        Returns:
            Whether there was one.
        """
        ...

    def give_slot(self, name: str, token: str) -> None:
        """Give a slot back."""
        ...

    def names(self) -> Sequence[str]:
        """The circuits that are not forgotten, in any order."""
        ...
