"""Where failed tasks are kept: what a store must do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from celery_resilience.failed.filters import Filter
from celery_resilience.failed.merge import Record
from celery_resilience.failed.record import FailedTask, Summary
from celery_resilience.message import OriginalMessage


@dataclass(frozen=True, slots=True)
class Claim:
    """
    One record that is taken for a replay, by nobody else.

    Attributes:
        token: Names this replay; the worker runs a message only with the
            record's current one.
        number: How often the record was claimed, this time included.
        reason: Why the task failed last.
        to_queue: Another queue than the original one.
        wants_new_id: Its message gets another task id.
        is_forced: It runs again, whatever its idempotency key came to.
        in_chord: A chord waits for the task's result.
        key: The name of its idempotency key, also where the worker made it and the
            message carries none; None where it has none, or nobody has said it.
    """

    id: str
    token: str
    number: int
    task: str
    task_id: str
    reason: str
    original: OriginalMessage
    to_queue: str | None = None
    wants_new_id: bool = False
    is_forced: bool = False
    in_chord: bool = False
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """
    All that a store holds of one failed task, so that another one may hold the same.

    Attributes:
        copy: Of the replay under way, the message that is running.
        claimed_at: Wall time in seconds, by the store's clock.
        size: Bytes that it takes in the store.
    """

    record: Record
    replays: int = 0
    replayed_as: str | None = None
    copy: str | None = None
    claimed_at: float | None = None
    to_queue: str | None = None
    wants_new_id: bool = False
    is_forced: bool = False
    size: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What the failed tasks of one failed queue take in the store."""

    count: int = 0
    size: int = 0


class FailedTaskStore(Protocol):
    """
    Failed tasks, safe to use from several processes at once.

    Every method raises StoreUnavailable when the store does not answer, and
    then nothing is known about what it did.
    """

    def keep(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take documents from failed queues in; the same one again changes nothing."""
        ...

    def check(self) -> None:
        """Raise what `keep` would, if it is known now that it would."""
        ...

    def list(
        self, wanted: Filter, *, limit: int | None = None, oldest_first: bool = False
    ) -> Iterator[Summary]:
        """The failed tasks that match, last failed first, in flat memory."""
        ...

    def count(self, wanted: Filter) -> int:
        """How many match."""
        ...

    def get(self, id: str) -> FailedTask | None:
        """One failed task with its message."""
        ...

    def get_many(self, ids: Iterable[str]) -> Iterator[FailedTask]:
        """Those of *ids* that there are, in their order, with their messages."""
        ...

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of *ids*, whole ones, that there are."""
        ...

    def resolve(self, start: str, *, limit: int = 2) -> Sequence[str]:
        """The ids that begin with *start*, or else those whose task id does."""
        ...

    def claim(
        self,
        ids: Sequence[str],
        *,
        to_queue: str | None = None,
        wants_new_id: bool = False,
        is_forced: bool = False,
    ) -> Sequence[Claim]:
        """
        Take those of *ids* that are unresolved for a replay.

        Args:
            to_queue, wants_new_id, is_forced: Remembered, so that whoever sends a
                stale claim sends it as it was meant.
        """
        ...

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        """
        The broker has the messages of these claims.

        Args:
            claims: Each with the task id it was sent with, where that is new.
        """
        ...

    def release(self, claim: Claim, note: str) -> None:
        """Nothing was sent for *claim*: its record is unresolved again."""
        ...

    def finish(self, ids: Sequence[str], note: str) -> None:
        """Resolve replays that no worker will report."""
        ...

    def take_stale_claims(self, *, older_than_s: float, limit: int) -> Sequence[Claim]:
        """Claims whose owner died before it sent them, with their old token."""
        ...

    def start(self, id: str, *, token: str, copy: str) -> bool:
        """
        Ask for leave to run a replayed message.

        Args:
            id: The record.
            token: Of the replay that the message belongs to.
            copy: Names the message; a replay may have two after a crash.

        Returns:
            True for the first copy of the current replay, each time that it is
            delivered, and where the record is gone. False for any other.
        """
        ...

    def discard(self, ids: Sequence[str]) -> int:
        """Mark unresolved ones as never to be replayed; returns how many were."""
        ...

    def reopen(self, ids: Sequence[str]) -> int:
        """
        Make discarded ones unresolved again; returns how many were.

        A replay that never came back is reopened too: its message, should it
        still come, is not run.
        """
        ...

    def stats(self) -> Mapping[str, Any]:
        """Counts by state, and of the unresolved by reason, task and age."""
        ...

    def usage(self) -> Mapping[str, Usage]:
        """What the failed tasks of each failed queue take."""
        ...

    def kept(self, ids: Iterable[str]) -> Iterator[Kept]:
        """All that is held of those of *ids* that there are, in their order."""
        ...

    def insert(self, tasks: Sequence[Kept]) -> set[str]:
        """Take in those of *tasks* that are not there; returns their ids."""
        ...

    def remove(self, tasks: Sequence[Kept]) -> set[str]:
        """Forget those of *tasks* that are still as they were read; returns their ids."""
        ...
