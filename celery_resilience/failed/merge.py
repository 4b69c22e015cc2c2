"""What a document from a failed queue changes in its record.

Documents may come twice, late and out of order: two captures of one attempt, a
success before the failure that it makes void, a failure of an older replay.
Policy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from celery_resilience.delivery.outcome import Outcome
from celery_resilience.failed.envelope import FAILED
from celery_resilience.failed.record import Phase, State

#: Attempts that a record keeps: the first ones, and the last ones.
FIRST_ATTEMPTS = 5
LAST_ATTEMPTS = 45


@dataclass(frozen=True, slots=True)
class Record:
    """
    A record, as far as documents change it.

    Attributes:
        document: The envelope of its last failure; None for a success that came
            before its failure.
        attempts: Failures, oldest first; keys with a "_" are ours.
        number: How often it was claimed for a replay.
        token: Of the replay under way.
        settled_at: Wall time of the success, by the worker's clock.
    """

    id: str
    state: State = State.UNRESOLVED
    document: Mapping[str, Any] | None = None
    attempts: tuple[Mapping[str, Any], ...] = field(default=())
    number: int = 0
    token: str | None = None
    phase: Phase | None = None
    settled_at: float | None = None
    note: str | None = None


def merged(record: Record | None, document: Mapping[str, Any]) -> Record | None:
    """
    The record after *document*; None when there is still none.

    Args:
        record: The record as it is.
        document: An envelope or a report.
    """
    if document["kind"] == FAILED:
        return _after_failure(record, document)
    if document["outcome"] == Outcome.REVOKED:
        return _after_revoke(record, document)
    return _after_success(record, document)


def _after_failure(record: Record | None, document: Mapping[str, Any]) -> Record:
    number = document["replay_number"]
    attempt = {
        **document["attempt"],
        "_failed_at": document["failed_at"],
        "_capture": document["capture"],
        "_replay": number,
        "_attempt": document["attempt_number"],
    }
    if record is None:
        return Record(
            id=document["id"], document=document, attempts=(attempt,), number=number
        )
    if _is_known(record, document):
        return record
    attempts = _limited((*record.attempts, attempt))
    if record.document is None and document["failed_at"] <= (record.settled_at or 0.0):
        # Its redelivery has succeeded, and was collected first.
        return replace(record, document=document, attempts=attempts)
    is_late = document["redelivered"] and (
        number < record.number or record.state is State.RESOLVED
    )
    is_outdated = number > 0 and (
        number != record.number or document["token"] != record.token
    )
    if is_late or is_outdated:
        return replace(record, attempts=attempts)
    return replace(
        record,
        state=State.UNRESOLVED,
        document=document,
        attempts=attempts,
        token=None,
        phase=None,
        note=None,
    )


def _after_success(record: Record | None, document: Mapping[str, Any]) -> Record | None:
    if document["replay_number"] > 0:
        if record is not None and _is_current(record, document):
            return replace(
                record,
                state=State.RESOLVED,
                phase=None,
                note=None,
                settled_at=document["settled_at"],
            )
        return record
    if record is None:
        return Record(
            id=document["id"],
            state=State.RESOLVED,
            settled_at=document["settled_at"],
        )
    if record.state is State.UNRESOLVED and record.number == 0:
        return replace(
            record,
            state=State.RESOLVED,
            settled_at=document["settled_at"],
            note="succeeded when it was delivered again",
        )
    return record


def _after_revoke(record: Record | None, document: Mapping[str, Any]) -> Record | None:
    if record is not None and _is_current(record, document):
        return replace(
            record,
            state=State.UNRESOLVED,
            token=None,
            phase=None,
            note=f"its replay was {document['reason'] or 'revoked'} before it ran",
        )
    return record


def _is_current(record: Record, document: Mapping[str, Any]) -> bool:
    return (
        record.state is State.REPLAYING
        and record.token is not None
        and record.token == document["token"]
    )


def _is_known(record: Record, document: Mapping[str, Any]) -> bool:
    """The same capture again, or another capture of the same attempt."""
    return any(
        known["_capture"] == document["capture"]
        or (
            document["redelivered"]
            and known["_replay"] == document["replay_number"]
            and known["_attempt"] == document["attempt_number"]
        )
        for known in record.attempts
    )


def _limited(attempts: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    if len(attempts) <= FIRST_ATTEMPTS + LAST_ATTEMPTS:
        return attempts
    return (*attempts[:FIRST_ATTEMPTS], *attempts[-LAST_ATTEMPTS:])
