"""What a document from a failed queue changes in its record.

Documents may come twice, late and out of order: two captures of one attempt, a
success before the failure that it makes void, a failure of an older replay.
Policy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from celery_resilience.failed.envelope import FAILED, message_name
from celery_resilience.failed.record import Phase, State
from celery_resilience.outcome import Outcome

#: Attempts that a record keeps: the first ones, and the last ones.
FIRST_ATTEMPTS = 5
LAST_ATTEMPTS = 45

#: Seconds by which the clocks of two workers may differ: a success within them is
#: taken to be later than the failure before it.
CLOCK_SKEW_S = 5.0

#: The same between a worker and a broker, which tells whole seconds.
DEATH_SKEW_S = CLOCK_SKEW_S + 1.0


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
    attempt = {
        **document["attempt"],
        "_failed_at": document["failed_at"],
        "_capture": document["capture"],
        "_replay": document["replay_number"],
        "_attempt": document["attempt_number"],
        "_redelivered": document["redelivered"],
        "_dead_letter": "dead_letter" in document,
        "_message": message_name(document["original"]),
    }
    if record is None:
        return Record(
            id=document["id"],
            document=document,
            attempts=(attempt,),
            number=document["replay_number"],
        )
    if _is_known(record, document):
        return record
    poorer = _found_dead(record, document)
    if poorer is not None:
        others = [known for known in record.attempts if known is not poorer]
        shown = record.document
        if shown is not None and shown["capture"] == poorer["_capture"]:
            shown = document
        return replace(record, document=shown, attempts=_limited((*others, attempt)))
    attempts = _limited((*record.attempts, attempt))
    if not _is_news(record, document):
        # A success that was collected first has no document yet.
        shown = record.document or document
        return replace(record, document=shown, attempts=attempts)
    return replace(
        record,
        state=State.UNRESOLVED,
        document=document,
        attempts=attempts,
        token=None,
        phase=None,
        note=None,
    )


def _is_news(record: Record, document: Mapping[str, Any]) -> bool:
    """Whether a failure is later than what the record says already."""
    number, failed_at = document["replay_number"], document["failed_at"]
    if record.state is State.REPLAYING:
        return bool(number == record.number and document["token"] == record.token)
    # A redelivery is of a run that has its answer, or of a task id that is used again.
    is_again = document["redelivered"] and not _is_another(record, document)
    if number < record.number and (number or is_again):
        return False
    if number and record.state is State.DISCARDED:
        return False
    if record.state is State.RESOLVED:
        if is_again:
            return False
        if record.settled_at is not None:
            return bool(failed_at > record.settled_at)
    shown = record.document
    if shown is None:
        return True
    return bool((number, failed_at) >= (shown["replay_number"], shown["failed_at"]))


def _after_success(record: Record | None, document: Mapping[str, Any]) -> Record | None:
    number, settled_at = document["replay_number"], document["settled_at"]
    if record is None:
        if number:
            return None
        return Record(id=document["id"], state=State.RESOLVED, settled_at=settled_at)
    if number != record.number:
        return record
    resolved = replace(
        record,
        state=State.RESOLVED,
        token=None if number == 0 else record.token,
        phase=None,
        note=None if number else "succeeded when it was delivered again",
        settled_at=settled_at,
    )
    if _is_current(record, document):
        return resolved
    # A run that had failed was captured, and delivered again before its ack.
    is_later = (
        record.state is State.UNRESOLVED
        and record.document is not None
        and settled_at >= record.document["failed_at"] - CLOCK_SKEW_S
    )
    return resolved if is_later else record


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
    """The same capture again, another one of the same attempt, or a forgotten one."""
    attempts, failed_at = record.attempts, document["failed_at"]
    name = message_name(document["original"])
    if len(attempts) == FIRST_ATTEMPTS + LAST_ATTEMPTS and (
        attempts[FIRST_ATTEMPTS - 1]["_failed_at"]
        < failed_at
        < attempts[FIRST_ATTEMPTS]["_failed_at"]
    ):
        return True
    return any(
        known["_capture"] == document["capture"]
        or (
            (known["_redelivered"] or document["redelivered"])
            and _is_same_message(known, document)
            and known.get("_message", name) == name
        )
        or (
            "dead_letter" in document
            and not known.get("_dead_letter")
            and _is_same_message(known, document)
            and known["_failed_at"] <= failed_at + DEATH_SKEW_S
        )
        for known in attempts
    )


def _is_another(record: Record, document: Mapping[str, Any]) -> bool:
    """
    Whether *document* is surely of another message than all that failed before.

    Not where the record is of a success: nobody remembers of which message.
    """
    name = message_name(document["original"])
    return bool(
        record.attempts
        and not document["replay_number"]
        and (record.number or record.settled_at is None)
        and all(known.get("_message", name) != name for known in record.attempts)
    )


def _found_dead(
    record: Record, document: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """
    The failure of *document* as the broker told of it, which knows less.

    A worker's capture comes before the death that it leads to, though it may be
    collected after it. A later capture is of another message with that id.
    """
    if "dead_letter" in document:
        return None
    return next(
        (
            known
            for known in record.attempts
            if known.get("_dead_letter")
            and _is_same_message(known, document)
            and document["failed_at"] <= known["_failed_at"] + DEATH_SKEW_S
        ),
        None,
    )


def _is_same_message(known: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    return bool(
        known["_replay"] == document["replay_number"]
        and known["_attempt"] == document["attempt_number"]
    )


def _limited(attempts: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    attempts = tuple(sorted(attempts, key=lambda attempt: attempt["_failed_at"]))
    if len(attempts) <= FIRST_ATTEMPTS + LAST_ATTEMPTS:
        return attempts
    return (*attempts[:FIRST_ATTEMPTS], *attempts[-LAST_ATTEMPTS:])
