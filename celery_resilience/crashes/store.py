"""Where starts of redelivered messages are remembered."""

from __future__ import annotations

from typing import Protocol


class StartStore(Protocol):
    """Starts that have not ended yet, by message."""

    def unfinished(self, key: str, *, window_s: float) -> list[bool]:
        """
        The starts of *key* that never ended, oldest first.

        Args:
            key: Names the message: one attempt of one task id.
            window_s: Older starts are forgotten.

        Returns:
            For each start, whether it ran alone in its worker.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        ...

    def record(self, key: str, *, is_alone: bool, worker: str) -> None:
        """Remember that a run of *key* starts now in *worker*."""
        ...

    def clear(self, key: str) -> None:
        """Forget the starts of *key*: a run has ended."""
        ...

    def clear_worker(self, worker: str) -> None:
        """Forget the starts in *worker*: it was asked to stop, so no crash follows."""
        ...
