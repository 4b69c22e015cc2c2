"""Where is remembered how far a run came."""

from __future__ import annotations

from typing import Protocol

#: Seconds that the place of an unfinished task is remembered: as long as a failed
#: task is kept by default, whose replay goes on there.
KEEP_S = 30 * 86_400.0

#: Seconds that the place of a finished one is, for the message that is delivered
#: again because its acknowledgement was lost.
KEEP_FINISHED_S = 86_400.0


class CheckpointStore(Protocol):
    """The places that tasks have come to, by task id and the name of a stream."""

    def load(self, task_id: str, name: str) -> bytes | None:
        """
        The place that was saved last, or None.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        ...

    def save(self, task_id: str, name: str, place: bytes) -> None:
        """Remember *place*, in one round trip, for `KEEP_S` from now."""
        ...

    def finished(self, task_id: str) -> None:
        """The task has ended well: remember its places for `KEEP_FINISHED_S` only."""
        ...
